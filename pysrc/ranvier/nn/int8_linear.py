"""Int8Linear: 8-bit weights under 8-bit activations, executed by the 4-bit kernels as two planes; for output layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranvier import _C
from ranvier.config import SpikeConfig
from ranvier.nn.spike_linear import SpikingLinear
from ranvier.ops._args import DTYPES
from ranvier.ops.spike_encode import SpikeFormat
from ranvier.ops.spike_linear import PackedWeight, pack_quantized, spike_linear_dynamic, unpack_weight
from ranvier.reference.spike_encode import spike_decode
from ranvier.reference.spike_linear import BYTE_TOP, Quantized, nibble_planes, quantize_weight

PLANE_RULE = (8, 1, "separate", "consistent", 0)  # one scale for each plane's copy of x, and the two are equal


class Int8Linear(SpikingLinear):
    """y = x^ W^T + b with W^ = s (q - z), q of 8 bits, and x^ a token's symmetric 8-bit codes, ``max|x| / 127``.

    A code is 16 high + low, and so is its zero point: W^ = 16 s (high - z_high) + s (low - z_low). The product is that of
    one 4-bit layer whose input is x twice, with a weight scale for each half, exact in integers. It reads 8 bits a weight
    and multiplies twice as often as a 4-bit layer. Nothing spikes, and no channel is salient.

    x [..., K] float32, bfloat16 or float16; y [..., N] in x's dtype. State and gradients are those of
    :class:`SpikingLinear`. :func:`ranvier.spike_` puts it in place of a model's output layer where
    ``SpikeConfig.head_bits`` is 8.
    """

    weight_bits = 8

    @staticmethod
    def default_config() -> SpikeConfig:
        """8-bit weights and activations."""
        return SpikeConfig(weight_bits=8, act_bits=8, steps=1, salient=0.0)

    @classmethod
    def _shell(cls, way: str, linear: nn.Linear, config: SpikeConfig | None, salient_mask: Tensor | None) -> Int8Linear:
        if salient_mask is not None and bool(torch.as_tensor(salient_mask).any()):
            raise ValueError(f"Int8Linear.{way}: salient_mask marks channels; with 8-bit weights no channel is salient")
        return super()._shell(way, linear, config, salient_mask)

    @property
    def format(self) -> SpikeFormat:
        """How x, put down twice, is encoded: the two halves are two ranges."""
        return SpikeFormat(2 * self.in_features, self.in_features, *PLANE_RULE)

    def _planes(self) -> Tensor:
        """Which channels of x, put down twice, are the second copy's: bool [2 K]."""
        return torch.arange(2 * self.in_features, device=self.weight_packed.device) >= self.in_features

    def _pack(self, weight: Quantized) -> PackedWeight:
        return pack_quantized(nibble_planes(weight), self._planes(), self.format)

    def _quantize(self, weight: Tensor) -> PackedWeight:
        return self._pack(quantize_weight(weight.detach().float(), (self.in_features,), None, BYTE_TOP))

    def _kernel_mask(self) -> Tensor:
        return self._planes()

    def _as_op(self, x: Tensor) -> Tensor:
        self._check(x)
        given = (self.packed_weight, self.format, self.out_features, self.bias, self._planes())
        return spike_linear_dynamic(torch.cat((x, x), -1), *given)

    def _eager(self, x: Tensor) -> Tensor:
        self._check(x)
        twice, description, dtype = torch.cat((x, x), -1), self._description(), DTYPES[x.dtype]
        y = x.new_empty(*x.shape[:-1], self.out_features)
        channels = 2 * self.in_features
        _C.spike_linear_dynamic(description, twice.data_ptr(), channels, dtype, twice.numel() // channels, y.data_ptr(), dtype)
        return y

    def _check(self, x: Tensor) -> None:
        if x.dtype not in DTYPES or not x.ndim or x.shape[-1] != self.in_features:
            self._refuse(x)

    def dequantized_weight(self) -> Tensor:
        """W^ = s (q - z): float32 [N, K]."""
        high, low = unpack_weight(self.packed_weight, self._planes(), self.format, self.out_features).chunk(2, -1)
        return high + low

    def dequantized_input(self, x: Tensor) -> Tensor:
        """x^, what the codes of x stand for: [..., K], float32 (float64 for float64)."""
        rule = {"act_bits": 8, "steps": 1, "span": "shared", "grid": "consistent"}
        return spike_decode(x, torch.zeros_like(self.salient_mask), **rule)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, W8A8"
