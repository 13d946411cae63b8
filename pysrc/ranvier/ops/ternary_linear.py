"""ternary_linear: spike codes x packed 2-bit weights, salient input channels in 4 bits.

    y[m, n] = b[n] + s_x[m] sum_r s_w[n, r] ( sum_{k in r} c[m, k] q[n, k] - z_w[n, r] sum_{k in r} c[m, k] )

r = 0 are the ordinary channels (q 0..3), r = 1 the salient ones (q 0..15, the sum of their spikes over all steps). One op takes
codes, one activations; the mechanisms, and the meaning of the gradient, are those of :mod:`ranvier.ops.spike_linear`.
Formulas: :mod:`ranvier.reference.ternary_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ranvier import _C
from ranvier.ops._args import DTYPES, check_channels, check_device, check_result, check_tensor, check_tokens, plain
from ranvier.ops._declare import declare
from ranvier.ops._digits import add_digits, digit_rows
from ranvier.ops._spike_triton import encode_launches
from ranvier.ops._ternary_triton import ternary_codes, ternary_launches, ternary_places
from ranvier.ops._triton import run
from ranvier.ops.spike_encode import SpikeFormat, clipping, outputs_at, reference_encode
from ranvier.ops.spike_linear import (
    OUTPUT_BLOCK,
    PackedWeight,
    _by_block,
    _by_output,
    check_layer,
    layer_description,
    pack_codes,
    straight_through,
    unpack_codes,
)
from ranvier.reference import ternary_linear as reference
from ranvier.reference.spike_encode import channel_order
from ranvier.reference.weight_only_linear import digit_count, weight_only_linear

WEIGHT = (
    "Tensor weight_packed, Tensor weight_scale, Tensor weight_zero, Tensor? salient_mask, Tensor? bias,"
    " int out_features, int salient_count"
)
TOPS = (3, 15)  # the highest code of an ordinary and of a salient channel's weight


@dataclass(frozen=True)
class TernaryFormat(SpikeFormat):
    """How tokens are encoded for 2-bit weights: one scale a token, ordinary channels first, a code sum for either kind."""

    weight_bits: ClassVar[int] = 2

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Channels of each range: (K - K_s, K_s), or (K,) where all are of one kind."""
        mixed = 0 < self.salient_count < self.channels
        return (self.channels - self.salient_count, self.salient_count) if mixed else (self.channels,)

    @property
    def salient_ranges(self) -> tuple[bool, ...]:
        """Whether each range holds salient channels."""
        return (False, True) if len(self.lengths) == 2 else (self.salient_count > 0,)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """64-byte blocks of each range's weights: of eight ordinary channels, of four salient ones."""
        widths = (4 if salient else 8 for salient in self.salient_ranges)
        return tuple(-(-length // width) for length, width in zip(self.lengths, widths, strict=True))

    @cached_property
    def _fault(self) -> str | None:
        if (self.steps, self.span, self.grid, self.group_size) != (1, "shared", "consistent", 0):
            return "activations of 2-bit weights take one step in one range a row; make the format by ternary_format"
        return super()._fault


def ternary_format(channels: int, salient_count: int, act_bits: int = 8, act_clip: float = 1.0) -> TernaryFormat:
    """The format of a layer of K channels and activations of act_bits."""
    return TernaryFormat(channels, salient_count, act_bits, 1, "shared", "consistent", 0, act_clip)


_known_format = lru_cache(maxsize=4096, typed=True)(ternary_format)


def _format_of(channels: int, salient_count: int, act_bits: int = 8, act_clip: float = 1.0) -> TernaryFormat:
    """The same, remembered with all that follows from it; not where K is a compiler's symbol."""
    make = _known_format if type(channels) is int else ternary_format
    return make(channels, salient_count, act_bits, act_clip)


def _pack_two_bit(q: Tensor) -> Tensor:
    """q uint8 [N, K] with codes 0..3 -> uint8 [N/32, K/8, 64], missing channels and outputs zero.

    Byte 4 i + j holds, from its low bits upwards: channel j for output i, channel j for output 16 + i, channel 4 + j for
    output i, channel 4 + j for output 16 + i.
    """
    q = torch.nn.functional.pad(q, (0, -q.shape[1] % 8, 0, -q.shape[0] % OUTPUT_BLOCK))
    blocks = q.shape[1] // 8
    fields = q.view(-1, 2, OUTPUT_BLOCK // 2, blocks, 2, 4).permute(4, 1, 0, 3, 2, 5)
    packed = fields[0, 0] | (fields[0, 1] << 2) | (fields[1, 0] << 4) | (fields[1, 1] << 6)
    return packed.reshape(-1, blocks, 64)


def _unpack_two_bit(packed: Tensor, channels: int, out_features: int) -> Tensor:
    blocks = packed.shape[1]
    fields = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    fields = fields.view(2, 2, -1, blocks, OUTPUT_BLOCK // 2, 4).permute(2, 1, 4, 3, 0, 5)
    return fields.reshape(-1, 8 * blocks)[:out_features, :channels]


def pack_ternary(q: Tensor, scale: Tensor, zero: Tensor, salient_mask: Tensor | None, form: TernaryFormat) -> PackedWeight:
    """Pack q uint8 [N, K], scale float [N, 2] and zero [N, 2] of ordinary and salient channels, K in the layer's order.

    Raises ValueError for other shapes, for codes above 3 (ordinary) or 15 (salient), and for zero points above 15.
    """
    rows = q.shape[0]
    check_tensor("pack_ternary", "q", q, torch.uint8, (rows, form.channels))
    for name, table in (("scale", scale), ("zero", zero)):
        if tuple(table.shape) != (rows, 2):
            raise ValueError(f"pack_ternary: {name} has shape {list(table.shape)}; it must be [{rows}, 2]")
    if not bool(scale.isfinite().all()):
        raise ValueError("pack_ternary: scale has NaN or Inf; repair the quantizer's output")
    if len(form.lengths) == 2:
        q = q[:, channel_order(salient_mask)]
    parts = []
    for part, salient in zip(q.split(form.lengths, 1), form.salient_ranges, strict=True):
        kind = "a salient" if salient else "an ordinary"
        for name, values, top in (("q", part, TOPS[salient]), ("zero", zero[:, int(salient)], TOPS[1])):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= top:
                raise ValueError(f"pack_ternary: {name} of {kind} channel is {int(values.max())}; allowed are 0 to {top}")
        parts.append(pack_codes(part, [part.shape[1]]) if salient else _pack_two_bit(part))
    kept = [int(salient) for salient in form.salient_ranges]
    tables = (scale[:, kept].float(), zero[:, kept].to(torch.uint8))
    return PackedWeight(torch.cat(parts, 1).contiguous(), *(_by_block(table) for table in tables), None)


def unpack_ordered(packed: Tensor, form: TernaryFormat, out_features: int) -> Tensor:
    """The codes q uint8 [N, K], ordinary channels first."""
    parts = []
    pieces = zip(packed.split(form.blocks, 1), form.lengths, form.salient_ranges, strict=True)
    for piece, length, salient in pieces:
        if salient:
            parts.append(unpack_codes(piece, [length], out_features))
        else:
            parts.append(_unpack_two_bit(piece, length, out_features))
    return torch.cat(parts, 1)


def unpack_ternary(
    weight: PackedWeight, salient_mask: Tensor | None, form: TernaryFormat, out_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`pack_ternary`: q, scale, zero. Where all channels are of one kind both columns are that one's."""
    q = unpack_ordered(weight.packed, form, out_features)
    tables = [_by_output(table, out_features).expand(out_features, 2) for table in (weight.scale, weight.zero)]
    if len(form.lengths) == 2:
        natural = torch.empty_like(q)
        natural[:, channel_order(salient_mask)] = q
        q = natural
    return q, *tables


def _mask_of(salient_mask: Tensor | None, form: TernaryFormat, device: torch.device) -> Tensor:
    if salient_mask is None or form.salient_count == 0:
        return torch.zeros(form.channels, dtype=torch.bool, device=device)
    return salient_mask


def dequantize_ternary(weight: PackedWeight, salient_mask: Tensor | None, form: TernaryFormat, out_features: int) -> Tensor:
    """W^ = s (q - z): float32 [N, K], the channels in the layer's own order."""
    unpacked = unpack_ternary(weight, salient_mask, form, out_features)
    return reference.dequantize_weight(*unpacked, _mask_of(salient_mask, form, weight.packed.device))


def _split(args: tuple) -> tuple[PackedWeight, Tensor | None, Tensor | None, int, int]:
    """weight, mask, bias, out_features, salient_count."""
    packed, scale, zero, *rest = args
    return PackedWeight(packed, scale, zero, None), *rest


def _native(args: tuple, form: TernaryFormat) -> tuple[bytes, tuple]:
    """The layer as the kernels want it, and the tensors whose addresses it holds."""
    weight, mask, bias, out, _ = _split(args)
    held = [None if t is None else plain(t) for t in (*weight, mask, bias)]
    return layer_description(PackedWeight(*held[:4]), held[4], held[5], form, out), tuple(held)


def _reference_product(codes: Tensor, code_scale: Tensor, args: tuple, form: TernaryFormat, dtype: torch.dtype) -> Tensor:
    weight, mask, bias, out, _ = _split(args)
    unpacked = unpack_ternary(weight, mask, form, out)
    return reference.ternary_linear(codes, code_scale, *unpacked, bias, _mask_of(mask, form, codes.device)).to(dtype)


def check_codes(codes: Tensor, scale: Tensor, *rest) -> None:
    *args, dtype = rest
    weight, mask, bias, out, count = _split(tuple(args))
    form = _format_of(codes.shape[-1] if codes.ndim else 0, count)
    check_layer("ternary_linear", codes.device, weight, mask, bias, form, out)
    check_device("ternary_linear", codes.device, scale=scale)
    lead = tuple(codes.shape[:-1])
    check_tensor("ternary_linear", "codes", codes, torch.int8, (*lead, form.channels))
    check_tensor("ternary_linear", "scale", scale, torch.float32, (*lead, 1))
    check_result("ternary_linear", dtype)


def fake_codes(codes: Tensor, scale: Tensor, *rest) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], rest[5]), dtype=rest[-1])


def cpu_codes(codes: Tensor, scale: Tensor, *rest) -> Tensor:
    form = _format_of(codes.shape[-1], rest[6])
    y, codes, scale = fake_codes(codes, scale, *rest), plain(codes), plain(scale)
    description, held = _native(rest[:-1], form)
    tokens = codes.numel() // form.channels
    _C.ternary_linear(description, codes.data_ptr(), scale.data_ptr(), tokens, y.data_ptr(), DTYPES[y.dtype])
    del held
    return y


def triton_codes(codes: Tensor, scale: Tensor, *rest) -> Tensor:
    form, (weight, mask, bias, out, _) = _format_of(codes.shape[-1], rest[6]), _split(rest[:-1])
    y = fake_codes(codes, scale, *rest)
    run(ternary_launches(form, ternary_codes(form, codes, scale, mask), weight, bias, y, out))
    return y


def reference_codes(codes: Tensor, scale: Tensor, *rest) -> Tensor:
    return _reference_product(codes, scale, rest[:-1], _format_of(codes.shape[-1], rest[6]), rest[-1])


op = declare(
    f"ternary_linear(Tensor codes, Tensor scale, {WEIGHT}, ScalarType dtype) -> Tensor",
    check=check_codes,
    fake=fake_codes,
    cpu=cpu_codes,
    triton=triton_codes,
    reference=reference_codes,
    places=("reference", "csrc", "kernels", "ops", "nn", "tests", "benchmarks"),
    dtypes=(torch.int8,),
)


def _dynamic_format(x: Tensor, rest: tuple) -> TernaryFormat:
    """act_bits 0 is weight-only, whose digits are 8-bit codes."""
    return _format_of(x.shape[-1], rest[6], rest[7] or 8, *rest[8:])


def check_dynamic(x: Tensor, *rest) -> None:
    check_tokens("ternary_linear", x)
    if rest[3] is not None:
        check_channels("ternary_linear", x, rest[3].shape[0])
    weight, mask, bias, out, _ = _split(rest[:7])
    check_layer("ternary_linear", x.device, weight, mask, bias, _dynamic_format(x, rest), out)


def fake_dynamic(x: Tensor, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[5]))


def cpu_dynamic(x: Tensor, *rest) -> Tensor:
    form = _dynamic_format(x, rest)
    y, x = fake_dynamic(x, *rest), plain(x)
    (description, held), dtype = _native(rest[:7], form), DTYPES[x.dtype]
    tokens = x.numel() // form.channels
    if rest[7] == 0:
        digits = digit_count(x.dtype)
        _C.weight_only_linear(description, x.data_ptr(), form.channels, dtype, tokens, digits, y.data_ptr(), dtype)
    else:
        _C.spike_linear_dynamic(description, x.data_ptr(), form.channels, dtype, tokens, y.data_ptr(), dtype)
    del held
    return y


def triton_dynamic(x: Tensor, *rest) -> Tensor:
    form, (weight, mask, bias, out, _) = _dynamic_format(x, rest), _split(rest[:7])
    y = fake_dynamic(x, *rest)
    if rest[7] == 0:
        digits, scale = digit_rows(x)
        products = scale.new_empty((digits.shape[0], out))
        run(ternary_launches(form, ternary_codes(form, digits, scale, mask), weight, None, products, out))
        return add_digits(products, bias, y)
    places = ternary_places(form)
    encoded = outputs_at(x, form, places)
    run(encode_launches(form, x, mask, encoded, places) + ternary_launches(form, encoded, weight, bias, y, out))
    return y


def reference_dynamic(x: Tensor, *rest) -> Tensor:
    form = _dynamic_format(x, rest)
    if rest[7] == 0:
        weight, mask, bias, out, _ = _split(rest[:7])
        return weight_only_linear(x, dequantize_ternary(weight, mask, form, out), bias).to(x.dtype)
    encoded = reference_encode(x, None, 0, form.act_bits, form.steps, form.span, form.grid, 0, form.act_clip)
    return _reference_product(encoded.codes, encoded.scale, rest[:7], form, x.dtype)


def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, *rest = inputs
    ctx.save_for_backward(*rest[:4])
    ctx.options, ctx.channels, ctx.has_bias = rest[5:], x.shape[-1], rest[4] is not None


def backward(ctx, grad: Tensor) -> tuple:
    packed, scale, zero, mask = ctx.saved_tensors
    out, count, act_bits, *_clip = ctx.options

    def weight() -> Tensor:
        form = _format_of(ctx.channels, count, act_bits or 8)
        return dequantize_ternary(PackedWeight(packed, scale, zero, None), mask, form, out)

    grad_x, grad_bias = straight_through(grad, weight, ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[5])
    return (grad_x, *[None] * 4, grad_bias, *[None] * 4)


dynamic_op = declare(
    f"ternary_linear_dynamic(Tensor x, {WEIGHT}, int act_bits, float act_clip=1.0) -> Tensor",
    check=check_dynamic,
    fake=fake_dynamic,
    cpu=cpu_dynamic,
    triton=triton_dynamic,
    reference=reference_dynamic,
    backward=backward,
    setup_context=setup_context,
    autocast=True,
    places=(),
    dtypes=tuple(DTYPES),
)


def _arguments(weight: PackedWeight, mask: Tensor | None, bias: Tensor | None, out: int, count: int) -> tuple:
    return *weight[:3], mask, bias, out, count


def ternary_linear(
    codes: Tensor,
    scale: Tensor,
    weight: PackedWeight,
    out_features: int,
    bias: Tensor | None = None,
    salient_mask: Tensor | None = None,
    *,
    salient_count: int | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The product of any int8 codes [..., K] and a packed weight: [..., N] in ``dtype``, bias included.

    codes are in the layer's own order of channels, scale float32 [..., 1] as :func:`ranvier.ops.spike_encode` returns it.
    weight: :func:`pack_ternary`'s result. salient_count: ``salient_mask.sum()`` where the caller knows it. Integer sums are
    exact; outputs have the same bits on every instruction-set level.
    Raises ValueError for shapes that do not belong together, TypeError for dtypes, BackendError for a backend that cannot run.
    """
    if salient_count is None:
        salient_count = int(salient_mask.sum()) if salient_mask is not None else 0
    arguments = _arguments(weight, salient_mask, bias, out_features, salient_count)
    return op(codes, scale, *arguments, dtype, backend=backend)


def ternary_linear_dynamic(
    x: Tensor,
    weight: PackedWeight,
    form: TernaryFormat,
    out_features: int,
    bias: Tensor | None = None,
    salient_mask: Tensor | None = None,
    *,
    weight_only: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Encode and multiply in one call: x [..., K] float32, bfloat16 or float16 -> [..., N] in x's dtype.

    With weight_only x is not quantized, but multiplied as its radix-256 digits: :func:`ranvier.ops.weight_only_linear`.
    Differentiable in x (straight-through: dx = dy W^) and bias. Raises like :func:`ternary_linear`.
    """
    check_channels("ternary_linear", x, form.channels)
    arguments = _arguments(weight, salient_mask, bias, out_features, form.salient_count)
    return dynamic_op(x, *arguments, 0 if weight_only else form.act_bits, *clipping(form.act_clip), backend=backend)
