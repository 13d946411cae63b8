"""GPTQ: weights rounded column by column, each column's error made up for by those that follow.

For inputs X^ [M, K] of a layer with weight W [N, K] and a damped Hessian H = X^^T X^ + lambda I, H^-1 = U^T U with U upper
triangular, column j is rounded to the grid and the columns after it take over its error:

    e = (w_j - Q(w_j)) / U_jj        w_k -= e U_jk   for k > j

which is the exact least-squares answer of the columns not yet rounded. GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ranvier.methods.spikellm._square import all_finite, cholesky_into, permute_, reverse_
from ranvier.ops.spike_encode import SpikeFormat
from ranvier.reference.spike_encode import channel_order
from ranvier.reference.spike_linear import WEIGHT_TOP, Quantized, group_index

MAX_DAMP = 1.0  # of the mean of the Hessian's diagonal: where even this is not positive definite, something is not finite


class WeightGrid(Protocol):
    """Levels that a weight may take, by groups of input channels.

    groups: the group of every input channel, int64 [K]. :func:`gptq` calls ``fit`` once for each group, before a column of
    it is rounded, with the group's columns as they are then; then ``round`` for each column.
    """

    groups: Tensor

    def fit(self, group: int, weight: Tensor, importance: Tensor) -> None:
        """Choose the levels of a group: weight [N, k], its channels ascending; importance [k], the Hessian's diagonal."""

    def round(self, column: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """The codes uint8 [N] of one channel's column [N], and the values they stand for, in its dtype."""


class UniformGrid:
    """Asymmetric levels 0 to ``top`` that include zero: s (q - z), one scale and zero point a row and group.

    Groups are those of a packed weight: ``group_size`` channels of each range in the codes' order, or one group a range.
    order: the codes' order of channels, int64 [K]. shrink: how many ranges are tried for a row and group, from the whole one
    down to ``smallest`` of it; the one with the least sum_k h_k (w_k - w^_k)^2 is taken. 1 keeps the whole range.
    """

    def __init__(
        self,
        out_features: int,
        lengths: Sequence[int],
        group_size: int | None,
        order: Tensor,
        *,
        top: int = WEIGHT_TOP,
        shrink: int = 24,
        smallest: float = 0.5,
    ) -> None:
        groups, ranges = group_index(lengths, group_size, order.device)
        self.groups = torch.empty_like(groups).index_copy_(0, order, groups)
        self.top, self._shares = top, torch.linspace(1.0, smallest, shrink).tolist()
        self.scale = torch.ones((out_features, len(ranges)), device=order.device)
        self.zero = torch.zeros((out_features, len(ranges)), dtype=torch.uint8, device=order.device)
        self._columns = self.groups.tolist()

    def fit(self, group: int, weight: Tensor, importance: Tensor) -> None:
        """See :class:`WeightGrid`."""
        low, high = weight.amin(-1).clamp(max=0.0), weight.amax(-1).clamp(min=0.0)
        best = scale = zero = None
        for share in self._shares:
            step = ((high - low) * share / self.top).float()
            step = torch.where(step > torch.finfo(step.dtype).tiny, step, 1.0)
            point = torch.round(-low * share / step).clamp(0, self.top)
            if len(self._shares) == 1:
                scale, zero = step, point
                break
            s, z = step[:, None].to(weight.dtype), point[:, None].to(weight.dtype)
            value = torch.round(weight / s).add_(z).clamp_(0, self.top).sub_(z).mul_(s)
            error = value.sub_(weight).square_() @ importance
            if best is None:
                best, scale, zero = error, step, point
            else:
                better = error < best
                best = torch.where(better, error, best)
                scale, zero = torch.where(better, step, scale), torch.where(better, point, zero)
        self.scale[:, group], self.zero[:, group] = scale, zero.to(torch.uint8)

    def round(self, column: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """See :class:`WeightGrid`."""
        group = self._columns[channel]
        scale, zero = self.scale[:, group].to(column.dtype), self.zero[:, group].to(column.dtype)
        q = torch.round(column / scale).add_(zero).clamp_(0, self.top)
        return q.to(torch.uint8), (q - zero).mul_(scale)


def inverse_factor(hessian: Tensor, percdamp: float, order: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
    """U, upper triangular, with U^T U = (H + lambda I)^-1; lambda is ``percdamp`` of the mean of H's diagonal.

    lambda grows tenfold until the sum is positive definite to the precision of its dtype. Raises ValueError for a Hessian
    that is not finite. H [K, K], its channels taken in ``order`` (int64 [K]; None: as they are).

    Two matrices [K, K] are held at a time beside H itself. overwrite: H is one of the two, and its values are lost.
    """
    work = hessian.contiguous() if overwrite else hessian.clone(memory_format=torch.contiguous_format)
    if order is not None:
        permute_(work, order)
    mean = work.diagonal().mean()
    if not all_finite(work):
        raise ValueError("gptq: the Hessian has NaN or Inf; the calibration inputs are not finite")
    # With the order of channels reversed the factor of H is upper triangular: H = R R^T, and U = R^-1.
    diagonal, lower = reverse_(work).diagonal(), torch.empty_like(work).T
    plain, damp = diagonal.clone(), percdamp
    while True:
        diagonal.copy_(plain).add_(damp * mean)
        if cholesky_into(work, lower):
            break
        if damp >= MAX_DAMP:
            raise ValueError(f"gptq: the Hessian is not positive definite, not even with {damp:g} of its mean diagonal added")
        damp = max(10 * damp, 1e-6)
    eye = work.zero_().fill_diagonal_(1.0).T
    return torch.linalg.solve_triangular(reverse_(lower), eye, upper=True, out=eye)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: WeightGrid,
    *,
    percdamp: float = 0.01,
    block: int = 128,
    act_order: bool = True,
    static: bool | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Tensor:
    """Codes of a weight [N, K] on a grid: uint8 [N, K], channels as in weight; the grid's tables are fitted on the way.

    hessian: X^T X [K, K] of the layer's inputs, by any factor. A channel whose diagonal is 0 never had an input: its column
    is rounded to nearest. act_order: channels with the largest diagonal first. static: levels are fitted to the weights as
    given, before the first column; else to what the columns before have made of them, when a group's first column is
    reached; None is static where act_order mixes the groups. dtype: float32, or float64. overwrite: a contiguous Hessian of
    this dtype is worked on in place and its values are lost: two matrices [K, K] are held in all, else three.

    Raises ValueError for shapes that do not belong together or values that are not finite.
    """
    rows, channels = weight.shape
    if tuple(hessian.shape) != (channels, channels) or block < 1 or percdamp < 0:
        got = f"weight {list(weight.shape)}, hessian {list(hessian.shape)}, block={block}, percdamp={percdamp}"
        raise ValueError(f"gptq: {got}; the hessian must be [K, K], block at least 1 and percdamp at least 0")
    hessian = hessian.to(dtype, copy=not overwrite)
    importance = hessian.diagonal().clone()
    dead = importance <= 0
    hessian.diagonal()[dead] = importance.mean().clamp(min=torch.finfo(dtype).tiny) if bool((~dead).any()) else 1.0
    order = (
        torch.argsort(importance, descending=True, stable=True) if act_order else torch.arange(channels, device=weight.device)
    )
    # Before the factor, so that its memory and that of the trials are not held together.
    fitted = _fit_all(weight.detach().to(dtype), importance, grid) if (act_order if static is None else static) else set()
    upper = inverse_factor(hessian, percdamp, order if act_order else None, overwrite=True)
    columns = weight.detach().to(dtype).T[order].contiguous()  # a column of the weight is a row here, and contiguous
    codes = torch.empty((channels, rows), dtype=torch.uint8, device=weight.device)
    sequence, groups = order.tolist(), grid.groups.to(weight.device)[order]
    for start, stop in _pieces(groups.tolist(), block, fitted):
        if (group := int(groups[start])) not in fitted:
            fitted.add(group)
            members = torch.sort(order[groups == group])
            grid.fit(group, columns[groups == group][members.indices].T, importance[members.values])
        here, factor = columns[start:stop], upper[start:stop, start:stop]
        errors, diagonal = torch.empty_like(here), factor.diagonal().tolist()
        for i in range(stop - start):
            codes[start + i], value = grid.round(here[i], sequence[start + i])
            torch.sub(here[i], value, out=errors[i]).div_(diagonal[i])
            here[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def _fit_all(weight: Tensor, importance: Tensor, grid: WeightGrid) -> set[int]:
    groups = grid.groups.unique().tolist()
    for group in groups:
        members = grid.groups == group
        grid.fit(group, weight[:, members], importance[members])
    return set(groups)


def _pieces(groups: list[int], block: int, fitted: set[int]) -> list[tuple[int, int]]:
    """Runs of at most ``block`` columns; a group that is not fitted begins one, so that its columns are up to date."""
    starts, seen = [], set(fitted)
    for j, group in enumerate(groups):
        if group not in seen or not starts or j - starts[-1] == block:
            starts.append(j)
            seen.add(group)
    return list(zip(starts, [*starts[1:], len(groups)], strict=True))


def quantize_gptq(weight: Tensor, hessian: Tensor, mask: Tensor, form: SpikeFormat, *, overwrite: bool = False) -> Quantized:
    """GPTQ on the 4-bit grids of a layer's format: codes as ``SpikingLinear.from_quantized`` takes them.

    weight float [N, K], hessian [K, K], mask of salient channels bool [K]. Ranges of a row are fitted apart. overwrite as
    for :func:`gptq`.
    """
    order = channel_order(mask) if len(form.lengths) == 2 else torch.arange(weight.shape[1], device=weight.device)
    grid = UniformGrid(weight.shape[0], form.lengths, form.group_size or None, order)
    return Quantized(gptq(weight, hessian, grid, overwrite=overwrite), grid.scale, grid.zero)
