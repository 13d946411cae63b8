"""spike_rms_norm: RMSNorm and the spike codes of what it gives, one pass over the tokens.

    y = w T(x / sqrt(mean x^2 + eps)),    codes = spike_encode(y)

The other weightings: :mod:`ranvier.reference.spike_rms_norm`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ranvier import _C
from ranvier.ops._args import DTYPES, check_device, check_float, check_tokens, plain, pointer
from ranvier.ops._declare import declare
from ranvier.ops._spike_triton import Norm, encode_launches, packed_places
from ranvier.ops._triton import run
from ranvier.ops.spike_encode import _outputs, clipping, format_of, reference_encode
from ranvier.ops.spike_encode import check as check_encoding
from ranvier.ops.spike_encode import fake as fake_encoding
from ranvier.reference import spike_rms_norm as reference
from ranvier.reference.spike_encode import SpikeCodes
from ranvier.reference.spike_rms_norm import WEIGHTINGS

SCHEMA = (
    "spike_rms_norm(Tensor x, Tensor weight, float eps, str weighting, Tensor? salient_mask, int salient_count, int act_bits,"
    " int steps, str span, str grid, int group_size, float act_clip=1.0)"
    " -> (Tensor y, Tensor codes, Tensor scale, Tensor code_sum, Tensor zero)"
)


def check_norm(op: str, x: Tensor, weight: Tensor, eps: float, weighting: str) -> None:
    """Raises ValueError or TypeError for what is no norm of x."""
    check_tokens(op, x)
    check_float(op, "weight", weight)
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}; it must be [{x.shape[-1]}], one entry per channel of x")
    check_device(op, x.device, weight=weight)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps is {eps!r}; it must be finite and not negative")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{op}: weighting is {weighting!r}; allowed are {', '.join(map(repr, WEIGHTINGS))}")


def check(x: Tensor, weight: Tensor, eps: float, weighting: str, *rest) -> None:
    check_norm("spike_rms_norm", x, weight, eps, weighting)
    check_encoding(x, *rest)


def fake(x: Tensor, weight: Tensor, eps: float, weighting: str, *rest) -> tuple:
    return x.new_empty(x.shape), *fake_encoding(x, *rest)


def cpu(x: Tensor, weight: Tensor, eps: float, weighting: str, mask: Tensor | None, count: int, *rest) -> tuple:
    form, (y, *codes) = format_of(x.shape[-1], count, *rest), fake(x, weight, eps, weighting, mask, count, *rest)
    x, weight, channels = plain(x), plain(weight.to(x.dtype)), x.shape[-1]
    mask = None if mask is None else mask.contiguous()
    _C.spike_rms_norm(
        x.data_ptr(), channels, DTYPES[x.dtype], weight.data_ptr(), channels, eps, WEIGHTINGS.index(weighting), y.data_ptr(),
        form.packed, pointer(mask), x.numel() // channels, *(pointer(t) for t in codes),
    )  # fmt: skip
    return y, *codes


def triton(x: Tensor, weight: Tensor, eps: float, weighting: str, mask: Tensor | None, count: int, *rest) -> tuple:
    form = format_of(x.shape[-1], count, *rest)
    y, codes = x.new_empty(x.shape), _outputs(x, form)
    run(encode_launches(form, x, mask, codes, packed_places(form), Norm(weight.to(x.dtype), eps, weighting, y)))
    return y, *codes


def reference_norm(x: Tensor, weight: Tensor, eps: float, weighting: str, *rest) -> tuple:
    y = reference.rms_norm(x, weight.to(x.dtype), eps, weighting)
    return y, *reference_encode(y, *rest)


op = declare(
    SCHEMA,
    check=check,
    fake=fake,
    cpu=cpu,
    triton=triton,
    reference=reference_norm,
    places=("reference", "csrc", "ops", "nn", "tests", "benchmarks"),
    instead="train with ranvier.nn.SpikingRMSNorm, which takes the plain formula where a gradient is needed",
    kernels_of="spike_encode",
    dtypes=tuple(DTYPES),
)


def spike_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    salient_mask: Tensor | None = None,
    *,
    weighting: str = "after_cast",
    act_bits: int = 4,
    steps: int = 2,
    span: str = "shared",
    grid: str = "consistent",
    group_size: int | None = None,
    act_clip: float | None = None,
    salient_count: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, SpikeCodes]:
    """RMSNorm of tokens x [..., K] (float32, bfloat16, float16) with weight [K], taken in x's type: (y, codes of y).

    weighting: "after_cast" (Llama), "before_cast" (torch.nn.RMSNorm) or "one_plus" (Gemma). The codes are those that
    :func:`ranvier.ops.spike_encode` gives for y with the other arguments, which are its own. The sum of squares has a fixed
    order: y's bits are the same on every instruction-set level, and differ from torch's by the rounding of one sum.
    Raises ValueError and TypeError like spike_encode, and for a weight of another length.
    """
    count = salient_count if salient_count is not None else int(salient_mask.sum()) if salient_mask is not None else 0
    rule = (act_bits, steps, span, grid, group_size or 0, *clipping(act_clip))
    y, *codes = op(x, weight, eps, weighting, salient_mask, count, *rule, backend=backend)
    return y, SpikeCodes(*codes)
