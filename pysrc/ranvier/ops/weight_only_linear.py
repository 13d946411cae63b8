"""weight_only_linear: float activations x packed 4-bit weights, in integers: a token as radix-256 digits of 8 bits each.

    y = x W^^T + b,   W^ = s_w (q - z_w)

float32 activations take three digits and come out as a float32 product would; bfloat16 and float16 take two. One pass over the
weights whatever the digits, so that a single token costs what reading 4-bit weights costs. Formulas:
:mod:`ranvier.reference.weight_only_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ranvier import _C
from ranvier.ops._args import DTYPES, check_channels, check_tokens, plain
from ranvier.ops._declare import declare
from ranvier.ops._digits import add_digits, digit_rows
from ranvier.ops._spike_triton import blocked_codes, linear_launches
from ranvier.ops._triton import run
from ranvier.ops.spike_encode import SpikeFormat, format_of
from ranvier.ops.spike_linear import PackedWeight, check_layer, layer_description, straight_through, unpack_weight
from ranvier.reference import weight_only_linear as reference
from ranvier.reference.spike_encode import SpikeCodes, group_sums

RULE = (8, 1, "shared", "consistent")  # a digit is a symmetric 8-bit code


def digit_format(channels: int, group_size: int | None = None) -> SpikeFormat:
    """The format of a token's digits, by which the weight is packed."""
    return SpikeFormat(channels, 0, *RULE, group_size or 0)


def _split(args: tuple, channels: int) -> tuple[PackedWeight, Tensor | None, int, SpikeFormat]:
    packed, scale, zero, bias, out, group_size = args
    return PackedWeight(packed, scale, zero, None), bias, out, format_of(channels, 0, *RULE, group_size)


def check(x: Tensor, *rest) -> None:
    check_tokens("weight_only_linear", x)
    packed = rest[0]
    if packed.ndim == 3 and -(-x.shape[-1] // 4) != packed.shape[1]:
        raise ValueError(f"weight_only_linear: x has {x.shape[-1]} channels; this weight was packed for {4 * packed.shape[1]}")
    weight, bias, out, form = _split(rest, x.shape[-1])
    check_layer("weight_only_linear", x.device, weight, None, bias, form, out)


def fake(x: Tensor, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[4]))


def cpu(x: Tensor, *rest) -> Tensor:
    weight, bias, out, form = _split(rest, x.shape[-1])
    y, x = fake(x, *rest), plain(x)
    weight = PackedWeight(*(t if t is None else plain(t) for t in weight))
    bias = None if bias is None else plain(bias)
    description, dtype = layer_description(weight, None, bias, form, out), DTYPES[x.dtype]
    digits, tokens = reference.digit_count(x.dtype), x.numel() // form.channels
    _C.weight_only_linear(description, x.data_ptr(), form.channels, dtype, tokens, digits, y.data_ptr(), dtype)
    return y


def triton(x: Tensor, *rest) -> Tensor:
    weight, bias, out, form = _split(rest, x.shape[-1])
    digits, scale = digit_rows(x)
    sums = group_sums(digits, form.lengths, form.group_size or None)
    encoded = SpikeCodes(blocked_codes(form, digits), scale, sums, torch.zeros_like(scale, dtype=torch.int32))
    products = scale.new_empty((digits.shape[0], out))
    run(linear_launches(form, encoded, weight, None, products, out))
    return add_digits(products, bias, fake(x, *rest))


def reference_linear(x: Tensor, *rest) -> Tensor:
    weight, bias, out, form = _split(rest, x.shape[-1])
    return reference.weight_only_linear(x, unpack_weight(weight, None, form, out), bias).to(x.dtype)


def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, packed, scale, zero, bias, out, group_size = inputs
    ctx.save_for_backward(packed, scale, zero)
    ctx.out, ctx.form, ctx.has_bias = out, digit_format(x.shape[-1], group_size), bias is not None


def backward(ctx, grad: Tensor) -> tuple:

    def weight() -> Tensor:
        return unpack_weight(PackedWeight(*ctx.saved_tensors, None), None, ctx.form, ctx.out)

    grad_x, grad_bias = straight_through(grad, weight, ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[4])
    return grad_x, None, None, None, grad_bias, None, None


op = declare(
    "weight_only_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor weight_zero, Tensor? bias,"
    " int out_features, int group_size) -> Tensor",
    check=check,
    fake=fake,
    cpu=cpu,
    triton=triton,
    reference=reference_linear,
    backward=backward,
    setup_context=setup_context,
    autocast=True,
    places=("reference", "csrc", "ops", "tests"),
    kernels_of="spike_linear",
    dtypes=tuple(DTYPES),
)


def weight_only_linear(
    x: Tensor,
    weight: PackedWeight,
    form: SpikeFormat,
    out_features: int,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x [..., K] float32, bfloat16 or float16 -> [..., N] in x's dtype, activations not quantized.

    weight: :func:`ranvier.ops.pack_weight`'s result for ``form`` = :func:`digit_format`. Differentiable in x (dx = dy W^) and
    bias. Raises ValueError for shapes that do not belong together, TypeError for dtypes, BackendError for a backend that cannot
    run. GPTQ's W4A16 (arXiv 2210.17323) is this product.
    """
    check_channels("weight_only_linear", x, form.channels)
    packed, scale, zero, _ = weight
    return op(x, packed, scale, zero, bias, out_features, form.group_size, backend=backend)
