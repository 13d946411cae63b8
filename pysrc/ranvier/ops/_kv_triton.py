"""Launches of kernels/kv_attention.py: the splits over a packed key-value cache, and what joins them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ranvier.ops._kv_layout import head_order
from ranvier.ops._spike_triton import _power_of_two
from ranvier.ops._triton import Launch, configuration

LOG2_E = 1.4426950408889634


def attention_launches(
    form: Any,
    query: Tensor,
    cache: Tensor,
    key_mask: Tensor,
    value_mask: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
) -> list[Launch]:
    """What fills out, dense [B, H, Lq, D].

    form: head_dim, padded, key_salient, value_salient, block_bytes and sections (name -> (offset, shape)) of a cache's block.
    query [B, H, Lq, D] with its channels side by side; mask float32 [B, H, Lq, width] or None, its tokens side by side.
    """
    batch, heads, queries, channels = query.shape
    kv_heads, blocks = cache.shape[1], cache.shape[2]
    use, options = configuration("kv_attention", "split", query.device, d=channels, blocks=blocks)
    group, chunk = heads // kv_heads, use["chunk"]
    rows, splits = group * queries, max(1, -(-blocks // chunk))
    if 0 in (batch, heads, queries):
        return []
    quads, value_groups = -(-form.key_salient // 4), -(-form.value_salient // 16)
    padded = max(32, _power_of_two(form.padded))
    shape = {
        "PADDED": padded, "GROUPS": max(2, _power_of_two(value_groups)),
    }  # fmt: skip
    offset = {name: at for name, (at, _) in form.sections.items()}
    width = padded + 16 * shape["GROUPS"]
    sums = torch.empty((batch * kv_heads, splits, rows, 2), dtype=torch.float32, device=query.device)
    partial = torch.empty((batch * kv_heads, splits, rows, width), dtype=torch.float32, device=query.device)
    strides = (0, 0, 0) if mask is None else mask.stride()[:3]
    split = {
        "query": query, "cache": cache, "key_order": head_order(key_mask), "lengths": lengths.contiguous(),
        "starts": None if starts is None else starts.contiguous(), "mask": mask, "sums": sums, "partial": partial,
        "logit_scale": scale * LOG2_E, "D": channels, "queries": queries, "group": group, "kv_heads": kv_heads,
        "blocks": blocks, "splits": splits, "block_bytes": form.block_bytes, "key_bits": offset["key_bits"],
        "key_scale": offset["key_scale"], "value_codes": offset["value_codes"], "value_bits": offset["value_bits"],
        "value_scale": offset["value_scale"], "quads": quads, "value_groups": value_groups,
        **dict(zip(("query_b", "query_h", "query_q"), query.stride()[:3], strict=True)),
        **dict(zip(("mask_b", "mask_h", "mask_q"), strides, strict=True)),
        "mask_width": 0 if mask is None else mask.shape[3], "ROWS": use["rows"], **shape,
        "QUADS": max(4, _power_of_two(quads)), "CHUNK": chunk, "STAGES": options["num_stages"],
    }  # fmt: skip
    join = {
        "sums": sums, "partial": partial, "value_order": head_order(value_mask), "out": out, "D": channels,
        "queries": queries, "group": group, "kv_heads": kv_heads, "splits": splits, **shape,
    }  # fmt: skip
    grid = (batch * kv_heads, splits, -(-rows // use["rows"]))
    return [
        Launch("kv_attention", "kv_attention_split", grid, split, options),
        Launch("kv_attention", "kv_attention_join", (batch * kv_heads, rows), join, {"num_warps": 4}),
    ]


def encode_launches(
    form: Any, x: Tensor, cache: Tensor, mask: Tensor, positions: Tensor, steps: Tensor, kind: str
) -> list[Launch]:
    """What writes x [B, H_kv, L, D] into the cache and its scales into steps [B, H_kv, L]. kind: "key" or "value"."""
    batch, kv_heads, tokens, channels = x.shape
    if x.numel() == 0:
        return []
    offset, keys = {name: at for name, (at, _) in form.sections.items()}, kind == "key"
    wide = -(-form.key_salient // 4) if keys else -(-form.value_salient // 16)
    arguments = {
        "x": x, "cache": cache, "order": head_order(mask), "mask": mask.contiguous(), "positions": positions.contiguous(),
        "steps": steps, "D": channels, "tokens": tokens, "kv_heads": kv_heads, "blocks": cache.shape[2],
        "block_bytes": form.block_bytes, "codes_at": offset[f"{kind}_codes"], "bits_at": offset[f"{kind}_bits"],
        "scale_at": offset[f"{kind}_scale"], "lines": form.padded // (8 if keys else 32), "wide": wide,
        **dict(zip(("x_b", "x_h", "x_t"), x.stride()[:3], strict=True)),
        "PADDED": max(32, _power_of_two(form.padded)), "WIDE": _power_of_two(wide), "KEYS": keys,
    }  # fmt: skip
    grid = (batch * kv_heads, tokens // 4 + 2)
    return [Launch("kv_attention", "kv_attention_encode", grid, arguments, {"num_warps": 4})]
