"""ternary_linear: the product of spike codes and weights that are sums of 2-bit or ternary spikes.

    y[m, n] = b[n] + s_x[m] sum_k c[m, k] W^[n, k],      W^[n, k] = s[n, r] (q[n, k] - z[n, r])

r = 0 on ordinary input channels, r = 1 on salient ones, whose codes are the sum of T spikes. Two grids (SpikeLLM, arXiv
2407.04752, sections 3.2 and 3.4):

    uniform   a spike has four levels. q 0..3 and 0..3 T, both over the row's min..max:  s_0 = T s_1 (consistent);
              with grid="compat" 0..4 T - 1 on salient channels, whose scale is then in no whole ratio to the other
    ternary   a spike is -1, 0 or 1, so a weight is an addition, a subtraction or nothing. q 0..2 with z = 1 and
              0..2 T with z = T, one step s for both

With span="separate" salient columns have a range, or a step, of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE_TOP = 3  # the highest code of a 2-bit spike
FITS = 4  # alternations of codes and step
SCAN = [0.3 * 1.15**i for i in range(24)]  # steps to begin from, in mean magnitudes of the row: up to 7.5


def _range_quantizer(low: Tensor, high: Tensor, top: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of codes 0..top over low..high, a range that includes zero."""
    scale = (high - low) / top if scale is None else scale
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
    return scale, torch.round(-low / scale).clamp(0, top)


def _extremes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """min and max of each row with zero among its values, [N]."""
    padded = torch.nn.functional.pad(weight, (0, 1))
    return padded.amin(-1), padded.amax(-1)


def quantize_uniform(weight: Tensor, salient: Tensor, steps: int, span: str, grid: str) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: q uint8 [N, K], scale [N, 2], zero uint8 [N, 2]. weight [N, K] float, salient bool [K]."""
    top = 4 * steps - 1 if grid == "compat" else BASE_TOP * steps
    separate = span == "separate"
    low, high = _extremes(weight[:, ~salient] if separate else weight)
    fine_low, fine_high = _extremes(weight[:, salient]) if separate else (low, high)
    fine_scale, fine_zero = _range_quantizer(fine_low, fine_high, top)
    exact = None if separate or grid == "compat" else steps * fine_scale
    scale, zero = _range_quantizer(low, high, BASE_TOP, exact)
    scale, zero = torch.stack([scale, fine_scale], -1), torch.stack([zero, fine_zero], -1)
    columns = salient.long()
    tops = torch.tensor([BASE_TOP, top], device=weight.device)[columns]
    codes = torch.round(weight / scale[:, columns]) + zero[:, columns]
    return torch.minimum(codes.clamp(min=0), tops).to(torch.uint8), scale, zero.to(torch.uint8)


def fit_step(weight: Tensor, tops: Tensor) -> Tensor:
    """The step s of each row that makes sum_k (w - s u)^2 small, u = clip(round(w / s), -top_k, top_k): [N].

    The best of a scan, then codes for the step and the best step for those codes, <w, u> / <u, u>, in turn, which never errs
    more. The error has many minima in s: the result is near the least one, not always it.
    """
    size = weight.abs().mean(-1)
    size = torch.where(size > 0, size, 1.0)
    step, least = size, torch.full_like(size, float("inf"))
    for start in SCAN:
        error = _step_error(weight, start * size, tops)
        step, least = torch.where(error < least, start * size, step), torch.minimum(error, least)
    for _ in range(FITS):
        u = ternary_counts(weight, step, tops)
        norm = u.square().sum(-1)
        step = torch.where(norm > 0, (weight * u).sum(-1) / norm.clamp(min=1), step)
    return step


def _step_error(weight: Tensor, step: Tensor, tops: Tensor) -> Tensor:
    return (weight - step.unsqueeze(-1) * ternary_counts(weight, step, tops)).square().sum(-1)


def ternary_counts(weight: Tensor, step: Tensor, tops: Tensor) -> Tensor:
    """u = clip(round(w / s), -top, top): what the spikes of a weight sum to, [N, K]."""
    return torch.round(weight / step.unsqueeze(-1)).clamp(-tops, tops)


def quantize_ternary(weight: Tensor, salient: Tensor, steps: int, span: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ternary spikes, T of them on salient channels, of the step that fits best: as :func:`quantize_uniform`."""
    columns = salient.long()
    tops = torch.tensor([1, steps], device=weight.device, dtype=weight.dtype)
    if span == "separate":
        steps_of = [fit_step(weight[:, columns == r], tops[r]) if (columns == r).any() else None for r in (0, 1)]
        scale = torch.stack([s if s is not None else weight.new_ones(weight.shape[0]) for s in steps_of], -1)
    else:
        scale = fit_step(weight, tops[columns]).unsqueeze(-1).repeat(1, 2)
    counts = torch.round(weight / scale[:, columns]).clamp(-tops[columns], tops[columns])
    zero = tops.to(torch.uint8).expand(weight.shape[0], 2).contiguous()
    return (counts + tops[columns]).to(torch.uint8), scale, zero


def quantize_weight(
    weight: Tensor, salient: Tensor, *, steps: int, weight_grid: str, span: str, grid: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q uint8 [N, K] in the order of weight, scale [N, 2] and zero uint8 [N, 2] of ordinary and salient channels."""
    if weight_grid == "ternary":
        return quantize_ternary(weight, salient, steps, span)
    return quantize_uniform(weight, salient, steps, span, grid)


def dequantize_weight(q: Tensor, scale: Tensor, zero: Tensor, salient: Tensor) -> Tensor:
    """W^ = s (q - z), [N, K], in the dtype of scale."""
    columns = salient.long()
    return scale[:, columns] * (q.to(scale.dtype) - zero[:, columns].to(scale.dtype))


def ternary_linear(
    codes: Tensor, code_scale: Tensor, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, salient: Tensor
) -> Tensor:
    """The formula above in float64: codes [..., K] in the order of the weight, code_scale [..., 1] -> [..., N].

    The integer sums of both ranges are exact, below 2^53.
    """
    columns = salient.long()
    signed = q.double() - zero.double()[:, columns]
    sums = [codes[..., columns == r].double() @ signed[:, columns == r].T * scale[:, r].double() for r in (0, 1)]
    y = code_scale.double() * (sums[0] + sums[1])
    return y if bias is None else y + bias.double()


def weight_spikes(counts: Tensor, steps: int) -> Tensor:
    """Ternary spikes s_t in {-1, 0, 1} with sum_t s_t = counts, the first |counts| steps firing: int8 [T, N, K]."""
    return torch.stack([torch.where(counts.abs() > t, counts.sign(), 0) for t in range(steps)]).to(torch.int8)


def add_only(codes: Tensor, counts: Tensor, steps: int) -> Tensor:
    """sum_t [ (sum of the codes where s_t = 1) - (sum of those where s_t = -1) ]: int64 [M, N], by additions alone.

    codes int8 [M, K], counts = q - z of the ternary grid [N, K] in -T..T.
    """
    total = torch.zeros(codes.shape[0], counts.shape[0], dtype=torch.int64, device=codes.device)
    for spikes in weight_spikes(counts, steps):
        for n, row in enumerate(spikes):
            total[:, n] += codes[:, row == 1].sum(-1) - codes[:, row == -1].sum(-1)
    return total


def binarize_partially(weight: Tensor, salient: Tensor, bits: int = 8) -> Tensor:
    """PB-LLM's weight: sign(w) mean|w| of the row's ordinary columns, salient columns rounded to ``bits`` bits: [N, K].

    Salient columns are asymmetric over the row's range of them. Yuan et al., PB-LLM, arXiv 2310.00034, section 3.
    """
    result = torch.empty_like(weight)
    ordinary = weight[:, ~salient]
    result[:, ~salient] = torch.where(ordinary < 0, -1.0, 1.0) * ordinary.abs().mean(-1, keepdim=True)
    kept = weight[:, salient]
    if kept.shape[1]:
        scale, zero = _range_quantizer(*_extremes(kept), 2**bits - 1)
        codes = (torch.round(kept / scale[:, None]) + zero[:, None]).clamp(0, 2**bits - 1)
        result[:, salient] = (codes - zero[:, None]) * scale[:, None]
    return result


def equal_steps(share: float, steps: int) -> float:
    """Steps a weight, by which the methods are compared: (1 - r) 1 + r b, b the steps (or bits) of a salient weight."""
    return (1 - share) + share * steps
