"""flash_attention: softmax attention, and its gradient.

    y[i] = sum_j p[i, j] v[j],    p[i, j] = exp(s[i, j]) / sum_j' exp(s[i, j']),    s[i, j] = scale q[i] . k[j]

over the keys j that query i sees: all of them or, with ``causal``, j <= i + L - Lq, so that the last query sees the last key.
Each of the H_kv heads of keys and values serves H / H_kv heads of queries. The tile by tile way to it: FlashAttention, Dao et
al., arXiv 2205.14135.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(queries: int, keys: int, causal: bool, device: torch.device | None = None) -> Tensor:
    """Which keys a query sees: bool [Lq, L]."""
    places = torch.arange(keys, device=device)
    if not causal:
        return (places >= 0).expand(queries, keys)
    return places <= torch.arange(queries, device=device)[:, None] + keys - queries


def weights(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """p [B, H_kv, H / H_kv, Lq, L] of q [B, H, Lq, D] and k [B, H_kv, L, D]."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    logits = scale * (grouped @ k.unsqueeze(2).transpose(-1, -2))
    seen = visible(q.shape[2], k.shape[2], causal, q.device)
    return torch.where(seen, logits, -torch.inf).softmax(-1)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """y [B, H, Lq, D] of q [B, H, Lq, D], k and v [B, H_kv, L, D], in their type."""
    return (weights(q, k, causal, scale) @ v.unsqueeze(2)).flatten(1, 2)


def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: with dp = grad v^T and ds = p (dp - sum_j p dp), dq = scale ds k, dk = scale ds^T q, dv = p^T grad."""
    p = weights(q, k, causal, scale)
    grouped, upstream = q.unflatten(1, (k.shape[1], -1)), grad.unflatten(1, (k.shape[1], -1))
    dp = upstream @ v.unsqueeze(2).transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = scale * (ds @ k.unsqueeze(2))
    dk = scale * (ds.transpose(-1, -2) @ grouped)
    dv = p.transpose(-1, -2) @ upstream
    return dq.flatten(1, 2), dk.sum(2), dv.sum(2)
