"""spike_linear: spike codes x packed 4-bit weights, in one integer product equal to the sum over all spikes.

    y[m, n] = b[n] + sum_r s_x[m, r] sum_{g in r} s_w[n, g] ( sum_{k in g} c[m, k] (q[n, k] - z_w[n, g]) - z_x[m, r] S[n, g] )

`spike_linear` takes codes, `spike_linear_dynamic` activations: encode, product and epilogue in one call. Its gradient is the
straight-through one: dx = dy W^, db = sum dy. Formulas: :mod:`ranvier.reference.spike_linear`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ranvier import _C
from ranvier.ops._args import (
    DTYPES,
    check_channels,
    check_device,
    check_float,
    check_is_tensor,
    check_result,
    check_tensor,
    check_tokens,
    plain,
    pointer,
)
from ranvier.ops._declare import declare
from ranvier.ops._spike_triton import blocked_codes, blocked_places, encode_launches, linear_launches
from ranvier.ops._triton import run
from ranvier.ops.spike_encode import SpikeFormat, clipping, format_of, outputs_at, reference_encode
from ranvier.reference import spike_linear as reference
from ranvier.reference.spike_encode import SpikeCodes, channel_order
from ranvier.reference.spike_linear import Quantized

OUTPUT_BLOCK = 32
WEIGHT = (
    "Tensor weight_packed, Tensor weight_scale, Tensor weight_zero, Tensor? weight_sum, Tensor? salient_mask, Tensor? bias,"
    " int out_features, int salient_count, int act_bits, int steps, str span, str grid, int group_size"
)


class PackedWeight(NamedTuple):
    """Weights as the kernels read them; G groups of channels, B blocks of four, outputs in blocks of 32.

    packed uint8 [N/32, B, 64], scale float32 [N/32, G, 32], zero uint8 [N/32, G, 32], sum int32 [N/32, G, 32] (compat only).
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    sum: Tensor | None


def _by_block(table: Tensor) -> Tensor:
    """[N, G] -> [N/32, G, 32], missing outputs zero."""
    rows = -(-table.shape[0] // OUTPUT_BLOCK) * OUTPUT_BLOCK
    padded = torch.nn.functional.pad(table, (0, 0, 0, rows - table.shape[0]))
    return padded.view(-1, OUTPUT_BLOCK, table.shape[1]).transpose(1, 2).contiguous()


def _by_output(table: Tensor, out_features: int) -> Tensor:
    """The inverse of `_by_block`."""
    return table.transpose(1, 2).reshape(-1, table.shape[1])[:out_features]


def pack_codes(q: Tensor, lengths: Sequence[int]) -> Tensor:
    """q uint8 [N, K] with codes 0..15 -> uint8 [N/32, B, 64].

    Byte 4 i + j of a block holds channel j of its four for output i (low nibble) and output 16 + i (high nibble).
    """
    pieces = [torch.nn.functional.pad(part, (0, -part.shape[1] % 4)) for part in q.split(lengths, 1)]
    q = torch.cat(pieces, 1)
    q = torch.nn.functional.pad(q, (0, 0, 0, -q.shape[0] % OUTPUT_BLOCK))
    halves = q.view(-1, 2, OUTPUT_BLOCK // 2, q.shape[1] // 4, 4).permute(1, 0, 3, 2, 4)
    return (halves[0] | (halves[1] << 4)).reshape(-1, q.shape[1] // 4, 64).contiguous()


def unpack_codes(packed: Tensor, lengths: Sequence[int], out_features: int) -> Tensor:
    """The inverse of :func:`pack_codes`."""
    blocks = packed.shape[1]
    halves = torch.stack([packed & 15, packed >> 4]).view(2, -1, blocks, OUTPUT_BLOCK // 2, 4)
    q = halves.permute(1, 0, 3, 2, 4).reshape(-1, 4 * blocks)[:out_features]
    padded = [-(-length // 4) * 4 for length in lengths]
    return torch.cat([part[:, :length] for part, length in zip(q.split(padded, 1), lengths, strict=True)], 1)


def pack_weight(weight: Tensor, salient_mask: Tensor | None, form: SpikeFormat) -> PackedWeight:
    """Quantize a float weight [N, K] round to nearest and pack it for codes of this format."""
    weight = weight.detach().float()
    if len(form.lengths) == 2:
        weight = weight[:, channel_order(salient_mask)]
    return _pack(reference.quantize_weight(weight, form.lengths, form.group_size or None), form)


def pack_quantized(weight: Quantized, salient_mask: Tensor | None, form: SpikeFormat) -> PackedWeight:
    """Pack codes q uint8 [N, K], their channels in the layer's own order, with the scales and zeros of this format's groups.

    Groups are those of the codes' order: group_size channels of each range, ascending, other channels before salient ones.
    Raises TypeError or ValueError for tensors that no such layer has.
    """
    q, scale, zero = weight
    for name, tensor in weight._asdict().items():
        check_is_tensor("pack_quantized", name, tensor)
    if q.ndim != 2:
        raise ValueError(f"pack_quantized: q has shape {list(q.shape)}; it must be [N, {form.channels}]")
    table = (q.shape[0], sum(form.groups))
    check_tensor("pack_quantized", "q", q, torch.uint8, (q.shape[0], form.channels))
    check_tensor("pack_quantized", "scale", scale, torch.float32, table)
    check_tensor("pack_quantized", "zero", zero, torch.uint8, table)
    check_device("pack_quantized", q.device, scale=scale, zero=zero, salient_mask=salient_mask)
    for name, codes in (("q", q), ("zero", zero)):
        if codes.numel() and int(codes.max()) > reference.WEIGHT_TOP:
            raise ValueError(f"pack_quantized: {name} reaches {int(codes.max())}; 4-bit codes end at {reference.WEIGHT_TOP}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError("pack_quantized: a scale is NaN, infinite or not above 0; pass the scales of a fitted grid")
    if len(form.lengths) == 2:
        q = q[:, channel_order(salient_mask)]
    return _pack(Quantized(q, scale, zero), form)


def _pack(weight: Quantized, form: SpikeFormat) -> PackedWeight:
    """weight: in the codes' order."""
    q, scale, zero = weight
    total = None
    if form.grid == "compat":
        groups, _ = reference.group_index(form.lengths, form.group_size or None, q.device)
        signed = q.to(torch.int32) - zero.to(torch.int32)[:, groups]
        total = torch.zeros(scale.shape, dtype=torch.int32, device=q.device).index_add_(1, groups, signed)
        total = _by_block(total)
    return PackedWeight(pack_codes(q, form.lengths), _by_block(scale), _by_block(zero), total)


def unpack_weight(weight: PackedWeight, salient_mask: Tensor | None, form: SpikeFormat, out_features: int) -> Tensor:
    """s_w (q - z_w): float32 [N, K], the channels in the layer's own order."""
    groups, _ = reference.group_index(form.lengths, form.group_size or None, weight.packed.device)
    q = unpack_codes(weight.packed, form.lengths, out_features)
    scale, zero = _by_output(weight.scale, out_features), _by_output(weight.zero, out_features)
    value = reference.dequantize_weight(q, scale, zero, groups)
    if len(form.lengths) == 1:
        return value
    natural = torch.empty_like(value)
    natural[:, channel_order(salient_mask)] = value
    return natural


def layer_description(weight: PackedWeight, mask: Tensor | None, bias: Tensor | None, form: SpikeFormat, out: int) -> bytes:
    """csrc SpikeLayer, packed: fields in its order. It holds addresses: valid while the tensors live where they are."""
    mask_address = pointer(mask) if form.salient_count else 0
    bias_dtype = DTYPES[bias.dtype] if bias is not None else 0
    tables = (pointer(weight.packed), pointer(weight.scale), pointer(weight.zero), pointer(weight.sum))
    return form.packed + struct.pack("9q", out, mask_address, *tables, pointer(bias), bias_dtype, form.weight_bits)


def check_layer(
    op: str, device: torch.device, weight: PackedWeight, mask: Tensor | None, bias: Tensor | None, form: SpikeFormat, out: int
) -> None:
    """Raises ValueError or TypeError when the tensors do not belong to this format or are not on the input's device."""
    form.check(op)
    tables = {f"weight_{name}": table for name, table in weight._asdict().items()}
    check_device(op, device, **tables, salient_mask=mask, bias=bias)
    rows, groups, blocks = -(-out // OUTPUT_BLOCK), sum(form.groups), sum(form.blocks)
    check_tensor(op, "weight_packed", weight.packed, torch.uint8, (rows, blocks, 64))
    check_tensor(op, "weight_scale", weight.scale, torch.float32, (rows, groups, OUTPUT_BLOCK))
    check_tensor(op, "weight_zero", weight.zero, torch.uint8, (rows, groups, OUTPUT_BLOCK))
    if form.grid == "compat":
        if weight.sum is None:
            raise ValueError(f"{op}: grid='compat' needs weight_sum; pack the weight for that grid")
        check_tensor(op, "weight_sum", weight.sum, torch.int32, (rows, groups, OUTPUT_BLOCK))
    if mask is not None:
        check_tensor(op, "salient_mask", mask, torch.bool, (form.channels,))
    elif form.salient_count:
        raise ValueError(f"{op}: salient_count is {form.salient_count} but there is no salient_mask")
    if bias is not None:
        check_float(op, "bias", bias)
        if tuple(bias.shape) != (out,):
            raise ValueError(f"{op}: bias has shape {list(bias.shape)}; it must be [{out}]")


def _split(args: tuple, channels: int) -> tuple[PackedWeight, Tensor | None, Tensor | None, SpikeFormat, int]:
    packed, scale, zero, total, mask, bias, out, count, *rule = args
    return PackedWeight(packed, scale, zero, total), mask, bias, format_of(channels, count, *rule), out


def _contiguous(weight: PackedWeight) -> PackedWeight:
    return PackedWeight(*(t if t is None else plain(t) for t in weight))


def _reference_product(encoded: SpikeCodes, args: tuple, dtype: torch.dtype) -> Tensor:
    weight, _, bias, form, out = _split(args, encoded.codes.shape[-1])
    q = unpack_codes(weight.packed, form.lengths, out)
    scale, zero = _by_output(weight.scale, out), _by_output(weight.zero, out)
    return reference.spike_linear(encoded, q, scale, zero, bias, form.lengths, form.group_size or None).to(dtype)


def check_codes(codes: Tensor, scale: Tensor, code_sum: Tensor, zero: Tensor, *rest) -> None:
    weight, mask, bias, form, out = _split(rest[:-1], codes.shape[-1] if codes.ndim else 0)
    check_layer("spike_linear", codes.device, weight, mask, bias, form, out)
    check_device("spike_linear", codes.device, scale=scale, code_sum=code_sum, zero=zero)
    lead = tuple(codes.shape[:-1])
    check_tensor("spike_linear", "codes", codes, torch.int8, (*lead, form.channels))
    check_tensor("spike_linear", "scale", scale, torch.float32, (*lead, len(form.lengths)))
    check_tensor("spike_linear", "code_sum", code_sum, torch.int32, (*lead, sum(form.groups)))
    check_tensor("spike_linear", "zero", zero, torch.int32, (*lead, len(form.lengths)))
    check_result("spike_linear", rest[-1])


def fake_codes(codes: Tensor, scale: Tensor, code_sum: Tensor, zero: Tensor, *rest) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], rest[6]), dtype=rest[-1])


def cpu_codes(codes: Tensor, scale: Tensor, code_sum: Tensor, zero: Tensor, *rest) -> Tensor:
    weight, mask, bias, form, out = _split(rest[:-1], codes.shape[-1])
    y = fake_codes(codes, scale, code_sum, zero, *rest)
    weight, bias = _contiguous(weight), None if bias is None else plain(bias)
    encoded = [plain(t) for t in (codes, scale, code_sum, zero)]
    tokens = codes.numel() // form.channels
    description = layer_description(weight, mask, bias, form, out)
    _C.spike_linear(description, *(pointer(t) for t in encoded), tokens, y.data_ptr(), DTYPES[y.dtype])
    return y


def triton_codes(codes: Tensor, scale: Tensor, code_sum: Tensor, zero: Tensor, *rest) -> Tensor:
    weight, _, bias, form, out = _split(rest[:-1], codes.shape[-1])
    y = fake_codes(codes, scale, code_sum, zero, *rest)
    encoded = SpikeCodes(blocked_codes(form, codes), *(t.contiguous() for t in (scale, code_sum, zero)))
    run(linear_launches(form, encoded, weight, bias, y, out))
    return y


def reference_codes(codes: Tensor, scale: Tensor, code_sum: Tensor, zero: Tensor, *rest) -> Tensor:
    return _reference_product(SpikeCodes(codes, scale, code_sum, zero), rest[:-1], rest[-1])


op = declare(
    f"spike_linear(Tensor codes, Tensor scale, Tensor code_sum, Tensor zero, {WEIGHT}, ScalarType dtype) -> Tensor",
    check=check_codes,
    fake=fake_codes,
    cpu=cpu_codes,
    triton=triton_codes,
    reference=reference_codes,
    places=("reference", "csrc", "kernels", "ops", "nn", "tests", "benchmarks"),
    dtypes=(torch.int8,),
)


def check_dynamic(x: Tensor, *rest) -> None:
    packed, mask = rest[0], rest[4]
    check_tokens("spike_linear", x)
    if mask is not None:
        check_channels("spike_linear", x, mask.shape[0])
    elif packed.ndim == 3 and -(-x.shape[-1] // 4) != packed.shape[1]:
        raise ValueError(f"spike_linear: x has {x.shape[-1]} channels; this weight was packed for {4 * packed.shape[1]}")
    weight, mask, bias, form, out = _split(rest, x.shape[-1])
    check_layer("spike_linear", x.device, weight, mask, bias, form, out)


def fake_dynamic(x: Tensor, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[6]))


def cpu_dynamic(x: Tensor, *rest) -> Tensor:
    weight, mask, bias, form, out = _split(rest, x.shape[-1])
    y, x = fake_dynamic(x, *rest), plain(x)
    weight, bias = _contiguous(weight), None if bias is None else plain(bias)
    mask = None if mask is None else mask.contiguous()
    description, dtype = layer_description(weight, mask, bias, form, out), DTYPES[x.dtype]
    tokens = x.numel() // form.channels
    _C.spike_linear_dynamic(description, x.data_ptr(), form.channels, dtype, tokens, y.data_ptr(), dtype)
    return y


def triton_dynamic(x: Tensor, *rest) -> Tensor:
    weight, mask, bias, form, out = _split(rest, x.shape[-1])
    y, places = fake_dynamic(x, *rest), blocked_places(form)
    encoded = outputs_at(x, form, places)
    run(encode_launches(form, x, mask, encoded, places))
    run(linear_launches(form, encoded, weight, bias, y, out))
    return y


def reference_dynamic(x: Tensor, *rest) -> Tensor:
    _, mask, _, form, _ = _split(rest, x.shape[-1])
    mask = mask if form.salient_count else None
    encoded = reference_encode(x, mask, form.salient_count, *_rule(form), form.act_clip)
    return _reference_product(encoded, rest, x.dtype)


def _rule(form: SpikeFormat) -> tuple:
    return form.act_bits, form.steps, form.span, form.grid, form.group_size


def straight_through(
    grad: Tensor, weight: Callable[[], Tensor], for_x: bool, for_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W^ and db = sum dy, where they are needed. weight makes W^ [N, K]."""
    grad_x = grad @ weight().to(grad.dtype) if for_x else None
    return grad_x, grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None


def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, *rest = inputs
    ctx.save_for_backward(*rest[:5])
    ctx.options = rest[6:]
    ctx.channels, ctx.has_bias = x.shape[-1], rest[5] is not None


def backward(ctx, grad: Tensor) -> tuple:
    packed, scale, zero, total, mask = ctx.saved_tensors
    out, count, *rule = ctx.options

    def weight() -> Tensor:
        return unpack_weight(PackedWeight(packed, scale, zero, total), mask, format_of(ctx.channels, count, *rule), out)

    grad_x, grad_bias = straight_through(grad, weight, ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[6])
    return (grad_x, *[None] * 5, grad_bias, *[None] * 8)


dynamic_op = declare(
    f"spike_linear_dynamic(Tensor x, {WEIGHT}, float act_clip=1.0) -> Tensor",
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


def _arguments(weight: PackedWeight, mask: Tensor | None, bias: Tensor | None, form: SpikeFormat, out: int) -> tuple:
    return *weight, mask, bias, out, form.salient_count, *_rule(form)


def spike_linear(
    encoded: SpikeCodes,
    weight: PackedWeight,
    form: SpikeFormat,
    out_features: int,
    bias: Tensor | None = None,
    salient_mask: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The product of codes [..., K] and a packed weight: [..., N] in ``dtype``, bias included.

    encoded: what :func:`ranvier.ops.spike_encode` returned for the same format. weight: :func:`pack_weight`'s result.
    Integer sums are exact; the epilogue's order of fused operations is the same on every instruction-set level,
    and so are its bits.
    Raises ValueError for shapes that do not belong together and codes larger than the format's, TypeError for dtypes,
    BackendError for a backend that cannot run.
    """
    return op(*encoded, *_arguments(weight, salient_mask, bias, form, out_features), dtype, backend=backend)


def spike_linear_dynamic(
    x: Tensor,
    weight: PackedWeight,
    form: SpikeFormat,
    out_features: int,
    bias: Tensor | None = None,
    salient_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Encode and multiply in one call: x [..., K] float32, bfloat16 or float16 -> [..., N] in x's dtype.

    Differentiable in x (straight-through: dx = dy W^) and bias. Raises like :func:`spike_linear`.
    """
    check_channels("spike_linear", x, form.channels)
    return dynamic_op(x, *_arguments(weight, salient_mask, bias, form, out_features), *clipping(form.act_clip), backend=backend)
