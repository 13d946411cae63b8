"""A transformers cache of 4-bit keys and values, and the attention that reads it.

    ranvier.integrations.spiking_cache.register()
    model.set_attn_implementation(NAME)
    cache = SpikingCache.for_model(model, SpikeConfig(), calibration)
    model.generate(**inputs, past_key_values=cache)

Attention functions are not handed the cache. So a layer's ``update`` returns, in place of keys and values, tensors without
memory (on the device "meta") that carry the layer; the attention function takes it from them. Any other attention would meet
tensors that hold nothing and cannot silently compute from them. New tokens are quantized first and then attended to, so that
one token at a time and the whole prompt at once see the same keys and values.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.config import SpikeConfig
from ranvier.integrations._kv_layers import SpikingCacheLayer, spiking_cache_class
from ranvier.methods.spikellm.convert import check_batches, check_supported
from ranvier.methods.spikellm.data import check_batch
from ranvier.methods.spikellm.kv_saliency import KVMasks, KVSaliency
from ranvier.ops.kv_attention import kv_attention

if TYPE_CHECKING:
    from transformers import Cache

NAME = "ranvier_spiking_kv"
OBSERVE = "ranvier_spiking_kv_observe"
_observers: contextvars.ContextVar[dict[int, KVSaliency] | None] = contextvars.ContextVar("ranvier_kv", default=None)


def spiking_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function registered as :data:`NAME`: query [B, H, Lq, D] against what the layer behind key holds.

    attention_mask: None, what :func:`spiking_mask` made, or a four-dimensional mask, bool or added.
    Raises ValueError without a :class:`SpikingCache` and for what the kernel has not: dropout, softcap, sinks, biases.
    """
    layer = getattr(key, "spiking_layer", None)
    if not isinstance(layer, SpikingCacheLayer):
        raise ValueError(
            f"{NAME}: keys do not come from a SpikingCache; pass past_key_values=SpikingCache.for_model(model, config), or"
            ' model.set_attn_implementation("sdpa")'
        )
    wanted = {"dropout": dropout, **{name: kwargs.get(name) for name in ("softcap", "s_aux", "position_bias")}}
    if found := [name for name, value in wanted.items() if value is not None and (name != "dropout" or value)]:
        raise ValueError(f"{NAME}: the attention of a packed cache has no {', '.join(found)}; use the model with sdpa or eager")
    starts = mask = None
    if attention_mask is not None and attention_mask.ndim == 1:
        starts = attention_mask
    elif attention_mask is not None:
        mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask.float()
    out = kv_attention(
        query, layer.packed, layer.key_mask, layer.value_mask, layer.length, starts=starts, mask=mask, scale=scaling,
        form=layer.form,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def spiking_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, mask_function: Any = None,
    attention_mask: Tensor | None = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """What the kernel needs of a mask: None where it is causal, int64 [B] first tokens where rows are padded on the left,
    else the whole of it, bool [B, 1, Lq, L]."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function in (None, causal_mask_function) and kv_offset == 0:
        if attention_mask is None:
            return None
        seen = attention_mask[:, :kv_length].to(torch.bool)
        starts = (~seen).sum(-1)
        places = torch.arange(seen.shape[1], device=seen.device)
        if bool((seen == (places >= starts[:, None])).all()):
            return starts if bool(starts.any()) else None
    kwargs.update(allow_is_causal_skip=False, mask_function=mask_function or causal_mask_function)
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    return sdpa_mask(**sizes, q_offset=q_offset, kv_offset=kv_offset, attention_mask=attention_mask, **kwargs)


def _observing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in float32 that adds what it sees to the layer's scores."""
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = scale * (query.float() @ key.float().repeat_interleave(group, 1).transpose(-1, -2))
    if attention_mask is not None:
        logits = logits + attention_mask.float()
    weights = logits.softmax(-1)
    found = _observers.get()
    if found is not None:
        found.setdefault(module.layer_idx, KVSaliency()).add(query, key, value, weights)
    out = weights @ value.float().repeat_interleave(group, 1)
    return out.to(query.dtype).transpose(1, 2).contiguous(), weights.to(query.dtype)


def register() -> None:
    """Makes the attention known to transformers by :data:`NAME`. Raises ImportError naming the extra without transformers."""
    from ranvier.integrations.transformers import import_transformers

    import_transformers()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, spiking_attention)
    AttentionMaskInterface.register(NAME, spiking_mask)
    AttentionInterface.register(OBSERVE, _observing_attention)
    AttentionMaskInterface.register(OBSERVE, eager_mask)


@contextlib.contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def calibrate_masks(
    model: nn.Module, calibration: Iterable[Tensor], share: float, *, per_head: bool = True, progress: bool = False
) -> list[KVMasks]:
    """The salient channels of every layer's keys and values, from the model's own attention on ids [B, L] of no padding.

    share, per_head: :func:`ranvier.methods.spikellm.kv_saliency.kv_mask`. Raises ValueError when a layer saw nothing and for
    ids that the model has not, TypeError for what is no batch of ids.
    """
    register()
    check_batches(calibration, "calibrate_masks")
    found: dict[int, KVSaliency] = {}
    token = _observers.set(found)
    try:
        with _attention(model, OBSERVE), torch.no_grad():
            for ids in tqdm(calibration, desc="key-value saliency", leave=False, disable=not progress):
                check_batch(model, ids)
                model(ids.to(model.device), use_cache=False)
    finally:
        _observers.reset(token)
    layers = model.config.get_text_config().num_hidden_layers
    if missing := [i for i in range(layers) if i not in found]:
        raise ValueError(f"calibrate_masks: layers {missing} saw no tokens; pass at least one batch of token ids")
    return [found[i].masks(share, per_head) for i in range(layers)]


def _no_masks(model: nn.Module) -> list[KVMasks]:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [KVMasks(*(torch.zeros(heads, size, dtype=torch.bool) for _ in range(2))) for _ in range(config.num_hidden_layers)]


class SpikingCache:
    """Makes caches; what it makes is a transformers ``Cache`` whose layers are :class:`SpikingCacheLayer`."""

    def __new__(cls, masks: list[KVMasks]) -> Cache:
        """An empty cache of a model whose layers have these masks. Raises TypeError for other masks."""
        if not isinstance(masks, (list, tuple)) or not all(isinstance(m, KVMasks) for m in masks):
            raise TypeError("SpikingCache: pass a list of KVMasks, one a layer, or use SpikingCache.for_model")
        return spiking_cache_class()(masks)

    @classmethod
    def for_model(
        cls, model: nn.Module, config: SpikeConfig | None = None, calibration: Iterable[Tensor] | None = None,
        *, per_head: bool = True,
    ) -> Cache:  # fmt: skip
        """An empty cache for the model, whose attention must be :data:`NAME`; ``cache.fresh()`` gives further ones.

        config: ``salient`` is the share of salient channels, at most 0.2, none with ``steps=1``; keys and values always take
        4 bits and two steps. calibration: ids [B, L] to find them by, the config's own where there is none.
        Raises ValueError without calibration where salient channels are asked for, or for another attention.
        """
        config = SpikeConfig() if config is None else config
        check_supported(config, "SpikingCache")
        share = 0.0 if config.steps == 1 else config.salient
        given = calibration if calibration is not None else config.calibration
        if not hasattr(getattr(model, "config", None), "_attn_implementation"):
            raise TypeError(f"SpikingCache: {type(model).__name__} is no model of transformers, whose attention could read it")
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"SpikingCache: the model's attention is {model.config._attn_implementation!r}; call"
                f" register() and model.set_attn_implementation({NAME!r}) first"
            )
        if share == 0:
            return cls(_no_masks(model))
        if given is None or isinstance(given, (str, os.PathLike)):
            raise ValueError(
                "SpikingCache: salient channels need calibration; pass token ids [B, L], or SpikeConfig(salient=0.0)"
            )
        return cls(calibrate_masks(model, given, share, per_head=per_head))
