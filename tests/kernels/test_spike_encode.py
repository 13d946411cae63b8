"""The Triton kernel of spike_encode: by the interpreter equal to the CPU kernel's integers, compiled within every limit."""

from __future__ import annotations

from importlib import import_module
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
    same,
    special_tokens,
)
from triton_tools import TARGETS, assert_all_fit, device, interpreted

from ranvier.ops._spike_triton import Gate, Norm, blocked_places, encode_launches
from ranvier.ops._triton import Launch, run
from ranvier.ops.spike_encode import SpikeFormat, cpu, outputs_at, triton
from ranvier.reference.spike_encode import SpikeCodes

# The modules, whose names in ranvier.ops are those of their functions.
spike_rms_norm, spike_silu_mul = (import_module(f"ranvier.ops.spike_{name}") for name in ("rms_norm", "silu_mul"))


def some_tokens(channels: int, dtype: torch.dtype, seed: int = 5) -> torch.Tensor:
    """Random tokens, every other of the special ones, and three that are not finite."""
    odd = torch.ones(3, channels, dtype=dtype)
    odd[0, channels // 2], odd[1, 0], odd[2, -1] = float("nan"), float("inf"), -float("inf")
    return torch.cat([random_tokens(3, channels, dtype, generator(seed)), special_tokens(channels, dtype)[seed % 2 :: 2], odd])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
def test_codes_are_the_cpus(rule: dict) -> None:
    """Codes, scales, sums and zero points have the CPU kernel's bits, with every share of salient channels, group and clip."""
    cases = [(0.0, 0, 257), (0.2, 0, 70), (0.2, 12, 70), (0.5, 32, 257), (1.0, 4, 33), (0.1, 128, 1)]
    cases = cases[MAIN_RULES.index(rule) % 2 :: 2]  # every other of them: all formats meet all kinds
    if rule in (MAIN_RULES[0], MAIN_RULES[3]):
        cases.append((0.2, 64, 4100))  # more than one tile
    with interpreted():
        for index, (share, group, channels) in enumerate(cases):
            mask = random_mask(channels, share, generator(index))
            form = format_of(mask, rule, group)
            arguments = (some_tokens(channels, DTYPES[index % 3], index), mask, form.salient_count, *rule.values(), group)
            arguments += ((1.0, 0.7, 0.3)[index % 3],)
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
def test_rms_norm_comes_first(weighting: str) -> None:
    """Codes are exactly those of the normalised tokens that the kernel also returns, and these are RMSNorm's.

    Against float64, in units of 2^-24: the sum of K squares K / 2 + 1 relative to the root, quotient, root and reciprocal 3,
    two products and 1 + w 3.
    """
    channels, epsilon = 1100, 1e-5
    mask = random_mask(channels, 0.1, generator(7))
    x = torch.randn(3, channels, generator=generator(8)) * torch.tensor([1e-3, 1.0, 1e3]).unsqueeze(1)
    weight = torch.rand(channels, generator=generator(9)) + 0.5
    rule = (int(mask.sum()), *MAIN_RULES[5 if weighting == "one_plus" else 0].values(), 0, 0.8)
    with interpreted():
        y, *codes = spike_rms_norm.triton(x, weight, epsilon, weighting, mask, *rule)
    assert_same_codes(SpikeCodes(*codes), cpu(y, mask, *rule))
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight.double() + (weighting == "one_plus"))
    assert bool(((y.double() - truth).abs() <= 2.0**-24 * (channels / 2 + 7) * truth.abs()).all())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated_product_has_the_cpus_bits(dtype: torch.dtype) -> None:
    """y and its codes have the CPU kernel's bits, also where e^-g leaves float32.

    Not in bfloat16, to which the interpreter does not round to the nearest even.
    """
    gate = random_tokens(7, 1100, dtype, generator(5))
    gate[0, :6] = torch.tensor([104.5, -104.5, 88.0, -88.0, 0.0, -0.0])
    gate[1, 3], gate[2, 4], gate[3, 5] = float("nan"), float("inf"), -float("inf")
    up, mask = torch.randn(7, 1100, generator=generator(6)), random_mask(1100, 0.2, generator(7))
    for rule in (MAIN_RULES[0], MAIN_RULES[5]):
        given = (gate.t().contiguous().t(), up, mask, int(mask.sum()), *rule.values(), 12, 0.9)
        with interpreted():
            got = spike_silu_mul.triton(*given)
        assert all(same(a, b) for a, b in zip(got, spike_silu_mul.cpu(*given), strict=True))


def launches(rule: dict, group: int, channels: int, source: str | None = None) -> list[Launch]:
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[: channels // 8] = True
    form: SpikeFormat = format_of(mask, rule, group)
    x = torch.empty(3, channels, dtype=torch.bfloat16)
    out: SpikeCodes = outputs_at(x, form, blocked_places(form))
    norm = Norm(torch.empty(channels, dtype=torch.bfloat16), 1e-5, "after_cast", torch.empty_like(x))
    sources = {None: None, "norm": norm, "gate": Gate(torch.empty_like(x), torch.empty_like(x))}
    return encode_launches(form, x, mask, out, blocked_places(form), sources[source])


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """Every shape of the table compiles without spills, division is IEEE's, and no multiply-add was contracted."""
    used: set = set()
    with device(target, used):
        made = launches(MAIN_RULES[0], 128, 4096, "norm") + launches(MAIN_RULES[5], 32, 1024)
        made += launches(MAIN_RULES[3], 0, 4096, "gate")
    for launch, needs in zip(made, assert_all_fit("spike_encode", target, made, used, tmp_path), strict=True):
        if target.startswith("sm_"):
            assert "div.approx.f" not in needs.text and "div.full.f" not in needs.text
            assert launch.arguments.get("SOURCE") == "silu_mul" or "fma.rn.f32" not in needs.text
