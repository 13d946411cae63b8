"""The Triton kernels of spike_linear: values by the interpreter, compiled within the limits of four processors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spiking import (
    MAIN_RULES,
    bound_of,
    epilogue_bound,
    exact_product,
    format_of,
    generator,
    integer_codes,
    integer_weight,
    random_mask,
    random_tokens,
    same,
)
from triton_tools import TARGETS, assert_all_fit, device, interpreted

from ranvier.ops import PackedWeight, SpikeFormat, pack_weight
from ranvier.ops._spike_triton import blocked_codes, blocked_places, linear_launches
from ranvier.ops._triton import Launch
from ranvier.ops.spike_encode import cpu as cpu_encode
from ranvier.ops.spike_encode import outputs_at
from ranvier.ops.spike_linear import _arguments, cpu_codes, reference_codes, triton_codes, triton_dynamic
from ranvier.reference.spike_encode import SpikeCodes

N = 70
SHARED, COMPAT, SEPARATE = MAIN_RULES[0], MAIN_RULES[3], MAIN_RULES[5]


def layer(form: SpikeFormat, mask: torch.Tensor, seed: int = 1) -> tuple[PackedWeight, torch.Tensor]:
    g = generator(seed)
    return pack_weight(torch.randn(N, form.channels, generator=g), mask, form), torch.randn(N, generator=g)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rule", "share", "channels"),
    [(SHARED, 0.2, 70), (COMPAT, 0.3, 600), (SEPARATE, 0.0, 133), (SEPARATE, 0.4, 90), (MAIN_RULES[6], 1.0, 36)],
)
def test_one_group_a_range_has_the_cpus_bits(rule: dict, share: float, channels: int) -> None:
    """gemv and gemm, split or not, one range or two: the bits of the CPU kernel, whose order of operations is the same."""
    mask = random_mask(channels, share, generator(channels))
    form = format_of(mask, rule)
    weight, bias = layer(form, mask)
    x = random_tokens(18, channels, torch.float32, generator(2))
    x[2, channels // 2] = float("nan")
    for tokens in (1, 3, 18):
        given = _arguments(weight, mask, bias if share else None, form, N)
        encoded = cpu_encode(x[:tokens], mask, form.salient_count, *rule.values(), 0)
        expected = cpu_codes(*encoded, *given, torch.float32)
        with interpreted():
            assert same(triton_codes(*encoded, *given, torch.float32), expected)
            if tokens == 3:
                assert same(triton_dynamic(x[:tokens], *given), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rule", "share", "channels", "group"),
    [(SHARED, 0.2, 70, 4), (SHARED, 0.1, 330, 160), (COMPAT, 0.4, 290, 128), (SEPARATE, 0.2, 90, 12), (SEPARATE, 0.0, 300, 32)],
)
def test_groups_are_within_the_bound(rule: dict, share: float, channels: int, group: int) -> None:
    """Groups of 4 to 160 channels, one range or two.

    epilogue_bound counts a rounding of the partial sum for each group and range, in any order. gemv rounds s_w v before it is
    added, at most one more unit of the sum of all terms; with two groups or ranges and more that is half as much again.
    """
    mask = random_mask(channels, share, generator(channels))
    form = format_of(mask, rule, group)
    weight, bias = layer(form, mask)
    x = random_tokens(17, channels, torch.float32, generator(2))
    for tokens in (2, 17):
        given = _arguments(weight, mask, bias, form, N)
        encoded = cpu_encode(x[:tokens], mask, form.salient_count, *rule.values(), group)
        truth = reference_codes(*encoded, *given, torch.float64)
        with interpreted():
            got = triton_codes(*encoded, *given, torch.float32)
        assert bool(((got.double() - truth).abs() <= 1.5 * epilogue_bound(encoded, weight, form, N, bias)).all())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rule", "extreme"), [(MAIN_RULES[4], -1), (SEPARATE, 1), (MAIN_RULES[7], -1), (MAIN_RULES[1], 1)])
def test_integers_are_exact(rule: dict, extreme: int) -> None:
    """Codes and weights at their extremes, all scales one: the product in int64, as far as float32 holds integers."""
    mask = random_mask(262, 0.4, generator(4))
    g = generator(6)
    for group, tokens in ((0, 19), (64, 2)):
        form = format_of(mask, rule, group)
        q = torch.full((N, 262), 15, dtype=torch.uint8)
        zero = torch.randint(0, 16, (N, sum(form.groups)), generator=g, dtype=torch.uint8)
        weight = integer_weight(q, zero, form)
        encoded = integer_codes(form, tokens, extreme, g)
        truth = exact_product(encoded, q, zero, form)
        assert max(bound_of(form)) <= 127 and int(truth.abs().max()) < 2**24
        with interpreted():
            got = triton_codes(*encoded, *_arguments(weight, mask, None, form, N), torch.float32)
        assert torch.equal(got.long(), truth)


def test_outputs_of_half_precision_are_rounded_once() -> None:
    """float16 y is the float32 one rounded."""
    mask = random_mask(64, 0.2, generator(1))
    form = format_of(mask, MAIN_RULES[0])
    weight, bias = layer(form, mask)
    x = torch.randn(2, 64, generator=generator(2))
    encoded = cpu_encode(x, mask, form.salient_count, *MAIN_RULES[0].values(), 0)
    given = _arguments(weight, mask, bias.half(), form, N)
    with interpreted():
        wide, half = (triton_codes(*encoded, *given, dtype) for dtype in (torch.float32, torch.float16))
    assert same(half, wide.half())


def test_no_tokens_and_odd_memory() -> None:
    """No tokens give no outputs; codes and weights at odd addresses and strided ones give the same values."""
    mask = random_mask(64, 0.2, generator(1))
    form = format_of(mask, MAIN_RULES[0])
    weight, bias = layer(form, mask)
    x = torch.randn(3, 64, generator=generator(2))
    with interpreted():
        expected = triton_dynamic(x, *_arguments(weight, mask, bias, form, N))
        assert triton_dynamic(x[:0], *_arguments(weight, mask, bias, form, N)).shape == (0, N)
        moved = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8)[1:].view(weight.packed.shape)
        moved.copy_(weight.packed)
        codes = cpu_encode(x, mask, form.salient_count, *MAIN_RULES[0].values(), 0)
        wide = torch.zeros(6, 65, dtype=torch.int8)
        wide[::2, 1:] = codes.codes
        given = _arguments(weight._replace(packed=moved), mask, bias, form, N)
        assert same(triton_codes(wide[::2, 1:], *codes[1:], *given, torch.float32), expected)
        assert same(triton_dynamic(x.t().contiguous().t(), *given), expected)


# --- compiled -----------------------------------------------------------------------------------------------------------------


def launches(tokens: int, outputs: int, rule: dict, group: int) -> list[Launch]:
    """Of a bfloat16 layer of Llama-2-7B's width, an eighth of its channels salient."""
    channels = 4096
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[:512] = True
    form = format_of(mask, rule, group)
    strips, groups = -(-outputs // 32), sum(form.groups)
    scale, zero = torch.empty(strips, groups, 32), torch.empty(strips, groups, 32, dtype=torch.uint8)
    total = zero.int() if form.grid == "compat" else None
    weight = PackedWeight(torch.empty(strips, sum(form.blocks), 64, dtype=torch.uint8), scale, zero, total)
    encoded = outputs_at(torch.empty(tokens, channels, dtype=torch.bfloat16), form, blocked_places(form))
    y = torch.empty(tokens, outputs, dtype=torch.bfloat16)
    return linear_launches(form, encoded, weight, torch.empty(outputs, dtype=torch.bfloat16), y, outputs)


# Tokens, outputs, rule and group that together take each entry of the tables, in the format that needs most registers there:
# two ranges with zero points of COMPAT, in groups where the entry takes them; of plain formats those that have spilled.
SHAPES = [
    (1, 2048, COMPAT, 32), (1, 4096, COMPAT, 0), (1, 4096, COMPAT, 128), (1, 4096, COMPAT, 32), (1, 4096, SHARED, 32),
    (4, 4096, COMPAT, 0), (8, 4096, COMPAT, 32), (16, 4096, COMPAT, 0), (16, 4096, COMPAT, 128), (32, 4096, SHARED, 0),
    (64, 4096, SHARED, 0), (64, 4096, COMPAT, 128), (64, 4096, SEPARATE, 64), (2048, 4096, SHARED, 0),
    (2048, 4096, SHARED, 128), (2048, 4096, COMPAT, 128),
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """Every shape of the table compiles within every limit, nothing spilled, to the processor's dot instructions."""
    used: set = set()
    with device(target, used):
        made = [launch for shape in SHAPES for launch in launches(*shape)]
    # Of what joins splits only the first: the others are the same lines with other counts.
    joins = [launch for launch in made if launch.kernel == "spike_linear_combine"]
    made = [launch for launch in made if launch.kernel != "spike_linear_combine"] + joins[:1]
    tensor_core = {
        "sm_80": "mma.sync.aligned.m16n8k32",
        "sm_90": "wgmma.mma_async",
        "sm_100": "tcgen05.mma",
        "gfx942": "mfma_i32",
    }
    for launch, needs in zip(made, assert_all_fit("spike_linear", target, made, used, tmp_path), strict=True):
        if launch.kernel == "spike_linear_gemm":
            assert tensor_core[target] in needs.text
        elif launch.kernel == "spike_linear_gemv":
            assert ("v_dot4_i32_i8" if target == "gfx942" else "dp4a.s32.s32") in needs.text
            assert target == "gfx942" or "cp.async" in needs.text


def test_operands_stay_in_registers_on_hopper(tmp_path: Path) -> None:
    """sm_90: packed weights go from shared memory straight to wgmma's registers, nothing is stored back or moved by bytes."""
    from triton_tools import resources

    with device("sm_90", set()):
        (launch,) = launches(2048, 4096, SHARED, 0)
    text = resources(launch, "sm_90", tmp_path).text
    start = text.index("Inner Loop")
    loop = text[start : text.index("bra", start)]
    assert "wgmma" in loop and "st.shared" not in loop and "ld.shared.b8" not in loop and "cp.async.cg" in loop


def test_blocked_codes_keep_aligned_memory() -> None:
    """Codes that already are in whole blocks are not copied."""
    mask = random_mask(64, 0.0, generator(1))
    codes = torch.zeros(3, 64, dtype=torch.int8)
    assert blocked_codes(format_of(mask, SHARED), codes).data_ptr() == codes.data_ptr()
    assert SpikeCodes._fields[0] == "codes"
