"""TernaryLinear: a linear layer whose weights are sums of 2-bit or ternary spikes, in place of ``torch.nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ranvier.config import SpikeConfig
from ranvier.nn.spike_linear import SpikingLinear
from ranvier.ops.spike_linear import PackedWeight
from ranvier.ops.ternary_linear import (
    TernaryFormat,
    dequantize_ternary,
    pack_ternary,
    ternary_format,
    ternary_linear_dynamic,
)
from ranvier.reference import ternary_linear as reference
from ranvier.reference.spike_linear import Quantized


class TernaryLinear(SpikingLinear):
    """y = x^ W^T + b with W^ of 2 bits, and of ``config.steps`` spikes on salient input channels: one packed product.

    x [..., K] float32, bfloat16 or float16; y [..., N] in x's dtype. Activations are encoded in one time step of
    ``config.act_bits``, one scale a token. ``config.weight_grid``, ``span`` and ``grid`` say how weights are quantized:
    :mod:`ranvier.reference.ternary_linear`. State, gradients and shared encodings are those of :class:`SpikingLinear`.
    SpikeLLM, arXiv 2407.04752, section 3.4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: SpikeConfig | None = None,
        salient_count: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer of this shape, to load a state into. Raises ValueError for a config of other weights."""
        config = config or self.default_config()
        if config.weight_bits != 2:
            raise ValueError(f"TernaryLinear: config.weight_bits is {config.weight_bits}; pass one with weight_bits=2")
        if config.act_bits is None:
            raise ValueError("TernaryLinear: config.act_bits is None, but its products take encoded activations; pass 1 to 8")
        super().__init__(in_features, out_features, bias, config, salient_count, device, dtype)

    @staticmethod
    def default_config() -> SpikeConfig:
        """Ternary weights, two spikes of them on salient channels, 8-bit activations."""
        return SpikeConfig(weight_bits=2, act_bits=8, steps=2, salient=0.05, weight_grid="ternary")

    @property
    def format(self) -> TernaryFormat:
        """How this layer's tokens are encoded."""
        return ternary_format(self.in_features, self.salient_count, self.config.act_bits)

    def _quantize(self, weight: Tensor) -> PackedWeight:
        c = self.config
        rule = {"steps": c.steps, "weight_grid": c.weight_grid, "span": c.span, "grid": c.grid}
        quantized = reference.quantize_weight(weight.detach().float(), self.salient_mask, **rule)
        return pack_ternary(*quantized, self.salient_mask, self.format)

    def _pack(self, codes: Quantized) -> PackedWeight:
        return pack_ternary(*codes, self.salient_mask, self.format)

    def _as_op(self, x: Tensor) -> Tensor:
        mask = self.salient_mask if self.salient_count else None
        return ternary_linear_dynamic(x, self.packed_weight, self.format, self.out_features, self.bias, mask)

    def dequantized_weight(self) -> Tensor:
        """W^ = s (q - z): float32 [N, K], channels in the order of x."""
        return dequantize_ternary(self.packed_weight, self.salient_mask, self.format, self.out_features)

    def extra_repr(self) -> str:
        """Sizes, bits, steps and grid."""
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" W{c.weight_bits}A{c.act_bits}, weight_grid={c.weight_grid}, steps={c.steps}, salient={self.salient_count},"
            f" span={c.span}"
        )
