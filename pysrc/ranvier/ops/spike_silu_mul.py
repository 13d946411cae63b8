"""spike_silu_mul: the product of a gated layer and its spike codes, one pass over the tokens.

y = T(T(silu(gate)) up),    codes = spike_encode(y),    T: to the type of gate
"""

from __future__ import annotations

from torch import Tensor

from ranvier import _C
from ranvier.ops._args import DTYPES, check_device, check_float, check_tensor, plain, pointer
from ranvier.ops._declare import declare
from ranvier.ops._spike_triton import Gate, encode_launches, packed_places
from ranvier.ops._triton import run
from ranvier.ops.spike_encode import _outputs, clipping, format_of, reference_encode
from ranvier.ops.spike_encode import check as check_encoding
from ranvier.ops.spike_encode import fake as fake_encoding
from ranvier.reference import spike_silu_mul as reference
from ranvier.reference.spike_encode import SpikeCodes

SCHEMA = (
    "spike_silu_mul(Tensor gate, Tensor up, Tensor? salient_mask, int salient_count, int act_bits, int steps, str span,"
    " str grid, int group_size, float act_clip=1.0)"
    " -> (Tensor y, Tensor codes, Tensor scale, Tensor code_sum, Tensor zero)"
)


def check(gate: Tensor, up: Tensor, *rest) -> None:
    check_float("spike_silu_mul", "gate", gate)
    check_float("spike_silu_mul", "up", up)
    check_tensor("spike_silu_mul", "up", up, up.dtype, tuple(gate.shape))
    check_device("spike_silu_mul", gate.device, up=up)
    check_encoding(gate, *rest)


def fake(gate: Tensor, up: Tensor, *rest) -> tuple:
    return gate.new_empty(gate.shape), *fake_encoding(gate, *rest)


def cpu(gate: Tensor, up: Tensor, mask: Tensor | None, count: int, *rest) -> tuple:
    form, (y, *codes) = format_of(gate.shape[-1], count, *rest), fake(gate, up, mask, count, *rest)
    gate, up = plain(gate), plain(up.to(gate.dtype))
    mask = None if mask is None else mask.contiguous()
    _C.spike_silu_mul(
        gate.data_ptr(), up.data_ptr(), DTYPES[gate.dtype], form.channels, y.data_ptr(), form.packed, pointer(mask),
        gate.numel() // form.channels, *(pointer(t) for t in codes),
    )  # fmt: skip
    return y, *codes


def triton(gate: Tensor, up: Tensor, mask: Tensor | None, count: int, *rest) -> tuple:
    form = format_of(gate.shape[-1], count, *rest)
    y, codes = gate.new_empty(gate.shape), _outputs(gate, form)
    run(encode_launches(form, gate, mask, codes, packed_places(form), Gate(up.to(gate.dtype), y)))
    return y, *codes


def reference_product(gate: Tensor, up: Tensor, *rest) -> tuple:
    y = reference.silu_mul(gate, up.to(gate.dtype))
    return y, *reference_encode(y, *rest)


op = declare(
    SCHEMA,
    check=check,
    fake=fake,
    cpu=cpu,
    triton=triton,
    reference=reference_product,
    places=("reference", "csrc", "ops", "nn", "tests", "benchmarks"),
    instead="train with ranvier.nn.SpikingGatedMLP, which calls its layers one by one where a gradient is needed",
    kernels_of="spike_encode",
    dtypes=tuple(DTYPES),
)


def spike_silu_mul(
    gate: Tensor,
    up: Tensor,
    salient_mask: Tensor | None = None,
    *,
    act_bits: int = 4,
    steps: int = 2,
    span: str = "shared",
    grid: str = "consistent",
    group_size: int | None = None,
    act_clip: float | None = None,
    salient_count: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, SpikeCodes]:
    """silu(gate) * up and its codes; gate and up [..., K] float32, bfloat16 or float16, up taken in gate's type.

    The codes are those that :func:`ranvier.ops.spike_encode` gives for y with the other arguments, which are its own. The
    exponential is a fixed sequence of fused operations: y's bits are the same on every instruction-set level.
    Raises ValueError and TypeError like spike_encode, and for an ``up`` of another shape.
    """
    count = salient_count if salient_count is not None else int(salient_mask.sum()) if salient_mask is not None else 0
    rule = (act_bits, steps, span, grid, group_size or 0, *clipping(act_clip))
    y, *codes = op(gate, up, salient_mask, count, *rule, backend=backend)
    return y, SpikeCodes(*codes)
