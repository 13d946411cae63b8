"""What an adapter offers to the benchmark."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Bound:
    """A peer's layer with its input in place.

    call(i) multiplies by the i-th copy of the weight; output() is the result of call(0), [M, N]; x the input [M, K] as
    the peer stores it, float64; bytes: input and output.
    """

    call: Callable[[int], object]
    output: Callable[[], Tensor]
    x: Tensor
    bytes: float


@dataclass
class Layers:
    """One weight in a peer's format, several copies of it.

    bytes: what one call reads of it. weight(outputs): the rows [.., K] that the stored numbers stand for, float64.
    tolerance: the error allowed in a result, as a share of |x| |W|^T. bind(x) takes float32 [M, K].
    """

    bytes: float
    copies: int
    weight: Callable[[Tensor], Tensor]
    tolerance: float
    bind: Callable[[Tensor], Bound]


@dataclass
class Peer:
    """name and dtype (of the activations) as they appear in the rows.

    load(weight, copies_for) packs a float32 weight [N, K]; copies_for(bytes) says how many times. install: the command
    that brings the module it needs. K must be a multiple of multiple. sizes(M): whether it is measured at this M.
    """

    name: str
    dtype: str
    load: Callable[[Tensor, Callable[[float], int]], Layers]
    module: str = "torch"
    install: str = "pip install torch"
    multiple: int = 1
    sizes: Callable[[int], bool] = lambda m: True

    def missing(self) -> str | None:
        """What to do to have it, None when it is there."""
        if importlib.util.find_spec(self.module) is not None:
            return None
        return f"not installed: {self.install}"


def call_bytes(x: Tensor, outputs: int, output_size: int) -> float:
    """Bytes of the input and of the output [M, N]."""
    return x.numel() * x.element_size() + x.shape[0] * outputs * output_size


# An 8-bit rounding of the input is off by half a step of max|x| / 127 at most, 0.9 % rms of a normal x, in every term;
# the errors of K terms add up as sqrt(K), so that from K = 512 on a sum is off by 5 standard deviations at 0.3 %.
INT8_INPUT = 0.003
# The output is rounded to 8 bits, by 2^-8 of it at most; a 4-bit weight's table is exact, sums are kept in float32.
BFLOAT16 = 1.01 * 2.0**-8
FLOAT32 = 2e-6


def float_layers(weight: Tensor, copies: int, dtype: torch.dtype, tolerance: float) -> Layers:
    """``torch.nn.Linear`` without bias in dtype."""
    first = weight.to(dtype)
    weights = [first, *(first.clone() for _ in range(copies - 1))]

    def bind(x: Tensor) -> Bound:
        given = x.to(dtype)
        linear = torch.nn.functional.linear
        moved = call_bytes(given, len(weight), first.element_size())
        return Bound(lambda i: linear(given, weights[i]), lambda: linear(given, first), given.double(), moved)

    return Layers(first.numel() * first.element_size(), copies, lambda n: first[n].double(), tolerance, bind)
