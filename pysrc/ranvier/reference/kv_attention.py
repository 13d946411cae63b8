"""kv_attention: keys and values of a decoder as 4-bit spike counts, 5-bit on salient channels, and attention on them.

For one token and kv head, x [D] a key after RoPE or a value, S the salient channels of the head:

    scale = fp16(clamp((max x - min x) / 30)),  zero = fp16(min x)
    v = 2 clip(round((x - zero) / (2 scale)), 0, 15)     d not in S: one step of 15 levels
    v = clip(round((x - zero) / scale), 0, 30)           d in S: T = 2 steps, one bit more
    x^ = zero + scale v

The range is the token's own minimum and maximum and need not include zero: attention only sums products, so no channel has
to be exactly 0. Everything is per token and so causal. SpikeLLM, arXiv 2407.04752, section 3; the released code's "Refine".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS, STEPS = 15, 2
SCALE_MIN, HALF_MAX = 2.0**-18, 65504.0


class KVCodes(NamedTuple):
    """codes uint8 [..., D] in units of the scale (0 to 30, even off the salient channels), scale and zero float16 [..., 1].

    A token with NaN or Inf has scale NaN, codes 0 and zero 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _codes(x: Tensor, salient: Tensor, low: Tensor, high: Tensor) -> KVCodes:
    scale = ((high - low) / (STEPS * LEVELS)).clamp(SCALE_MIN, HALF_MAX).half()
    zero = low.clamp(-HALF_MAX, HALF_MAX).half()
    step, above = scale.to(x.dtype), x - zero.to(x.dtype)
    coarse = STEPS * torch.round((above / (STEPS * step)).clamp(0, LEVELS))
    fine = torch.round((above / step).clamp(0, STEPS * LEVELS))
    return KVCodes(torch.where(salient, fine, coarse).to(torch.uint8), scale, zero)


def kv_encode(x: Tensor, salient: Tensor) -> KVCodes:
    """x float [..., heads, tokens, D], salient bool [heads, D] -> :class:`KVCodes`, one range a token and head."""
    x = _working(x)
    finite = x.isfinite().all(-1, keepdim=True)
    given = torch.where(finite, x, 0.0)
    encoded = _codes(given, salient.unsqueeze(-2), given.amin(-1, keepdim=True), given.amax(-1, keepdim=True))
    scale = torch.where(finite, encoded.scale, float("nan"))
    return KVCodes(torch.where(finite, encoded.codes, 0), scale, torch.where(finite, encoded.zero, 0.0))


def kv_decode(encoded: KVCodes, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the codes stand for, [..., D]; in float32 and float64 rounded at most once."""
    return encoded.zero.to(dtype) + encoded.scale.to(dtype) * encoded.codes.to(dtype)


def kv_decode_window(x: Tensor, salient: Tensor) -> Tensor:
    """Non-causal, for reproducing the paper's figures only: each channel's range is that of the whole window.

    x float [..., heads, tokens, D], salient bool [heads, D]. The released code takes keys' minimum and maximum over the last
    axis of K^T, all tokens of the window, later ones included: no cache can do that token by token.
    """
    given = _working(x)
    return kv_decode(
        _codes(given, salient.unsqueeze(-2), given.amin(-2, keepdim=True), given.amax(-2, keepdim=True)), given.dtype
    )


def visible(lengths: Tensor, starts: Tensor | None, queries: int, tokens: int) -> Tensor:
    """bool [B, 1, queries, tokens]: the i-th of the last ``queries`` tokens of a row sees starts <= t <= itself."""
    t = torch.arange(tokens, device=lengths.device)
    last = lengths[:, None] - queries + torch.arange(queries, device=lengths.device)
    seen = t <= last[..., None]
    if starts is not None:
        seen = seen & (t >= starts[:, None, None])
    return seen.unsqueeze(1)


def kv_attention(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v over the seen tokens; a query that sees none gets 0.

    query [B, H, Lq, D], keys and values [B, H_kv, L, D] of the same float type, H a multiple of H_kv: query head h reads kv
    head h // (H / H_kv). seen bool and mask float, each broadcast to [B, H, Lq, L].
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    logits = scale * (query @ keys.transpose(-1, -2))
    if mask is not None:
        logits = logits + mask.to(logits.dtype)
    logits = logits.masked_fill(~seen, float("-inf"))
    top = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros((*logits.shape[:-1], 1))
    weights = torch.exp(logits - torch.where(top == float("-inf"), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    used = torch.where(seen.any(-2).squeeze(1)[:, None, :, None], values, 0.0)  # a NaN that nobody sees
    return (weights @ used) / torch.where(total == 0, 1.0, total)
