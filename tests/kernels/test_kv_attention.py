"""The Triton kernels of kv_attention: values by the interpreter, compiled within the limits of four processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from spiking import generator, same
from torch import Tensor
from triton_tools import TARGETS, assert_all_fit, device, interpreted

from ranvier.ops import KVFormat, kv_decode
from ranvier.ops._kv_triton import attention_launches, encode_launches
from ranvier.ops._triton import Launch
from ranvier.ops.kv_attention import cpu_encode, triton, triton_encode


@dataclass
class Cache:
    form: KVFormat
    bytes: Tensor  # [B, H_kv, blocks, block_bytes]
    key_mask: Tensor
    value_mask: Tensor
    keys: Tensor  # float64 [B, H_kv, T, D], what the codes stand for
    values: Tensor

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        return self.key_mask, self.value_mask


def some_masks(form: KVFormat, kv_heads: int, fewer: int = 0) -> tuple[Tensor, Tensor]:
    """As many salient channels as the format has room for; each further head ``fewer`` less."""
    g = generator(form.head_dim)
    masks = []
    for count in (form.key_salient, form.value_salient):
        mask = torch.zeros(kv_heads, form.head_dim, dtype=torch.bool)
        for h in range(kv_heads):
            mask[h, torch.randperm(form.head_dim, generator=g)[: max(0, count - fewer * h)]] = True
        masks.append(mask)
    return tuple(masks)


def a_cache(
    batch: int, kv_heads: int, tokens: int, channels: int, salient: tuple[int, int], nan_at: int | None = None
) -> Cache:
    """Filled by the CPU kernel."""
    g, form = generator(tokens + channels), KVFormat(channels, *salient)
    keys, values = (torch.randn(batch, kv_heads, tokens, channels, generator=g) for _ in range(2))
    if nan_at is not None:
        keys[:, :, nan_at], values[:, :, nan_at] = float("nan"), float("nan")
    masks, packed = some_masks(form, kv_heads), form.empty(batch, kv_heads, form.blocks(tokens))
    cpu_encode(keys, values, packed, *masks, torch.zeros(batch, dtype=torch.int64), *salient)
    return Cache(form, packed, *masks, *(x.double() for x in kv_decode(packed, *masks, tokens, form=form)))


def attended(query: Tensor, cache: Cache, lengths: Tensor, starts: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """The formula in float64."""
    batch, heads, queries, _ = query.shape
    group, tokens = heads // cache.keys.shape[1], cache.keys.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                begin, end = (0 if starts is None else int(starts[b])), int(lengths[b]) - queries + i + 1
                if end <= begin:
                    continue
                keys, values = (x[b, h // group, begin:end] for x in (cache.keys, cache.values))
                logits = scale * (keys @ query[b, h, i].double())
                if mask is not None:
                    logits = logits + torch.nn.functional.pad(mask[b, h, i], (0, tokens))[begin:end]
                out[b, h, i] = torch.softmax(logits, 0) @ values
    return out


def ours(query: Tensor, cache: Cache, lengths: Tensor, starts: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    salient = cache.form.key_salient, cache.form.value_salient
    with interpreted():
        return triton(query, cache.bytes, *cache.masks, lengths, starts, mask, *salient, query.shape[-1] ** -0.5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("channels", "salient", "tokens", "positions", "dtype"),
    [
        (64, (7, 9), 5, (0, 3), torch.float32), (80, (0, 17), 9, (61, 62), torch.bfloat16),
        (32, (32, 0), 10, (60, 119), torch.float16), (128, (13, 13), 1, (126, 65), torch.float32),
    ],
)  # fmt: skip
def test_tokens_are_packed_as_the_cpu_packs_them(
    channels: int, salient: tuple[int, int], tokens: int, positions: tuple[int, int], dtype: torch.dtype
) -> None:
    """Every byte of the cache, those of other tokens and of fewer salient channels included, and the scales; strided tokens."""
    form, g = KVFormat(channels, *salient), generator(channels)
    before = torch.randint(0, 256, (2, 2, 3, form.block_bytes), dtype=torch.uint8, generator=g)
    key, value = (torch.randn(2, tokens, 2, channels, generator=g).to(dtype).transpose(1, 2) for _ in range(2))
    key[0, 1, 0, 3], value[1, 0, -1, 0] = float("nan"), float("inf")
    given = (*some_masks(form, 2, fewer=1), torch.tensor(positions), *salient)
    expected, got = before.clone(), before.clone()
    scales = cpu_encode(key, value, expected, *given)
    with interpreted():
        assert same(triton_encode(key, value, got, *given), scales)
    assert torch.equal(got, expected) and not torch.equal(got, before)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("position", [-3, 60])
def test_tokens_beyond_the_cache_are_not_stored(position: int) -> None:
    """Their scales are NaN; the bytes around the cache keep their values."""
    form, masks = KVFormat(32, 5, 5), some_masks(KVFormat(32, 5, 5), 1)
    room = torch.full((3, form.block_bytes), 170, dtype=torch.uint8)
    cache, key = room[1:2].view(1, 1, 1, -1), torch.randn(1, 1, 7, 32, generator=generator(1))
    with interpreted():
        scales = triton_encode(key, key, cache, *masks, torch.tensor([position]), 5, 5)
    at = position + torch.arange(7)
    assert torch.equal(scales[0, 0, 0].isnan(), (at < 0) | (at > 63)) and bool((room[::2] == 170).all())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("kv_heads", "group", "queries", "channels", "salient"),
    [(2, 1, 1, 64, (7, 9)), (1, 2, 3, 80, (0, 17)), (1, 7, 3, 32, (32, 0))],
)
def test_attention_is_the_formulas(kv_heads: int, group: int, queries: int, channels: int, salient: tuple[int, int]) -> None:
    """Splits, heads that share a cache, several queries, lengths within a block, left padding and a mask.

    In float32 with u = 2^-24 a logit of D terms errs by at most (D + 6) u scale sum |q| (|zero| + 30 scale), here below 5e-5 of
    the weights' exponent; values are below 10 and so the result within 1e-3.
    """
    cache = a_cache(2, kv_heads, 320, channels, salient)
    query = torch.randn(2, kv_heads * group, queries, channels, generator=generator(3))
    lengths, starts = torch.tensor([320, 71]), torch.tensor([5, 68])
    mask = torch.randn(2, kv_heads * group, queries, 300, generator=generator(4))
    for given in ((lengths, None, None), (lengths, starts, mask)):
        truth = attended(query, cache, *given, channels**-0.5)
        assert float((ours(query, cache, *given).double() - truth).abs().max()) < 1e-3


@pytest.mark.usefixtures("poisoned")
def test_half_precision_is_no_worse_than_twice_torchs() -> None:
    """float16 queries: error to the float64 truth at most twice that of torch's SDPA on the same keys and values in float16."""
    cache = a_cache(1, 2, 192, 64, (8, 8))
    query = torch.randn(1, 4, 1, 64, generator=generator(3)).half()
    truth = attended(query, cache, torch.tensor([192]), None, None, 0.125)
    keys, values = (x.half().repeat_interleave(2, 1) for x in (cache.keys, cache.values))
    torchs = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.125)
    error, theirs = ((y.double() - truth).abs().max() for y in (ours(query, cache, torch.tensor([192])), torchs))
    assert float(error) <= 2 * float(theirs)


@pytest.mark.usefixtures("poisoned")
def test_only_who_sees_a_nan_gets_it() -> None:
    """A token that is not finite makes its later queries NaN and no earlier one; a query that sees nothing gets 0."""
    cache = a_cache(1, 1, 128, 32, (4, 4), nan_at=70)
    query = torch.randn(1, 1, 3, 32, generator=generator(3))
    got = ours(query, cache, torch.tensor([72]))
    assert bool(got[0, 0, 0].isfinite().all()) and bool(got[0, 0, 1:].isnan().all())
    assert bool((ours(query, cache, torch.tensor([60]), torch.tensor([60])) == 0).all())


def launches(channels: int) -> list[Launch]:
    form = KVFormat(channels, channels // 10, channels // 10)
    query = torch.empty(1, 32, 1, channels, dtype=torch.bfloat16)
    masks = some_masks(form, 8)
    cache = form.empty(1, 8, 64)
    out = torch.empty_like(query)
    return attention_launches(form, query, cache, *masks, torch.tensor([4096]), None, None, 0.1, out)


def encoding() -> list[Launch]:
    form, x = KVFormat(128, 13, 13), torch.empty(1, 8, 1, 128, dtype=torch.bfloat16)
    masks, cache, at = some_masks(form, 8), form.empty(1, 8, 64), torch.tensor([4096])
    steps = torch.empty(8, 1)
    kinds = zip(masks, ("key", "value"), strict=True)
    return [launch for mask, kind in kinds for launch in encode_launches(form, x, cache, mask, at, steps, kind)]


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """Every shape of the table compiles within the processor's memory and registers, without spills."""
    used: set = set()
    with device(target, used):
        made = launches(256) + encoding()
    assert_all_fit("kv_attention", target, made, used, tmp_path)
