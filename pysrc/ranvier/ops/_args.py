"""What the ops' argument checks and native calls share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/core/numeric.h, DType
MAX_CHANNELS = 1_000_000  # 127 * 15 * K stays within int32


def plain(tensor: Tensor) -> Tensor:
    """The tensor as memory holds its values: contiguous, a negated view's sign carried out."""
    return tensor.resolve_neg().contiguous()


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension side by side in memory, signs carried out; other strides as they are."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """The address for the compiled module, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check_is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; pass a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {value.layout}; pass a dense tensor")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    check_is_tensor(op, name, tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; pass float32, bfloat16 or float16")


def check_tokens(op: str, x: Tensor) -> None:
    """Raises TypeError or ValueError unless x [..., K] holds floats."""
    check_float(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; its last one must hold the channels")


def check_result(op: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}; allowed are float32, bfloat16 and float16")


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must be {list(shape)}")


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and the input on {device}; move one of them")


def check_channels(op: str, x: Tensor, channels: int) -> None:
    check_is_tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; its last one must hold {channels} channels")
    if x.shape[-1] != channels:
        raise ValueError(f"{op}: x has {x.shape[-1]} channels in its last dimension; this layer takes {channels}")


def logit_scale(op: str, scale: float | None, channels: int) -> float:
    """The scale of an attention's logits, ``channels ** -0.5`` for None. Raises TypeError, ValueError for no finite one."""
    if scale is None:
        return float(max(channels, 1) ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: scale is {scale!r}; pass a number, or None for D ** -0.5")
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale!r}; pass a finite number, or None for D ** -0.5")
    return float(scale)
