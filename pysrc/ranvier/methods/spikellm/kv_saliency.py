"""Which channels of keys and values get a second time step.

After RoPE, over l tokens, one score a kv head h and channel c, summed over the query heads that read it:

    S_K(h, c) = 1/l sum_i (Q^T Q)_ci (K^T K)_ci = 1/l sum_t k_tc (Q^T Q k_t)_c
    S_V(h, c) = 1/l ||P v_c||^2

SpikeLLM, arXiv 2407.04752, section 3.3; the released code's key and value scores, in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ranvier.methods.spikellm.saliency import salient_channels, salient_mask

MAX_SHARE = 0.2


@dataclass(frozen=True)
class KVMasks:
    """Salient channels of one attention layer: bool [H_kv, D], keys and values."""

    key: Tensor
    value: Tensor


def key_saliency(query: Tensor, key: Tensor) -> Tensor:
    """sum_i (Q^T Q)_ci (K^T K)_ci, not yet divided by the tokens: float32 [H_kv, D].

    query [B, H, L, D] and key [B, H_kv, L, D], both after RoPE; query heads of a kv head are summed.
    """
    query, key = query.float(), key.float()
    grouped = query.unflatten(1, (key.shape[1], -1))
    queries = torch.einsum("bhgtc,bhgti->bhci", grouped, grouped)
    return (queries * (key.transpose(-1, -2) @ key)).sum(-1).sum(0)


def value_saliency(weights: Tensor, value: Tensor) -> Tensor:
    """||P v_c||^2, not yet divided by the tokens: float32 [H_kv, D], never negative.

    weights: the softmax P [B, H, L, L]; value [B, H_kv, L, D]; query heads of a kv head are summed.
    """
    value = value.float()
    grouped = weights.float().unflatten(1, (value.shape[1], -1))
    return (grouped @ value.unsqueeze(2)).square().sum((0, 2, 3))


def kv_mask(scores: Tensor, share: float, per_head: bool = True) -> Tensor:
    """The salient channels by scores [H_kv, D]: bool [H_kv, D].

    per_head: every head marks the same number, ``D - int((1 - share) D)``, so that the packed cache has one size of bit plane
    and no head's room lies idle. Otherwise the paper's rule: one threshold over all H_kv D scores, counts differ by head and
    the plane has room for the largest. Raises ValueError for scores that are not finite and a share outside 0 to 0.2.
    """
    if not 0 <= share <= MAX_SHARE:
        raise ValueError(
            f"kv_mask: share is {share}; allowed are 0 to {MAX_SHARE}, as each salient channel stores one more bit"
        )
    if not per_head:
        return salient_mask(scores.flatten(), share).view_as(scores)
    if not bool(scores.isfinite().all()):
        raise ValueError("kv_mask: the saliency scores have NaN or Inf; the calibration inputs or weights are not finite")
    count = salient_channels(scores.shape[1], share)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    # Stable, so that ties are decided by the channel's place and the mask does not depend on the sort.
    return chosen.scatter_(1, scores.argsort(dim=1, descending=True, stable=True)[:, :count], True)


class KVSaliency:
    """Scores of one attention layer, added up over calls."""

    def __init__(self) -> None:
        self.key: Tensor | float = 0.0
        self.value: Tensor | float = 0.0
        self.tokens = 0

    def add(self, query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> None:
        """One call's queries, keys, values and softmax; keys and queries of the same tokens."""
        self.key = self.key + key_saliency(query, key)
        self.value = self.value + value_saliency(weights, value)
        self.tokens += key.shape[0] * key.shape[2]

    def masks(self, share: float, per_head: bool = True) -> KVMasks:
        """The masks of what was added. Raises ValueError when nothing was."""
        if self.tokens == 0:
            raise ValueError("KVSaliency: no call was seen; run the model on calibration tokens first")
        return KVMasks(*(kv_mask(scores / self.tokens, share, per_head) for scores in (self.key, self.value)))
