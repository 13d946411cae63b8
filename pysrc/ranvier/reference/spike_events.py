"""spike_events: a code as the spikes that a network would fire, and what they cost.

A code v (signed; |v| is what the membrane holds) becomes digits d_p, one a time step or bit plane, v = sum_p w_p d_p:

    unary, ternary   d_p = sign(v) min(mem_p, 1),        mem_{p+1} = mem_p - |d_p|,         w_p = 1
    gif              d_p = sign(v) min(mem_p, L - 1),    mem_{p+1} = mem_p - |d_p|,         w_p = 1
    bitplane         d_p = sign(v) bit p of |v|                                             w_p = 2^p
    naf              d_p in {-1, 0, 1}, no two adjacent ones non-zero                       w_p = 2^p

A digit that is not zero is a spike (an event); it adds one weight column, scaled by the channel's threshold, to the
outputs. unary and gif fire the unsigned code u and take the zero point off afterwards, once a token:

    sum_k t_k (u_k - z_k) w_k = sum_k t_k u_k w_k - z_l sum_{k not in S} t_k w_k - z_h sum_{k in S} t_k w_k

ternary, bitplane and naf fire the centred code u - z. t_k is T on the ordinary channels of the consistent grid, whose
step is T times the salient one, else 1: c_k = t_k (u_k - z_k). L - 1 is the top level of a step, so gif takes
ceil(|v| / (L - 1)) steps: T for the consistent grid's top code T (L - 1), more for `compat`, whose top code T L - 1 the
released code, which stops after T steps, cannot fire. SpikeLLM, arXiv 2407.04752, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ranvier.reference.spike_encode import SYMMETRIC_MAX
from ranvier.reference.spike_linear import WEIGHT_TOP

ENCODINGS = {"unary": "u", "gif": "u", "ternary": "c", "bitplane": "c", "naf": "c"}  # and the code that each one fires
WEIGHT_BITS = WEIGHT_TOP.bit_length()
FLOAT16_ACE = 16 * 16


def step_level(encoding: str, act_bits: int) -> int:
    """The most that one spike carries: L - 1 for gif (127 at 8 bits, which are symmetric), else 1."""
    return min(2**act_bits - 1, SYMMETRIC_MAX) if encoding == "gif" else 1


def planes(top: int, encoding: str, level: int) -> int:
    """Time steps, or bit planes, that hold every code up to |v| = top."""
    if encoding in ("bitplane", "naf"):
        return (3 * top).bit_length() - 1 if encoding == "naf" and top else top.bit_length()
    return -(-top // level)


def place_values(count: int, encoding: str, device: torch.device | None = None) -> Tensor:
    """w_p: int64 [P]."""
    exponents = torch.arange(count, device=device)
    return 2**exponents if encoding in ("bitplane", "naf") else torch.ones_like(exponents)


def expand(codes: Tensor, encoding: str, level: int, count: int | None = None) -> Tensor:
    """The digits d_p of every code, int64 [P, ...]; P is ``count``, or what the codes need.

    Raises ValueError when count planes leave something on a membrane.
    """
    sign, membrane = codes.to(torch.int64).sign(), codes.to(torch.int64).abs()
    top = int(membrane.max()) if membrane.numel() else 0
    needed = planes(top, encoding, level)
    count = needed if count is None else count
    if count < needed:
        raise ValueError(f"expand: codes reach {top}, which takes {needed} planes of {encoding!r}; {count} were given")
    digits = codes.new_empty((count, *codes.shape), dtype=torch.int64)
    for digit in digits:
        if encoding == "bitplane":
            spike, membrane = membrane & 1, membrane >> 1
        elif encoding == "naf":
            spike = (membrane & 1) * (2 - (membrane & 3))
            membrane = (membrane - spike) >> 1
        else:
            spike = membrane.clamp(max=level)
            membrane = membrane - spike
        torch.mul(spike, sign, out=digit)
    return digits


def _ones(values: Tensor) -> Tensor:
    """The one bits of every value, below 2^62."""
    count, rest = torch.zeros_like(values), values
    for _ in range(int(values.max()).bit_length() if values.numel() else 0):
        count, rest = count + (rest & 1), rest >> 1
    return count


def spikes(codes: Tensor, encoding: str, level: int) -> Tensor:
    """How many digits of every code are not zero, int64 [...], without expanding it."""
    magnitude = codes.to(torch.int64).abs()
    if encoding == "bitplane":
        return _ones(magnitude)
    if encoding == "naf":
        return _ones(magnitude ^ (3 * magnitude))
    return (magnitude + level - 1).div(level, rounding_mode="floor")


def thresholds(salient: Tensor, *, act_bits: int, steps: int, span: str, grid: str, act_clip: float = 1.0) -> Tensor:
    """t_k: int64 [K]."""
    ordinary = steps if grid == "consistent" and span == "shared" and act_bits < 8 else 1
    return torch.where(salient, 1, ordinary)


def top_code(salient_count: int, *, act_bits: int, steps: int, span: str, grid: str, act_clip: float = 1.0) -> int:
    """The largest |u| that the layer's codes can have."""
    if act_bits == 8 or (span == "separate" and salient_count):
        return SYMMETRIC_MAX
    fine = (steps << act_bits) - 1 if grid == "compat" else steps * (2**act_bits - 1)
    return fine if salient_count and span == "shared" else 2**act_bits - 1


def bits_per_channel(salient: Tensor, *, act_bits: int, steps: int, span: str, grid: str, act_clip: float = 1.0) -> Tensor:
    """The activation bits that the papers' ACE counts, int64 [K]: n a time step, 8 in a salient range of its own."""
    fine = 8 if span == "separate" else act_bits * steps
    return torch.where(salient, fine, act_bits)


def zero_points(u: Tensor, centred: Tensor, salient: Tensor) -> Tensor:
    """z_l and z_h of every token, int64 [M, 2] (0 where there is no such channel), from u and u - z [M, K]."""
    z = torch.zeros((u.shape[0], 2), dtype=torch.int64, device=u.device)
    for column, channels in enumerate((~salient, salient)):
        if bool(channels.any()):
            first = int(channels.nonzero()[0])
            z[:, column] = u[:, first] - centred[:, first]
    return z


def correction(zero: Tensor, columns: Tensor, groups: Tensor, group_count: int, salient: Tensor) -> Tensor:
    """z_l sum_{k not in S} t_k w_k + z_h sum_{k in S} t_k w_k over every group: int64 [M, G, N].

    zero int64 [M, 2], columns t_k w_k [K, N], groups int64 [K], salient bool [K].
    """
    total = zero.new_zeros((zero.shape[0], group_count, columns.shape[1]))
    for z, channels in zip(zero.unbind(1), (~salient, salient), strict=True):
        sums = total.new_zeros(total.shape[1:])
        sums.index_add_(0, groups[channels], columns[channels].to(torch.int64))
        total += z[:, None, None] * sums
    return total


def spike_events(
    codes: Tensor, columns: Tensor, groups: Tensor, group_count: int, encoding: str, level: int
) -> tuple[Tensor, Tensor]:
    """Plane by plane, then summed: codes [M, K], columns t_k w_k [K, N], groups [K] -> int64 [M, G, N], spikes [M].

    By float64 products, exact below 2^53.
    """
    digits = expand(codes, encoding, level)
    output = columns.new_zeros((codes.shape[0], group_count, columns.shape[1]), dtype=torch.float64)
    wide = columns.to(torch.float64)
    for digit, place in zip(digits, place_values(len(digits), encoding, codes.device), strict=True):
        for g in range(group_count):
            output[:, g] += (place * digit[:, groups == g]).to(torch.float64) @ wide[groups == g]
    return output.to(torch.int64), (digits != 0).sum((0, 2))
