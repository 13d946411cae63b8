"""Saliency of keys and values: closed forms against the definitions, grouped heads, masks by head and by one threshold."""

from __future__ import annotations

import pytest
import torch
from spiking import generator

from ranvier.methods.spikellm.kv_saliency import KVSaliency, key_saliency, kv_mask, value_saliency
from ranvier.methods.spikellm.saliency import salient_channels


def inputs(batch: int = 2, heads: int = 6, kv_heads: int = 2, tokens: int = 9, channels: int = 16) -> tuple:
    g = generator(3)
    query, logits = (
        torch.randn(batch, heads, tokens, channels, generator=g),
        torch.randn(batch, heads, tokens, tokens, generator=g),
    )
    key, value = (torch.randn(batch, kv_heads, tokens, channels, generator=g) for _ in range(2))
    return query, key, value, logits.softmax(-1)


def test_scores_are_the_definitions() -> None:
    """S_K = mean_t (Q^T Q K^T) o K^T = row sums of (Q^T Q) o (K^T K); S_V = mean_t (P v_c)^2 >= 0.  # spec spikellm O10"""
    query, key, value, weights = (x.double() for x in inputs())
    spelled_k, spelled_v, grams = torch.zeros(2, 16), torch.zeros(2, 16), torch.zeros(2, 16)
    for b in range(2):
        for head in range(6):
            q, k, v, p = query[b, head], key[b, head // 3], value[b, head // 3], weights[b, head]
            spelled_k[head // 3] += ((q.T @ q @ k.T) * k.T).sum(1)
            grams[head // 3] += ((q.T @ q) * (k.T @ k)).sum(1)
            spelled_v[head // 3] += ((p @ v) ** 2).sum(0)
    got_k, got_v = key_saliency(query, key), value_saliency(weights, value)
    # Float32 sums of some hundred products of order one.
    torch.testing.assert_close(got_k, spelled_k, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got_k, grams, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got_v, spelled_v, rtol=1e-5, atol=1e-5)
    assert (got_v >= 0).all()


def test_scores_add_up_over_calls_and_heads() -> None:
    """Two calls give the sum of theirs, a kv head's score is the sum over its query heads."""
    query, key, value, weights = inputs()
    whole, parts = KVSaliency(), KVSaliency()
    whole.add(query, key, value, weights)
    for b in range(2):
        parts.add(query[b : b + 1], key[b : b + 1], value[b : b + 1], weights[b : b + 1])
    assert whole.tokens == parts.tokens == 18
    torch.testing.assert_close(whole.key, parts.key)
    torch.testing.assert_close(whole.value, parts.value)
    by_head = sum(key_saliency(query[:, [h, 3 + h]], key) for h in range(3))
    torch.testing.assert_close(key_saliency(query, key), by_head, rtol=1e-4, atol=1e-3)


def test_masks() -> None:
    """Equal counts a head, or the paper's one threshold over all heads: K - int(p K) in all, unequal by head."""
    scores = torch.rand(4, 64, generator=generator(1)) * torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    each, together = kv_mask(scores, 0.1), kv_mask(scores, 0.1, per_head=False)
    assert each.sum(1).tolist() == [salient_channels(64, 0.1)] * 4 == [7] * 4
    assert together.sum() == salient_channels(256, 0.1) and together.sum(1).unique().numel() > 1
    assert scores[together].min() > scores[~together].max()
    assert all(scores[h][each[h]].min() >= scores[h][~each[h]].max() for h in range(4))
    assert not kv_mask(scores, 0.0).any() and kv_mask(torch.zeros(2, 10), 0.2).sum(1).tolist() == [2, 2]


def test_bad_input() -> None:
    """Shares over a fifth, scores that are not finite, nothing seen."""
    with pytest.raises(ValueError, match=r"0 to 0\.2"):
        kv_mask(torch.rand(2, 8), 0.3)
    with pytest.raises(ValueError, match="NaN or Inf"):
        kv_mask(torch.full((2, 8), float("nan")), 0.1)
    with pytest.raises(ValueError, match="no call was seen"):
        KVSaliency().masks(0.1)
