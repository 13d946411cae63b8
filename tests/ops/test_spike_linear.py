"""spike_linear: exact integers on every level, float results inside a derived bound and equal bit for bit over levels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking import (
    CHANNELS,
    DTYPES,
    LEVELS,
    MAIN_RULES,
    ROUNDING,
    RULES,
    epilogue_bound,
    exact_product,
    format_of,
    generator,
    integer_codes,
    integer_weight,
    layouts,
    random_mask,
    random_tokens,
    rule_id,
    same,
    special_tokens,
    tables,
)
from torch import Tensor

import ranvier
from ranvier import _C
from ranvier.ops import PackedWeight, SpikeCodes, SpikeFormat, pack_weight, spike_encode, spike_linear, spike_linear_dynamic
from ranvier.ops.spike_linear import pack_codes, unpack_codes, unpack_weight
from ranvier.reference import spike_linear as reference
from ranvier.reference.spike_encode import spike_decode

pytestmark = pytest.mark.usefixtures("poisoned")

main_rules = pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
OUTPUTS = (1, 5, 16, 31, 32, 33, 64, 67)


def assert_exact(form: SpikeFormat, tokens: int, out: int, extreme: int | None, g: torch.Generator) -> None:
    encoded = integer_codes(form, tokens, extreme, g)
    groups = sum(form.groups)
    q = torch.randint(0, 16, (out, form.channels), generator=g, dtype=torch.uint8)
    zero = torch.randint(0, 16, (out, groups), generator=g, dtype=torch.uint8)
    if extreme is not None:
        q[:], zero[:] = 15, 0
    expected = exact_product(encoded, q, zero, form)
    assert expected.abs().max().item() < 2**24 if expected.numel() else True
    got = spike_linear(encoded, integer_weight(q, zero, form), form, out, salient_mask=salient_mask_of(form))
    assert torch.equal(got.long(), expected) and torch.equal(got, got.round())


def salient_mask_of(form: SpikeFormat) -> Tensor | None:
    return torch.arange(form.channels) >= form.channels - form.salient_count if form.salient_count else None


@settings(max_examples=60)
@given(
    rule=st.sampled_from(RULES),
    channels=st.sampled_from(CHANNELS),
    tokens=st.integers(0, 27),
    out=st.sampled_from(OUTPUTS),
    group_size=st.sampled_from((0, 4, 32, 64, 128)),
    share=st.sampled_from((0.0, 0.2, 1.0)),
    extreme=st.sampled_from((None, None, -1, 1)),
    seed=st.integers(0, 2**31),
)
def test_integers_are_exact(
    isa: str, rule: dict, channels: int, tokens: int, out: int, group_size: int, share: float, extreme: int | None, seed: int
) -> None:
    """With every scale one the output is the integer sum over all spikes, below 2^24 exact in float32.  # spec spikellm O5"""
    form = SpikeFormat(channels, int(share * channels), **rule, group_size=group_size)
    assert_exact(form, tokens, out, extreme, generator(seed))


WINDOWS = [(4, 1, 72), (4, 2, 36), (4, 4, 18), (8, 1, 8)]


@pytest.mark.parametrize(("act_bits", "steps", "blocks"), WINDOWS)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 12])
def test_int16_window(isa: str, act_bits: int, steps: int, blocks: int, sign: int, tokens: int) -> None:
    """All-max codes and weights around the AVX2 window: one more block must be flushed before.  # spec spikellm O12"""
    top = 127 if act_bits == 8 else steps * 15
    assert blocks * 2 * top * 15 <= 32767 < (blocks + 1) * 2 * top * 15
    for count in (blocks - 1, blocks, blocks + 1, 2 * blocks, 2 * blocks + 1):
        for tail in (0, 1, 2):
            form = SpikeFormat(4 * count + tail, 0, act_bits, steps, "shared", "consistent")
            assert_exact(form, tokens, 33, sign, generator())


@pytest.mark.parametrize("span", ["shared", "separate"])
def test_extreme_codes_of_salient_range(isa: str, span: str) -> None:
    """Salient 8-bit codes of +-127, and compat codes of 127, meet weights of 15 without wrapping."""
    steps, grid = (1, "consistent") if span == "separate" else (8, "compat")
    for sign in (-1, 1):
        assert_exact(SpikeFormat(300, 150, 4, steps, span, grid), 7, 40, sign, generator())


@pytest.mark.parametrize("channels", [4096, 5120, 8192, 11008, 13824])
def test_accumulator_stays_below_2_to_24(channels: int) -> None:
    """K T (L - 1) 15 < 2^24 for every Llama shape, T up to 4.  # spec spikellm O11"""
    assert channels * 4 * 15 * 15 < 2**24


@pytest.mark.parametrize("tokens", [1, 13])
def test_llama_rows_are_exact(isa: str, tokens: int) -> None:
    """K = 11008, all codes 60 and weights 15, then random: also as float32 and bfloat16 products.  # spec spikellm O11"""
    form = SpikeFormat(11008, 0, 4, 4, "shared", "consistent")
    assert_exact(form, tokens, 33, 1, generator())
    assert_exact(form, tokens, 33, -1, generator())
    encoded = integer_codes(form, tokens, None, generator(2))
    q = torch.randint(0, 16, (33, 11008), generator=generator(3), dtype=torch.uint8)
    zero = torch.zeros((33, 1), dtype=torch.uint8)
    got = spike_linear(encoded, integer_weight(q, zero, form), form, 33)
    assert torch.equal(got, encoded.codes.float() @ q.float().T)
    # Partial sums of |c q| stay below 2^24, so a bfloat16 product with float32 sums is exact; its operands lose nothing.
    operands = encoded.codes.bfloat16(), q.bfloat16()
    assert torch.equal(operands[0].float() @ operands[1].float().T, got)
    assert torch.equal(operands[0].to(torch.int8), encoded.codes)


@settings(max_examples=60)
@given(
    rule=st.sampled_from(RULES),
    channels=st.sampled_from(CHANNELS),
    tokens=st.integers(0, 27),
    out=st.sampled_from(OUTPUTS),
    group_size=st.sampled_from((None, 32, 64, 128)),
    share=st.sampled_from((0.0, 0.2, 1.0)),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from((None, *DTYPES)),
    seed=st.integers(0, 2**31),
)
def test_levels_agree_and_float64_confirms(
    rule: dict, channels: int, tokens: int, out: int, group_size: int | None, share: float,
    dtype: torch.dtype, bias_dtype: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    """Every level gives the scalar level's bits, in every output type; those lie within the bound of the float64 formula."""
    g = generator(seed)
    mask = random_mask(channels, share, g)
    form = format_of(mask, rule, group_size)
    weight = pack_weight(torch.randn(out, channels, generator=g), mask, form)
    bias = None if bias_dtype is None else torch.randn(out, generator=g).to(bias_dtype)
    x = torch.randn(tokens, channels, generator=g).to(dtype)
    before = _C.isa()
    results = []
    for level in LEVELS:
        _C.set_isa(level)
        results.append(spike_linear_dynamic(x, weight, form, out, bias, mask))
    _C.set_isa(before)
    assert all(same(y, results[0]) for y in results)
    encoded = spike_encode(x, mask, **rule, group_size=group_size, backend="reference")
    assert same(spike_linear(encoded, weight, form, out, bias, mask, dtype=dtype), results[0])
    q, scale, zero = tables(weight, form, out)
    truth = reference.spike_linear(encoded, q, scale, zero, bias, form.lengths, group_size)
    # The last rounding, to the output type: half its spacing, 2^-25 where float16 is subnormal.
    bound = epilogue_bound(encoded, weight, form, out, bias)
    bound = bound + (truth.abs() + bound) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)
    assert results[0].dtype == dtype and ((results[0].double() - truth).abs() <= bound).all()


@main_rules
@pytest.mark.parametrize("group_size", [None, 32])
def test_one_product_equals_dequantized_matmul(rule: dict, group_size: int | None) -> None:
    """The integer form in float64 is decode(x) @ dequantized W to 1e-12, its float32 epilogue to 1e-5.  # spec spikellm O5"""
    mask = random_mask(193, 0.2, generator(4))
    form = format_of(mask, rule, group_size)
    weight = pack_weight(torch.randn(40, 193, generator=generator()), mask, form)
    x = torch.randn(9, 193, generator=generator(2))
    # float64 throughout: the decoder multiplies scale and code without rounding to float32
    encoded = spike_encode(x, mask, **rule, group_size=group_size, backend="reference")
    q, scale, zero = tables(weight, form, 40)
    y = reference.spike_linear(encoded, q, scale, zero, None, form.lengths, group_size)
    groups, ranges = reference.group_index(form.lengths, group_size)
    per_channel = ranges[groups]
    decoded = encoded.scale.double()[:, per_channel] * (encoded.codes.double() - encoded.zero.double()[:, per_channel])
    dequantized = reference.dequantize_weight(q, scale.double(), zero, groups)
    expected = decoded @ dequantized.T
    size = decoded.abs() @ dequantized.abs().T
    assert ((y - expected).abs() <= 1e-12 * size).all()
    assert ((spike_linear_dynamic(x, weight, form, 40, None, mask) - expected).abs() <= 1e-5 * size).all()
    natural = spike_decode(x, mask, **rule).double() @ unpack_weight(weight, mask, form, 40).double().T
    assert ((natural - expected).abs() <= 2.0**-22 * size).all()


def layer(rule: dict, channels: int, out: int, group_size: int | None = None) -> tuple:
    mask = random_mask(channels, 0.2, generator(5))
    form = format_of(mask, rule, group_size)
    weight = pack_weight(torch.randn(out, channels, generator=generator(6)), mask, form)
    return weight, form, torch.randn(out, generator=generator(7)), mask


@main_rules
@dtypes
def test_rows_do_not_know_each_other(isa: str, rule: dict, dtype: torch.dtype) -> None:
    """Row m of a batch of any size from 1 to 40 has the bits of the row alone.  # spec spikellm O17"""
    weight, form, bias, mask = layer(rule, 70, 37, 32)
    x = random_tokens(40, 70, dtype, generator())
    alone = torch.cat([spike_linear_dynamic(x[m : m + 1], weight, form, 37, bias, mask) for m in range(40)])
    for tokens in range(1, 41):
        assert same(spike_linear_dynamic(x[:tokens], weight, form, 37, bias, mask), alone[:tokens])


@main_rules
def test_channel_order_does_not_matter(isa: str, rule: dict) -> None:
    """Permuting K of x, W and the mask together leaves every bit of y: the integer sums are the same.  # spec spikellm O7"""
    mask, w = random_mask(131, 0.2, generator(5)), torch.randn(40, 131, generator=generator(6))
    x, order = torch.randn(9, 131, generator=generator(7)), torch.randperm(131, generator=generator(8))
    form = format_of(mask, rule)
    plain = spike_linear_dynamic(x, pack_weight(w, mask, form), form, 40, None, mask)
    moved = pack_weight(w[:, order], mask[order], form)
    assert same(spike_linear_dynamic(x[:, order], moved, form, 40, None, mask[order]), plain)


@main_rules
@dtypes
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=lambda d: f"bias-{str(d)[6:]}")
def test_zero_token_gives_the_bias(isa: str, rule: dict, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    """The output of an all-zero token is the bias, rounded once to the output type.  # spec spikellm O14"""
    weight, form, bias, mask = layer(rule, 37, 41)
    got = spike_linear_dynamic(torch.zeros(3, 37, dtype=dtype), weight, form, 41, bias.to(bias_dtype), mask)
    assert same(got, bias.to(bias_dtype).to(dtype).expand(3, 41).contiguous())


@main_rules
@dtypes
def test_special_tokens_agree_over_levels(rule: dict, dtype: torch.dtype) -> None:
    """Subnormal, huge, constant and one-hot tokens: equal bits on all levels, finite wherever float64 stays in range."""
    weight, form, bias, mask = layer(rule, 67, 37)
    x = special_tokens(67, dtype)
    before, results = _C.isa(), []
    for level in LEVELS:
        _C.set_isa(level)
        results.append(spike_linear_dynamic(x, weight, form, 37, bias, mask))
    _C.set_isa(before)
    assert all(same(y, results[0]) for y in results)
    truth = spike_linear(spike_encode(x, mask, **rule, backend="reference"), weight, form, 37, bias, mask, backend="reference")
    assert torch.equal(results[0].isfinite(), truth.to(dtype).isfinite())


@main_rules
@dtypes
def test_not_finite_token_is_alone(isa: str, rule: dict, dtype: torch.dtype) -> None:
    """NaN or Inf in a token: NaN in that row of y, the other rows keep their bits, whatever tile they share."""
    weight, form, bias, mask = layer(rule, 33, 37)
    x = random_tokens(14, 33, dtype, generator())
    clean = spike_linear_dynamic(x, weight, form, 37, bias, mask)
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 6, 13):
            spoiled = x.clone()
            spoiled[row, 32] = value
            y = spike_linear_dynamic(spoiled, weight, form, 37, bias, mask)
            others = torch.arange(14) != row
            assert y[row].isnan().all() and same(y[others], clean[others])


@main_rules
@dtypes
def test_layouts(isa: str, rule: dict, dtype: torch.dtype) -> None:
    """Strided, offset, expanded, oddly addressed and read-only tokens; strided weights, mask and bias; inputs unchanged."""
    weight, form, bias, mask = layer(rule, 33, 37)
    strided = PackedWeight(*(None if t is None else torch.stack([t, t], -1)[..., 0] for t in weight))
    strided_bias, strided_mask = torch.stack([bias, bias], 1)[:, 1], torch.stack([mask, mask], 1)[:, 1]
    for name, x in layouts(random_tokens(6, 33, dtype, generator())):
        before = x.clone()
        expected = spike_linear_dynamic(before.contiguous(), weight, form, 37, bias, mask)
        assert same(spike_linear_dynamic(x, strided, form, 37, strided_bias, strided_mask), expected), name
        assert same(x, before), name
    encoded = spike_encode(random_tokens(6, 33, dtype, generator()), mask, **rule)
    expected = spike_linear(encoded, weight, form, 37, bias, mask)
    spread = SpikeCodes(*(torch.stack([t, t], -1)[..., 0] for t in encoded))
    assert same(spike_linear(spread, strided, form, 37, strided_bias, strided_mask), expected)


def test_threads_and_repeats(isa: str, threads: None) -> None:
    """One thread, two threads and a hundred repeats give the same bits, with few outputs and with few tokens."""
    for tokens, out in ((70, 40), (2, 1500)):
        weight, form, bias, mask = layer(MAIN_RULES[5], 515, out, 128)
        x = random_tokens(tokens, 515, torch.float32, generator())
        torch.set_num_threads(1)
        single = spike_linear_dynamic(x, weight, form, out, bias, mask)
        torch.set_num_threads(2)
        for _ in range(100 if isa != "scalar" else 5):
            assert same(spike_linear_dynamic(x, weight, form, out, bias, mask), single)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,), (2, 3, 16)])
def test_shapes(isa: str, shape: tuple[int, ...]) -> None:
    """Any leading dimensions, none and empty ones too."""
    weight, form, bias, mask = layer(MAIN_RULES[0], 16, 5)
    x = torch.randn(shape)
    y = spike_linear_dynamic(x, weight, form, 5, bias, mask)
    assert y.shape == (*shape[:-1], 5)
    assert same(y.view(-1, 5), spike_linear_dynamic(x.view(-1, 16), weight, form, 5, bias, mask))


@given(
    out=st.integers(1, 70), low=st.integers(1, 70), salient=st.integers(0, 40), seed=st.integers(0, 2**31)
)  # fmt: skip
def test_packing_round_trips(out: int, low: int, salient: int, seed: int) -> None:
    """unpack_codes inverts pack_codes; the filled-up channels and outputs are zero."""
    lengths = [low, salient] if salient else [low]
    q = torch.randint(0, 16, (out, low + salient), generator=generator(seed), dtype=torch.uint8)
    packed = pack_codes(q, lengths)
    assert packed.shape == (-(-out // 32), sum(-(-n // 4) for n in lengths), 64)
    assert torch.equal(unpack_codes(packed, lengths, out), q)
    nibbles = (packed & 15).long().sum() + (packed >> 4).long().sum()
    assert nibbles == q.long().sum()


@main_rules
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_weight_error_is_half_a_step(rule: dict, group_size: int | None) -> None:
    """|w - w^| <= s_w / 2, and a step more at an end that the rounded zero point moved; constant rows survive."""
    mask, w = random_mask(256, 0.25, generator(5)), torch.randn(40, 256, generator=generator(6))
    w[3], w[4], w[5] = 0.0, 2.5, -1e-30
    form = format_of(mask, rule, group_size)
    weight = pack_weight(w, mask, form)
    error = (unpack_weight(weight, mask, form, 40) - w).abs()
    assert error[3].max() == 0 and error[4].max() <= 2.0**-22 * 2.5
    step = weight.scale.transpose(1, 2).reshape(-1, sum(form.groups))[:40].amax(-1, keepdim=True)
    assert (error <= 1.001 * step).all() and (error <= 0.501 * step).float().mean() > 0.95


W, FORM, BIAS, MASK = layer(MAIN_RULES[0], 16, 5)
X, N = torch.zeros(2, 16), 5


def change(form: SpikeFormat, **values: object) -> SpikeFormat:
    return dataclasses.replace(form, **values)


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (TypeError, "float64", (X.double(), W, FORM, N, BIAS, MASK)),
        (ValueError, "no dimensions", (torch.tensor(1.0), W, FORM, N, BIAS, MASK)),
        (ValueError, "15 channels", (torch.zeros(2, 15), W, FORM, N, BIAS, MASK)),
        (ValueError, "20 channels", (torch.zeros(2, 20), W, change(FORM, salient_count=0), N)),
        (ValueError, "15 channels", (torch.zeros(2, 15), W, change(FORM, salient_count=0), N)),
        (ValueError, r"bias has shape \[4\]", (X, W, FORM, N, BIAS[:4], MASK)),
        (TypeError, "bias is torch.float64", (X, W, FORM, N, BIAS.double(), MASK)),
        (TypeError, "weight_scale", (X, W._replace(scale=W.scale.half()), FORM, N, BIAS, MASK)),
        (TypeError, "weight_packed", (X, W._replace(packed=W.packed.view(torch.int8)), FORM, N, BIAS, MASK)),
        (ValueError, "weight_zero", (X, W._replace(zero=W.zero[..., :31]), FORM, N, BIAS, MASK)),
        (ValueError, "weight_packed", (X, W, FORM, 33, None, MASK)),
        (ValueError, "weight_scale", (X, W, change(FORM, group_size=4), N, BIAS, MASK)),
        (ValueError, "weight_sum", (X, W, change(FORM, grid="compat", steps=1), N, BIAS, MASK)),
        (TypeError, "salient_mask", (X, W, FORM, N, BIAS, MASK.float())),
        (ValueError, "salient_mask", (X, W, FORM, N, BIAS, None)),
        (ValueError, "int8 ends at 127", (X, W, change(FORM, steps=9), N, BIAS, MASK)),
    ],
)
def test_bad_input(error: type, says: str, arguments: tuple) -> None:
    """Tensors that do not belong together have an error that says what came and what is allowed."""
    with pytest.raises(error, match=says):
        spike_linear_dynamic(*arguments)


@pytest.mark.parametrize(
    ("error", "says", "field", "value"),
    [
        (TypeError, "codes", "codes", torch.zeros(2, 16)),
        (ValueError, "scale", "scale", torch.zeros(2, 2)),
        (ValueError, "code_sum", "code_sum", torch.zeros(3, 1, dtype=torch.int32)),
        (TypeError, "zero", "zero", torch.zeros(2, 1)),
    ],
)
def test_bad_codes(error: type, says: str, field: str, value: Tensor) -> None:
    """Codes that no spike_encode of this format returned are refused by name, and so is an output type."""
    encoded = spike_encode(X, MASK)
    with pytest.raises(error, match=f"{says} "):
        spike_linear(encoded._replace(**{field: value}), W, FORM, N, BIAS, MASK)
    with pytest.raises(TypeError, match="float64"):
        spike_linear(encoded, W, FORM, N, BIAS, MASK, dtype=torch.float64)
    with pytest.raises(ranvier.BackendError, match="backend 'triton' cannot run"):
        spike_linear(encoded, W, FORM, N, BIAS, MASK, backend="triton")


def test_codes_beyond_the_format_are_refused(isa: str) -> None:
    """Codes that the 16-bit sums of one level have no room for raise on every level."""
    form = SpikeFormat(64, 0, 4, 1, "shared", "consistent")
    weight = pack_weight(torch.randn(8, 64, generator=generator()), None, form)
    encoded = spike_encode(torch.randn(3, 64, generator=generator()), act_bits=4, steps=1)
    for wrong in (16, -16, 127, -128):
        codes = encoded.codes.clone()
        codes[2, 63] = wrong
        with pytest.raises(ValueError, match="codes are larger than this format's"):
            spike_linear(encoded._replace(codes=codes), weight, form, 8)


def test_negated_tables_are_read_with_their_sign() -> None:
    """A bias and a scale that are views with a negative sign count as what they show."""
    form = SpikeFormat(64, 0, 4, 1, "shared", "consistent")
    weight = pack_weight(torch.randn(8, 64, generator=generator()), None, form)
    encoded, bias = spike_encode(torch.randn(3, 64, generator=generator()), act_bits=4, steps=1), torch.randn(8)
    negated = encoded._replace(scale=torch._neg_view(encoded.scale))
    expected = spike_linear(encoded._replace(scale=-encoded.scale), weight, form, 8, -bias)
    assert same(spike_linear(negated, weight, form, 8, torch._neg_view(bias)), expected)
