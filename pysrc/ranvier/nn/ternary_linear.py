"""TernaryLinear: a linear layer whose weights are sums of 2-bit or ternary spikes, in place of ``torch.nn.Linear``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranvier.config import SpikeConfig
from ranvier.nn.spike_linear import SpikingLinear
from ranvier.ops._args import check_is_tensor, check_tensor
from ranvier.ops.spike_linear import PackedWeight
from ranvier.ops.ternary_linear import (
    TernaryFormat,
    dequantize_ternary,
    pack_ternary,
    ternary_format,
    ternary_linear_dynamic,
)
from ranvier.reference import ternary_linear as reference


class TernaryLinear(SpikingLinear):
    """y = x^ W^T + b with W^ of 2 bits, and of ``config.steps`` spikes on salient input channels: one packed product.

    x [..., K] float32, bfloat16 or float16; y [..., N] in x's dtype. Activations are encoded in one time step of
    ``config.act_bits``, one scale a token, or stay as they are (weight-only) where that is None. ``config.weight_grid``,
    ``span`` and ``grid`` say how weights are quantized: :mod:`ranvier.reference.ternary_linear`. State, gradients and shared
    encodings are those of :class:`SpikingLinear`. SpikeLLM, arXiv 2407.04752, section 3.4.
    """

    weight_bits = 2

    @staticmethod
    def default_config() -> SpikeConfig:
        """Ternary weights, two spikes of them on salient channels, 8-bit activations."""
        return SpikeConfig(weight_bits=2, act_bits=8, steps=2, salient=0.05, weight_grid="ternary")

    @classmethod
    def from_quantized(
        cls,
        linear: nn.Linear,
        config: SpikeConfig | None,
        salient_mask: Tensor | None,
        q: Tensor,
        scale: Tensor,
        zero: Tensor,
    ) -> TernaryLinear:
        """A layer in place of ``linear`` whose weight another pipeline has quantized to s (q - z).

        q: uint8 [N, K], channels in the layer's order, 0..3 on ordinary and 0..15 on salient ones. scale float and zero
        [N, 2]: of the ordinary and of the salient channels. Raises like :meth:`SpikingLinear.from_linear`, and TypeError or
        ValueError for tables of another shape or dtype, codes, zero points or scales out of range.
        """
        layer = cls._shell("from_quantized", linear, config, salient_mask)
        for name, value in (("q", q), ("scale", scale), ("zero", zero)):
            check_is_tensor("TernaryLinear.from_quantized", name, value)
        check_tensor("TernaryLinear.from_quantized", "q", q, torch.uint8, tuple(linear.weight.shape))
        if not bool(scale.isfinite().all()):
            raise ValueError("TernaryLinear.from_quantized: scale has NaN or Inf; repair the quantizer's output")
        return layer._take(pack_ternary(q, scale, zero, layer.salient_mask, layer.format))

    @property
    def format(self) -> TernaryFormat:
        """How this layer's tokens are encoded."""
        c = self.config
        # A float that a compiler reads costs it a second graph; most layers have none.
        return ternary_format(self.in_features, self.salient_count, c.act_bits or 8, c.act_clip if self._clips else 1.0)

    def _quantize(self, weight: Tensor) -> PackedWeight:
        c = self.config
        rule = {"steps": c.steps, "weight_grid": c.weight_grid, "span": c.span, "grid": c.grid}
        quantized = reference.quantize_weight(weight.detach().float(), self.salient_mask, **rule)
        return pack_ternary(*quantized, self.salient_mask, self.format)

    def _as_op(self, x: Tensor) -> Tensor:
        mask = self.salient_mask if self.salient_count else None
        given = (self.packed_weight, self.format, self.out_features, self.bias, mask)
        return ternary_linear_dynamic(x, *given, weight_only=self.config.act_bits is None)

    def dequantized_weight(self) -> Tensor:
        """W^ = s (q - z): float32 [N, K], channels in the order of x."""
        return dequantize_ternary(self.packed_weight, self.salient_mask, self.format, self.out_features)

    def extra_repr(self) -> str:
        """Sizes, bits, steps and grid."""
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" W{c.weight_bits}A{c.act_bits or 16}, weight_grid={c.weight_grid}, steps={c.steps}, salient={self.salient_count},"
            f" span={c.span}"
        )
