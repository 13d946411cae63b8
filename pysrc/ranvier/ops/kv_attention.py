"""kv_attention: attention that reads a packed 4-bit key-value cache, and the op that appends tokens to it.

    out = softmax(scale q k^^T + mask) v^   over the visible tokens of the cache,   k^, v^ = zero + scale code

The formula and the codes: :mod:`ranvier.reference.kv_attention`. Per token and kv head the cache takes D + 8 bytes and the
salient channels' bits, for D = 128 and 13 salient channels 140 bytes of the 512 that bfloat16 takes.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ranvier import _C
from ranvier.ops._args import DTYPES, check_device, check_float, check_is_tensor, dense_rows, logit_scale, pointer
from ranvier.ops._declare import declare
from ranvier.ops._kv_layout import BLOCK, KVFormat, pack_keys, pack_values, unpack_keys, unpack_values
from ranvier.ops._kv_triton import attention_launches, encode_launches
from ranvier.ops._triton import run
from ranvier.reference import kv_attention as reference

ENCODE_SCHEMA = (
    "kv_attention_encode(Tensor key, Tensor value, Tensor(a!) cache, Tensor key_mask, Tensor value_mask, Tensor positions,"
    " int key_salient, int value_salient) -> Tensor"
)
SCHEMA = (
    "kv_attention(Tensor query, Tensor cache, Tensor key_mask, Tensor value_mask, Tensor lengths, Tensor? starts,"
    " Tensor? mask, int key_salient, int value_salient, float scale) -> Tensor"
)
INSTEAD = "train with an attention of floats, model.set_attn_implementation('sdpa')"


def _check_cache(op: str, x: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, form: KVFormat) -> None:
    form.check(op)
    check_is_tensor(op, "cache", cache)
    batch = x.shape[0]
    shape = "uint8 [batch, kv_heads, blocks, block_bytes]"
    if cache.dtype != torch.uint8 or cache.ndim != 4 or cache.shape[0] != batch or cache.shape[3] != form.block_bytes:
        got = f"{cache.dtype} {list(cache.shape)}"
        raise ValueError(
            f"{op}: cache is {got}; it must be {shape} with batch {batch} and block_bytes {form.block_bytes}; make it by"
            " KVFormat.empty"
        )
    if not cache.is_contiguous():
        raise ValueError(f"{op}: cache is not contiguous; pass the whole tensor that KVFormat.empty made")
    expected = (cache.shape[1], form.head_dim)
    for name, mask in (("key_mask", key_mask), ("value_mask", value_mask)):
        check_is_tensor(op, name, mask)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"{op}: {name} is {mask.dtype} {list(mask.shape)}; it must be bool {list(expected)}, [kv_heads, D]"
            )


def _check_row(op: str, name: str, row: Tensor, batch: int) -> None:
    check_is_tensor(op, name, row)
    if row.dtype != torch.int64 or tuple(row.shape) != (batch,):
        raise ValueError(
            f"{op}: {name} is {row.dtype} {list(row.shape)}; it must be int64 [{batch}], one entry a row of the batch"
        )


def check_encode(
    key: Tensor, value: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, positions: Tensor,
    key_salient: int, value_salient: int,
) -> None:  # fmt: skip
    op = "kv_attention_encode"
    check_float(op, "key", key)
    check_float(op, "value", value)
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"{op}: key is {list(key.shape)}, value {list(value.shape)}; both must be [batch, kv_heads, tokens, D]"
        )
    _check_cache(op, key, cache, key_mask, value_mask, KVFormat(key.shape[3], key_salient, value_salient))
    if cache.shape[1] != key.shape[1]:
        raise ValueError(f"{op}: key has {key.shape[1]} kv heads and the cache {cache.shape[1]}")
    _check_row(op, "positions", positions, key.shape[0])
    check_device(op, key.device, value=value, cache=cache, key_mask=key_mask, value_mask=value_mask, positions=positions)


def check(
    query: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, lengths: Tensor, starts: Tensor | None,
    mask: Tensor | None, key_salient: int, value_salient: int, scale: float,
) -> None:  # fmt: skip
    op = "kv_attention"
    check_float(op, "query", query)
    if query.ndim != 4:
        raise ValueError(f"{op}: query is {list(query.shape)}; it must be [batch, heads, queries, D]")
    _check_cache(op, query, cache, key_mask, value_mask, KVFormat(query.shape[3], key_salient, value_salient))
    heads, kv_heads = query.shape[1], cache.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: query has {heads} heads, no multiple of the cache's {kv_heads} kv heads")
    _check_row(op, "lengths", lengths, query.shape[0])
    if starts is not None:
        _check_row(op, "starts", starts, query.shape[0])
    if mask is not None:
        check_is_tensor(op, "mask", mask)
        wanted = (query.shape[0], heads, query.shape[2])
        fits = mask.ndim == 4 and all(m in (1, n) for m, n in zip(mask.shape[:3], wanted, strict=True))
        if mask.dtype not in (torch.float32, torch.bool) or not fits or mask.shape[3] == 0:
            raise ValueError(
                f"{op}: mask is {mask.dtype} {list(mask.shape)}; it must be float32 (added) or bool (True: seen), of a shape"
                f" that broadcasts to {[*wanted, 'tokens']}"
            )
    check_device(
        op, query.device, cache=cache, key_mask=key_mask, value_mask=value_mask, lengths=lengths, starts=starts, mask=mask
    )


def fake_encode(key: Tensor, *_: object) -> Tensor:
    return key.new_empty((2, *key.shape[:3]), dtype=torch.float32)


def cpu_encode(
    key: Tensor, value: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, positions: Tensor,
    key_salient: int, value_salient: int,
) -> Tensor:  # fmt: skip
    key, value, positions = dense_rows(key), dense_rows(value), positions.contiguous()
    key_mask, value_mask = key_mask.contiguous(), value_mask.contiguous()
    steps = fake_encode(key)
    batch, kv_heads, tokens, channels = key.shape
    _C.kv_append(
        struct.pack(
            "22q", channels, key_salient, value_salient, batch, kv_heads, tokens, cache.shape[2], DTYPES[key.dtype],
            DTYPES[value.dtype], cache.data_ptr(), key_mask.data_ptr(), value_mask.data_ptr(), key.data_ptr(),
            *key.stride()[:3],
            value.data_ptr(), *value.stride()[:3], positions.data_ptr(), steps.data_ptr(),
        )
    )  # fmt: skip
    return steps


def triton_encode(
    key: Tensor, value: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, positions: Tensor,
    key_salient: int, value_salient: int,
) -> Tensor:  # fmt: skip
    form, steps = KVFormat(key.shape[3], key_salient, value_salient), fake_encode(key)
    run(encode_launches(form, dense_rows(key), cache, key_mask, positions, steps[0], "key"))
    run(encode_launches(form, dense_rows(value), cache, value_mask, positions, steps[1], "value"))
    return steps


def reference_encode(
    key: Tensor, value: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, positions: Tensor,
    key_salient: int, value_salient: int,
) -> Tensor:  # fmt: skip
    form = KVFormat(key.shape[3], key_salient, value_salient)
    steps = []
    at = positions[:, None] + torch.arange(key.shape[2], device=key.device)
    if key.numel() and (int(at.min()) < 0 or int(at.max()) >= BLOCK * cache.shape[2]):
        raise ValueError("kv_attention_encode: positions leave the cache; make it larger")
    for x, mask, count, unpack, pack in (
        (key, key_mask, key_salient, unpack_keys, pack_keys),
        (value, value_mask, value_salient, unpack_values, pack_values),
    ):
        if int(mask.sum(-1).max()) > count:
            raise ValueError("kv_attention_encode: a mask marks more channels than its salient count; raise the count")
        stored, encoded = unpack(cache, mask, form), reference.kv_encode(x, mask)
        for old, new in zip(stored, encoded, strict=True):
            old.scatter_(2, at[:, None, :, None].expand_as(new), new)
        pack(cache, stored, mask, form)
        steps.append(encoded.scale.squeeze(-1).float())
    return torch.stack(steps)


def fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def _float_mask(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, float("-inf"))
    return dense_rows(mask).expand(*shape, -1)


def cpu(
    query: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, lengths: Tensor, starts: Tensor | None,
    mask: Tensor | None, key_salient: int, value_salient: int, scale: float,
) -> Tensor:  # fmt: skip
    out = fake(query)
    if not out.is_contiguous():
        out = torch.empty(query.shape, dtype=query.dtype)
    query, lengths = dense_rows(query), lengths.contiguous()
    key_mask, value_mask = key_mask.contiguous(), value_mask.contiguous()
    starts = None if starts is None else starts.contiguous()
    batch, heads, queries, channels = query.shape
    mask = None if mask is None else _float_mask(mask, (batch, heads, queries))
    width, strides = (0, (0, 0, 0)) if mask is None else (mask.shape[3], mask.stride()[:3])
    _C.kv_attention(
        struct.pack(
            "24q", channels, key_salient, value_salient, batch, heads, cache.shape[1], queries, cache.shape[2],
            DTYPES[query.dtype], cache.data_ptr(), key_mask.data_ptr(), value_mask.data_ptr(), query.data_ptr(),
            *query.stride()[:3], lengths.data_ptr(), pointer(starts), pointer(mask), *strides, width, out.data_ptr(),
        ),
        scale,
    )  # fmt: skip
    return out


def triton(
    query: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, lengths: Tensor, starts: Tensor | None,
    mask: Tensor | None, key_salient: int, value_salient: int, scale: float,
) -> Tensor:  # fmt: skip
    form = KVFormat(query.shape[3], key_salient, value_salient)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    mask = None if mask is None else _float_mask(mask, query.shape[:3])
    run(attention_launches(form, dense_rows(query), cache, key_mask, value_mask, lengths, starts, mask, scale, out))
    return out


def reference_attention(
    query: Tensor, cache: Tensor, key_mask: Tensor, value_mask: Tensor, lengths: Tensor, starts: Tensor | None,
    mask: Tensor | None, key_salient: int, value_salient: int, scale: float,
) -> Tensor:  # fmt: skip
    form = KVFormat(query.shape[3], key_salient, value_salient)
    tokens = int(lengths.max()) if lengths.numel() else 0
    if tokens > BLOCK * cache.shape[2] or bool((lengths < query.shape[2]).any()):
        raise ValueError("kv_attention: lengths leave the cache, or are fewer than the queries")
    keys, values = (
        reference.kv_decode(unpack(cache, m, form))[:, :, :tokens]
        for unpack, m in ((unpack_keys, key_mask), (unpack_values, value_mask))
    )
    if mask is not None:
        mask = _float_mask(mask, query.shape[:3])[..., :tokens]
    seen = reference.visible(lengths, starts, query.shape[2], tokens)
    return reference.kv_attention(query.float(), keys, values, seen, mask, scale).to(query.dtype)


encode_op = declare(
    ENCODE_SCHEMA, check=check_encode, fake=fake_encode, cpu=cpu_encode, triton=triton_encode,
    reference=reference_encode, places=(), dtypes=tuple(DTYPES), instead=INSTEAD,
)  # fmt: skip
op = declare(
    SCHEMA, check=check, fake=fake, cpu=cpu, triton=triton, reference=reference_attention,
    places=("reference", "csrc", "kernels", "ops", "tests", "benchmarks"), dtypes=tuple(DTYPES), instead=INSTEAD,
)  # fmt: skip


def _row(op: str, name: str, values: int | Tensor, like: Tensor, cache: Tensor, first: int, last: int) -> Tensor:
    """values for each row; a number is looked at here, before a GPU, which reads none back, gets it.

    first, last: the smallest number, and how far below the cache's room the largest one is.
    """
    if isinstance(values, Tensor):
        return values
    if isinstance(values, bool) or not isinstance(values, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} is {values!r}; pass a whole number, or int64 [batch]")
    # Of another cache the op itself says what is wrong.
    fits = isinstance(cache, Tensor) and cache.ndim == 4 and cache.is_contiguous()
    room = BLOCK * cache.shape[2] if fits else None
    if values < first or (room is not None and values > room - last):
        raise ValueError(
            f"{op}: {name} is {values}; with this many tokens in the call it must be from {first} to {room - last}, as the"
            f" cache has room for {room}"
            if room is not None
            else f"{op}: {name} is {values}; it must be at least {first}"
        )
    return torch.full((like.shape[0],), values, dtype=torch.int64, device=like.device)


def kv_encode(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    key_mask: Tensor,
    value_mask: Tensor,
    positions: int | Tensor,
    *,
    form: KVFormat,
    backend: str | None = None,
) -> Tensor:
    """Quantize new tokens into the cache, in place.

    key, value: float32, bfloat16 or float16 [B, H_kv, L, D], keys after RoPE. cache: uint8 [B, H_kv, blocks, block_bytes] of
    :meth:`KVFormat.empty`. key_mask, value_mask: bool [H_kv, D], True where a channel has one more bit. positions: where the
    first of the new tokens goes, one for all rows or int64 [B]. form: the format the cache was made with. Returns the scales,
    float32 [2, B, H_kv, L] (keys, values): NaN where a token is not finite; whoever sees such a token gets NaN.

    Raises ValueError for shapes that do not fit, positions beyond the cache and masks with more salient channels than the
    format has room for, TypeError for dtypes, BackendError for a backend that cannot run. On a GPU, which does not read numbers
    back, a token beyond the cache is not stored and its scale is NaN, and bits that the format has no room for are dropped.
    Source: SpikeLLM, arXiv 2407.04752, section 3; quantized per token, as in its parent OmniQuant, so that it is causal.
    """
    op, tokens = "kv_attention_encode", key.shape[2] if isinstance(key, Tensor) and key.ndim == 4 else 0
    check_is_tensor(op, "key", key)
    at = _row(op, "positions", positions, key, cache, 0, tokens)
    return encode_op(key, value, cache, key_mask, value_mask, at, form.key_salient, form.value_salient, backend=backend)


def kv_attention(
    query: Tensor,
    cache: Tensor,
    key_mask: Tensor,
    value_mask: Tensor,
    lengths: int | Tensor,
    *,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    form: KVFormat,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v over a packed cache.

    query: float32, bfloat16 or float16 [B, H, Lq, D], H a multiple of H_kv; its tokens are the last Lq of each row, and the
    i-th sees those up to itself. cache, key_mask, value_mask, form: as :func:`kv_encode` filled them. lengths: tokens stored,
    one for all rows or int64 [B]. starts: int64 [B], the first visible token (left padding). mask: float32, added to the
    logits, or bool, True where seen; its shape broadcasts to [B, H, Lq, tokens], but for the last dimension, which has them
    all. A value at or below -2.3e38 hides a token, as -inf does. scale: D ** -0.5 by default.
    Returns [B, H, Lq, D] of the query's dtype. A query that sees no token gets 0; one that sees a token that is not finite,
    or is not finite itself, NaN. Each query's result is the same bits beside any other and on any number of threads.

    Exactness: the CPU kernels read a query as 16-bit integers, step max|q| / 32512, and weights times a value's scale as
    16-bit integers per 64 tokens; both sums are exact. Against exact arithmetic on the cache's values a logit is off by at
    most scale * step / 2 * sum_d |k^_d| and float32 rounding. The GPU kernel multiplies in the query's type.

    Raises ValueError for shapes that do not fit and lengths beyond the cache, TypeError for dtypes, BackendError for a
    backend that cannot run. On a GPU, which does not read numbers back, lengths beyond the cache are cut to it, and a mask
    narrower than a row's tokens adds nothing to the others.
    """
    check_is_tensor("kv_attention", "query", query)
    head_dim, queries = (query.shape[-1], query.shape[2]) if query.ndim == 4 else (0, 0)
    scale = logit_scale("kv_attention", scale, head_dim)
    lengths = _row("kv_attention", "lengths", lengths, query, cache, queries, 0)
    given = (key_mask, value_mask, lengths, starts, mask, form.key_salient, form.value_salient, scale)
    return op(query, cache, *given, backend=backend)


def kv_decode(cache: Tensor, key_mask: Tensor, value_mask: Tensor, length: int, *, form: KVFormat) -> tuple[Tensor, Tensor]:
    """The keys and values that the first ``length`` tokens of a cache stand for: float32 [B, H_kv, length, D] each."""
    return tuple(
        reference.kv_decode(unpack(cache, mask, form))[:, :, :length]
        for unpack, mask in ((unpack_keys, key_mask), (unpack_values, value_mask))
    )
