"""The Triton kernels of kv_attention: values by the interpreter, compiled within the limits of four processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from spiking import generator
from torch import Tensor
from triton_tools import TARGETS, assert_all_fit, device, interpreted

from ranvier.ops._kv_triton import attention_launches, head_order
from ranvier.ops._triton import Launch, run


@dataclass(frozen=True)
class Format:
    """A block of 64 tokens: offset and shape of its parts, each filled up to 64 bytes (csrc/kv_attention/kv_attention.h)."""

    head_dim: int
    key_salient: int
    value_salient: int

    @property
    def padded(self) -> int:
        return -(-self.head_dim // 32) * 32

    @property
    def sections(self) -> dict[str, tuple[int, int]]:
        keys, values = 32 * -(-self.key_salient // 4), 128 * -(-self.value_salient // 16)
        sizes = {
            "key_codes": 32 * self.padded, "key_bits": keys, "key_scale": 128, "key_zero": 128,
            "value_codes": 32 * self.padded, "value_bits": values, "value_scale": 128, "value_zero": 128, "end": 0,
        }  # fmt: skip
        at, found = 0, {}
        for name, size in sizes.items():
            found[name] = (at, size)
            at += -(-size // 64) * 64
        return found

    @property
    def block_bytes(self) -> int:
        return self.sections["end"][0]


def packed(codes: Tensor, scale: Tensor, zero: Tensor, salient: int, form: Format, *, keys: bool) -> Tensor:
    """One head's tokens [T, D] with their salient channels first, by the header's words: uint8 [T / 64, block_bytes]."""
    tokens, channels = codes.shape
    out = torch.zeros(tokens // 64, form.block_bytes, dtype=torch.uint8)
    name = "key" if keys else "value"
    t, p = torch.arange(64)[:, None], torch.arange(channels)[None, :]
    if keys:
        unit, wide = p // 4, -(-salient // 4)
        place = (t // 16 * (form.padded // 8) + unit // 2) * 64 + t % 16 * 4 + p % 4
        bit, line = t % 16 * 4 + p % 4, (t // 16) * wide + unit
    else:
        unit, wide = p // 16, -(-salient // 16)
        place = (t // 4 * (form.padded // 32) + unit // 2) * 64 + p % 16 * 4 + t % 4
        bit, line = p % 16 * 4 + t % 4, (t // 4) * wide + unit
    for block, part in zip(out, codes.view(-1, 64, channels), strict=True):
        nibbles = (part >> 1) << (4 * (unit % 2)).to(torch.uint8)
        block.index_put_((form.sections[f"{name}_codes"][0] + place,), nibbles, accumulate=True)
        kept = (p < salient).expand_as(part)
        at = (form.sections[f"{name}_bits"][0] + line * 8 + bit // 8)[kept]
        block.index_put_((at,), ((part & 1) << (bit % 8).to(torch.uint8))[kept], accumulate=True)
    for suffix, values in (("scale", scale), ("zero", zero)):
        at = form.sections[f"{name}_{suffix}"][0]
        out[:, at : at + 128] = values.half().view(-1, 64).contiguous().view(torch.uint8)
    return out


@dataclass
class Cache:
    form: Format
    bytes: Tensor  # [B, H_kv, blocks, block_bytes]
    key_mask: Tensor
    value_mask: Tensor
    keys: Tensor  # float64 [B, H_kv, T, D], what the codes stand for
    values: Tensor


def a_cache(
    batch: int, kv_heads: int, tokens: int, channels: int, salient: tuple[int, int], nan_at: int | None = None
) -> Cache:
    g = generator(tokens + channels)
    form = Format(channels, *salient)
    masks, floats = [], []
    cache = torch.zeros(batch, kv_heads, tokens // 64, form.block_bytes, dtype=torch.uint8)
    for keys, count in ((True, salient[0]), (False, salient[1])):
        mask = torch.zeros(kv_heads, channels, dtype=torch.bool)
        for h in range(kv_heads):
            mask[h, torch.randperm(channels, generator=g)[:count]] = True
        codes = torch.randint(0, 31, (batch, kv_heads, tokens, channels), generator=g, dtype=torch.uint8)
        codes = torch.where(mask[None, :, None], codes, codes & 30)
        scale = (torch.rand(batch, kv_heads, tokens, 1, generator=g) * 0.2 + 1e-3).half()
        zero = (-3 * torch.rand(batch, kv_heads, tokens, 1, generator=g)).half()
        if nan_at is not None:
            scale[:, :, nan_at] = float("nan")
        order = head_order(mask)
        for b in range(batch):
            for h in range(kv_heads):
                cache[b, h] |= packed(codes[b, h][:, order[h]], scale[b, h], zero[b, h], count, form, keys=keys)
        masks.append(mask)
        floats.append(zero.double() + scale.double() * codes.double())
    return Cache(form, cache, *masks, *floats)


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
    out = torch.full(query.shape, float("nan"), dtype=query.dtype)
    given = (cache.bytes, cache.key_mask, cache.value_mask, lengths, starts, mask, query.shape[-1] ** -0.5)
    with interpreted():
        run(attention_launches(cache.form, query, *given, out))
    return out


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("kv_heads", "group", "queries", "channels", "salient"),
    [(2, 1, 1, 64, (7, 9)), (1, 4, 1, 128, (13, 13)), (1, 2, 3, 80, (0, 17)), (1, 7, 3, 32, (32, 0))],
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
    for given in ((lengths, None, None), (lengths, starts, None), (lengths, starts, mask)):
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
    form = Format(channels, channels // 10, channels // 10)
    query = torch.empty(1, 32, 1, channels, dtype=torch.bfloat16)
    masks = [torch.zeros(8, channels, dtype=torch.bool) for _ in range(2)]
    cache = torch.empty(1, 8, 64, form.block_bytes, dtype=torch.uint8)
    out = torch.empty_like(query)
    return attention_launches(form, query, cache, *masks, torch.tensor([4096]), None, None, 0.1, out)


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """Every shape of the table compiles within the processor's memory and registers, without spills."""
    used: set = set()
    with device(target, used):
        made = launches(128) + launches(256)[:1]
    assert_all_fit("kv_attention", target, made, used, tmp_path)
