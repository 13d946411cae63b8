"""GPTQ's levels for weights of 2 bits: sums of spikes, T of them on salient input channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.gptq import gptq
from ranvier.reference.spike_linear import Quantized

SHARES = torch.linspace(1.2, 0.4, 33).tolist()


class SpikeGrid:
    """Levels s_r (q - z_r) of a row's ordinary (r = 0) and salient (r = 1) columns; a grid of :func:`gptq`.

    Starts at the tables [N, 2] of round to nearest and scales the steps of a row by the share with the least
    sum_k h_k (w_k - w^_k)^2, both ranges by the same: their ratio is the format's. A scaled step moves the zero point of an
    asymmetric grid no further than its range. tops: the highest code of each range.
    """

    def __init__(
        self, weight: Tensor, mask: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, tops: tuple[int, int]
    ) -> None:
        self.groups, self.tops = mask.long(), tops
        columns, top = self.groups, torch.tensor(tops, device=weight.device, dtype=weight.dtype)[self.groups]
        point, best = zero.to(weight.dtype)[:, columns], None
        for share in SHARES:
            step = (scale * share)[:, columns]
            value = (torch.round(weight / step) + point).clamp(min=0).minimum(top).sub_(point).mul_(step)
            error = value.sub_(weight).square_() @ importance
            if best is None:
                best, chosen = error, torch.full_like(error, share)
            else:
                chosen, best = torch.where(error < best, share, chosen), torch.minimum(error, best)
        self.scale, self.zero = (scale * chosen[:, None]).float(), zero

    def fit(self, group: int, weight: Tensor, importance: Tensor) -> None:
        """Nothing to choose: both ranges were fitted together."""

    def round(self, column: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """See :class:`ranvier.methods.spikellm.gptq.WeightGrid`."""
        group = int(self.groups[channel])
        scale, zero = self.scale[:, group].to(column.dtype), self.zero[:, group].to(column.dtype)
        q = torch.round(column / scale).add_(zero).clamp_(0, self.tops[group])
        return q.to(torch.uint8), (q - zero).mul_(scale)


def quantize_spikes(
    weight: Tensor, hessian: Tensor, mask: Tensor, config: SpikeConfig, *, overwrite: bool = False
) -> Quantized:
    """GPTQ for ``TernaryLinear.from_quantized``: weight float [N, K], hessian [K, K], mask of salient channels bool [K].

    overwrite as for :func:`gptq`.
    """
    from ranvier.reference.ternary_linear import quantize_weight

    rule = {"steps": config.steps, "weight_grid": config.weight_grid, "span": config.span, "grid": config.grid}
    _, scale, zero = quantize_weight(weight, mask, **rule)
    if config.weight_grid == "ternary":
        tops = (2, 2 * config.steps)
    else:
        tops = (3, 4 * config.steps - 1 if config.grid == "compat" else 3 * config.steps)
    grid = SpikeGrid(weight, mask, hessian.diagonal().to(weight.dtype), scale, zero, tops)
    return Quantized(gptq(weight, hessian, grid, overwrite=overwrite), grid.scale, grid.zero)


class BinaryGrid:
    """PB-LLM's levels: sign(w) mean|w| of a row's ordinary columns, ``top + 1`` asymmetric levels of its salient ones.

    Yuan et al., PB-LLM, arXiv 2310.00034: the baseline that ternary spikes are compared with.
    """

    def __init__(self, weight: Tensor, mask: Tensor, top: int = 255) -> None:
        self.groups, self.top = mask.long(), top
        ordinary, salient = weight[:, ~mask], weight[:, mask]
        self.size = ordinary.abs().mean(-1) if ordinary.shape[1] else weight.new_zeros(weight.shape[0])
        low, high = salient.new_zeros(salient.shape[0]), salient.new_zeros(salient.shape[0])
        if salient.shape[1]:
            low, high = salient.amin(-1).clamp(max=0.0), salient.amax(-1).clamp(min=0.0)
        step = (high - low) / top
        self.step = torch.where(step > torch.finfo(step.dtype).tiny, step, 1.0)
        self.zero = torch.round(-low / self.step)

    def fit(self, group: int, weight: Tensor, importance: Tensor) -> None:
        """Nothing to choose: both kinds of columns were fitted at once."""

    def round(self, column: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """See :class:`ranvier.methods.spikellm.gptq.WeightGrid`."""
        if int(self.groups[channel]) == 0:
            positive = column >= 0
            return positive.to(torch.uint8), torch.where(positive, self.size, -self.size)
        q = (torch.round(column / self.step) + self.zero).clamp(0, self.top)
        return q.to(torch.uint8), (q - self.zero) * self.step


def binarize_by_gptq(weight: Tensor, hessian: Tensor, mask: Tensor, bits: int = 8) -> Tensor:
    """Partial binarization through GPTQ: the weight [N, K] that it leaves, salient columns at ``bits`` bits."""
    grid = BinaryGrid(weight, mask, 2**bits - 1)
    codes = gptq(weight, hessian, grid).to(weight.dtype)
    ordinary = (2 * codes - 1) * grid.size[:, None]
    return torch.where(mask, (codes - grid.zero[:, None]) * grid.step[:, None], ordinary)
