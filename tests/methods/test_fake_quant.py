"""Fake quantization: the values and codes of the real layers, and the straight-through gradient."""

from __future__ import annotations

import pytest
import torch
from decoder_block import Frozen, mask_of
from spiking import MAIN_RULES, format_of, rule_id

from ranvier.methods.spikellm.fake_quant import (
    CLIP_SHARES,
    fake_input,
    fake_weight,
    quantized_weight,
    search_clip,
    weight_layout,
)
from ranvier.reference.spike_encode import channel_order, spike_decode
from ranvier.reference.spike_linear import quantize_weight


@pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
@pytest.mark.parametrize("count", [0, 5, 33])
def test_fake_inputs_are_the_codes_values(rule: dict, count: int) -> None:
    """x^ is bit for bit what the reference decodes."""
    mask = mask_of(33, count)
    x = torch.randn(3, 4, 33) * torch.exp(torch.randn(33))
    assert torch.equal(fake_input(x, mask, format_of(mask, rule)), spike_decode(x, mask, **rule))


@pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
def test_gradient_of_fake_inputs(rule: dict) -> None:
    """The straight-through gradient is the true one of the surrogate with frozen rounding, which gradcheck confirms."""
    mask = mask_of(11, 3)
    form, frozen = format_of(mask, rule), Frozen()
    x = (torch.randn(2, 11, dtype=torch.float64) * 3).requires_grad_()
    grad = torch.randn(2, 11, dtype=torch.float64)
    (exact,) = torch.autograd.grad(fake_input(x, mask, form, frozen), x, grad)
    (ours,) = torch.autograd.grad(fake_input(x, mask, form), x, grad)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: fake_input(t, mask, form, frozen.restart()), x)


@pytest.mark.parametrize("size", [None, 32])
def test_gradient_of_fake_weights(size: int | None) -> None:
    """The same for weights and their clipping, where clipped weights have a gradient through the scale only."""
    mask = mask_of(64, 7)
    layout = weight_layout(format_of(mask, MAIN_RULES[5], size), mask)
    weight = torch.randn(3, 64, dtype=torch.float64).requires_grad_()
    shape = (3, layout.count if size else 1)
    clip = [torch.empty(shape, dtype=torch.float64).uniform_(-0.5, 2.0).requires_grad_() for _ in range(2)]
    frozen, grad = Frozen(), torch.randn(3, 64, dtype=torch.float64)
    exact = torch.autograd.grad(fake_weight(weight, layout, tuple(clip), frozen), [weight, *clip], grad)
    ours = torch.autograd.grad(fake_weight(weight, layout, tuple(clip)), [weight, *clip], grad)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda w, g, b: fake_weight(w, layout, (g, b), frozen.restart()), (weight, *clip))


@pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
@pytest.mark.parametrize("size", [None, 32])
def test_weight_codes_without_clipping_are_round_to_nearest(rule: dict, size: int | None) -> None:
    """q, scale and zero are what quantize_weight gives, q in the layer's own channel order."""
    mask, weight = mask_of(96, 10), torch.randn(5, 96)
    form = format_of(mask, rule, size)
    order = channel_order(mask) if len(form.lengths) == 2 else torch.arange(96)
    q, scale, zero = quantize_weight(weight[:, order], form.lengths, size)
    ours = quantized_weight(weight, weight_layout(form, mask), None)
    assert torch.equal(ours.q[:, order], q)
    assert torch.equal(ours.scale.expand_as(scale), scale) and torch.equal(ours.zero.expand_as(zero), zero)
    assert ours.scale.shape == (5, sum(form.groups))


@pytest.mark.parametrize("group_size", [None, 32])
def test_searched_clipping_has_the_least_weighted_error(group_size: int | None) -> None:
    """Of all shares, for every row or group, by the power of each channel's input."""
    mask = mask_of(64, 0)
    layout = weight_layout(format_of(mask, MAIN_RULES[0], group_size), mask)
    weight, power = torch.randn(6, 64, dtype=torch.float64), torch.exp(3 * torch.randn(64)).double()
    groups = layout.groups if group_size else torch.zeros(64, dtype=torch.int64)
    errors = []
    for share in CLIP_SHARES:
        logit = torch.logit(torch.full((6, int(groups.max()) + 1), share, dtype=torch.float64))
        error = (fake_weight(weight, layout, (logit, logit)) - weight).square() * power
        errors.append(torch.stack([error[:, groups == g].sum(1) for g in groups.unique()], 1))
    best = torch.tensor(CLIP_SHARES, dtype=torch.float64)[torch.stack(errors).argmin(0)]
    torch.testing.assert_close(torch.sigmoid(search_clip(weight, layout, power)), best, rtol=1e-9, atol=0)
