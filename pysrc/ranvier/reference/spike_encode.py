"""spike_encode: a token as spike counts of Generalized Integrate-and-Fire neurons.

For one token x [K], L - 1 = 2^n - 1 the top level of a step and T the steps on salient channels S:

    consistent, shared    s_h = clamp((hi - lo) / (T (L - 1))), s_l = T s_h, z = round(-lo / s)
                          c = T (clip(round(x / s_l) + z_l, 0, L - 1) - z_l)          k not in S
                          c = clip(round(x / s_h) + z_h, 0, T (L - 1)) - z_h          k in S;     x^ = s_h c
    compat, shared        s_l = clamp((hi - lo) / (L - 1)), s_h = clamp((hi - lo) / (T L - 1))
                          c = clip(round(x / s) + z, 0, top), the raw code;                      x^ = s (c - z)
    separate              k not in S as above with T = 1 and their own lo, hi
                          c = clip(round(x / s), -127, 127), s = clamp(max_S |x| / 127)          k in S
    act_bits = 8          symmetric like the salient channels of `separate`, for every channel

Consistent ranges include zero: lo = min(0, min x), hi = max(0, max x), and their zero points are levels. Scales are
clamped to [1e-5, 1e4], the zero points of compat to [-1e4, 1e4]. With act_clip = c < 1 each range's ends (lo, hi, max |x|)
are multiplied by c before its scale is made, and values beyond them take the end's code. SpikeLLM, arXiv 2407.04752,
section 3; the released fake quantizer for `compat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_MIN, SCALE_MAX, ZERO_MAX, SYMMETRIC_MAX = 1e-5, 1e4, 1e4, 127


class SpikeCodes(NamedTuple):
    """codes int8 [..., K], scale [..., R], code_sum int32 [..., G], zero int32 [..., R].

    R is 1, or 2 when salient channels have a scale of their own: then codes hold the other channels first and the salient
    ones after them, both ascending. G counts the groups of code sums. zero is what `compat` codes still carry, else 0.
    """

    codes: Tensor
    scale: Tensor
    code_sum: Tensor
    zero: Tensor


class Quantizer(NamedTuple):
    """code = (clip(round(x / step) + zero, floor, ceiling) - centre) * gain, each [..., 1]."""

    step: Tensor
    zero: Tensor
    floor: float
    ceiling: float
    centred: bool
    gain: int

    def levels(self, x: Tensor) -> Tensor:
        """The unsigned code u (the signed one where the quantizer is symmetric)."""
        return (torch.round(x / self.step) + self.zero).clamp(self.floor, self.ceiling)

    def codes(self, x: Tensor) -> Tensor:
        u = self.levels(x)
        return (u - self.zero if self.centred else u) * self.gain

    def decode(self, codes: Tensor) -> Tensor:
        return (codes / self.gain - (0.0 if self.centred else self.zero)) * self.step


def _symmetric(magnitude: Tensor) -> Quantizer:
    step = (magnitude / SYMMETRIC_MAX).clamp(SCALE_MIN, SCALE_MAX)
    return Quantizer(step, torch.zeros_like(step), -SYMMETRIC_MAX, SYMMETRIC_MAX, True, 1)


def _asymmetric(low: Tensor, step: Tensor, top: int, centred: bool, gain: int = 1) -> Quantizer:
    zero = torch.round(-low / step).clamp(*((0, top) if centred else (-ZERO_MAX, ZERO_MAX)))
    return Quantizer(step, zero, 0, top, centred, gain)


def extremes(x: Tensor, chosen: Tensor, include_zero: bool) -> tuple[Tensor, Tensor]:
    """min and max over the chosen channels, each [..., 1]; of no channel at all (0, 0)."""
    inf = float("inf")
    low = torch.where(chosen, x, inf).amin(-1, keepdim=True)
    high = torch.where(chosen, x, -inf).amax(-1, keepdim=True)
    if include_zero or not bool(chosen.any()):
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    return low, high


def quantizers(
    x: Tensor, salient: Tensor, *, act_bits: int, steps: int, span: str, grid: str, act_clip: float = 1.0
) -> tuple[Quantizer, Quantizer]:
    """The quantizers of a token's ordinary and of its salient channels. x [..., K], salient bool [K]."""
    top, separate, compat = 2**act_bits - 1, span == "separate", grid == "compat"
    low, high = extremes(x, ~salient if separate else torch.ones_like(salient), include_zero=not compat)
    low, high = low * act_clip, high * act_clip
    own = _symmetric(torch.where(salient, x.abs(), 0.0).amax(-1, keepdim=True) * act_clip) if separate else None
    if act_bits == 8:
        ordinary = _symmetric(torch.maximum(high, -low))
        return ordinary, own or ordinary
    span_width = high - low
    if separate or compat:
        ordinary = _asymmetric(low, (span_width / top).clamp(SCALE_MIN, SCALE_MAX), top, not compat)
        if own is not None:
            return ordinary, own
        fine_top = (steps << act_bits) - 1
        return ordinary, _asymmetric(low, (span_width / fine_top).clamp(SCALE_MIN, SCALE_MAX), fine_top, False)
    fine = (span_width / (steps * top)).clamp(SCALE_MIN, SCALE_MAX)
    return _asymmetric(low, steps * fine, top, True, steps), _asymmetric(low, fine, steps * top, True)


def has_two_ranges(
    salient_count: int, channels: int, *, act_bits: int, steps: int, span: str, grid: str, act_clip: float = 1.0
) -> bool:
    """Whether salient channels need a scale of their own."""
    mixed = 0 < salient_count < channels
    return mixed and (span == "separate" or (grid == "compat" and steps > 1))


def channel_order(salient: Tensor) -> Tensor:
    """The stable order that two-range codes have: other channels first, salient ones after them."""
    return torch.argsort(salient.to(torch.uint8), stable=True)


def group_sums(codes: Tensor, lengths: Sequence[int], group_size: int | None) -> Tensor:
    """Sums of codes over the groups of each range: int32 [..., G]."""
    sums = []
    for part in codes.to(torch.int32).split(lengths, -1):
        size = group_size or max(part.shape[-1], 1)
        sums += [piece.sum(-1, dtype=torch.int32) for piece in part.split(size, -1)]
    return torch.stack(sums, -1)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def spike_encode(
    x: Tensor,
    salient: Tensor,
    *,
    act_bits: int,
    steps: int,
    span: str,
    grid: str,
    group_size: int | None,
    act_clip: float = 1.0,
) -> SpikeCodes:
    """x [..., K] float, salient bool [K] -> :class:`SpikeCodes`. A token with NaN or Inf gets scale NaN and codes 0."""
    x = _working(x)
    count = int(salient.sum())
    finite = x.isfinite().all(-1, keepdim=True)
    rule = {"act_bits": act_bits, "steps": steps, "span": span, "grid": grid}
    ordinary, fine = quantizers(torch.where(finite, x, 0.0), salient, **rule, act_clip=act_clip)
    codes = torch.where(salient, fine.codes(x), ordinary.codes(x))
    codes = torch.where(finite, codes, 0.0).to(torch.int8)
    two = has_two_ranges(count, x.shape[-1], **rule)
    shared_scale = grid == "consistent" and span == "shared"
    used = [ordinary, fine] if two else [fine if count == x.shape[-1] or shared_scale else ordinary]
    scale = torch.where(finite, torch.cat([q.step for q in used], -1), float("nan"))
    zeros = [torch.zeros_like(q.zero) if q.centred else q.zero for q in used]
    zero = torch.where(finite, torch.cat(zeros, -1), 0.0).to(torch.int32)
    lengths = [x.shape[-1] - count, count] if two else [x.shape[-1]]
    if two:
        codes = codes[..., channel_order(salient)]
    return SpikeCodes(codes.contiguous(), scale.contiguous(), group_sums(codes, lengths, group_size), zero.contiguous())


def spike_levels(
    x: Tensor, salient: Tensor, *, act_bits: int, steps: int, span: str, grid: str, act_clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The unsigned code u and the centred code c of every channel, int32 [..., K] each, in the order of x.

    u counts the spikes of the paper; c = gain (u - z) is what the merged product multiplies.
    """
    x = _working(x)
    ordinary, fine = quantizers(x, salient, act_bits=act_bits, steps=steps, span=span, grid=grid, act_clip=act_clip)
    u = torch.where(salient, fine.levels(x), ordinary.levels(x))
    c = torch.where(salient, (fine.levels(x) - fine.zero) * fine.gain, (ordinary.levels(x) - ordinary.zero) * ordinary.gain)
    return u.to(torch.int32), c.to(torch.int32)


def spike_decode(
    x: Tensor, salient: Tensor, *, act_bits: int, steps: int, span: str, grid: str, act_clip: float = 1.0
) -> Tensor:
    """What the codes of x stand for, [..., K], with a straight-through gradient: d x^ / d x = 1."""
    value = _working(x)
    finite = value.isfinite().all(-1, keepdim=True)
    with torch.no_grad():
        rule = {"act_bits": act_bits, "steps": steps, "span": span, "grid": grid, "act_clip": act_clip}
        ordinary, fine = quantizers(torch.where(finite, value, 0.0), salient, **rule)
        decoded = torch.where(salient, fine.decode(fine.codes(value)), ordinary.decode(ordinary.codes(value)))
        decoded = torch.where(finite, decoded, float("nan"))
    return value + (decoded - value).detach() if value.requires_grad else decoded
