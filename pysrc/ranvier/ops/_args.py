"""What the ops' argument checks and native calls share."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/core/numeric.h, DType
MAX_CHANNELS = 1_000_000  # 127 * 15 * K stays within int32


def pointer(tensor: Tensor | None) -> int:
    """The address for the compiled module, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; pass float32, bfloat16 or float16")


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must be {list(shape)}")


def check_channels(op: str, x: Tensor, channels: int) -> None:
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; its last one must hold {channels} channels")
    if x.shape[-1] != channels:
        raise ValueError(f"{op}: x has {x.shape[-1]} channels in its last dimension; this layer takes {channels}")
