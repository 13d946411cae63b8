"""The Triton kernel of spike_encode: by the interpreter equal to the CPU kernel's integers, compiled within every limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spiking import (
    DTYPES,
    MAIN_RULES,
    assert_same_codes,
    format_of,
    generator,
    random_mask,
    random_tokens,
    rule_id,
    special_tokens,
)
from triton_tools import TARGETS, assert_all_fit, device, interpreted

from ranvier.ops._spike_triton import Norm, blocked_places, encode_launches, packed_places
from ranvier.ops._triton import Launch, run
from ranvier.ops.spike_encode import SpikeFormat, cpu, outputs_at, triton
from ranvier.reference.spike_encode import SpikeCodes


def some_tokens(channels: int, dtype: torch.dtype, seed: int = 5) -> torch.Tensor:
    """Random tokens, every other of the special ones, and three that are not finite."""
    odd = torch.ones(3, channels, dtype=dtype)
    odd[0, channels // 2], odd[1, 0], odd[2, -1] = float("nan"), float("inf"), -float("inf")
    return torch.cat([random_tokens(3, channels, dtype, generator(seed)), special_tokens(channels, dtype)[seed % 2 :: 2], odd])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
def test_codes_are_the_cpus(rule: dict) -> None:
    """Codes, scales, sums and zero points have the bits of the CPU kernel, with every share of salient channels and group."""
    cases = [(0.0, 0, 257), (0.2, 0, 70), (0.2, 12, 70), (0.5, 32, 257), (1.0, 4, 33), (0.1, 128, 1)]
    cases = cases[MAIN_RULES.index(rule) % 2 :: 2]  # every other of them: all formats meet all kinds
    if rule in (MAIN_RULES[0], MAIN_RULES[3]):
        cases.append((0.2, 64, 4100))  # more than one tile
    with interpreted():
        for index, (share, group, channels) in enumerate(cases):
            mask = random_mask(channels, share, generator(index))
            form = format_of(mask, rule, group)
            arguments = (some_tokens(channels, DTYPES[index % 3], index), mask, form.salient_count, *rule.values(), group)
            assert_same_codes(triton(*arguments), cpu(*arguments))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rule", [MAIN_RULES[0], MAIN_RULES[5]], ids=rule_id)
def test_blocked_codes_are_filled_up(rule: dict) -> None:
    """Codes in whole blocks are the same codes with zeros after each range, and so are sums of groups."""
    mask = random_mask(71, 0.3, generator(3))
    for group in (0, 12):
        form = format_of(mask, rule, group)
        x = some_tokens(71, torch.float32)
        out = outputs_at(x, form, blocked_places(form))
        with interpreted():
            run(encode_launches(form, x, mask, out, blocked_places(form)))
        expected = cpu(x, mask, form.salient_count, *rule.values(), group)
        parts = [torch.nn.functional.pad(p, (0, -p.shape[1] % 4)) for p in expected.codes.split(form.lengths, 1)]
        assert_same_codes(out, expected._replace(codes=torch.cat(parts, 1)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weighting", ["after_cast", "before_cast", "one_plus"])
@pytest.mark.parametrize("rule", [MAIN_RULES[0], MAIN_RULES[5]], ids=rule_id)
def test_rms_norm_comes_first(rule: dict, weighting: str) -> None:
    """Codes are exactly those of the normalised tokens that the kernel also returns, and these are RMSNorm's.

    Against float64, in units of 2^-24: the sum of K squares K / 2 + 1 relative to the root, quotient, root and reciprocal 3,
    two products and 1 + w 3.
    """
    channels, epsilon = 1100, 1e-5
    mask = random_mask(channels, 0.1, generator(7))
    x = torch.randn(3, channels, generator=generator(8)) * torch.tensor([1e-3, 1.0, 1e3]).unsqueeze(1)
    weight = torch.rand(channels, generator=generator(9)) + 0.5
    form = format_of(mask, rule)
    got, norm = outputs_at(x, form, packed_places(form)), Norm(weight, epsilon, weighting, torch.empty_like(x))
    with interpreted():
        run(encode_launches(form, x, mask, got, packed_places(form), norm))
    assert_same_codes(got, cpu(norm.out, mask, form.salient_count, *rule.values(), 0))
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight.double() + (weighting == "one_plus"))
    assert bool(((norm.out.double() - truth).abs() <= 2.0**-24 * (channels / 2 + 7) * truth.abs()).all())


def launches(rule: dict, group: int, channels: int, *, norm: bool) -> list[Launch]:
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[: channels // 8] = True
    form: SpikeFormat = format_of(mask, rule, group)
    x = torch.empty(3, channels, dtype=torch.bfloat16)
    out: SpikeCodes = outputs_at(x, form, blocked_places(form))
    weight = Norm(torch.empty(channels, dtype=torch.bfloat16), 1e-5, "after_cast", torch.empty_like(x)) if norm else None
    return encode_launches(form, x, mask, out, blocked_places(form), weight)


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """Every shape of the table compiles without spills, division is IEEE's, and no multiply-add was contracted."""
    used: set = set()
    with device(target, used):
        made = launches(MAIN_RULES[0], 128, 4096, norm=True) + launches(MAIN_RULES[5], 32, 1024, norm=False)
        made += launches(MAIN_RULES[3], 0, 4096, norm=False)
    for needs in assert_all_fit("spike_encode", target, made, used, tmp_path):
        if target.startswith("sm_"):
            assert "div.approx.f" not in needs.text and "div.full.f" not in needs.text and "fma.rn.f32" not in needs.text
