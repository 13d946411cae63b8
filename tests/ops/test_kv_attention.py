"""kv_attention and kv_attention_encode: codes are the reference's to the last bit, attention is full attention on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking import DTYPES, generator, layouts, random_tokens, same, special_tokens
from torch import Tensor

import ranvier
from ranvier.ops import KVFormat, kv_attention, kv_decode, kv_encode
from ranvier.ops._declare import OPS
from ranvier.reference import kv_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 509, 512, 513, 1100)


def masks(heads: int, channels: int, count: int, seed: int = 1) -> Tensor:
    """Bool [heads, D] with this many salient channels a head."""
    scores = torch.rand(heads, channels, generator=generator(seed))
    return torch.zeros(heads, channels, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :count], True)


class Filled:
    """A cache of random tokens and what it stands for."""

    def __init__(self, batch=2, kv_heads=2, length=70, channels=48, salient=(5, 9), dtype=torch.float32, seed=1) -> None:
        g = generator(seed)
        self.key_mask, self.value_mask = masks(kv_heads, channels, salient[0]), masks(kv_heads, channels, salient[1], 2)
        self.form, self.length = KVFormat(channels, *salient), length
        self.key, self.value = (torch.randn(batch, kv_heads, length, channels, generator=g).to(dtype) for _ in range(2))
        self.cache = self.form.empty(batch, kv_heads, self.form.blocks(length))
        self.masks = (self.key_mask, self.value_mask)
        kv_encode(self.key, self.value, self.cache, *self.masks, 0, form=self.form)

    def query(self, heads: int, queries: int, dtype=torch.float32) -> Tensor:
        return torch.randn(len(self.key), heads, queries, self.form.head_dim, generator=generator(7)).to(dtype)

    def attend(self, query: Tensor, lengths=None, **options) -> Tensor:
        return kv_attention(
            query, self.cache, *self.masks, self.length if lengths is None else lengths, form=self.form, **options
        )

    def truth(self, query: Tensor, lengths=None, starts=None, mask=None) -> tuple[Tensor, Tensor]:
        """Float64 attention on the dequantized cache, and how far the kernel may be from it.

        A query is q = step (c + e), |e| <= 1/2, step = max|q| / 32512: a logit is off by d = scale step / 2 sum |k^|, and by
        float32 rounding of its terms, u (|zero sum q| + 2 |scale_k q v|) <= 4 u scale sum |q| (|zero| + |k^|). A weight is
        then off by a factor e^(2d), also through the sum of all weights; the polynomial and sums add 2^-18 (exp2 1.6e-7
        and float32 sums over up to 1100 tokens). Weights times value scales are rounded to 2^-17 of the largest in 64
        tokens, each times a count of at most 30: relative to the sum of weights at most 2^-17 * min(64, L) * 30 scale_v.
        """
        lengths = torch.full((len(query),), self.length) if lengths is None else lengths
        keys, values = (x.double() for x in kv_decode(self.cache, *self.masks, self.length, form=self.form))
        seen = reference.visible(lengths, starts, query.shape[2], self.length)
        q, scale = query.double(), self.form.head_dim**-0.5
        out = reference.kv_attention(q, keys, values, seen, mask, scale)
        size = keys.abs().sum(-1).nan_to_num().amax()
        step = q.abs().amax(-1, keepdim=True) / 32512
        logit = scale * (step / 2 * size + 2.0**-22 * q.abs().amax() * 3 * size)
        spread = values.nan_to_num().amax((-1, -2)) - values.nan_to_num().amin((-1, -2))  # 30 scale_v is at most this
        spread = spread.repeat_interleave(query.shape[1] // keys.shape[1], 1)[..., None, None]
        bound = (2 * logit + 2.0**-17) * spread + 2.0**-17 * min(64, self.length) * spread + 2.0**-20
        return out, bound + {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[query.dtype] * out.abs()


@settings(max_examples=60)
@given(
    channels=st.sampled_from((1, 3, 16, 31, 32, 33, 64, 80, 128, 160)), tokens=st.integers(0, 70), at=st.integers(0, 70),
    salient=st.tuples(st.sampled_from((0, 0.1, 0.2, 1)), st.sampled_from((0, 0.1, 0.2, 1))), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_codes_equal_reference(channels: int, tokens: int, at: int, salient: tuple, dtype: torch.dtype) -> None:
    """Every byte of the cache and every scale, appended anywhere into a used block, over sizes with tails."""
    form = KVFormat(channels, *(int(s * channels) for s in salient))
    chosen = masks(2, channels, form.key_salient), masks(2, channels, form.value_salient, 2)
    key, value = (random_tokens(2 * tokens, channels, dtype, generator(s)).view(1, 2, tokens, channels) for s in (1, 2))
    used = torch.randint(0, 256, form.empty(1, 2, 3).shape, generator=generator(3), dtype=torch.uint8)
    kv_encode(torch.randn(1, 2, 192, channels), torch.randn(1, 2, 192, channels), used, *chosen, 0, form=form)
    mine, theirs = used.clone(), used.clone()
    steps = kv_encode(key, value, mine, *chosen, at, form=form)
    assert same(steps, kv_encode(key, value, theirs, *chosen, at, form=form, backend="reference"))
    assert torch.equal(mine, theirs)


@dtypes
def test_special_tokens(dtype: torch.dtype) -> None:
    """Constant, one-hot, subnormal, 1e30 and largest tokens equal the reference; finite; constants come back to float16."""
    x = special_tokens(33, dtype).view(1, 1, -1, 33)
    form, chosen = KVFormat(33, 5, 5), (masks(1, 33, 5), masks(1, 33, 5, 2))
    mine, theirs = form.empty(1, 1, 1), form.empty(1, 1, 1)
    kv_encode(x, x.flip(2), mine, *chosen, 0, form=form)
    kv_encode(x, x.flip(2), theirs, *chosen, 0, form=form, backend="reference")
    assert torch.equal(mine, theirs)
    key, _ = kv_decode(mine, *chosen, x.shape[2], form=form)
    assert key.isfinite().all()
    assert torch.equal(key[0, 0, 2], torch.full((33,), 7.25)) and not key[0, 0, 0].any()


def test_error_is_half_a_step_and_salient_channels_are_finer() -> None:
    """|x - x^| <= scale off S and scale / 2 on S, beyond the rounding of scale and zero to float16.  # spec spikellm O15"""
    filled = Filled(length=200, channels=64, salient=(12, 12))
    for x, decoded, mask in zip(
        (filled.key, filled.value), kv_decode(filled.cache, *filled.masks, 200, form=filled.form), filled.masks, strict=True
    ):
        scale = ((x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 30).double()
        error, fine = (x - decoded).abs().double(), mask[:, None].expand_as(x)
        # 30 scale 2^-11 at the far end, |zero| 2^-11, and as much again for a code that moves.
        rounding = 2.0**-10 * (30 * scale + x.abs().amax(-1, keepdim=True))
        assert (error <= torch.where(fine, scale / 2, scale) + rounding).all()
        assert error[fine].mean() < 0.6 * error[~fine].mean()


@pytest.mark.parametrize(("channels", "count"), [(64, 7), (128, 13), (64, 13), (128, 26)])
def test_bytes(channels: int, count: int) -> None:
    """At most 0.30 of bfloat16's bytes: D + 8 bytes a token and the bits, with 10 % and with 20 % salient channels."""
    form = KVFormat(channels, count, count)
    assert form.share_of_bf16 <= 0.30
    bits = (32 * -(-count // 4) + 63) // 64 * 64 / 64 + 2 * -(-count // 16)
    assert form.block_bytes == 64 * (channels + 8 + bits)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_full_attention(isa: str, length: int) -> None:
    """Decode on the packed cache is float64 attention on the dequantized one, grouped heads, lengths with tails."""
    filled = Filled(length=length, channels=64 if length % 2 else 96, salient=(6, 17))
    for heads, queries in ((2, 1), (6, min(length, 3))):
        query = filled.query(heads, queries)
        before = query.clone(), filled.cache.clone()
        got = filled.attend(query)
        truth, bound = filled.truth(query)
        assert ((got.double() - truth).abs() <= bound).all()
        assert same(query, before[0]) and torch.equal(filled.cache, before[1])


@pytest.mark.parametrize("channels", [1, 16, 31, 33, 128, 160, 256])
@dtypes
def test_head_sizes_and_dtypes(isa: str, channels: int, dtype: torch.dtype) -> None:
    """Any head size; float32, bfloat16 and float16 queries."""
    salient = channels // 5
    filled = Filled(length=67, channels=channels, salient=(salient, channels - salient), dtype=dtype)
    query = filled.query(2, 2, dtype)
    truth, bound = filled.truth(query)
    got = filled.attend(query)
    assert got.dtype == dtype and ((got.double() - truth).abs() <= bound).all()


def test_levels_threads_and_neighbours_give_equal_bits(threads: None) -> None:
    """Every level, one thread or two, split into chunks or not, one query or many: the same bits.  # spec spikellm O17"""
    filled = Filled(batch=1, length=1100, channels=80, salient=(9, 18))
    query, before = filled.query(4, 40), ranvier._C.isa()
    torch.set_num_threads(1)
    expected = filled.attend(query)
    try:
        for level in ("scalar", "avx2", "avx512", before):
            ranvier._C.set_isa(level)
            assert same(filled.attend(query), expected), level
    finally:
        ranvier._C.set_isa(before)
    for count in (1, 2):
        torch.set_num_threads(count)
        for _ in range(10):
            assert same(filled.attend(query), expected)
            assert same(filled.attend(query[:, :, -1:]), expected[:, :, -1:])
        alone = filled.attend(query[:, :, 5:6].contiguous(), torch.tensor([1100 - 34]))
        assert same(alone, expected[:, :, 5:6])


def test_padding_ragged_lengths_and_masks(isa: str) -> None:
    """Each row has its own first and last token; a mask is added, or hides; a query that sees nothing gets 0."""
    filled = Filled(batch=3, length=130, channels=32, salient=(3, 3))
    query, lengths = filled.query(4, 3), torch.tensor([130, 65, 3])
    starts = torch.tensor([70, 0, 2])
    truth, bound = filled.truth(query, lengths, starts)
    got = filled.attend(query, lengths, starts=starts)
    assert ((got.double() - truth).abs() <= bound).all()
    assert not got[2, :, :2].any() and got[2, :, 2].any()
    mask = torch.randn(3, 4, 3, 130, generator=generator(9))  # another for every row, head and query
    mask[0, :, :, 100:] = float("-inf")
    mask[1, :, 1] = torch.finfo(torch.float32).min
    mask[2] = float("-inf")
    truth, bound = filled.truth(query, lengths, None, mask.double())
    got = filled.attend(query, lengths, mask=mask)
    rows = [0, 2]  # in row 1 of the batch one query has only the smallest float32 to add
    assert ((got.double() - truth).abs() <= bound)[rows].all() and got.isfinite().all() and not got[2].any()
    seen = torch.rand(1, 4, 1, 140, generator=generator(3)) < 0.5
    hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    got = filled.attend(query, mask=seen)
    assert same(got, filled.attend(query, mask=hidden))
    truth, bound = filled.truth(query, None, None, hidden[..., :130].double())
    assert ((got.double() - truth).abs() <= bound).all()


def test_not_finite_tokens_and_queries_touch_those_who_see_them(isa: str) -> None:
    """NaN for a query that sees a token with NaN or Inf, or has one; the bits of all others stay."""
    filled = Filled(length=100)
    query = filled.query(4, 60)
    clean = filled.attend(query)
    for name in ("key", "value"):
        given = {"key": filled.key[:, :, 70:71].clone(), "value": filled.value[:, :, 70:71].clone()}
        given[name][1, 0, 0, 3] = float("inf")
        steps = kv_encode(*given.values(), filled.cache, *filled.masks, 70, form=filled.form)
        assert steps.isnan().sum() == 1
        got = filled.attend(query)
        assert got[1, :2, 30:].isnan().all()
        assert same(got[0], clean[0]) and same(got[1, :2, :30], clean[1, :2, :30]) and same(got[1, 2:], clean[1, 2:])
        kv_encode(filled.key[:, :, 70:71], filled.value[:, :, 70:71], filled.cache, *filled.masks, 70, form=filled.form)
    for value in (float("nan"), float("-inf")):
        query[0, 1, 5, 2] = value
        got = filled.attend(query)
        assert got[0, 1, 5].isnan().all() and got.isnan().sum() == got.shape[-1]


def test_bytes_of_not_finite_tokens_equal_reference() -> None:
    """Such a token stores no codes: nothing of the token, key or value before it."""
    x = torch.randn(1, 1, 5, 33, generator=generator(5))
    x[..., 1, 3], x[..., 3, 7] = float("nan"), float("inf")
    form, chosen = KVFormat(33, 5, 5), (masks(1, 33, 5), masks(1, 33, 5, 2))
    mine, theirs = form.empty(1, 1, 1), form.empty(1, 1, 1)
    kv_encode(x, x.roll(1, 2), mine, *chosen, 0, form=form)
    kv_encode(x, x.roll(1, 2), theirs, *chosen, 0, form=form, backend="reference")
    assert torch.equal(mine, theirs)


def test_garbage_beyond_the_length_is_not_read(isa: str) -> None:
    """What a cropped cache still holds, NaN scales included, has no part in the result."""
    filled = Filled(length=128)
    query, lengths = filled.query(2, 1), torch.tensor([70, 70])
    before = filled.attend(query, lengths)
    bad = torch.full((2, 2, 58, 48), float("nan"))
    kv_encode(bad, bad, filled.cache, *filled.masks, 70, form=filled.form)
    assert same(filled.attend(query, lengths), before)


@dtypes
def test_layouts(isa: str, dtype: torch.dtype) -> None:
    """Queries, keys and values in memory a kernel may not expect."""
    filled = Filled(batch=1, kv_heads=1, length=6, channels=33, salient=(3, 3), dtype=dtype)
    for name, x in layouts(filled.key[0, 0]):
        rows = x if x.ndim == 2 else x[:, 0]
        given, dense = rows[None, None], rows.clone().contiguous()[None, None]
        caches = [filled.form.empty(1, 1, 1) for _ in range(2)]
        for cache, tensor in zip(caches, (given, dense), strict=True):
            kv_encode(tensor, tensor, cache, *filled.masks, 0, form=filled.form)
        assert torch.equal(*caches), name
        assert same(filled.attend(given), filled.attend(dense)), name


def test_per_token_mode_is_causal_and_window_mode_is_not() -> None:
    """Outputs at t do not change when later tokens change; with the window's ranges they do.  # spec spikellm O18"""
    g = generator(4)
    key, value, query = (torch.randn(1, 2, 90, 32, generator=g) for _ in range(3))
    changed = key.clone()
    changed[:, :, 60:] *= 3
    chosen, form = (masks(2, 32, 3), masks(2, 32, 3, 2)), KVFormat(32, 3, 3)

    def per_token(k: Tensor) -> Tensor:
        cache = form.empty(1, 2, 2)
        kv_encode(k, value, cache, *chosen, 0, form=form)
        return kv_attention(query, cache, *chosen, 90, form=form)

    def window(k: Tensor) -> Tensor:
        values = reference.kv_decode(reference.kv_encode(value, chosen[1]))
        seen = reference.visible(torch.tensor([90]), None, 90, 90)
        return reference.kv_attention(query, reference.kv_decode_window(k, chosen[0]), values, seen, None, 32**-0.5)

    assert same(per_token(key)[:, :, :60], per_token(changed)[:, :, :60])
    assert not torch.equal(window(key)[:, :, :60], window(changed)[:, :, :60])


def test_appending_is_seen_by_autograd() -> None:
    """Every way of appending counts as writing into the cache, so that torch's checks of what was saved before see it."""
    filled = Filled()
    arguments = (filled.key, filled.value, filled.cache, *filled.masks)
    for backend in (None, "cpu", "reference"):
        version = filled.cache._version
        kv_encode(*arguments, 0, form=filled.form, backend=backend)
        assert filled.cache._version > version
    for key in (filled.key, filled.key.clone().requires_grad_()):
        version = filled.cache._version
        OPS["kv_attention_encode"].overload(key, *arguments[1:], torch.tensor([0, 0]), 5, 9)
        assert filled.cache._version == version + 1
    version = filled.cache._version
    with pytest.raises(ValueError, match="positions"):
        kv_encode(*arguments, torch.tensor([0]), form=filled.form)
    assert filled.cache._version == version
    with torch.inference_mode():  # counts no versions; such a cache may be used outside as well
        kept = filled.cache.clone()
        kv_encode(*arguments[:2], kept, *filled.masks, 0, form=filled.form)
    kv_encode(*arguments[:2], kept, *filled.masks, 0, form=filled.form)
    assert torch.equal(kept, filled.cache)


def test_empty_calls() -> None:
    """No batch, no queries, no tokens."""
    filled = Filled()
    assert filled.attend(filled.query(2, 0)).shape == (2, 2, 0, 48)
    empty = filled.form.empty(0, 2, 1)
    assert kv_attention(torch.zeros(0, 2, 1, 48), empty, *filled.masks, 1, form=filled.form).shape == (0, 2, 1, 48)
    assert kv_encode(filled.key[:, :, :0], filled.key[:, :, :0], filled.cache, *filled.masks, 0, form=filled.form).numel() == 0


BASE = Filled()
Q = BASE.query(4, 1)


@pytest.mark.parametrize(
    ("error", "says", "change"),
    [
        (TypeError, "float64", {"query": Q.double()}),
        (ValueError, "batch, heads, queries", {"query": Q[0]}),
        (ValueError, "multiple of the cache's 2", {"query": Q[:, :3]}),
        (ValueError, "KVFormat.empty", {"cache": BASE.cache[..., 1:]}),
        (ValueError, "KVFormat.empty", {"cache": BASE.cache.float()}),
        (ValueError, "not contiguous", {"cache": BASE.cache[:, :, ::2]}),
        (ValueError, r"bool \[2, 48\]", {"key_mask": BASE.key_mask[:, 1:]}),
        (ValueError, r"bool \[2, 48\]", {"value_mask": BASE.value_mask.float()}),
        (ValueError, r"int64 \[2\]", {"lengths": torch.tensor([1, 2, 3])}),
        (ValueError, "starts", {"starts": torch.tensor([1.0, 2.0])}),
        (ValueError, "broadcasts", {"mask": torch.zeros(3, 1, 1, 70)}),
        (ValueError, "broadcasts", {"mask": torch.zeros(1, 1, 1, 70, dtype=torch.float64)}),
        (ValueError, "lengths is 129; .* from 1 to 128, as the cache has room for 128", {"lengths": 129}),
        (ValueError, "lengths is 0; .* from 1 to 128", {"lengths": 0}),
        (ValueError, "consistent", {"lengths": torch.tensor([70, 129])}),
        (ValueError, "consistent", {"lengths": torch.tensor([0, 70])}),
        (TypeError, r"lengths is 70\.0; pass a whole number", {"lengths": 70.0}),
        (ValueError, "consistent", {"mask": torch.zeros(1, 1, 1, 69)}),
        (ValueError, "head_dim", {"form": KVFormat(48, 5, 49)}),
        (ValueError, "salient", {"key_mask": torch.ones(2, 48, dtype=torch.bool)}),
        (ranvier.BackendError, "backend 'triton' cannot run", {"backend": "triton"}),
    ],
)
def test_bad_input(error: type, says: str, change: dict) -> None:
    """Wrong shapes, types, lengths and masks are refused with what is allowed."""
    given = {"query": Q, "cache": BASE.cache, "key_mask": BASE.key_mask, "value_mask": BASE.value_mask, "lengths": 70}
    with pytest.raises(error, match=says):
        kv_attention(**{**given, "form": BASE.form, **change})


@pytest.mark.parametrize(
    ("error", "says", "change"),
    [
        (TypeError, "float64", {"key": BASE.key.double()}),
        (TypeError, "float64", {"value": BASE.value.double()}),
        (ValueError, "kv_heads, tokens, D", {"value": BASE.value[:, :, 1:]}),
        (ValueError, "1 kv heads and the cache 2", {"key": BASE.key[:, :1], "value": BASE.value[:, :1]}),
        (ValueError, "positions is 59; .* from 0 to 58, as the cache has room for 128", {"positions": 59}),
        (ValueError, "positions is -1; .* from 0 to 58", {"positions": -1}),
        (ValueError, "consistent", {"positions": torch.tensor([0, 59])}),
        (ValueError, "consistent", {"positions": torch.tensor([-1, 0])}),
        (TypeError, r"positions is 1\.5; pass a whole number", {"positions": 1.5}),
        (ValueError, "salient", {"value_mask": torch.ones(2, 48, dtype=torch.bool)}),
    ],
)
def test_bad_tokens(error: type, says: str, change: dict) -> None:
    """A refused append leaves the cache as it is."""
    given = {
        "key": BASE.key,
        "value": BASE.value,
        "cache": BASE.cache,
        "key_mask": BASE.key_mask,
        "value_mask": BASE.value_mask,
    }
    before = BASE.cache.clone()
    with pytest.raises(error, match=says):
        kv_encode(**{**given, "positions": 0, "form": BASE.form, **change})
    assert torch.equal(BASE.cache, before)


@pytest.mark.parametrize("form", [KVFormat(-1), KVFormat(16, 17), KVFormat(16, 0, -1)])
def test_no_cache_of_sizes_that_no_kernel_takes(form: KVFormat) -> None:
    with pytest.raises(ValueError, match=r"KVFormat\.empty: "):
        form.empty(1, 1, 1)
    with pytest.raises(ValueError, match="none may be negative"):
        KVFormat(16).empty(1, 1, -1)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_bool_masks_do_not_follow_the_default_dtype(default: torch.dtype) -> None:
    """torch.set_default_dtype changes nothing of a masked attention."""
    query, seen = BASE.query(4, 1), torch.ones(1, 1, 1, BASE.length, dtype=torch.bool)
    seen[..., 3:9] = False
    expected = kv_attention(query, BASE.cache, *BASE.masks, BASE.length, mask=seen, form=BASE.form)
    torch.set_default_dtype(default)
    try:
        got = kv_attention(query, BASE.cache, *BASE.masks, BASE.length, mask=seen, form=BASE.form)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(got, expected)
