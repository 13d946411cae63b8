"""The packed key-value cache in torch: where each code, bit, scale and zero lies, as csrc/kv_attention/kv_attention.h says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ranvier.reference.kv_attention import KVCodes

BLOCK = 64  # tokens
MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class KVFormat:
    """Sizes of a packed cache: channels of a head, and how many salient ones its bit planes have room for."""

    head_dim: int
    key_salient: int = 0
    value_salient: int = 0

    def check(self, op: str) -> None:
        """Raises ValueError for sizes that no kernel takes."""
        if not 0 < self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"{op}: head_dim is {self.head_dim}; allowed are 1 to {MAX_HEAD_DIM}")
        for name in ("key_salient", "value_salient"):
            if not 0 <= getattr(self, name) <= self.head_dim:
                raise ValueError(f"{op}: {name} is {getattr(self, name)}; it must be from 0 to head_dim = {self.head_dim}")

    @cached_property
    def padded(self) -> int:
        """Channels in memory: head_dim rounded up to 32."""
        return -(-self.head_dim // 32) * 32

    @cached_property
    def sections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Offset and shape, in bytes, of the parts of a block."""
        shapes = {
            "key_codes": (4, self.padded // 8, 64),
            "key_bits": (4, -(-self.key_salient // 4), 8),
            "key_scale": (2 * BLOCK,),
            "key_zero": (2 * BLOCK,),
            "value_codes": (16, self.padded // 32, 64),
            "value_bits": (16, -(-self.value_salient // 16), 8),
            "value_scale": (2 * BLOCK,),
            "value_zero": (2 * BLOCK,),
        }
        found, at = {}, 0
        for name, shape in shapes.items():
            found[name] = (at, shape)
            at += -(-torch.Size(shape).numel() // 64) * 64
        return {**found, "end": (at, ())}

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: 64 tokens of one kv head, keys and values."""
        return self.sections["end"][0]

    @property
    def share_of_bf16(self) -> float:
        """Bytes of a full block over those of 64 bfloat16 keys and values."""
        return self.block_bytes / (BLOCK * 2 * 2 * self.head_dim)

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // BLOCK)

    def empty(self, batch: int, kv_heads: int, blocks: int, device: torch.device | str = "cpu") -> Tensor:
        """A cache with room for 64 ``blocks`` tokens: uint8 [batch, kv_heads, blocks, block_bytes].

        Raises ValueError for sizes that no kernel takes.
        """
        self.check("KVFormat.empty")
        if min(batch, kv_heads, blocks) < 0:
            raise ValueError(f"KVFormat.empty: got {batch}, {kv_heads}, {blocks}; none may be negative")
        return torch.zeros((batch, kv_heads, blocks, self.block_bytes), dtype=torch.uint8, device=device)


def _part(cache: Tensor, form: KVFormat, name: str) -> Tensor:
    """The part of every block, a view: [B, H, blocks, *shape]."""
    at, shape = form.sections[name]
    return cache[..., at : at + torch.Size(shape).numel()].unflatten(-1, shape)


def _halves(cache: Tensor, form: KVFormat, name: str) -> Tensor:
    return _part(cache, form, name).contiguous().view(torch.float16).flatten(2)


def _set_halves(cache: Tensor, form: KVFormat, name: str, values: Tensor) -> None:
    _part(cache, form, name).copy_(values.unflatten(2, (-1, BLOCK)).contiguous().view(torch.uint8))


def _unpacked_bits(cache: Tensor, form: KVFormat, name: str) -> Tensor:
    bits = _part(cache, form, name)
    return (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=cache.device)) & 1


def _twice_nibbles(cache: Tensor, form: KVFormat, name: str) -> Tensor:
    """2 n, the low nibble's line before the high one's: [B, H, blocks, rows, 2 lines, 64]."""
    packed = _part(cache, form, name)
    return torch.stack([packed << 1 & 30, packed >> 3 & 30], -2).flatten(-3, -2)


def head_order(mask: Tensor) -> Tensor:
    """Salient channels first, both parts ascending: int64 [heads, D], the channel at each place."""
    return torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)


def _unordered(placed: Tensor, mask: Tensor) -> Tensor:
    """[B, H, L, D] from the places in the cache to the channels."""
    order = head_order(mask)[None, :, None].expand_as(placed)
    return torch.empty_like(placed).scatter_(-1, order, placed)


def unpack_keys(cache: Tensor, mask: Tensor, form: KVFormat) -> KVCodes:
    """All tokens of the cache, [B, H, 64 blocks, ...]."""
    codes = _twice_nibbles(cache, form, "key_codes")  # [B, H, blocks, group, quad, lane * 4 + channel]
    bits = _unpacked_bits(cache, form, "key_bits").flatten(-2)
    codes[..., : bits.shape[-2], :] += bits
    placed = codes.unflatten(-1, (16, 4)).permute(0, 1, 2, 3, 5, 4, 6).flatten(5).flatten(2, 4)[..., : form.head_dim]
    halves = [_halves(cache, form, name).unsqueeze(-1) for name in ("key_scale", "key_zero")]
    return KVCodes(_unordered(placed, mask), *halves)


def unpack_values(cache: Tensor, mask: Tensor, form: KVFormat) -> KVCodes:
    """All tokens of the cache, [B, H, 64 blocks, ...]."""
    codes = _twice_nibbles(cache, form, "value_codes")  # [B, H, blocks, quad, group, channel * 4 + token]
    bits = _unpacked_bits(cache, form, "value_bits").flatten(-2)
    codes[..., : bits.shape[-2], :] += bits
    placed = codes.unflatten(-1, (16, 4)).permute(0, 1, 2, 3, 6, 4, 5).flatten(5).flatten(2, 4)[..., : form.head_dim]
    halves = [_halves(cache, form, name).unsqueeze(-1) for name in ("value_scale", "value_zero")]
    return KVCodes(_unordered(placed, mask), *halves)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """[..., 2 lines, 64] of 2 n + b to [..., lines, 64] bytes."""
    nibbles = (codes >> 1).unflatten(-2, (-1, 2))
    return nibbles[..., 0, :] | nibbles[..., 1, :] << 4


def _pack_bits(codes: Tensor) -> Tensor:
    """[..., 64] to [..., 8] bytes."""
    weight = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return ((codes & 1).unflatten(-1, (8, 8)) * weight).sum(-1, dtype=torch.uint8)


def _placed(codes: Tensor, mask: Tensor, form: KVFormat) -> Tensor:
    order = head_order(mask)[None, :, None].expand_as(codes)
    return torch.nn.functional.pad(codes.gather(-1, order), (0, form.padded - form.head_dim)).unflatten(2, (-1, BLOCK))


def pack_keys(cache: Tensor, encoded: KVCodes, mask: Tensor, form: KVFormat) -> None:
    """Writes all tokens [B, H, 64 blocks, ...] into the cache."""
    lines = (
        _placed(encoded.codes, mask, form).unflatten(3, (4, 16)).unflatten(5, (-1, 4)).permute(0, 1, 2, 3, 5, 4, 6).flatten(5)
    )
    _part(cache, form, "key_codes").copy_(_pack_nibbles(lines))
    bits = _part(cache, form, "key_bits")
    bits.copy_(_pack_bits(lines[..., : bits.shape[-2], :]))
    for name, halves in (("key_scale", encoded.scale), ("key_zero", encoded.zero)):
        _set_halves(cache, form, name, halves.squeeze(-1))


def pack_values(cache: Tensor, encoded: KVCodes, mask: Tensor, form: KVFormat) -> None:
    """Writes all tokens [B, H, 64 blocks, ...] into the cache."""
    lines = (
        _placed(encoded.codes, mask, form).unflatten(3, (16, 4)).unflatten(5, (-1, 16)).permute(0, 1, 2, 3, 5, 6, 4).flatten(5)
    )
    _part(cache, form, "value_codes").copy_(_pack_nibbles(lines))
    bits = _part(cache, form, "value_bits")
    bits.copy_(_pack_bits(lines[..., : bits.shape[-2], :]))
    for name, halves in (("value_scale", encoded.scale), ("value_zero", encoded.zero)):
        _set_halves(cache, form, name, halves.squeeze(-1))
