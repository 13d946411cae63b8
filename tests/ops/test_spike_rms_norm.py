"""spike_rms_norm: the norm within a bound of float64, the same bits everywhere; its codes are those of its own output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking import (
    CHANNELS,
    DTYPES,
    LEVELS,
    MAIN_RULES,
    assert_same_codes,
    generator,
    layouts,
    random_mask,
    random_tokens,
    rule_id,
    same,
    special_tokens,
)

from ranvier import _C
from ranvier.ops import spike_encode, spike_rms_norm
from ranvier.reference.spike_rms_norm import WEIGHTINGS, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def weight_of(channels: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(channels, generator=generator(9)) + 0.5).to(dtype)


@settings(max_examples=60)
@given(
    channels=st.sampled_from(CHANNELS), tokens=st.integers(0, 5), dtype=st.sampled_from(DTYPES),
    weighting=st.sampled_from(WEIGHTINGS), rule=st.sampled_from(MAIN_RULES), group_size=st.sampled_from((None, 4, 32)),
)  # fmt: skip
def test_is_the_norm_and_then_the_encoding(isa: str, channels, tokens, dtype, weighting, rule, group_size) -> None:
    """The codes are spike_encode's of y to the last bit; y has the scalar level's bits."""
    x, weight = random_tokens(tokens, channels, dtype, generator()), weight_of(channels, dtype)
    mask = random_mask(channels, 0.3, generator(2))
    options = {"weighting": weighting, **rule, "group_size": group_size}
    y, codes = spike_rms_norm(x, weight, 1e-5, mask, **options)
    assert_same_codes(codes, spike_encode(y, mask, **rule, group_size=group_size))
    _C.set_isa("scalar")
    try:
        assert same(y, spike_rms_norm(x, weight, 1e-5, mask, **options)[0])
    finally:
        _C.set_isa(isa)


@weightings
@dtypes
def test_error_to_float64(isa: str, weighting: str, dtype: torch.dtype) -> None:
    """|y - truth| within the roundings that lead to it, and at most twice torch's own.

    With u = 2^-24: each of the 16 partial sums takes K / 16 fused steps and 4 more fold them, all terms positive: relative
    error (K / 16 + 4) u; the mean, eps, root and quotient one u each, the root halves what came before; times x, times w
    (and 1 + w) one u each. The type's own rounding comes at the end, and after_cast in the middle too.
    """
    for channels in (1, 17, 576, 4099):
        x, weight = random_tokens(9, channels, dtype, generator()), weight_of(channels, dtype)
        y, _ = spike_rms_norm(x, weight, 1e-6, weighting=weighting)
        factor = 1 + weight.double() if weighting == "one_plus" else weight.double()
        root = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
        truth = x.double() * root * factor
        relative = ((channels / 16 + 6) / 2 + 5) * 2.0**-24 + (0 if dtype == torch.float32 else 2 * UNIT[dtype])
        scaled = (x.double() * root).abs()
        bound = 1.01 * relative * truth.abs() + SMALLEST[dtype] * (1 + weight.double().abs() + scaled)
        if weighting == "one_plus":  # 1 + w is rounded where it is small too
            bound += 2.0**-24 * scaled * (1 + weight.double().abs())
        error = (y.double() - truth).abs()
        assert (error <= bound).all()
        own = (rms_norm(x, weight, 1e-6, weighting).double() - truth).abs()
        assert error.max() <= 2 * own.max() + 2.0**-24 * truth.abs().max()


@weightings
@dtypes
def test_special_tokens(weighting: str, dtype: torch.dtype) -> None:
    """Zero, huge (the square overflows), subnormal, NaN and Inf: torch's values, on every level the same bits."""
    x, weight = special_tokens(37, dtype), weight_of(37, dtype)
    spoiled = x[:3].clone()
    spoiled[0, 5], spoiled[1, 36], spoiled[2, 0] = float("nan"), float("inf"), -float("inf")
    x = torch.cat([x, spoiled])
    results = []
    for level in LEVELS:
        before = _C.isa()
        _C.set_isa(level)
        try:
            results.append(spike_rms_norm(x, weight, 1e-6, weighting=weighting))
        finally:
            _C.set_isa(before)
    y, codes = results[0]
    assert all(same(y, other) for other, _ in results[1:])
    torch.testing.assert_close(y, rms_norm(x, weight, 1e-6, weighting), rtol=4 * UNIT[dtype], atol=1e-30, equal_nan=True)
    assert codes.scale[-3:].isnan().all() and not codes.codes[-3:].any()


def test_rows_layouts_and_threads(isa: str, threads: None) -> None:
    """A row has the same bits alone, in any layout, and on two threads; x and weight stay as they are."""
    x, weight = random_tokens(70, 576, torch.float32, generator()), weight_of(576, torch.float32)
    torch.set_num_threads(1)
    y, codes = spike_rms_norm(x, weight)
    torch.set_num_threads(2)
    again, again_codes = spike_rms_norm(x, weight)
    assert same(y, again)
    assert_same_codes(codes, again_codes)
    assert all(same(spike_rms_norm(x[m], weight)[0], y[m]) for m in (0, 1, 33, 69))
    small = random_tokens(6, 33, torch.float32, generator())
    for name, view in layouts(small):
        before = view.clone()
        assert same(spike_rms_norm(view, weight[:33])[0], spike_rms_norm(before.contiguous(), weight[:33])[0]), name
        assert same(view, before), name
    wide = torch.stack([weight, -weight], 1)
    assert same(spike_rms_norm(x, wide[:, 0])[0], y)


@pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
def test_clipped(rule: dict) -> None:
    """act_clip reaches the codes."""
    x, weight = random_tokens(3, 65, torch.float32, generator()), weight_of(65, torch.float32)
    mask = random_mask(65, 0.3, generator(3))
    y, codes = spike_rms_norm(x, weight, 1e-6, mask, **rule, act_clip=0.5)
    assert_same_codes(codes, spike_encode(y, mask, **rule, act_clip=0.5))
    assert not same(codes.scale, spike_encode(y, mask, **rule).scale)


X, W = torch.zeros(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("error", "says", "arguments", "options"),
    [
        (TypeError, "float64", (X.double(), W), {}),
        (TypeError, "weight is torch.int64", (X, W.long()), {}),
        (ValueError, "no dimensions", (torch.tensor(1.0), W), {}),
        (ValueError, r"weight has shape \[7\]", (X, W[:7]), {}),
        (ValueError, "eps is -1", (X, W, -1.0), {}),
        (ValueError, "eps is nan", (X, W, float("nan")), {}),
        (ValueError, "weighting is 'late'", (X, W), {"weighting": "late"}),
        (ValueError, "int8 ends at 127", (X, W), {"steps": 9}),
    ],
)
def test_bad_input(error: type, says: str, arguments: tuple, options: dict) -> None:
    """Each mistake has an error that says what came and what is allowed."""
    with pytest.raises(error, match=says):
        spike_rms_norm(*arguments, **options)
