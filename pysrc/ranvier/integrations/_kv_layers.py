"""The layers of a SpikingCache. transformers' base classes are met only when a cache is made."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ranvier.methods.spikellm.kv_saliency import KVMasks
from ranvier.ops._kv_layout import BLOCK, KVFormat
from ranvier.ops.kv_attention import kv_decode, kv_encode

GROWTH = 8  # a full cache grows by an eighth of its blocks, at least one


class SpikingCacheLayer:
    """Packed keys and values of one attention layer, growing: uint8 [B, H_kv, blocks, block_bytes], ``length`` tokens used."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, masks: KVMasks) -> None:
        self.key_mask, self.value_mask = masks.key, masks.value
        self.form = KVFormat(masks.key.shape[1], *(int(m.sum(-1).max()) for m in (masks.key, masks.value)))
        self.packed: Tensor | None = None
        self.length = 0
        self.keys = self.values = None  # names that Cache knows; nothing is kept unpacked

    @property
    def is_initialized(self) -> bool:
        """Whether tokens were stored."""
        return self.packed is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for the first tokens."""
        heads, channels = self.key_mask.shape
        if key_states.shape[1] != heads or key_states.shape[3] != channels or value_states.shape != key_states.shape:
            got = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise ValueError(f"SpikingCache: keys and values are {got}; its masks are for [B, {heads}, L, {channels}]")
        self.key_mask, self.value_mask = self.key_mask.to(key_states.device), self.value_mask.to(key_states.device)
        blocks = self.form.blocks(key_states.shape[2])
        self.packed = self.form.empty(key_states.shape[0], heads, blocks, key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantizes and stores new tokens [B, H_kv, L, D]; returns tensors without memory that carry this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.packed.shape[0]:
            rows = f"{self.packed.shape[0]} rows and the call {key_states.shape[0]}"
            raise ValueError(f"SpikingCache: it holds {rows}; begin another batch with cache.fresh() or cache.reset()")
        self._reserve(self.length + key_states.shape[2])
        kv_encode(
            key_states, value_states, self.packed, self.key_mask, self.value_mask, self.length, form=self.form
        )  # fmt: skip
        self.length += key_states.shape[2]
        shape = (*key_states.shape[:2], self.length, key_states.shape[3])
        handles = tuple(torch.empty(shape, dtype=key_states.dtype, device="meta") for _ in range(2))
        for handle in handles:
            handle.spiking_layer = self
        return handles

    def _reserve(self, tokens: int) -> None:
        blocks = self.packed.shape[2]
        if tokens <= BLOCK * blocks:
            return
        wanted = max(self.form.blocks(tokens), blocks + max(1, blocks // GROWTH))
        larger = self.form.empty(self.packed.shape[0], self.packed.shape[1], wanted, self.packed.device)
        larger[:, :, :blocks] = self.packed
        self.packed = larger

    def decoded(self) -> tuple[Tensor, Tensor]:
        """The keys and values that the stored tokens stand for: float32 [B, H_kv, length, D] each."""
        return kv_decode(self.packed, self.key_mask, self.value_mask, self.length, form=self.form)

    def nbytes(self) -> int:
        """Bytes of the blocks in use, without the room to grow."""
        if self.packed is None:
            return 0
        return self.packed.shape[0] * self.packed.shape[1] * self.form.blocks(self.length) * self.form.block_bytes

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that the next call attends to, offset of the first)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens, keeps the masks."""
        self.packed, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; as in transformers, their number is passed as a negative one."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(f"crop: got {tokens_to_remove}; pass minus the number of tokens to remove, down to -{self.length}")
        self.length += tokens_to_remove

    def _take(self, rows: Tensor) -> None:
        if self.packed is not None:
            self.packed = self.packed.index_select(0, rows.to(self.packed.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        if self.packed is not None:
            self.packed = self.packed[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.packed is not None:
            self.packed = self.packed.repeat_interleave(repeats, 0)

    def offload(self) -> None:
        """Not supported: the packed cache is read where it lies."""
        raise ValueError("SpikingCache does not offload; leave offloading out")

    prefetch = offload


@functools.cache
def spiking_cache_class() -> type:
    """The Cache class, made when transformers is there."""
    from ranvier.integrations.transformers import import_transformers

    import_transformers()
    from transformers.cache_utils import Cache, CacheLayerMixin

    layer_class = type(
        "SpikingCacheLayer", (SpikingCacheLayer, CacheLayerMixin), {"is_initialized": SpikingCacheLayer.is_initialized}
    )

    class SpikingCache(Cache):
        """One :class:`SpikingCacheLayer` a layer of the model."""

        def __init__(self, masks: list[KVMasks]) -> None:
            self.masks = list(masks)
            super().__init__(layers=[layer_class(m) for m in self.masks])

        def fresh(self) -> SpikingCache:
            """An empty cache with the same masks."""
            return type(self)(self.masks)

        def nbytes(self) -> int:
            """Bytes of all blocks in use."""
            return sum(layer.nbytes() for layer in self.layers)

    return SpikingCache
