"""What SpikingLinear computes, as differentiable functions: 4-bit weights with clipped ranges, spike-coded inputs.

Every value is (clip(round(x / s) + z, floor, ceiling) - z) s, with the very operations of :mod:`ranvier.reference` and
hence its codes. The derivative is the straight-through one: the rounding error e = round(x / s) - x / s and the zero point
z count as constants, so with r = x / s + e and c the value over s

    d value / d x = 1 where r + z is inside [floor, ceiling], else 0
    d value / d s = c - x / s where inside (that is e), else c

and s depends on x, on the clipping and on the transform as it is computed, through the ends of its range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranvier.ops.spike_encode import SpikeFormat
from ranvier.reference.spike_encode import channel_order, quantizers
from ranvier.reference.spike_linear import WEIGHT_TOP, group_index

CLIP_SHARES = (0.9995, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of the range; 1 has no logit


class Quantized(NamedTuple):
    """A weight's codes: q uint8 [N, K] in the layer's own channel order, scale float32 [N, G], zero uint8 [N, G].

    G counts the groups of all ranges, as :func:`ranvier.reference.spike_linear.quantize_weight` orders them.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor


class Rounded(torch.autograd.Function):
    """(clip(round(x / step) + zero, floor, ceiling) - zero) step, with the derivatives of this module's heading.

    step and zero broadcast to x; floor and ceiling are numbers or broadcast, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, floor: Any, ceiling: Any) -> Tensor:
        ratio = x / step
        level = torch.round(ratio).add_(zero)
        kept = level.clamp(floor, ceiling)
        inside = kept == level
        code = kept.sub_(zero)
        ctx.shapes = step.shape
        ctx.save_for_backward(inside, torch.where(inside, code - ratio, code))
        return code * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        inside, slope = ctx.saved_tensors
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_step = (grad * slope).sum_to_size(ctx.shapes) if ctx.needs_input_grad[1] else None
        return grad_x, grad_step, None, None, None


rounded = Rounded.apply


class WeightLayout(NamedTuple):
    """Which channels of a weight [N, K] share a scale.

    groups int64 [K] names every channel's group of ``count``. members int64 [count, size] lists the channels of each, K
    standing for a missing one; None where all groups have the whole row's scale.
    """

    groups: Tensor
    count: int
    members: Tensor | None


def weight_layout(form: SpikeFormat, mask: Tensor) -> WeightLayout:
    """The layout that a layer of this format and salient mask bool [K] has."""
    size, channels = form.group_size or None, form.channels
    by_code, ranges = group_index(form.lengths, size, mask.device)
    order = channel_order(mask) if len(form.lengths) == 2 else torch.arange(channels, device=mask.device)
    groups = torch.empty_like(by_code)
    groups[order] = by_code
    if size is None:
        return WeightLayout(groups, len(ranges), None)
    members = torch.full((len(ranges), size), channels, dtype=torch.int64, device=mask.device)
    first = torch.searchsorted(by_code, torch.arange(len(ranges), device=mask.device))
    members[by_code, torch.arange(channels, device=mask.device) - first[by_code]] = order
    return WeightLayout(groups, len(ranges), members)


def _weight_grid(weight: Tensor, layout: WeightLayout, clip: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, G], or [N, 1] for the whole row."""
    ranged = weight
    if layout.members is not None:
        # A missing channel counts as zero, which every range includes.
        ranged = torch.cat([weight, weight.new_zeros(weight.shape[0], 1)], 1)[:, layout.members]
    high, low = ranged.amax(-1).clamp(min=0.0), ranged.amin(-1).clamp(max=0.0)
    if layout.members is None:
        high, low = high[:, None], low[:, None]
    if clip is not None:
        high, low = torch.sigmoid(clip[0]) * high, torch.sigmoid(clip[1]) * low
    scale = (high - low) / WEIGHT_TOP
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
    return scale, torch.round(-low / scale).clamp(0, WEIGHT_TOP).detach()


def clip_shape(weight: Tensor, layout: WeightLayout) -> tuple[int, int]:
    """The shape of a weight's clipping parameters: one a row, or one a row and group."""
    return weight.shape[0], 1 if layout.members is None else layout.count


def fake_weight(weight: Tensor, layout: WeightLayout, clip: tuple[Tensor, Tensor] | None, through: Any = rounded) -> Tensor:
    """W^ [N, K] on the 4-bit grid of a clipped range that includes zero.

    high = sig(g) max(0, max w), low = sig(b) min(0, min w), s = (high - low) / 15, z = round(-low / s).
    clip: (g, b), each :func:`clip_shape`; None for no clipping. through: the rounding, :data:`rounded` or a surrogate of it.
    OmniQuant, arXiv 2308.13137, section 3.2.
    """
    scale, zero = _weight_grid(weight, layout, clip)
    if layout.members is not None:
        scale, zero = scale[:, layout.groups], zero[:, layout.groups]
    return through(weight, scale, zero, 0, WEIGHT_TOP)


def search_clip(weight: Tensor, layout: WeightLayout, power: Tensor) -> Tensor:
    """The logit g = b whose clipping has the least sum_k power_k (w_k - w^_k)^2, for every row or group: :func:`clip_shape`.

    power: the mean square of each channel of the layer's input, [K].
    """
    shape = clip_shape(weight, layout)
    best, least = weight.new_zeros(shape), weight.new_full(shape, float("inf"))
    for share in CLIP_SHARES:
        logit = torch.logit(weight.new_full(shape, share))
        error = (fake_weight(weight, layout, (logit, logit)) - weight).square() * power
        if layout.members is None:
            error = error.sum(1, keepdim=True)
        else:
            error = weight.new_zeros(shape).index_add_(1, layout.groups, error)
        best, least = torch.where(error < least, logit, best), torch.minimum(error, least)
    return best


def quantized_weight(weight: Tensor, layout: WeightLayout, clip: tuple[Tensor, Tensor] | None) -> Quantized:
    """The codes of :func:`fake_weight`: s (q - z) is its value, bit for bit in float32."""
    scale, zero = _weight_grid(weight, layout, clip)
    scale, zero = (table.expand(-1, layout.count) for table in (scale, zero))
    q = (torch.round(weight / scale[:, layout.groups]) + zero[:, layout.groups]).clamp(0, WEIGHT_TOP)
    return Quantized(q.to(torch.uint8), scale.float().contiguous(), zero.to(torch.uint8).contiguous())


def fake_input(x: Tensor, mask: Tensor, form: SpikeFormat, through: Any = rounded) -> Tensor:
    """x^ [..., K], what the spike codes of x stand for; its derivative includes that of every token's range.

    The values are those of :func:`ranvier.reference.spike_encode.spike_decode`. x float32 or float64, finite.
    """
    ordinary, fine = quantizers(x, mask, **form.rule)
    if ordinary is fine or not bool(mask.any()):
        return through(x, ordinary.step, ordinary.zero.detach(), ordinary.floor, ordinary.ceiling)
    if bool(mask.all()):
        return through(x, fine.step, fine.zero.detach(), fine.floor, fine.ceiling)
    step = torch.where(mask, fine.step, ordinary.step)
    zero = torch.where(mask, fine.zero, ordinary.zero).detach()
    floor = torch.where(mask, x.new_tensor(fine.floor), x.new_tensor(ordinary.floor))
    ceiling = torch.where(mask, x.new_tensor(fine.ceiling), x.new_tensor(ordinary.ceiling))
    return through(x, step, zero, floor, ceiling)
