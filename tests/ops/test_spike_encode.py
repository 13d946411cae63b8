"""spike_encode: every level's codes, scales, sums and zero points are the reference's to the last bit, and what they mean."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from spiking import (
    DTYPES,
    MAIN_RULES,
    assert_same_codes,
    encodings,
    generator,
    layouts,
    random_mask,
    random_tokens,
    rule_id,
    same,
    special_tokens,
)

import ranvier
from ranvier.ops import spike_encode
from ranvier.reference.spike_encode import SCALE_MAX, SCALE_MIN, channel_order, quantizers, spike_decode

pytestmark = pytest.mark.usefixtures("poisoned")

main_rules = pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@settings(max_examples=100)
@given(case=encodings())
def test_equals_reference(isa: str, case: tuple) -> None:
    """Any format, size, type and mask, tails and empty batches included."""
    x, mask, rule, group_size = case
    before = x.clone()
    got = spike_encode(x, mask, **rule, group_size=group_size)
    assert_same_codes(got, spike_encode(x, mask, **rule, group_size=group_size, backend="reference"))
    assert same(x, before)


@main_rules
@dtypes
def test_special_tokens_equal_reference(isa: str, rule: dict, dtype: torch.dtype) -> None:
    """Constant, one-hot, zero, subnormal, 1e30, largest, ties: finite scales, equal codes.  # spec spikellm O14"""
    for channels in (1, 16, 33, 130):
        x, mask = special_tokens(channels, dtype), random_mask(channels, 0.3, generator(channels))
        got = spike_encode(x, mask, **rule)
        assert_same_codes(got, spike_encode(x, mask, **rule, backend="reference"))
        assert got.scale.isfinite().all() and (got.scale >= 1e-5).all() and (got.scale <= 1e4).all()


def test_constant_zero_and_one_hot_tokens(isa: str) -> None:
    """A zero token has scale 1e-5 and codes 0; a one-hot token has one code, the end of its range.  # spec spikellm O14"""
    x = torch.zeros(2, 37)
    x[1, 5] = -3.0
    got = spike_encode(x, torch.zeros(37, dtype=torch.bool), steps=1)
    assert got.scale[0].item() == torch.tensor(1e-5).item() and not got.codes[0].any() and not got.code_sum[0].any()
    assert got.codes[1, 5] == -15 and got.codes[1].count_nonzero() == 1 and got.code_sum[1] == -15
    constant = spike_encode(torch.full((1, 37), 4.0), grid="compat", steps=1)
    assert constant.scale.item() == torch.tensor(1e-5).item() and constant.zero.item() == -10_000
    huge = spike_encode(torch.tensor([[-1e30, 0.0, 1e30]]), steps=2)
    assert huge.scale.item() == 1e4 and huge.codes.abs().max() <= 30


@pytest.mark.parametrize("low", [-30, -16, 0, -14])
@pytest.mark.parametrize("exponent", [-8, 0, 5])
def test_ties_round_to_even(isa: str, low: int, exponent: int) -> None:
    """A token whose scale is a power of two has exact halves of both signs: Python's exact round is the oracle."""
    steps, unit = 2, Fraction(2) ** exponent
    values = [Fraction(low)] + [Fraction(low) + Fraction(i, 4) for i in range(121)]  # range low .. low + 30: s_h = unit
    x = torch.tensor([float(v * unit) for v in values])
    for salient in (False, True):
        mask = torch.full(x.shape, salient)
        mask[0] = not salient  # both quantizers are in use
        got = spike_encode(x, mask, act_bits=4, steps=steps)
        gain, top = (1, 30) if salient else (2, 15)
        zero = round(Fraction(-low, gain))
        expected = [gain * (min(max(round(v / gain) + zero, 0), top) - zero) for v in values[1:]]
        assert got.scale.item() == float(unit)
        assert got.codes[1:].tolist() == expected


@dtypes
def test_division_is_not_a_reciprocal(isa: str, dtype: torch.dtype) -> None:
    """Codes of tokens on which x * (1 / s) rounds to another integer than x / s still equal the reference's."""
    x = torch.randint(-600, 600, (1000, 257), generator=generator()).to(dtype) / 8
    mask = random_mask(257, 0.5, generator())
    expected = spike_encode(x, mask, act_bits=6, steps=2, backend="reference")
    wrong = torch.round(x.float() * (1 / expected.scale)) != torch.round(x.float() / expected.scale)
    assert wrong.sum() > 20
    assert_same_codes(spike_encode(x, mask, act_bits=6, steps=2), expected)


@pytest.mark.parametrize("steps", [2, 4])
def test_empty_and_full_mask_are_plain_quantizers(isa: str, steps: int) -> None:
    """No salient channel: n-bit asymmetric. All salient: T (L - 1) levels; compat: n + log2 T bits.  # spec spikellm O6"""
    x, bits = random_tokens(9, 131, torch.float32, generator()), 4
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    for grid, full, top in [
        ("consistent", False, 15),
        ("consistent", True, 15 * steps),
        ("compat", False, 15),
        ("compat", True, 2**bits * steps - 1),
    ]:
        lo, hi = (low.clamp(max=0), high.clamp(min=0)) if grid == "consistent" else (low, high)
        fine = (hi - lo) / (15 * steps if grid == "consistent" else top)
        scale = (fine if full or grid == "compat" else fine * steps).clamp(1e-5, 1e4)
        zero = torch.round(-lo / scale)
        unsigned = (torch.round(x / scale) + zero).clamp(0, top)
        got = spike_encode(x, torch.full((131,), full), act_bits=bits, steps=steps, grid=grid)
        gain = steps if grid == "consistent" and not full else 1
        expected = unsigned if grid == "compat" else gain * (unsigned - zero)
        assert torch.equal(got.codes.float(), expected)
        assert same(got.scale * gain, scale)
        assert torch.equal(got.zero.float(), zero if grid == "compat" else torch.zeros_like(zero))


@main_rules
@dtypes
def test_error_is_half_a_step(isa: str, rule: dict, dtype: torch.dtype) -> None:
    """|x - x^| <= s / 2, and a step more only at an end that the rounded zero point moved.  # spec spikellm O15"""
    x, mask = random_tokens(24, 131, dtype, generator()), random_mask(131, 0.2, generator(2))
    got = spike_encode(x, mask, **rule)
    two = got.scale.shape[-1] == 2
    order = channel_order(mask) if two else torch.arange(131)
    x, salient = x[:, order].double(), mask[order]
    scale = torch.where(salient, got.scale[:, -1:], got.scale[:, :1]).double()
    zero = torch.where(salient, got.zero[:, -1:], got.zero[:, :1])
    single = rule["grid"] == "consistent" and rule["span"] == "shared" and rule["act_bits"] < 8
    step = torch.where(salient, 1, rule["steps"]) * scale if single else scale
    error = ((got.codes - zero) * scale - x).abs()
    # Float32 division and rounding can put a value on the other side of a tie: a relative 2^-22 of the quotient.
    slack = x.abs() * 2.0**-22
    assert (error <= 1.5 * step + slack).all()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    inside = (x > low + step) & (x < high - step)
    assert (error[inside] <= (0.5 * step + slack)[inside]).all()


@main_rules
def test_clipped_range(isa: str, rule: dict) -> None:
    """act_clip: inside the ends times c the error is half a step, beyond them the code is the end's.  # spec spikellm O15"""
    clip = 0.75
    mask = random_mask(131, 0.2, generator(2))
    x = random_tokens(24, 131, torch.float32, generator())
    assert_same_codes(spike_encode(x, mask, **rule, act_clip=1.0), spike_encode(x, mask, **rule))
    values = spike_decode(x, mask, **rule, act_clip=clip).double()
    ordinary, fine = quantizers(x, mask, **rule, act_clip=clip)
    whole = quantizers(x, mask, **rule)
    bounded = (whole[0].step > SCALE_MIN / clip) & (whole[0].step < SCALE_MAX)
    ratio = (ordinary.step / whole[0].step)[bounded]
    assert bounded.sum() > 10 and ((ratio - clip).abs() <= 2.0**-21).all()
    step = torch.where(mask, fine.step, ordinary.step).double()
    top = torch.where(mask, fine.ceiling - fine.zero, ordinary.ceiling - ordinary.zero).double() * step
    bottom = torch.where(mask, fine.floor - fine.zero, ordinary.floor - ordinary.zero).double() * step
    slack = x.abs().double() * 2.0**-21 + 2.0**-20 * (top.abs() + bottom.abs())
    above, below = x > top + step, x < bottom - step
    assert above.any() and below.any()
    assert ((values - top).abs() <= slack)[above].all() and ((values - bottom).abs() <= slack)[below].all()
    inside = (x < top) & (x > bottom)
    assert ((values - x).abs() <= 0.5 * step + slack)[inside].all()


@pytest.mark.parametrize("clip", [0, 1.5, -0.5, float("nan"), True, "1", 1e-300])
def test_clip_out_of_range(clip: object) -> None:
    """A share that is no share is refused."""
    with pytest.raises(ValueError, match="act_clip is"):
        spike_encode(X, MASK, act_clip=clip)


def test_more_steps_refine_salient_channels_only() -> None:
    """Squared error on S: T=4 < T=2 < T=1; off S the decoded compat values keep their bits.  # spec spikellm O16"""
    x, mask = random_tokens(200, 257, torch.float32, generator()), random_mask(257, 0.2, generator(3))
    rule = {"act_bits": 4, "span": "shared", "grid": "compat"}
    decoded = [spike_decode(x, mask, **rule, steps=steps) for steps in (1, 2, 4)]
    relative = [(((d - x) / x.abs().amax(-1, keepdim=True))[:, mask] ** 2).mean().item() for d in decoded]
    assert relative[2] < relative[1] < relative[0]
    assert all(same(d[:, ~mask], decoded[0][:, ~mask]) for d in decoded)
    codes = [spike_encode(x, mask, **rule, steps=steps) for steps in (2, 4)]
    assert same(codes[0].codes[:, : (~mask).sum()], codes[1].codes[:, : (~mask).sum()])


@main_rules
def test_codes_decode_to_the_decoded_input(isa: str, rule: dict) -> None:
    """s (c - z) is spike_decode(x): the codes stand for what the reference says."""
    x, mask = random_tokens(9, 97, torch.float32, generator()), random_mask(97, 0.3, generator(5))
    got = spike_encode(x, mask, **rule)
    two = got.scale.shape[-1] == 2
    order = channel_order(mask) if two else torch.arange(97)
    pick = mask[order] if two else torch.zeros(97, dtype=torch.bool)
    value = torch.where(pick, got.scale[:, -1:], got.scale[:, :1]).double() * (
        got.codes - torch.where(pick, got.zero[:, -1:], got.zero[:, :1])
    )
    expected = spike_decode(x, mask, **rule)[:, order].double()
    # The decoder multiplies steps * scale once more in float32: one rounding each.
    assert ((value - expected).abs() <= 2.0**-23 * expected.abs()).all()


@main_rules
def test_sums_and_limits_of_codes(isa: str, rule: dict) -> None:
    """code_sum is the groups' sum; codes off S are multiples of T on the consistent grid; no code leaves its range."""
    x = torch.cat([random_tokens(9, 131, torch.float32, generator()), special_tokens(131, torch.float32)])
    mask = random_mask(131, 0.3, generator(6))
    got = spike_encode(x, mask, **rule, group_size=32)
    parts = [(~mask).sum().item(), mask.sum().item()] if got.scale.shape[-1] == 2 else [131]
    sums = [piece.long().sum(-1) for part in got.codes.split(parts, -1) for piece in part.split(32, -1)]
    assert torch.equal(got.code_sum.long(), torch.stack(sums, -1))
    if rule["grid"] == "consistent" and rule["span"] == "shared" and rule["act_bits"] < 8:
        assert not (got.codes[:, ~mask] % rule["steps"]).any()
    assert (got.codes > -128).all()


@main_rules
def test_channel_order_does_not_matter(isa: str, rule: dict) -> None:
    """Permuting x and its mask permutes the codes and leaves scales and sums.  # spec spikellm O7"""
    x, mask = random_tokens(5, 131, torch.float32, generator()), random_mask(131, 0.3, generator(8))
    order = torch.randperm(131, generator=generator(9))
    plain, moved = spike_encode(x, mask, **rule), spike_encode(x[:, order], mask[order], **rule)
    assert same(plain.scale, moved.scale) and same(plain.code_sum, moved.code_sum) and same(plain.zero, moved.zero)
    natural, natural_moved = torch.empty_like(plain.codes), torch.empty_like(plain.codes)
    two = plain.scale.shape[-1] == 2
    natural[:, channel_order(mask) if two else torch.arange(131)] = plain.codes
    natural_moved[:, channel_order(mask[order]) if two else torch.arange(131)] = moved.codes
    assert same(natural[:, order], natural_moved)


@main_rules
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@dtypes
def test_not_finite_token_is_alone(isa: str, rule: dict, value: float, dtype: torch.dtype) -> None:
    """A token with NaN or Inf, wherever it is, gets scale NaN and codes 0; its neighbours keep their bits."""
    for channels in (1, 17, 64):
        x, mask = random_tokens(3, channels, dtype, generator()), random_mask(channels, 0.3, generator(10))
        clean = spike_encode(x, mask, **rule)
        for at in {0, channels // 2, channels - 1}:
            spoiled = x.clone()
            spoiled[1, at] = value
            got = spike_encode(spoiled, mask, **rule)
            assert got.scale[1].isnan().all() and not got.codes[1].any() and not got.code_sum[1].any()
            for name in got._fields:
                assert same(getattr(got, name)[::2], getattr(clean, name)[::2])


@main_rules
@dtypes
def test_layouts(isa: str, rule: dict, dtype: torch.dtype) -> None:
    """Strided, offset, expanded, oddly addressed and read-only tokens give the codes of a plain copy, and stay as they are."""
    mask = random_mask(33, 0.3, generator(11))
    strided = torch.stack([mask, ~mask], 1)[:, 0]
    for name, x in layouts(random_tokens(6, 33, dtype, generator())):
        before = x.clone()
        expected = spike_encode(before.contiguous(), mask, **rule)
        assert_same_codes(spike_encode(x, strided, **rule), expected)
        assert same(x, before), name


@main_rules
def test_rows_do_not_know_each_other(isa: str, rule: dict) -> None:
    """Row m of any batch has the bits of the row alone.  # spec spikellm O17"""
    x, mask = random_tokens(40, 67, torch.float32, generator()), random_mask(67, 0.3, generator(12))
    alone = [spike_encode(x[m], mask, **rule) for m in range(40)]
    for tokens in (2, 12, 13, 40):
        batch = spike_encode(x[:tokens].view(1, tokens, 67), mask, **rule)
        for m in range(tokens):
            assert_same_codes(type(batch)(*(t[0, m] for t in batch)), alone[m])


def test_threads_and_repeats(isa: str, threads: None) -> None:
    """One thread, two threads and a hundred repeats give the same bits."""
    x, mask = random_tokens(64, 1030, torch.bfloat16, generator()), random_mask(1030, 0.1, generator(13))
    torch.set_num_threads(1)
    single = spike_encode(x, mask, span="separate")
    torch.set_num_threads(2)
    for _ in range(100 if isa != "scalar" else 10):
        assert_same_codes(spike_encode(x, mask, span="separate"), single)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,), (2, 3, 16)])
def test_shapes(isa: str, shape: tuple[int, ...]) -> None:
    """Any leading dimensions, none and empty ones too."""
    got = spike_encode(torch.randn(shape), torch.arange(16) < 3, span="separate", group_size=4)
    assert got.codes.shape == shape and got.scale.shape == (*shape[:-1], 2)
    assert got.code_sum.shape == (*shape[:-1], 5) and got.zero.shape == (*shape[:-1], 2)


X, MASK = torch.zeros(2, 8), torch.zeros(8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "says", "x", "mask", "options"),
    [
        (TypeError, "float64", X.double(), MASK, {}),
        (TypeError, "int64", X.long(), MASK, {}),
        (ValueError, "no dimensions", torch.tensor(1.0), None, {}),
        (ValueError, r"bool \[8\]", X, torch.zeros(7, dtype=torch.bool), {}),
        (ValueError, r"bool \[8\]", X, torch.zeros(8), {}),
        (ValueError, r"bool \[8\]", X, torch.zeros(2, 8, dtype=torch.bool), {}),
        (ValueError, "salient_mask", X, None, {"salient_count": 1}),
        (ValueError, "K is 0", torch.zeros(2, 0), None, {}),
        (ValueError, "act_bits", X, MASK, {"act_bits": 9}),
        (ValueError, "act_bits", X, MASK, {"act_bits": 0}),
        (ValueError, "step", X, MASK, {"steps": 0}),
        (ValueError, "int8 ends at 127", X, MASK, {"steps": 9}),
        (ValueError, "int8 ends at 127", X, MASK, {"act_bits": 7, "steps": 2, "grid": "compat"}),
        (ValueError, "act_bits=8", X, MASK, {"act_bits": 8, "grid": "compat"}),
        (ValueError, "span='both'", X, MASK, {"span": "both"}),
        (ValueError, "grid='fine'", X, MASK, {"grid": "fine"}),
        (ValueError, "group_size is 3", X, MASK, {"group_size": 3}),
        (ValueError, "group_size is -4", X, MASK, {"group_size": -4}),
        (ValueError, "salient_count is 9", X, MASK, {"salient_count": 9}),
        (ranvier.BackendError, "backend 'triton' cannot run", X, MASK, {"backend": "triton"}),
        (ranvier.BackendError, "no backend 'gpu'", X, MASK, {"backend": "gpu"}),
    ],
)
def test_bad_input(error: type, says: str, x: torch.Tensor, mask: torch.Tensor | None, options: dict) -> None:
    """Each mistake has an error that says what came and what is allowed."""
    with pytest.raises(error, match=says):
        spike_encode(x, mask, **options)


@pytest.mark.parametrize("count", [1, 29, 31, 63])
def test_mask_that_does_not_match_its_count_is_refused(isa: str, count: int) -> None:
    """The codes of two ranges are placed by the mask: one with other than salient_count channels writes nothing."""
    x, mask = torch.randn(3, 64), torch.arange(64) < 30
    with pytest.raises(ValueError, match="does not mark as many channels as salient_count says"):
        spike_encode(x, mask, span="separate", salient_count=count)
    assert spike_encode(x, mask, span="separate", salient_count=30).scale.shape == (3, 2)


def test_a_wrong_number_spoils_no_later_call() -> None:
    """4.0 is refused and is not remembered as 4."""
    x = torch.randn(2, 61)
    for wrong in ({"act_bits": 4.0}, {"group_size": 32.0}, {"steps": 2.0}, {"steps": 10**30, "span": "separate"}):
        with pytest.raises(ValueError, match=r"whole number|1 to 127 steps"):
            spike_encode(x, **wrong)
    assert_same_codes(spike_encode(x), spike_encode(x, backend="reference"))
    assert_same_codes(spike_encode(x, group_size=32), spike_encode(x, group_size=32, backend="reference"))


def test_negated_view(isa: str) -> None:
    """A view whose sign is not in memory is read with its sign."""
    x = torch.randn(4, 33)
    assert_same_codes(spike_encode(torch._neg_view(x)), spike_encode(-x))


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ({"grid": "compat", "steps": 2}, 0), ({"grid": "compat", "steps": 2}, 64), ({"span": "separate"}, 0),
        ({"steps": 2}, 3),
    ],
)  # fmt: skip
def test_a_mask_that_marks_others_than_the_count_is_refused(isa: str, rule: dict, count: int) -> None:
    """Also where all channels would share one range."""
    mask = torch.arange(64) < 32
    with pytest.raises(ValueError, match="does not mark as many channels"):
        spike_encode(torch.randn(2, 64, generator=generator()), mask, salient_count=count, **rule)
