"""SpikingRMSNorm: RMSNorm that leaves the spike codes of its output to the layers that read it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ranvier import _C
from ranvier.nn.spike_linear import SpikingLinear, when_read
from ranvier.ops._args import DTYPES, plain
from ranvier.ops._declare import needs_dispatcher
from ranvier.reference.spike_rms_norm import WEIGHTINGS, rms_norm

LOOKS = 8  # outputs watched for a spiking reader before the norm counts as one that has none


class SpikingRMSNorm(nn.Module):
    """y = w T(x / sqrt(mean x^2 + eps)): an RMSNorm whose eager call on the CPU is one pass, encoding included.

    x [..., K] float32, bfloat16 or float16. weighting: "after_cast", "before_cast" or "one_plus", see
    :mod:`ranvier.reference.spike_rms_norm`. The layers that read it are found as they run: the first
    :class:`~ranvier.nn.SpikingLinear` of a group that encodes one of its outputs. From then on the norm encodes too, and the
    group finds the codes under that very tensor; whoever else reads the tensor sees plain numbers. With gradients, under a
    compiler, on other devices, or with a weight of another type than x it is the plain formula.
    """

    def __init__(self, weight: nn.Parameter, eps: float, weighting: str = "after_cast") -> None:
        """Takes over the parameter. Raises TypeError for another kind of weight, ValueError for an unknown weighting."""
        super().__init__()
        if not isinstance(weight, nn.Parameter):
            raise TypeError(f"SpikingRMSNorm: weight is a {type(weight).__name__}; pass a torch.nn.Parameter")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"SpikingRMSNorm: weighting is {weighting!r}; allowed are {', '.join(map(repr, WEIGHTINGS))}")
        self.weight, self.eps, self.weighting = weight, eps, weighting
        self._code = WEIGHTINGS.index(weighting)
        self._reader: weakref.ref[SpikingLinear] | None = None
        self._looks = LOOKS

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., K], what torch's own operations give within the rounding of one sum."""
        weight = self._parameters["weight"]
        dtype, shape = input.dtype, input.shape
        if (
            needs_dispatcher(input, weight)
            or not input.is_cpu
            or dtype is not weight.dtype
            or dtype not in DTYPES
            or not shape
            or shape[-1] != weight.shape[0]
        ):
            return rms_norm(input, weight, self.eps, self.weighting)
        x = input if input.is_contiguous() and not input.is_neg() else plain(input)
        return self._eager(x, weight if weight.is_contiguous() else weight.contiguous())

    def _eager(self, x: Tensor, weight: Tensor) -> Tensor:
        y, channels = torch.empty_like(x), weight.shape[0]
        tokens = x.numel() // channels
        norm = (x.data_ptr(), channels, DTYPES[x.dtype], weight.data_ptr(), channels, self.eps, self._code, y.data_ptr())
        reader = None if self._reader is None or y.is_inference() else self._reader()
        group = None if reader is None else reader.group
        if group is None or reader.in_features != channels or not reader._buffers["weight_packed"].is_cpu:
            _C.rms_norm(*norm, tokens)
            if self._looks and not y.is_inference():
                self._looks -= 1
                when_read(y, self._read_by)
            return y
        description = reader._description()
        encoded = torch.empty(_C.spike_encoding_bytes(description, tokens), dtype=torch.uint8)
        _C.spike_rms_norm_panels(*norm, description, tokens, encoded.data_ptr())
        group.keep(description, reader._buffers["salient_mask"], y, encoded)
        return y

    def _read_by(self, layer: SpikingLinear) -> None:
        self._reader, self._looks = weakref.ref(layer), LOOKS

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, weighting={self.weighting!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_looks": LOOKS}
