"""spike_encode: activations as int8 spike codes, one scale a token (or two), one code sum a group.

    c = T (clip(round(x / s_l) + z, 0, L - 1) - z)  on ordinary channels,   s_l = T s_h
    c = clip(round(x / s_h) + z, 0, T (L - 1)) - z  on salient channels,    x^ = s_h c

L = 2^act_bits levels a step, T steps: the Generalized Integrate-and-Fire rule of SpikeLLM (arXiv 2407.04752, section 3).
The other grids and spans: :mod:`ranvier.reference.spike_encode`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ranvier import _C
from ranvier.config import GRIDS, SPANS
from ranvier.ops._args import DTYPES, MAX_CHANNELS, check_device, check_tokens, plain, pointer
from ranvier.ops._declare import declare
from ranvier.ops._spike_triton import Places, encode_launches, packed_places
from ranvier.ops._triton import run
from ranvier.reference import spike_encode as reference
from ranvier.reference.spike_encode import SpikeCodes

SCHEMA = (
    "spike_encode(Tensor x, Tensor? salient_mask, int salient_count, int act_bits, int steps, str span, str grid,"
    " int group_size, float act_clip=1.0) -> (Tensor codes, Tensor scale, Tensor code_sum, Tensor zero)"
)


@dataclass(frozen=True)
class SpikeFormat:
    """How tokens of K channels are encoded; what the compiled kernels and the packed weights agree on."""

    channels: int
    salient_count: int
    act_bits: int
    steps: int
    span: str
    grid: str
    group_size: int = 0
    act_clip: float = 1.0
    weight_bits: ClassVar[int] = 4

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Channels of each range: (K,), or (K - K_s, K_s) when salient channels have a scale of their own."""
        two = reference.has_two_ranges(self.salient_count, self.channels, **self.rule)
        return (self.channels - self.salient_count, self.salient_count) if two else (self.channels,)

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Groups of each range."""
        return tuple(-(-length // self.group_size) if self.group_size else 1 for length in self.lengths)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of four channels of each range, the last one filled up."""
        return tuple(-(-length // 4) for length in self.lengths)

    @property
    def rule(self) -> dict:
        """The keyword arguments of the reference."""
        rule = {"act_bits": self.act_bits, "steps": self.steps, "span": self.span, "grid": self.grid}
        return {**rule, "act_clip": self.act_clip}

    @cached_property
    def packed(self) -> bytes:
        """csrc SpikeFormat: int64 fields in its order, the last one the bits of a float32."""
        low = self.channels - self.salient_count
        flags = (int(self.span == "separate"), int(self.grid == "compat"))
        fields = (self.channels, low, len(self.lengths), self.group_size, self.act_bits, self.steps, *flags)
        return struct.pack("8qf4x", *fields, self.act_clip)

    @cached_property
    def _fault(self) -> str | None:
        for name in ("salient_count", "act_bits", "steps", "group_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
                return f"{name} is {value!r}; pass a whole number"
        if not 0 < self.channels <= MAX_CHANNELS:
            return f"K is {self.channels}; allowed are 1 to {MAX_CHANNELS} channels"
        if not 0 <= self.salient_count <= self.channels:
            return f"salient_count is {self.salient_count}; it must be from 0 to K = {self.channels}"
        if not (1 <= self.act_bits <= 8 and 1 <= self.steps <= 127):
            return f"act_bits={self.act_bits}, steps={self.steps}; allowed are 1 to 8 bits and 1 to 127 steps"
        if self.span not in SPANS or self.grid not in GRIDS:
            return f"span={self.span!r}, grid={self.grid!r}; allowed are {SPANS} and {GRIDS}"
        if self.group_size < 0 or self.group_size % 4:
            return f"group_size is {self.group_size}; allowed are 0 (none) and multiples of 4"
        clip = self.act_clip
        if isinstance(clip, bool) or not isinstance(clip, (int, float, torch.SymFloat)) or not 2.0**-126 <= clip <= 1:
            return f"act_clip is {clip!r}; it must be a share above 0 and up to 1"
        if self.grid == "compat" and self.act_bits == 8:
            return "grid='compat' keeps raw codes in int8; act_bits=8 does not fit, use 7 or less"
        top = self.steps * (2**self.act_bits - 1) if self.grid == "consistent" else (self.steps << self.act_bits) - 1
        if self.span == "shared" and self.act_bits < 8 and top > 127:
            return f"codes reach {top} with act_bits={self.act_bits}, steps={self.steps}; int8 ends at 127"
        return None

    def check(self, op: str) -> None:
        """Raises ValueError for a format no kernel can run."""
        if self._fault is not None:
            raise ValueError(f"{op}: {self._fault}")


_known_format = lru_cache(maxsize=4096, typed=True)(SpikeFormat)


def format_of(channels: int, salient_count: int, *rule) -> SpikeFormat:
    """The format of these values, remembered with all that follows from it; not where K is a compiler's symbol."""
    return (
        _known_format(channels, salient_count, *rule) if type(channels) is int else SpikeFormat(channels, salient_count, *rule)
    )


def clipping(act_clip: float | None) -> tuple:
    """The schema's last argument, left out where it is the default: a float that a compiler sees costs it a second graph."""
    return () if act_clip is None or (type(act_clip) is float and act_clip == 1) else (act_clip,)


def check(x: Tensor, salient_mask: Tensor | None, salient_count: int, *rest) -> None:
    check_tokens("spike_encode", x)
    format_of(x.shape[-1], salient_count, *rest).check("spike_encode")
    check_device("spike_encode", x.device, salient_mask=salient_mask)
    if salient_mask is None:
        if salient_count:
            raise ValueError(f"spike_encode: salient_count is {salient_count} but there is no salient_mask")
    elif salient_mask.dtype != torch.bool or tuple(salient_mask.shape) != (x.shape[-1],):
        got = f"{salient_mask.dtype} {list(salient_mask.shape)}"
        raise ValueError(f"spike_encode: salient_mask is {got}; it must be bool [{x.shape[-1]}], one entry per channel of x")


def _outputs(x: Tensor, form: SpikeFormat) -> SpikeCodes:
    lead = x.shape[:-1]
    return SpikeCodes(
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*lead, len(form.lengths)), dtype=torch.float32),
        x.new_empty((*lead, sum(form.groups)), dtype=torch.int32),
        x.new_empty((*lead, len(form.lengths)), dtype=torch.int32),
    )


def outputs_at(x: Tensor, form: SpikeFormat, places: Places) -> SpikeCodes:
    """Empty outputs for the tokens of x as rows, their codes at these places."""
    tokens, ranges = x.numel() // form.channels, len(form.lengths)
    return SpikeCodes(
        x.new_empty((tokens, places.stride), dtype=torch.int8),
        x.new_empty((tokens, ranges), dtype=torch.float32),
        x.new_empty((tokens, sum(form.groups)), dtype=torch.int32),
        x.new_empty((tokens, ranges), dtype=torch.int32),
    )


def fake(x: Tensor, salient_mask: Tensor | None, salient_count: int, *rest) -> SpikeCodes:
    return _outputs(x, format_of(x.shape[-1], salient_count, *rest))


def cpu(x: Tensor, salient_mask: Tensor | None, salient_count: int, *rest) -> SpikeCodes:
    form = format_of(x.shape[-1], salient_count, *rest)
    out, x = _outputs(x, form), plain(x)
    mask = salient_mask.contiguous() if salient_mask is not None else None
    _C.spike_encode(
        form.packed, pointer(mask), x.data_ptr(), x.shape[-1], DTYPES[x.dtype],
        x.numel() // x.shape[-1], *(pointer(t) for t in out),
    )  # fmt: skip
    return out


def triton(x: Tensor, salient_mask: Tensor | None, salient_count: int, *rest) -> SpikeCodes:
    form = format_of(x.shape[-1], salient_count, *rest)
    out = _outputs(x, form)
    run(encode_launches(form, x, salient_mask, out, packed_places(form)))
    return out


def reference_encode(x: Tensor, salient_mask: Tensor | None, salient_count: int, *rest) -> SpikeCodes:
    form = format_of(x.shape[-1], salient_count, *rest)
    mask = salient_mask if salient_mask is not None else torch.zeros(form.channels, dtype=torch.bool, device=x.device)
    return reference.spike_encode(x, mask, **form.rule, group_size=form.group_size or None)


op = declare(
    SCHEMA,
    check=check,
    fake=fake,
    cpu=cpu,
    triton=triton,
    reference=reference_encode,
    places=("reference", "csrc", "kernels", "ops", "tests", "benchmarks"),
    dtypes=tuple(DTYPES),
)


def spike_encode(
    x: Tensor,
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
) -> SpikeCodes:
    """Encode tokens as spike counts.

    x: float32, bfloat16 or float16 [..., K]. salient_mask: bool [K], True where a channel takes ``steps`` time steps.
    Returns :class:`SpikeCodes`: codes int8 [..., K], scale float32 [..., R], code_sum int32 [..., G], zero int32 [..., R].
    With R = 2 (span "separate", or grid "compat" with steps > 1) codes hold the ordinary channels first, then the salient
    ones. A token with NaN or Inf gets scale NaN, so that everything made from it is NaN, and touches no other token.

    act_clip: the share of a token's range that its codes span, None for all of it; values beyond it saturate.
    salient_count: ``salient_mask.sum()`` where the caller knows it. backend: a name is a contract, None takes the device's.
    Raises ValueError for shapes and options out of range, TypeError for dtypes, BackendError for a backend that cannot run.
    Source: SpikeLLM, arXiv 2407.04752, sections 3.1-3.2.
    """
    if salient_count is None:
        salient_count = int(salient_mask.sum()) if salient_mask is not None else 0
    rule = (act_bits, steps, span, grid, group_size or 0, *clipping(act_clip))
    return SpikeCodes(*op(x, salient_mask, salient_count, *rule, backend=backend))
