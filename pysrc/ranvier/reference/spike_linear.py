"""spike_linear: the product of spike codes and 4-bit weights.

    y[m, n] = b[n] + sum_r s_x[m, r] sum_{g in r} s_w[n, g] ( sum_{k in g} c[m, k] (q[n, k] - z_w[n, g]) - z_x[m, r] S[n, g] )
    S[n, g] = sum_{k in g} (q[n, k] - z_w[n, g])

c are the codes of :mod:`ranvier.reference.spike_encode`, in their order, q the weights' codes 0..15 in the same order, g
the groups of channels and r the ranges they lie in. Summing the spikes of every time step first gives the same
integers: sum_t (s_t W^T) = (sum_t s_t) W^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ranvier.reference.spike_encode import SpikeCodes

WEIGHT_TOP = 15
BYTE_TOP = 255


class Quantized(NamedTuple):
    """A weight on a grid: s_w (q - z_w). q uint8 [N, K], scale float [N, G] and zero uint8 [N, G] of its G groups."""

    q: Tensor
    scale: Tensor
    zero: Tensor


def quantize_weight(weight: Tensor, lengths: Sequence[int], group_size: int | None, top: int = WEIGHT_TOP) -> Quantized:
    """Round to nearest on an asymmetric grid that includes zero: q uint8 [N, K], scale [N, G], zero uint8 [N, G].

    s = (max(0, max w) - min(0, min w)) / top, z = round(-min / s), q = clip(round(w / s) + z, 0, top), over groups of
    group_size channels of each range, or over the whole row. weight [N, K] float, its channels in the codes' order. top: 15
    for 4 bits, 255 for 8.
    """
    whole = [weight] * len(lengths)
    pieces = [part for piece in weight.split(lengths, -1) for part in piece.split(group_size or max(piece.shape[-1], 1), -1)]
    ranged = pieces if group_size else whole
    scales, zeros, codes = [], [], []
    for piece, source in zip(pieces, ranged, strict=True):
        low = source.amin(-1, keepdim=True).clamp(max=0.0)
        high = source.amax(-1, keepdim=True).clamp(min=0.0)
        scale = (high - low) / top
        scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
        zero = torch.round(-low / scale).clamp(0, top)
        codes.append((torch.round(piece / scale) + zero).clamp(0, top))
        scales.append(scale)
        zeros.append(zero)
    return Quantized(torch.cat(codes, -1).to(torch.uint8), torch.cat(scales, -1), torch.cat(zeros, -1).to(torch.uint8))


def nibble_planes(weight: Quantized) -> Quantized:
    """8-bit codes [N, K] of one group as 4-bit ones [N, 2 K] of two: the high nibbles, whose scale is 16 s, then the low.

    s (q - z) = 16 s (q // 16 - z // 16) + s (q % 16 - z % 16).
    """
    q, scale, zero = weight
    return Quantized(*(torch.cat(pair, -1) for pair in ((q >> 4, q & 15), (16 * scale, scale), (zero >> 4, zero & 15))))


def group_index(lengths: Sequence[int], group_size: int | None, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """For every channel its group [K], and for every group its range [G]."""
    groups, ranges = [], []
    for r, length in enumerate(lengths):
        size = group_size or max(length, 1)
        count = -(-length // size)
        groups.append(torch.arange(length, device=device) // size + len(ranges))
        ranges += [r] * count
    return torch.cat(groups), torch.tensor(ranges, device=device)


def dequantize_weight(q: Tensor, scale: Tensor, zero: Tensor, groups: Tensor) -> Tensor:
    """s_w (q - z_w), [N, K], in the dtype of scale."""
    return scale[:, groups] * (q.to(scale.dtype) - zero[:, groups].to(scale.dtype))


def integer_products(codes: Tensor, q: Tensor, zero: Tensor, groups: Tensor, count: int) -> Tensor:
    """sum_{k in g} c[m, k] (q[n, k] - z_w[n, g]): int64 [..., N, G], by float64 products, exact below 2^53."""
    signed = q.to(torch.float64) - zero[:, groups].to(torch.float64)
    parts = [codes[..., groups == g].to(torch.float64) @ signed[:, groups == g].T for g in range(count)]
    return torch.stack(parts, -1).to(torch.int64)


def spike_linear(
    encoded: SpikeCodes,
    q: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    lengths: Sequence[int],
    group_size: int | None,
) -> Tensor:
    """The formula above in float64: codes [..., K], q [N, K], weight_scale and weight_zero [N, G] -> [..., N]."""
    groups, ranges = group_index(lengths, group_size, q.device)
    products = integer_products(encoded.codes, q, weight_zero, groups, len(ranges)).to(torch.float64)
    signed = q.to(torch.float64) - weight_zero[:, groups].to(torch.float64)
    weight_sum = torch.stack([signed[:, groups == g].sum(-1) for g in range(len(ranges))], -1)
    products = products - encoded.zero[..., ranges].unsqueeze(-2).to(torch.float64) * weight_sum
    terms = encoded.scale[..., ranges].unsqueeze(-2).to(torch.float64) * weight_scale.to(torch.float64) * products
    y = terms.sum(-1)
    return y if bias is None else y + bias.to(torch.float64)
