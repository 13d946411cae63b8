"""Launches of kernels/ternary_linear.py: integer sums of 2-bit and 4-bit ranges, finished by spike_linear's combine kernel.

A format here is an ordinary SpikeFormat of one step whose ``lengths`` are (K - K_s, K_s), or (K,) where all channels are of one
kind: spike_encode's kernel with two ranges then writes the codes in blocks, both ranges with the token's one scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ranvier.ops._spike_triton import OUTPUT_BLOCK, Places, _power_of_two
from ranvier.ops._triton import Launch, aligned, configuration, dot_instruction
from ranvier.reference.spike_encode import SpikeCodes, channel_order

if TYPE_CHECKING:
    from ranvier.ops.spike_encode import SpikeFormat
    from ranvier.ops.spike_linear import PackedWeight


def _padded(form: SpikeFormat) -> tuple[int, ...]:
    """Codes of each range in memory: whole blocks of eight ordinary or four salient channels."""
    all_salient = form.salient_count == form.channels
    return tuple(-(-n // w) * w for n, w in zip(form.lengths, (4 if all_salient else 8, 4), strict=False))


def ternary_places(form: SpikeFormat) -> Places:
    """Codes as the product reads them."""
    padded = _padded(form)
    return Places(sum(padded), padded[0])


def ternary_codes(form: SpikeFormat, codes: Tensor, scale: Tensor, mask: Tensor | None) -> SpikeCodes:
    """Codes [..., K] in the layer's own order and their scale [..., 1] as the product reads them."""
    codes, scale = codes.reshape(-1, form.channels), scale.reshape(-1, 1)
    if len(form.lengths) == 2:
        codes = codes[:, channel_order(mask)]
    parts = codes.split(form.lengths, 1)
    sums = torch.stack([part.sum(-1, dtype=torch.int32) for part in parts], -1)
    wide = [torch.nn.functional.pad(p, (0, n - p.shape[1])) for p, n in zip(parts, _padded(form), strict=True)]
    return SpikeCodes(torch.cat(wide, 1), scale.expand(sums.shape).contiguous(), sums, torch.zeros_like(sums))


def ternary_launches(
    form: SpikeFormat, encoded: SpikeCodes, weight: PackedWeight, bias: Tensor | None, y: Tensor, out_features: int
) -> list[Launch]:
    """What fills y [..., N] from blocked codes [M, stride]; ``encoded`` by :func:`ternary_codes` or spike_encode's kernel."""
    tokens, ranges = encoded.codes.shape[0], len(form.lengths)
    if tokens == 0:
        return []
    kernel = "gemv" if tokens <= 8 else "gemm"
    use, options = configuration("ternary_linear", kernel, y.device, m=tokens, n=out_features, k=form.channels)
    first_bits = 4 if form.salient_count == form.channels else 2
    low_rows = _padded(form)[0] // (4 if first_bits == 4 else 8)
    places, splits = ternary_places(form), use["splits"]
    partial = y.new_empty((splits, ranges, tokens, out_features), dtype=torch.int32)
    arguments = {
        "codes": aligned(encoded.codes), "weight": aligned(weight.packed), "partial": partial, "M": tokens, "N": out_features,
        "stride": places.stride, "salient_at": places.salient_at, "rows": weight.packed.shape[1], "low_rows": low_rows,
        "RANGES": ranges, "FIRST_BITS": first_bits, "SPLITS": splits,
    }  # fmt: skip
    if kernel == "gemv":
        grid = (-(-out_features // OUTPUT_BLOCK), splits)
        words = {name: arguments[name].view(torch.int32) for name in ("codes", "weight")}
        words.update(stride=places.stride // 4, salient_at=places.salient_at // 4)
        shape = {
            "ROWS": _power_of_two(tokens), "TILE": use["tile"], "STAGES": options["num_stages"],
            "DOT": dot_instruction(y.device),
        }  # fmt: skip
        arguments |= words
    else:
        shape = {"BLOCK_M": use["block_m"], "BLOCK_N": use["block_n"], "BLOCK": use["block"]}
        grid = (-(-tokens // use["block_m"]), -(-out_features // use["block_n"]), splits)
    finish = {
        "scale": encoded.scale, "code_sum": encoded.code_sum, "zero": encoded.zero, "weight_scale": aligned(weight.scale),
        "weight_zero": aligned(weight.zero), "weight_sum": None, "bias": None if bias is None else bias.contiguous(), "y": y,
        "partial": partial, "M": tokens, "N": out_features, "groups": ranges, "BLOCK_N": 256, "RANGES": ranges,
        "GROUPED": False, "COMPAT": False, "SPLITS": splits,
    }  # fmt: skip
    return [
        Launch("ternary_linear", f"ternary_linear_{kernel}", grid, {**arguments, **shape}, options),
        Launch("spike_linear", "spike_linear_combine", (-(-out_features // 256), tokens), finish, {"num_warps": 4}),
    ]
