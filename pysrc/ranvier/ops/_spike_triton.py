"""Launches of kernels/spike_encode.py and kernels/spike_linear.py: grids, padded codes, which kernel and what shape.

Codes go between the two kernels in blocks of four channels: int8 [M, 4 * blocks], every range filled up with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ranvier.ops._args import plain
from ranvier.ops._triton import Launch, aligned, configuration, dot_instruction

if TYPE_CHECKING:
    from ranvier.ops.spike_encode import SpikeFormat
    from ranvier.ops.spike_linear import PackedWeight
    from ranvier.reference.spike_encode import SpikeCodes

OUTPUT_BLOCK = 32


class Norm(NamedTuple):
    """RMSNorm before encoding: weight [K], epsilon, how the weight is applied (ranvier.reference.spike_rms_norm), result."""

    weight: Tensor
    epsilon: float
    weighting: str = "after_cast"
    out: Tensor | None = None  # [..., K] like x, filled with the normalised tokens


class Gate(NamedTuple):
    """silu(x) times ``up`` before encoding, and the result."""

    up: Tensor  # [..., K] like x
    out: Tensor | None = None


class Places(NamedTuple):
    """Where the codes of a token lie: its row's length and the beginning of its second range."""

    stride: int
    salient_at: int


def packed_places(form: SpikeFormat) -> Places:
    """Codes as the op returns them, without gaps."""
    return Places(form.channels, form.lengths[0])


def blocked_places(form: SpikeFormat) -> Places:
    """Codes as the product reads them, in whole blocks."""
    return Places(4 * sum(form.blocks), 4 * form.blocks[0])


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def encode_launches(
    form: SpikeFormat,
    x: Tensor,
    mask: Tensor | None,
    out: SpikeCodes,
    places: Places,
    source: Norm | Gate | None = None,
) -> list[Launch]:
    """What fills ``out`` with the codes of x [..., K], of RMSNorm(x) or of silu(x) up."""
    x, tokens, group = plain(x), x.numel() // form.channels, form.group_size
    use, options = configuration("spike_encode", "spike_encode", x.device, k=form.channels, m=tokens)
    block = min(use["block"], max(16, _power_of_two(form.channels)))
    # A sum a group comes along where groups are whole pieces of the tile; else a second kernel adds the codes up.
    along = len(form.lengths) == 1 and group and group == _power_of_two(group) and group <= block
    norm = source if isinstance(source, Norm) else None
    other = norm.weight.contiguous() if norm else source and plain(source.up)
    first = Launch(
        "spike_encode", "spike_encode", (tokens,),
        {
            "x": x, "other": other, "made": source and source.out,
            "mask": None if mask is None or not form.salient_count else mask.contiguous(),
            "codes": out.codes, "scale": out.scale, "code_sum": out.code_sum, "zero": out.zero,
            "epsilon": norm.epsilon if norm else 0.0, "clip": form.act_clip,
            "K": form.channels, "low_count": form.channels - form.salient_count,
            "groups": sum(form.groups), "code_stride": places.stride, "salient_at": places.salient_at,
            "BITS": form.act_bits, "STEPS": form.steps, "SEPARATE": form.span == "separate",
            "COMPAT": form.grid == "compat", "RANGES": len(form.lengths),
            "ALL_SALIENT": form.salient_count == form.channels, "GROUP": (group if along else -1) if group else 0,
            "SOURCE": norm.weighting if norm else source and "silu_mul", "BLOCK": block,
        }, options,
    )  # fmt: skip
    if not group or along:
        return [first]
    tile = max(1, min(1024 // _power_of_two(group), _power_of_two(sum(form.groups))))
    second = Launch(
        "spike_encode", "spike_code_sums", (tokens, -(-sum(form.groups) // tile)),
        {
            "codes": out.codes, "code_sum": out.code_sum, "low_count": form.lengths[0], "high_count": sum(form.lengths[1:]),
            "low_groups": form.groups[0], "groups": sum(form.groups), "code_stride": places.stride,
            "salient_at": places.salient_at, "group": group, "WIDTH": _power_of_two(group), "TILE": tile,
        }, {"num_warps": 4},
    )  # fmt: skip
    return [first, second]


def blocked_codes(form: SpikeFormat, codes: Tensor) -> Tensor:
    """Codes [..., K] as the product reads them: [M, 4 * blocks]."""
    codes = codes.reshape(-1, form.channels)
    if all(length % 4 == 0 for length in form.lengths):
        return aligned(codes)
    parts = codes.split(form.lengths, 1)
    return torch.cat([torch.nn.functional.pad(part, (0, -part.shape[1] % 4)) for part in parts], 1)


def linear_launches(
    form: SpikeFormat, encoded: SpikeCodes, weight: PackedWeight, bias: Tensor | None, y: Tensor, out_features: int
) -> list[Launch]:
    """What fills y [..., N] from blocked codes [M, 4 * blocks]: one kernel, or two where K is split."""
    rows, ranges, tokens = sum(form.blocks), len(form.lengths), encoded.codes.shape[0]
    if tokens == 0:
        return []
    kernel = "gemv" if tokens <= 8 else "gemm"
    use, options = configuration(
        "spike_linear", kernel, y.device, m=tokens, n=out_features, k=form.channels, groups=sum(form.groups), ranges=ranges
    )
    grouped, group_rows = bool(form.group_size), form.group_size // 4
    splits = min(use.pop("splits"), _power_of_two(max(form.groups if grouped else form.blocks)))
    partial = None
    if splits > 1:
        dtype = torch.float32 if grouped else torch.int32
        partial = y.new_empty((splits, ranges, tokens, out_features), dtype=dtype)
    weight_packed, scale, zero, total = (aligned(t) for t in weight)
    codes = aligned(encoded.codes)
    compat = form.grid == "compat"
    tables = {
        "scale": encoded.scale, "code_sum": encoded.code_sum, "zero": encoded.zero, "weight_scale": scale,
        "weight_zero": zero, "weight_sum": total if compat else None, "bias": None if bias is None else bias.contiguous(),
        "y": y, "partial": partial,
    }  # fmt: skip
    sizes = {"M": tokens, "N": out_features, "groups": sum(form.groups)}
    walk = {"rows": rows, "low_rows": form.blocks[0], "low_groups": form.groups[0], "group_rows": group_rows}
    what = {"RANGES": ranges, "GROUPED": grouped, "COMPAT": compat, "SPLITS": splits}
    if kernel == "gemv":
        grid = (-(-out_features // OUTPUT_BLOCK), splits)
        shape = {
            "ROWS": _power_of_two(tokens), "TILE": use["tile"], "STAGES": options["num_stages"],
            "DOT": dot_instruction(y.device),
        }  # fmt: skip
        codes, weight_packed = codes.view(torch.int32), weight_packed.view(torch.int32)
    else:
        block = min(use["block"], max(8, _power_of_two(group_rows if grouped else max(form.blocks))))
        whole = [group_rows if grouped else length for length in form.blocks]
        even = all(length % w == 0 and w % block == 0 for length, w in zip(form.blocks, whole, strict=True))
        shape = {"BLOCK_M": use["block_m"], "BLOCK_N": use["block_n"], "BLOCK": block, "EVEN": even, "STRIPE": use["stripe"]}
        grid = (-(-out_features // use["block_n"]) * -(-tokens // use["block_m"]), splits)
    arguments = {"codes": codes, "weight": weight_packed, **tables, **sizes, **walk, **what, **shape}
    launches = [Launch("spike_linear", f"spike_linear_{kernel}", grid, arguments, options)]
    if splits > 1:
        block = 256
        finish = {**tables, **sizes, "BLOCK_N": block, **what}
        grid = (-(-out_features // block), tokens)
        launches.append(Launch("spike_linear", "spike_linear_combine", grid, finish, {"num_warps": 4}))
    return launches
