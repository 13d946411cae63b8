"""A transformers attention for prompts on CPUs: :func:`ranvier.ops.flash_attention`.

    ranvier.integrations.flash_attention.register()
    model.set_attn_implementation(NAME)

It takes the causal or full attention of several tokens without a mask. What the kernel has not (masks of padded batches or
windows, dropout, gradients, other devices) and where it gains nothing (a token or a few after a cache) goes to transformers'
own ``sdpa``, which computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ranvier.ops.flash_attention import MAX_D, flash_attention

NAME = "ranvier_tiles"  # without "flash", which transformers takes for the package flash-attn
FEW = 8  # queries; with fewer, packing the keys costs more than the kernel saves


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function registered as :data:`NAME`: query [B, H, Lq, D] -> [B, Lq, H, D].

    Raises ValueError for what neither has: softcap, sinks, biases by position.
    """
    if found := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"{NAME}: it has no {', '.join(found)}; use the model with eager")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if _fits(query, key, value, bool(causal)) and attention_mask is None and not dropout:
        return flash_attention(query, key, value, causal=bool(causal), scale=scaling).transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = (module, query, key, value, attention_mask)
    return sdpa_attention_forward(*given, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)


def _fits(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    queries, channels = query.shape[2:]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    # Of several queries after a cache transformers' mask function tells sdpa by a mask; without one they are all there is.
    return (
        query.device.type == "cpu"
        and not differentiated
        and queries >= FEW
        and (not causal or key.shape[2] == queries)
        and channels <= MAX_D
        and value.shape == key.shape
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def register() -> None:
    """Makes the attention known to transformers by :data:`NAME`. Raises ImportError naming the extra without transformers."""
    from ranvier.integrations.transformers import import_transformers

    import_transformers()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
