"""spike_events: what a spiking linear layer costs as a spiking network, run spike by spike.

    out[m, n, g] = sum over the spikes (k in g, step p) of token m:  w_p d_p t_k (q[n, k] - z_w[n, g])   (- zero points)
                 = sum_{k in g} c[m, k] (q[n, k] - z_w[n, g])

The second line is the merged product; the first walks the events and adds one weight column for each. Both are
integers and equal. Encodings, thresholds t_k, zero points: :mod:`ranvier.reference.spike_events`. The executor runs on
the host, on one thread; numba compiles it at its first call. SpikeLLM, arXiv 2407.04752, sections 3.1-3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ranvier.ops._args import check_channels, check_device, check_float, check_tensor
from ranvier.ops._declare import declare
from ranvier.ops.spike_encode import SpikeFormat
from ranvier.ops.spike_linear import PackedWeight, _by_output, unpack_codes
from ranvier.ops.ternary_linear import unpack_ordered
from ranvier.reference import spike_events as reference
from ranvier.reference.spike_encode import channel_order, spike_levels
from ranvier.reference.spike_events import ENCODINGS
from ranvier.reference.spike_linear import group_index

SCHEMA = (
    "spike_events(Tensor codes, Tensor columns, Tensor groups, int group_count, str encoding, int level)"
    " -> (Tensor output, Tensor spikes)"
)
STEPS, BITS, NAF = 0, 1, 2  # how a membrane gives up its charge
RULES = {"unary": STEPS, "gif": STEPS, "ternary": STEPS, "bitplane": BITS, "naf": NAF}


def walk(
    codes: np.ndarray,
    columns: np.ndarray,
    groups: np.ndarray,
    rule: int,
    level: int,
    output: np.ndarray,
    spikes: np.ndarray,
) -> None:
    """Every token's neurons, step by step: a spike adds its channel's column to the accumulators of its group.

    Only channels with charge left are visited; unit spikes add or subtract, no multiplication. numba compiles this.
    """
    channels, outputs = columns.shape
    active, membrane = np.empty(channels, np.int64), np.empty(channels, np.int64)
    for m in range(codes.shape[0]):
        alive = 0
        for k in range(channels):
            if codes[m, k] != 0:
                active[alive], membrane[alive] = k, abs(np.int64(codes[m, k]))
                alive += 1
        step = 0
        while alive > 0:
            kept = 0
            for i in range(alive):
                k, charge = active[i], membrane[i]
                if rule == STEPS:
                    digit = min(charge, level)
                    amplitude, charge = digit, charge - digit
                else:
                    digit = charge & 1 if rule == BITS else (charge & 1) * (2 - (charge & 3))
                    amplitude, charge = digit << step, (charge - digit) >> 1
                if digit != 0:
                    spikes[m] += 1
                    if codes[m, k] < 0:
                        amplitude = -amplitude
                    sums, column = output[m, groups[k]], columns[k]
                    if amplitude == 1:
                        for n in range(outputs):
                            sums[n] += column[n]
                    elif amplitude == -1:
                        for n in range(outputs):
                            sums[n] -= column[n]
                    else:
                        for n in range(outputs):
                            sums[n] += amplitude * column[n]
                if charge != 0:
                    active[kept], membrane[kept] = k, charge
                    kept += 1
            alive, step = kept, step + 1


@functools.cache
def _compiled() -> Callable:
    from numba import njit  # half a second: only who runs spikes pays it

    signature = "void(int32[:,::1], int16[:,::1], int64[::1], int64, int64, int64[:,:,::1], int64[::1])"
    return njit(signature, nogil=True)(walk)


def _check_encoding(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ValueError(f"spike_events: encoding is {encoding!r}; allowed are {', '.join(map(repr, ENCODINGS))}")


def check(codes: Tensor, columns: Tensor, groups: Tensor, group_count: int, encoding: str, level: int) -> None:
    _check_encoding(encoding)
    if codes.ndim != 2 or columns.ndim != 2:
        got = f"codes {list(codes.shape)}, columns {list(columns.shape)}"
        raise ValueError(f"spike_events: {got}; pass codes [M, K] and columns [K, N]")
    channels = codes.shape[1]
    check_device("spike_events", codes.device, columns=columns, groups=groups)
    check_tensor("spike_events", "codes", codes, torch.int32, tuple(codes.shape))
    check_tensor("spike_events", "columns", columns, torch.int16, (channels, columns.shape[1]))
    check_tensor("spike_events", "groups", groups, torch.int64, (channels,))
    if level < 1 or group_count < 1:
        raise ValueError(f"spike_events: level={level}, group_count={group_count}; both must be at least 1")
    if level != 1 and encoding != "gif":
        raise ValueError(f"spike_events: level is {level} with encoding {encoding!r}; only 'gif' has graded spikes, pass 1")


def fake(codes: Tensor, columns: Tensor, groups: Tensor, group_count: int, *_) -> tuple[Tensor, Tensor]:
    shape = (codes.shape[0], group_count, columns.shape[1])
    return codes.new_empty(shape, dtype=torch.int64), codes.new_empty(shape[0], dtype=torch.int64)


def cpu(codes: Tensor, columns: Tensor, groups: Tensor, group_count: int, encoding: str, level: int) -> tuple[Tensor, Tensor]:
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < group_count:
        raise ValueError(f"spike_events: groups has entries outside 0 to {group_count - 1} (group_count={group_count})")
    output, spikes = (t.zero_() for t in fake(codes, columns, groups, group_count))
    given = (t.contiguous().numpy() for t in (codes, columns, groups))
    _compiled()(*given, RULES[encoding], level, output.numpy(), spikes.numpy())
    return output, spikes


op = declare(
    SCHEMA,
    check=check,
    fake=fake,
    cpu=cpu,
    reference=reference.spike_events,
    places=("reference", "ops", "tests", "benchmarks"),
    dtypes=(torch.int32,),
)


class SpikingLayer(Protocol):
    """What is read of a layer; :class:`ranvier.nn.SpikingLinear` has it."""

    format: SpikeFormat
    out_features: int
    salient_mask: Tensor
    packed_weight: PackedWeight


@dataclass(frozen=True)
class SpikeCounts:
    """What one of the two codes fires, a value a token, int64 [...]: spikes, and silent: channels whose code is 0."""

    spikes: Tensor
    silent: Tensor
    in_features: int
    out_features: int

    @property
    def accumulates(self) -> Tensor:
        """Additions into an accumulator: every spike adds one column of N weights."""
        return self.spikes * self.out_features

    @property
    def zero_fraction(self) -> float:
        """Share of zero codes over all tokens, 0 for no token."""
        return float(self.silent.sum()) / max(1, self.silent.numel() * self.in_features)


@dataclass(frozen=True)
class SpikeEvents:
    """What a layer costs on given tokens; u counts the unsigned code's spikes, c the centred one's, as ``encoding``.

    macs: multiply-accumulates a token of the merged product. ace: the papers' arithmetic computation effort a token:
    bits of the weight x bits of the activation, each of all time steps, per multiply-accumulate; 256 in float16. output:
    int64 [..., N, G], the sums over each group of weights that share a scale; None where spikes were only counted.
    """

    encoding: str
    u: SpikeCounts
    c: SpikeCounts
    macs: int
    ace: int
    act_bits: int
    output: Tensor | None
    weight_bits: int = reference.WEIGHT_BITS

    @property
    def mac_equivalents(self) -> float:
        """Multiply-accumulates a token if one time step's operands count as one: macs * (1 + share of extra steps)."""
        return self.ace / (self.weight_bits * self.act_bits)

    def per_token(self) -> dict[str, float]:
        """Means over the tokens, as plain numbers that add up over layers. Zero fraction: silent / codes."""
        totals: dict[str, float] = {"codes": self.u.in_features, "macs": self.macs, "ace": self.ace}
        for name, counts in (("u", self.u), ("c", self.c)):
            for field in ("spikes", "silent", "accumulates"):
                values = getattr(counts, field)
                totals[f"{field}_{name}"] = float(values.sum()) / max(1, values.numel())
        return totals


def _check_call(layer: SpikingLayer, x: Tensor, encoding: str) -> None:
    if not all(hasattr(layer, name) for name in SpikingLayer.__annotations__):
        raise TypeError(f"spike_events: layer is {type(layer).__name__}; pass a ranvier.nn.SpikingLinear")
    if getattr(getattr(layer, "config", None), "act_bits", 0) is None:
        raise ValueError("spike_events: this layer is weight-only (act_bits=None); its activations are no spikes")
    _check_encoding(encoding)
    check_float("spike_events", "x", x)
    check_channels("spike_events", x, layer.format.channels)


def _own_codes(layer: SpikingLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """u and u - z, int32 [M, K] in x's order. A token with NaN or Inf fires nothing."""
    form, salient = layer.format, layer.salient_mask.to(x.device)
    x = x.detach().reshape(-1, form.channels)
    finite = x.isfinite().all(-1, keepdim=True)
    u, c = spike_levels(torch.where(finite, x, 0.0), salient, **form.rule)
    return u, (c // reference.thresholds(salient, **form.rule)).to(torch.int32)


def weight_columns(layer: SpikingLayer) -> tuple[Tensor, Tensor, int]:
    """What the executor reads: t_k (q - z_w) int16 [K, N] in the codes' order, groups int64 [K], their count."""
    form, weight, out = layer.format, layer.packed_weight, layer.out_features
    groups, ranges = group_index(form.lengths, form.group_size or None, weight.packed.device)
    unpack = unpack_ordered if form.weight_bits == 2 else lambda packed, form, out: unpack_codes(packed, form.lengths, out)
    signed = unpack(weight.packed, form, out).to(torch.int16) - _by_output(weight.zero, out)[:, groups]
    t = _in_order(layer, reference.thresholds(layer.salient_mask, **form.rule))
    return (signed.T * t[:, None].to(torch.int16)).contiguous().cpu(), groups.cpu(), len(ranges)


def _weight_bits(layer: SpikingLayer) -> Tensor:
    """Bits of a channel's weights, those of all their time steps where it is the weights that spike: int64 [K]."""
    bits, mask = layer.format.weight_bits, layer.salient_mask
    steps = layer.config.steps if bits == 2 else 1
    return torch.where(mask, bits * steps, bits)


def _in_order(layer: SpikingLayer, values: Tensor) -> Tensor:
    """Values of every channel [K, ...] from x's order to the codes'."""
    return values[channel_order(layer.salient_mask).to(values.device)] if len(layer.format.lengths) == 2 else values


def _run(layer: SpikingLayer, u: Tensor, centred: Tensor, encoding: str, level: int) -> Tensor:
    """The executor over a layer's codes, zero points taken off: int64 [M, N, G]."""
    u, centred = (_in_order(layer, code.T).T.cpu() for code in (u, centred))
    columns, groups, count = weight_columns(layer)
    unsigned = ENCODINGS[encoding] == "u"
    output, _ = op(u if unsigned else centred, columns, groups, count, encoding, level)
    if unsigned:
        salient = _in_order(layer, layer.salient_mask).cpu()
        zero = reference.zero_points(u, centred, salient)
        output -= reference.correction(zero, columns, groups, count, salient)
    return output.transpose(1, 2)


def spike_events(layer: SpikingLayer, x: Tensor, encoding: str = "gif", *, execute: bool = True) -> SpikeEvents:
    """Run, or only count, a spiking linear layer spike by spike.

    layer: a :class:`ranvier.nn.SpikingLinear`. x: float32, bfloat16 or float16 [..., K]. encoding (the code it fires):

    - ``"unary"`` (u): one binary spike a unit
    - ``"gif"`` (u): one graded spike of up to ``2**act_bits - 1`` levels a time step
    - ``"ternary"`` (c): one signed unit spike a unit
    - ``"bitplane"`` (c): one signed spike a bit of the magnitude
    - ``"naf"`` (c): signed digits, no two adjacent ones non-zero

    Both codes are counted under every encoding, in units of their channel's own threshold: an ordinary channel of the
    consistent grid fires u or c / T. Symmetric ranges (8 bits) have no unsigned code: there u = c, and spikes carry a
    sign. With ``execute=False`` spikes are counted in closed form and ``output`` is None. A token with NaN or Inf fires
    nothing. Taking the zero points off, at most two columns a token, is not counted.

    ``output`` [..., N, G] equals the merged product exactly: sum_k c (q - z_w) over each group of weights. Raises
    ValueError for shapes and encodings, TypeError for dtypes and other layers. Source: SpikeLLM, arXiv 2407.04752,
    sections 3.1-3.2.
    """
    _check_call(layer, x, encoding)
    form, lead = layer.format, x.shape[:-1]
    u, centred = _own_codes(layer, x)
    level = reference.step_level(encoding, form.act_bits)
    counted = [
        SpikeCounts(
            reference.spikes(code, encoding, level).sum(-1).view(lead), (code == 0).sum(-1).view(lead),
            form.channels, layer.out_features,
        )
        for code in (u, centred)
    ]  # fmt: skip
    output = None
    if execute:
        output = _run(layer, u, centred, encoding, level)
        output = output.reshape(*lead, *output.shape[1:]).to(x.device)
    ace = int((_weight_bits(layer) * reference.bits_per_channel(layer.salient_mask, **form.rule)).sum()) * layer.out_features
    macs = form.channels * layer.out_features
    return SpikeEvents(encoding, *counted, macs, ace, form.act_bits, output, form.weight_bits)


def spike_raster(layer: SpikingLayer, x: Tensor, encoding: str = "gif") -> Tensor:
    """When each input channel fires: int32 [..., P, K], levels of each time step (digits of each bit plane), signed.

    x [..., K] as in :func:`spike_events`; channels in x's order. P: the steps that the layer's codes can need (T with
    ``"gif"`` on the consistent grid). For tokens x [M, K], ``spike_raster(layer, x).flatten(0, 1).T`` is [K, time].
    """
    _check_call(layer, x, encoding)
    form = layer.format
    u, centred = _own_codes(layer, x)
    code, level = u if ENCODINGS[encoding] == "u" else centred, reference.step_level(encoding, form.act_bits)
    reached = int(code.abs().max()) if code.numel() else 0
    count = reference.planes(max(reached, reference.top_code(form.salient_count, **form.rule)), encoding, level)
    digits = reference.expand(code, encoding, level, count).movedim(0, 1).to(torch.int32)
    return digits.reshape(*x.shape[:-1], count, form.channels)
