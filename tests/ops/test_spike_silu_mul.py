"""spike_silu_mul: the gated product within a bound of float64, the same bits everywhere; its codes are those of its output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking import CHANNELS, DTYPES, LEVELS, MAIN_RULES, assert_same_codes, generator, layouts, random_mask, same

from ranvier import _C
from ranvier.ops import spike_encode, spike_silu_mul
from ranvier.reference.spike_silu_mul import silu_mul

pytestmark = pytest.mark.usefixtures("poisoned")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def pair(tokens: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate = 6 * torch.randn(tokens, channels, generator=generator(1))
    return gate.to(dtype), torch.randn(tokens, channels, generator=generator(2)).to(dtype)


@settings(max_examples=60)
@given(
    channels=st.sampled_from(CHANNELS), tokens=st.integers(0, 5), dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(MAIN_RULES), group_size=st.sampled_from((None, 4, 32)), clip=st.sampled_from((1.0, 0.8)),
)  # fmt: skip
def test_is_the_product_and_then_the_encoding(isa: str, channels, tokens, dtype, rule, group_size, clip) -> None:
    """The codes are spike_encode's of y to the last bit; y has the scalar level's bits."""
    gate, up = pair(tokens, channels, dtype)
    mask = random_mask(channels, 0.3, generator(2))
    options = {**rule, "group_size": group_size, "act_clip": clip}
    y, codes = spike_silu_mul(gate, up, mask, **options)
    assert_same_codes(codes, spike_encode(y, mask, **options))
    _C.set_isa("scalar")
    try:
        assert same(y, spike_silu_mul(gate, up, mask, **options)[0])
    finally:
        _C.set_isa(isa)


@dtypes
def test_error_to_float64(isa: str, dtype: torch.dtype) -> None:
    """|y - truth| within the roundings that lead to it, over all of the exponential's range, and at most twice torch's own.

    With u = 2^-24: Horner's rule and the argument's reduction leave e within 4 u of e^-g (the argument's own error counts
    |z| u, none: both fused steps are exact to the second part of ln 2), 1 + e, the quotient and the product add one u each;
    the type rounds twice. Below the smallest normal a spacing of its subnormals.
    """
    gate = torch.cat([torch.linspace(-100, 100, 20001), torch.randn(20000, generator=generator(3))]).to(dtype)
    up = torch.randn(gate.shape, generator=generator(4)).to(dtype)
    y, _ = spike_silu_mul(gate, up)
    truth = gate.double() * torch.sigmoid(gate.double()) * up.double()
    relative = 8 * 2.0**-24 + (0 if dtype == torch.float32 else 2 * UNIT[dtype])
    bound = relative * truth.abs() + 2 * SMALLEST[dtype] * (1 + up.double().abs())
    # e^-g beyond float32 ends in zero: what is lost is below 104 e^-88.
    error = (y.double() - truth).abs()
    assert (error <= bound + torch.where(gate < -87, 1e-36, 0.0)).all()
    own = (silu_mul(gate, up).double() - truth).abs()
    assert error.max() <= 2 * own.max() + 2.0**-24 * truth.abs().max()


@dtypes
def test_special_values(dtype: torch.dtype) -> None:
    """Zeros of both signs, ends of the range, NaN and Inf: torch's values, on every level the same bits."""
    top, inf, nan = torch.finfo(dtype).max, float("inf"), float("nan")
    gate = torch.tensor([0.0, -0.0, top, -top, 88.0, -88.0, 104.5, -104.5, 1e-7, inf, -inf, nan, 1.0, 1.0], dtype=dtype)
    up = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, -2.0, 1.0, 1.0, 1.0, nan, inf], dtype=dtype)
    results = []
    for level in LEVELS:
        before = _C.isa()
        _C.set_isa(level)
        try:
            results.append(spike_silu_mul(gate.view(-1, 1), up.view(-1, 1))[0].view(-1))
        finally:
            _C.set_isa(before)
    assert all(same(results[0], other) for other in results[1:])
    torch.testing.assert_close(results[0], silu_mul(gate, up), rtol=4 * UNIT[dtype], atol=1e-36, equal_nan=True)


def test_rows_layouts_and_threads(isa: str, threads: None) -> None:
    """A row has the same bits alone, in any layout, and on two threads; the inputs stay as they are."""
    gate, up = pair(40, 1030, torch.bfloat16)
    torch.set_num_threads(1)
    y, codes = spike_silu_mul(gate, up)
    torch.set_num_threads(2)
    again, again_codes = spike_silu_mul(gate, up)
    assert same(y, again)
    assert_same_codes(codes, again_codes)
    assert all(same(spike_silu_mul(gate[m], up[m])[0], y[m]) for m in (0, 1, 39))
    small, other = pair(6, 33, torch.float32)
    for name, view in layouts(small):
        before = view.clone()
        third = other.reshape(view.shape)
        expected = spike_silu_mul(before.contiguous(), third)[0]
        assert same(spike_silu_mul(view, third)[0], expected), name
        assert same(spike_silu_mul(third, view)[0], spike_silu_mul(third, before.contiguous())[0]), name
        assert same(view, before), name


G = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("error", "says", "gate", "up", "options"),
    [
        (TypeError, "float64", G.double(), G, {}),
        (TypeError, "up is torch.int64", G, G.long(), {}),
        (ValueError, r"up has shape \[8\]", G, G[0], {}),
        (ValueError, "no dimensions", torch.tensor(1.0), torch.tensor(1.0), {}),
        (ValueError, "int8 ends at 127", G, G, {"steps": 9}),
    ],
)
def test_bad_input(error: type, says: str, gate: torch.Tensor, up: torch.Tensor, options: dict) -> None:
    """Each mistake has an error that says what came and what is allowed."""
    with pytest.raises(error, match=says):
        spike_silu_mul(gate, up, **options)
