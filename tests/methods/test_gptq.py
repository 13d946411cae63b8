"""gptq: against an independent solver in float64, on grids of every format, with Hessians of every kind."""

from __future__ import annotations

import pytest
import torch
from spiking import generator
from torch import Tensor

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.gptq import UniformGrid, gptq, inverse_factor, quantize_gptq
from ranvier.methods.spikellm.spike_grid import SHARES, BinaryGrid, SpikeGrid, binarize_by_gptq, quantize_spikes
from ranvier.ops.spike_encode import SpikeFormat
from ranvier.reference.spike_linear import WEIGHT_TOP, dequantize_weight, group_index, quantize_weight
from ranvier.reference.ternary_linear import binarize_partially
from ranvier.reference.ternary_linear import quantize_weight as quantize_spiking

N = 12


def layer(channels: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and X^T X of correlated inputs, float64."""
    g = generator(seed)
    mix = torch.randn(channels, channels, generator=g, dtype=torch.float64) / channels**0.5 + torch.eye(channels).double()
    x = torch.randn(tokens, channels, generator=g, dtype=torch.float64) @ mix * torch.rand(channels, generator=g).double()
    return torch.randn(N, channels, generator=g, dtype=torch.float64), x.T @ x


def uniform(channels: int, lengths: tuple[int, ...] = (), group_size: int | None = None, **options) -> UniformGrid:
    order = torch.randperm(channels, generator=generator(9)) if len(lengths) == 2 else torch.arange(channels)
    return UniformGrid(N, lengths or (channels,), group_size, order, **options)


def surgeon(weight: Tensor, hessian: Tensor, grid: UniformGrid, order: list[int], static: bool) -> Tensor:
    """Optimal Brain Quantization in a given order, in float64: H^-1 dense, its rows and columns struck one by one."""
    weight, inverse, left = weight.clone(), torch.linalg.inv(hessian), list(order)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    fitted = set()
    for group in grid.groups.unique().tolist() if static else []:
        members = grid.groups == group
        grid.fit(group, weight[:, members], hessian.diagonal()[members])
        fitted.add(group)
    for channel in order:
        group = int(grid.groups[channel])
        if group not in fitted:
            members = grid.groups == group
            grid.fit(group, weight[:, members], hessian.diagonal()[members])
            fitted.add(group)
        codes[:, channel], value = grid.round(weight[:, channel], channel)
        error = (weight[:, channel] - value) / inverse[channel, channel]
        left.remove(channel)
        weight[:, left] -= error[:, None] * inverse[channel, left]
        inverse = inverse - inverse[:, [channel]] * inverse[[channel], :] / inverse[channel, channel]
    return codes


def damped(hessian: Tensor, percdamp: float = 0.01) -> Tensor:
    return hessian + percdamp * hessian.diagonal().mean() * torch.eye(hessian.shape[0], dtype=hessian.dtype)


def loss(weight: Tensor, hessian: Tensor, grid: UniformGrid, codes: Tensor) -> float:
    error = weight - dequantize_weight(codes, grid.scale.double(), grid.zero, grid.groups)
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("channels", "lengths", "group_size"),
    [(64, (), None), (37, (), None), (96, (), 32), (96, (70, 26), None), (96, (64, 32), 32), (1, (), None)],
    ids=["row", "prime", "groups", "two-ranges", "ranges-and-groups", "one"],
)
@pytest.mark.parametrize("static", [True, False])
def test_equals_brain_surgeon(channels: int, lengths: tuple, group_size: int | None, act_order: bool, static: bool) -> None:
    """Codes and tables equal those of dense elimination in float64, over blocks that do not divide K."""
    weight, hessian = layer(channels)
    importance = hessian.diagonal()
    order = torch.argsort(importance, descending=True, stable=True).tolist() if act_order else list(range(channels))
    one, other = uniform(channels, lengths, group_size), uniform(channels, lengths, group_size)
    codes = gptq(weight, hessian, one, block=20, act_order=act_order, static=static, dtype=torch.float64)
    # The dense solver sees the damped Hessian, but fits its grid by the importance that gptq fits by: the same up to a sum.
    truth = surgeon(weight, damped(hessian), _Fixed(other, importance), order, static)
    assert codes.dtype == torch.uint8 and torch.equal(codes, truth)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.zero, other.zero)


class _Fixed:
    """A grid fitted by the undamped diagonal, whatever importance it is given."""

    def __init__(self, grid: UniformGrid, importance: Tensor) -> None:
        self.grid, self.groups, self.importance = grid, grid.groups, importance

    def fit(self, group: int, weight: Tensor, _: Tensor) -> None:
        self.grid.fit(group, weight, self.importance[self.groups == group])

    def round(self, column: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        return self.grid.round(column, channel)


@pytest.mark.parametrize("act_order", [True, False])
def test_grids_are_fitted_first_where_act_order_mixes_the_groups(act_order: bool) -> None:
    """static=None is static under act_order, and only there."""
    weight, hessian = layer(96)
    found = []
    for static in (None, True, False):
        grid = uniform(96, (), 32)
        found.append((gptq(weight, hessian, grid, act_order=act_order, static=static), grid.scale))
    same = [all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)) for other in found[1:]]
    assert same == [act_order, not act_order]


def test_factor_of_the_inverse() -> None:
    """U is upper triangular and U^T U the inverse; K eps cond(H), 64 * 2e-16 * 1e4, bounds the relative error."""
    _, hessian = layer(64)
    upper = inverse_factor(hessian, 0.01)
    assert torch.equal(upper, upper.triu())
    truth = torch.linalg.inv(damped(hessian))
    assert (upper.T @ upper - truth).abs().max() <= 1e-10 * truth.abs().max()


def test_float32_is_near_float64() -> None:
    """The loss in float32 is that of float64 but for the few columns that round the other way: within 5 %."""
    weight, hessian = layer(128)
    losses = []
    for dtype in (torch.float32, torch.float64):
        grid = uniform(128)
        losses.append(loss(weight, hessian, grid, gptq(weight, hessian, grid, dtype=dtype)))
    assert abs(losses[0] / losses[1] - 1) <= 0.05


@pytest.mark.parametrize("search", [1, 24])
def test_beats_rounding_to_nearest(search: int) -> None:
    """The layer's error on its inputs is lower than that of rounding on the same grid."""
    weight, hessian = layer(96)
    grid = uniform(96, shrink=search)
    codes = gptq(weight, hessian, grid)
    nearest = torch.stack([grid.round(weight[:, j], j)[0] for j in range(96)], 1)
    assert loss(weight, hessian, grid, codes) < 0.8 * loss(weight, hessian, grid, nearest)


def test_without_search_the_grid_is_that_of_rounding() -> None:
    """shrink=1 fits the tables of quantize_weight, and with H = I gptq gives its codes: nothing is carried over."""
    weight, _ = layer(96)
    grid = uniform(96, group_size=32, shrink=1)
    codes = gptq(weight.float(), torch.eye(96), grid)
    truth = quantize_weight(weight.float(), (96,), 32)
    assert torch.equal(codes, truth.q) and torch.equal(grid.scale, truth.scale) and torch.equal(grid.zero, truth.zero)


def test_search_lowers_the_weighted_error() -> None:
    """No row's sum_k h_k (w - w^)^2 is above that of the whole range."""
    weight, hessian = layer(96)
    errors = []
    for shrink in (1, 24):
        grid = uniform(96, shrink=shrink)
        grid.fit(0, weight, hessian.diagonal())
        value = torch.stack([grid.round(weight[:, j], j)[1] for j in range(96)], 1)
        errors.append((value - weight).square() @ hessian.diagonal())
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.99 * errors[0].sum()


def test_dead_channels_round_to_nearest() -> None:
    """A channel that never had an input keeps its own nearest code and gives nothing to the others."""
    weight, hessian = layer(40)
    dead = [0, 7, 39]
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[:, dead] *= 0.1  # no end of a row's range, so the grid is the same without them
    grid = uniform(40)
    codes = gptq(weight, hessian, grid, dtype=torch.float64)
    for j in dead:
        assert torch.equal(codes[:, j], grid.round(weight[:, j], j)[0])
    alive = [j for j in range(40) if j not in dead]
    changed = weight.clone()
    changed[:, dead] *= 0.5
    other = gptq(changed, hessian, grid, dtype=torch.float64)
    assert torch.equal(codes[:, alive], other[:, alive])


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rank_deficient(tokens: int) -> None:
    """Fewer tokens than channels, or none: damping makes it solvable, also without any damping asked."""
    weight, hessian = layer(48, tokens=tokens)
    for percdamp in (0.01, 0.0):
        grid = uniform(48)
        codes = gptq(weight, hessian, grid, percdamp=percdamp)
        assert int(codes.max()) <= WEIGHT_TOP and bool(grid.scale.isfinite().all())


def test_inputs_stay_and_bad_ones_are_named() -> None:
    """Weight and Hessian are not written to; shapes and values that cannot be are refused."""
    weight, hessian = layer(24)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, uniform(24), dtype=torch.float64)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    for given, words in (
        ((weight, hessian[:-1]), "must be \\[K, K\\]"),
        ((weight, hessian * float("nan")), "has NaN or Inf"),
        ((weight, -hessian - 1e6), "not positive definite"),
    ):
        with pytest.raises(ValueError, match=words):
            gptq(*given, uniform(24))
    with pytest.raises(ValueError, match=r"percdamp=-0\.1"):
        gptq(weight, hessian, uniform(24), percdamp=-0.1)
    with pytest.raises(ValueError, match="block=0"):
        gptq(weight, hessian, uniform(24), block=0)


@pytest.mark.parametrize("span", ["shared", "separate"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_formats(span: str, group_size: int) -> None:
    """Tables have the format's groups, salient columns their own where they have a range of their own."""
    weight, hessian = layer(96)
    mask = torch.zeros(96, dtype=torch.bool)
    mask[::6] = True
    form = SpikeFormat(96, 16, 4, 1 if span == "separate" else 2, span, "consistent", group_size)
    q, scale, zero = quantize_gptq(weight.float(), hessian, mask, form)
    index, ranges = group_index(form.lengths, group_size or None)
    assert q.shape == weight.shape and scale.shape == zero.shape == (N, len(ranges))
    order = torch.argsort(mask.to(torch.uint8), stable=True) if len(form.lengths) == 2 else torch.arange(96)
    value = dequantize_weight(q[:, order], scale, zero, index)
    # A row's range is 5 or so: half a step of it is 0.17; carried errors and clipping add a few steps at most.
    assert (value - weight.float()[:, order]).abs().max() < 2.0


def test_partial_binarization_through_gptq() -> None:
    """Where inputs do not correlate it is partial binarization itself; where they do its output error is smaller."""
    g = torch.Generator().manual_seed(5)
    weight, mask = torch.randn(12, 40, generator=g), torch.arange(40) % 13 == 0
    plain = binarize_partially(weight, mask)
    torch.testing.assert_close(binarize_by_gptq(weight, torch.eye(40), mask), plain, rtol=0, atol=1e-6)
    x = torch.randn(400, 40, generator=g) @ torch.randn(40, 40, generator=g)
    fitted = binarize_by_gptq(weight, x.T @ x, mask)
    errors = [float((x @ (w - weight).T).norm()) for w in (plain, fitted)]
    assert errors[1] < errors[0]
    # Two magnitudes a row are all that ordinary columns have.
    assert all(row[~mask].abs().unique().numel() == 1 for row in fitted)


def test_levels_of_salient_columns_include_zero() -> None:
    """PB-LLM's 8-bit columns of one sign: 0 is a level, and the far end is the largest weight."""
    weight, mask = torch.rand(6, 20, generator=generator(3)) + 0.5, torch.arange(20) < 5
    for sign in (1.0, -1.0):
        grid = BinaryGrid(sign * weight, mask)
        ends = (-grid.zero * grid.step, (255 - grid.zero) * grid.step)
        far, near = (ends[1], ends[0]) if sign > 0 else (-ends[0], ends[1])
        assert not near.any()
        torch.testing.assert_close(far, weight[:, mask].amax(1), rtol=2.0**-22, atol=0)  # two roundings


@pytest.mark.parametrize(("grid", "tops"), [("uniform", (3, 9)), ("ternary", (2, 6))])
def test_spiking_levels_are_the_best_share_of_a_row(grid: str, tops: tuple[int, int]) -> None:
    """Of all shares of round to nearest's steps a row takes the one of least weighted error, both kinds of columns together."""
    weight, hessian = layer(40)
    mask, importance = torch.arange(40) % 4 == 0, hessian.diagonal()
    rule = {"steps": 3, "weight_grid": grid, "span": "shared", "grid": "consistent"}
    _, scale, zero = quantize_spiking(weight, mask, **rule)
    found = SpikeGrid(weight, mask, importance, scale, zero, tops)
    errors = []
    for share in SHARES:
        error = torch.zeros(N, dtype=torch.float64)
        for channel in range(40):
            r = int(mask[channel])
            step, point = scale[:, r].double() * share, zero[:, r].double()
            q = (torch.round(weight[:, channel] / step) + point).clamp(0, tops[r])
            error += importance[channel] * (step * (q - point) - weight[:, channel]).square()
        errors.append(error)
    best = torch.stack(errors).argmin(0)
    expected = scale.double() * torch.tensor(SHARES)[best, None].double()
    torch.testing.assert_close(found.scale.double(), expected, rtol=2.0**-20, atol=0)  # stored in float32


@pytest.mark.parametrize("sign", [1, -1])
def test_uniform_levels_include_zero(sign: int) -> None:
    """A row of one sign begins, or ends, at 0."""
    weight = sign * (torch.rand(N, 20, generator=generator(4)) + 0.5).double()
    grid = uniform(20, shrink=1)
    grid.fit(0, weight, torch.ones(20).double())
    assert (grid.zero == (0 if sign > 0 else WEIGHT_TOP)).all()
    torch.testing.assert_close(grid.scale[:, 0].double() * WEIGHT_TOP, weight.abs().amax(1), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("fields", "tops"),
    [
        ({"steps": 3}, (3, 9)),
        ({"steps": 4, "grid": "compat"}, (3, 15)),
        ({"steps": 3, "weight_grid": "ternary"}, (2, 6)),
        ({"steps": 3, "weight_grid": "ternary", "span": "separate"}, (2, 6)),
    ],
    ids=str,
)
def test_codes_of_spiking_weights_are_sums_of_spikes(fields: dict, tops: tuple[int, int]) -> None:
    """Heavy tails saturate: both kinds of columns reach the highest code that T spikes give, and none goes beyond."""
    weight, hessian = layer(80)
    weight, mask = weight.float() * weight.float().square(), torch.arange(80) % 4 == 0
    q, _, _ = quantize_spikes(weight, hessian.float(), mask, SpikeConfig(weight_bits=2, act_bits=8, **fields))
    assert (int(q[:, ~mask].max()), int(q[:, mask].max())) == tops
