"""flash_attention: values within a derived bound of float64, equal bits on every level and thread count, exact gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spiking import DTYPES, LEVELS, ROUNDING, generator, same
from torch import Tensor

from ranvier import _C
from ranvier.ops import flash_attention
from ranvier.reference import flash_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned")
# Around the widths of a group of rows (6), a tile (60), a block of keys (64) and a vector (16).
SHAPES = [
    (1, 1, 1, 1, 1, 1), (1, 2, 1, 5, 5, 16), (2, 6, 2, 67, 131, 40), (1, 3, 3, 1, 70, 64), (1, 9, 3, 61, 61, 64),
    (1, 2, 2, 66, 66, 17), (1, 4, 1, 6, 64, 128), (2, 2, 1, 121, 129, 80), (1, 1, 1, 7, 200, 512), (1, 2, 1, 12, 65, 3),
]  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value of (B, H, H_kv, Lq, L, D)."""
    batch, heads, kv_heads, queries, keys, channels = shape
    g = generator(queries + keys)
    sizes = ((batch, heads, queries, channels), (batch, kv_heads, keys, channels), (batch, kv_heads, keys, channels))
    query, key, value = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    return spread * query, key, value


def bound(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, dtype: torch.dtype) -> Tensor:
    """How far a float32 computation may be from exact arithmetic, [B, H, Lq, D]."""
    q, k, v = (t.double() for t in (query, key, value))
    unit, (kv_heads, channels, tokens) = 2.0**-24, (k.shape[1], q.shape[-1], k.shape[2])
    size = abs(scale) * (q.abs().unflatten(1, (kv_heads, -1)) @ k.abs().unsqueeze(2).transpose(-1, -2))
    seen = reference.visible(q.shape[2], tokens, causal)
    # A logit: D products and sums, the scale's two roundings and its product; then its distance from the maximum is rounded.
    logit = torch.where(seen, size, 0.0).amax(-1, keepdim=True) * (channels + 6) * unit
    # A weight: its logit's error and its maximum's, and the polynomial's 2e-7; blocks are scaled down once each at most.
    weight = 2 * logit + 2e-7 + (tokens / 64 + 1) * 4e-7
    # Numerator and denominator: their sums, and the weights' errors in both.
    p = reference.weights(q, k, causal, scale)
    total = (p @ v.abs().unsqueeze(2)) * (2 * weight + 2 * (tokens + 4) * unit)
    y = reference.flash_attention(q, k, v, causal, scale).abs()
    return total.flatten(1, 2) + (y + total.flatten(1, 2)) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)


@shapes
@pytest.mark.parametrize("causal", [True, False])
def test_values(isa: str, shape: tuple[int, ...], causal: bool) -> None:
    """Within the bound of float64 attention, for logits of size one and for sharp ones."""
    for spread, dtype in ((1.0, torch.float32), (30.0, torch.float32), (1.0, torch.bfloat16), (1.0, torch.float16)):
        given = problem(shape, dtype, spread)
        scale = shape[-1] ** -0.5
        y = flash_attention(*given, causal=causal)
        truth = reference.flash_attention(*(t.double() for t in given), causal, scale)
        assert y.dtype == dtype and y.shape == given[0].shape and y.transpose(1, 2).is_contiguous()
        assert ((y.double() - truth).abs() <= bound(*given, causal, scale, dtype)).all()


@shapes
def test_every_level_and_thread_count_gives_the_same_bits(threads: None, shape: tuple[int, ...]) -> None:
    """Levels, one thread or two, and a query alone instead of among the others."""
    before = _C.isa()
    for dtype in DTYPES:
        given, found = problem(shape, dtype), []
        for level in LEVELS:
            _C.set_isa(level)
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(flash_attention(*given))
        _C.set_isa(before)
        assert all(same(y, found[0]) for y in found)
        last = flash_attention(given[0][:, :, -1:], *given[1:])
        assert same(last, found[0][:, :, -1:])


def test_a_query_depends_on_what_it_sees_alone(isa: str) -> None:
    """Keys and values behind a query's own token, NaN and infinity too, never change its bits."""
    query, key, value = problem((1, 2, 1, 70, 70, 32))
    whole = flash_attention(query, key, value)
    for token in (1, 5, 6, 59, 60, 63, 64, 69):
        spoilt = [t.clone() for t in (key, value)]
        for tensor, bad in zip(spoilt, (torch.nan, torch.inf), strict=True):
            tensor[:, :, token:] = bad
        y = flash_attention(query, *spoilt)
        assert same(y[:, :, :token], whole[:, :, :token]) and bool(y[:, :, token:].isnan().all())


def test_large_and_not_finite_logits(isa: str) -> None:
    """Logits of thousands do not overflow; a query, key or value that is not finite makes NaN of what sees it."""
    query, key, value = problem((1, 1, 1, 8, 8, 16))
    y = flash_attention(1e4 * query, key, value)
    assert bool(y.isfinite().all())
    best = (query @ key.transpose(-1, -2)).masked_fill(~reference.visible(8, 8, True), -torch.inf).argmax(-1)
    torch.testing.assert_close(y, value.gather(2, best[..., None].expand_as(value)), rtol=1e-5, atol=1e-5)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = query.clone()
        spoilt[0, 0, 3, 2] = bad
        y = flash_attention(spoilt, key, value)
        rows = y.isnan().any(-1)[0, 0]
        assert rows.tolist() == [i == 3 for i in range(8)]
    spoilt = key.clone()
    spoilt[0, 0, 2, 5] = torch.nan
    assert flash_attention(query, spoilt, value).isnan().any(-1)[0, 0].tolist() == [i >= 2 for i in range(8)]


def test_the_maximum_moves_from_block_to_block(isa: str) -> None:
    """Logits that grow by hundreds from one block of keys to the next, fall, or are -inf in all of the first one."""
    tokens, one = 200, torch.ones(1, 1, 1, 1)
    places = torch.arange(tokens, dtype=torch.float32).view(1, 1, tokens, 1)
    value = places + 1
    for key, best in ((10 * places, tokens), (-10 * places, 1.0)):
        y = flash_attention(one, key, value, scale=1.0)
        torch.testing.assert_close(y, torch.full_like(y, best), rtol=1e-4, atol=0)
    key = torch.where(places < 70, -torch.inf, 0.0)
    y = flash_attention(one, key, value, scale=1.0)
    torch.testing.assert_close(y, value[:, :, 70:].mean(2, keepdim=True))
    assert bool(flash_attention(one, key[:, :, :70], value[:, :, :70], scale=1.0).isnan().all())


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 80), st.integers(0, 80)),
    channels=st.integers(1, 70),
    causal=st.booleans(),
)
def test_any_shape(sizes: tuple[int, ...], channels: int, causal: bool) -> None:
    """Random sizes, memory layouts of a projection's output, and a scale of its own."""
    batch, kv_heads, group, queries, more = sizes
    shape = (batch, kv_heads * group, kv_heads, queries, queries + more, channels)
    query, key, value = problem(shape)
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    y = flash_attention(*moved, causal=causal, scale=0.3)
    assert same(y, flash_attention(query, key, value, causal=causal, scale=0.3))
    truth = reference.flash_attention(*(t.double() for t in (query, key, value)), causal, 0.3)
    assert ((y.double() - truth).abs() <= bound(query, key, value, causal, 0.3, torch.float32)).all()
    odd = query.transpose(2, 3).contiguous().transpose(2, 3)
    assert same(flash_attention(odd, key, value, causal=causal, scale=0.3), y)


def test_equals_torch() -> None:
    """torch's scaled_dot_product_attention with grouped heads, and with the last query at the last key."""
    query, key, value = problem((2, 6, 2, 33, 33, 24))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(flash_attention(query, key, value), sdpa(query, key, value, is_causal=True, enable_gqa=True))
    mask = reference.visible(5, 33, True)
    short = query[:, :, :5]
    torch.testing.assert_close(flash_attention(short, key, value), sdpa(short, key, value, mask, enable_gqa=True))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients(causal: bool) -> None:
    """Against autograd of the formula in float64; the bound is float32's through two products of 33 and 16 terms."""
    given = [t.requires_grad_() for t in problem((1, 4, 2, 33, 40, 16))]
    upstream = torch.randn(1, 4, 33, 16, generator=generator(5))
    flash_attention(*given, causal=causal).backward(upstream)
    exact = [t.detach().double().requires_grad_() for t in given]
    reference.flash_attention(*exact, causal, 0.25).backward(upstream.double())
    for t, e in zip(given, exact, strict=True):
        torch.testing.assert_close(t.grad.double(), e.grad, rtol=1e-5, atol=5e-6)


def test_empty_and_refused() -> None:
    """No queries or no batch give nothing; shapes, types and sizes that do not fit are named."""
    query, key, value = problem((1, 4, 2, 3, 5, 8))
    assert flash_attention(query[:, :, :0], key, value).shape == (1, 4, 0, 8)
    assert flash_attention(query[:0], key[:0], value[:0]).shape == (0, 4, 3, 8)
    with pytest.raises(ValueError, match="no multiple of the 2 heads"):
        flash_attention(query[:, :3], key, value)
    with pytest.raises(ValueError, match="3 queries see 2 keys"):
        flash_attention(query, key[:, :, :2], value[:, :, :2])
    with pytest.raises(ValueError, match=r"must be\s+\[1, kv heads, tokens, 8\]"):
        flash_attention(query, key, value[..., :4])
    with pytest.raises(ValueError, match=r"query is \[4, 3, 8\]"):
        flash_attention(query[0], key, value)
    with pytest.raises(TypeError, match="cast one of them"):
        flash_attention(query, key.bfloat16(), value)
    with pytest.raises(TypeError, match="float64"):
        flash_attention(query.double(), key.double(), value.double())
    for scale, error in (("x", TypeError), (True, TypeError), (torch.nan, ValueError), (torch.inf, ValueError)):
        with pytest.raises(error, match=r"scale is .*; pass a"):
            flash_attention(query, key, value, scale=scale)
    wide = torch.zeros(1, 1, 1, 513)
    with pytest.raises(ValueError, match="D is 513"):
        flash_attention(wide, wide, wide)
