"""flash_attention: softmax attention of a prompt, tile by tile, on the CPU.

    y[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]

No tensor of Lq x L is made, the heads of keys and values are not repeated for grouped queries, and what a causal query does
not see is not computed. Formulas: :mod:`ranvier.reference.flash_attention`. FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

import struct

from torch import Tensor

from ranvier import _C
from ranvier.ops._args import DTYPES, check_device, check_float, dense_rows, logit_scale
from ranvier.ops._declare import declare
from ranvier.reference import flash_attention as reference

MAX_D = 512
SCHEMA = "flash_attention(Tensor query, Tensor key, Tensor value, bool causal, float scale) -> Tensor"


def check(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> None:
    op = "flash_attention"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_float(op, name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} is {list(tensor.shape)}; it must be [batch, heads, tokens, D]")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype} and query {query.dtype}; cast one of them")
    batch, heads, queries, channels = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != channels:
        raise ValueError(
            f"{op}: query is {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}; key and value must be"
            f" [{batch}, kv heads, tokens, {channels}]"
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{op}: query has {heads} heads, no multiple of the {key.shape[1]} heads of key and value")
    if not 1 <= channels <= MAX_D:
        raise ValueError(f"{op}: D is {channels}; allowed are 1 to {MAX_D}")
    if queries and (key.shape[2] == 0 or (causal and key.shape[2] < queries)):
        raise ValueError(f"{op}: {queries} queries see {key.shape[2]} keys; causal ones need at least as many keys")
    check_device(op, query.device, key=key, value=value)


def fake(query: Tensor, *_: object) -> Tensor:
    batch, heads, queries, channels = query.shape
    return query.new_empty(batch, queries, heads, channels).transpose(1, 2)


def cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    out, given = fake(query), [dense_rows(t) for t in (query, key, value)]
    batch, heads, queries, channels = query.shape
    sizes = (batch, heads, key.shape[1], queries, key.shape[2], channels, DTYPES[query.dtype], int(causal))
    places = [number for t in (*given, out) for number in (t.data_ptr(), *t.stride()[:3])]
    _C.flash_attention(struct.pack("24q", *sizes, *places), scale)
    return out


def reference_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    y = reference.flash_attention(query.double(), key.double(), value.double(), causal, scale)
    return fake(query).copy_(y)


def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.causal, ctx.scale = inputs[3:]


def backward(ctx, grad: Tensor) -> tuple:
    given = [t.float() for t in (grad, *ctx.saved_tensors)]
    grads = reference.flash_attention_backward(*given, ctx.causal, ctx.scale)
    return (*(g.to(grad.dtype) for g in grads), None, None)


op = declare(
    SCHEMA,
    check=check,
    fake=fake,
    cpu=cpu,
    reference=reference_attention,
    backward=backward,
    setup_context=setup_context,
    exact=True,
    places=("reference", "csrc", "ops", "tests", "benchmarks"),
    dtypes=tuple(DTYPES),
)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of query [B, H, Lq, D] over key and value [B, H_kv, L, D]: [B, H, Lq, D] of their dtype.

    float32, bfloat16 or float16, one dtype for all; everything is computed in float32 and rounded once. H is a multiple of
    H_kv, D at most 512; channels are read where they are if they lie side by side. causal: query i sees the keys up to
    i + L - Lq. scale: D ** -0.5 by default. The result lies in memory as [B, Lq, H, D]. Each query's result is the same
    bits beside any other, on any number of threads and on every instruction-set level; a query whose logits are not finite
    gets NaN, and one never depends on tokens that it does not see.

    The gradient is exact; it makes the Lq x L matrix that the forward pass avoids.

    Raises ValueError for shapes that do not fit and a scale that is not finite, TypeError for dtypes, BackendError for a
    backend that cannot run; there is no Triton kernel, on GPUs use torch's scaled_dot_product_attention.
    """
    check_float("flash_attention", "query", query)
    channels = query.shape[-1] if query.ndim else 1
    return op(query, key, value, bool(causal), logit_scale("flash_attention", scale, channels), backend=backend)
