"""hadamard: matrices from the constructions, values against the dense float64 product, equal bits on every level."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spiking import DTYPES, LEVELS, generator, layouts, same

from ranvier import _C
from ranvier.ops import hadamard
from ranvier.ops._args import MAX_CHANNELS
from ranvier.reference.hadamard import (
    LARGEST_CORE,
    core_matrix,
    hadamard_core,
    hadamard_matrix,
    hadamard_order,
    walsh,
)
from ranvier.reference.hadamard import hadamard as reference

pytestmark = pytest.mark.usefixtures("poisoned")
CORES = [m for m in range(4, LARGEST_CORE + 1, 4) if hadamard_core(m) == m]
# Widths of published models (SmolLM2, Llama, Qwen2, Gemma, Mistral, TinyLlama) and their cores.
WIDTHS = {
    576: 36, 1536: 12, 896: 28, 4864: 76, 3584: 28, 18944: 148, 1152: 36, 6912: 108, 8960: 140, 4096: 1, 11008: 172,
    5120: 20, 13824: 108, 14336: 28, 28672: 28, 5632: 44, 6656: 104, 17920: 140, 8192: 1, 22016: 172, 9728: 76,
}  # fmt: skip
# Half the spacing of the output type, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 128, 172, 192, 256, 512, 576, 1024, 1536, 2304, 4096)


@pytest.mark.parametrize("m", [1, 2, *CORES])
def test_cores_are_hadamard_matrices(m: int) -> None:
    """C C^T = m I in integers, entries +-1: Paley's and Williamson's constructions."""
    c = core_matrix(m)
    assert torch.equal(c @ c.T, m * torch.eye(m, dtype=torch.int64)) and bool((c.abs() == 1).all())


def test_the_constructions_cover_these_cores() -> None:
    """The widths of published models have an order of their own, none is block-diagonal."""
    assert {12, 20, 28, 36, 44, 60, 76, 84, 104, 108, 140, 148, 172} <= set(CORES)
    assert {n: hadamard_core(n) for n in WIDTHS} == WIDTHS
    assert all(hadamard_order(n) == n for n in WIDTHS)


@pytest.mark.parametrize(("channels", "order"), [(1, 1), (3, 1), (6, 2), (100, 20), (29568, 4224), (7 * 64, 448), (92, 4)])
def test_largest_order_of_other_widths(channels: int, order: int) -> None:
    """A width without a matrix is turned in blocks of its largest divisor that has one."""
    assert hadamard_order(channels) == order and hadamard_core(order) is not None
    assert not [d for d in range(order + 1, channels + 1) if channels % d == 0 and hadamard_core(d)]


@pytest.mark.parametrize("order", [1, 2, 4, 12, 48, 56, 64, 72, 172])
def test_reference_is_the_dense_product(order: int) -> None:
    """x (I (x) H) / sqrt(n) in float64, both directions, and H H^T = n I for the whole order."""
    h = hadamard_matrix(order)
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    x = torch.randn(3, 2 * order, generator=generator(), dtype=torch.float64)
    for transpose in (False, True):
        dense = torch.block_diag(h, h) / math.sqrt(order)
        expected = x @ (dense.T if transpose else dense)
        assert (reference(x, order, transpose) - expected).abs().max() < 1e-12
    assert (reference(reference(x, order), order, True) - x).abs().max() < 1e-12


def test_walsh_is_sylvesters_matrix() -> None:
    """The butterflies are the product with S_p, whose entry is the parity of the common bits."""
    p = 32
    s = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(p)] for i in range(p)])
    assert torch.equal(walsh(torch.eye(p)), s) and torch.equal(hadamard_matrix(p, torch.float32), s)


def bound(x: torch.Tensor, order: int, dtype: torch.dtype) -> torch.Tensor:
    """Every addition rounds relative to a partial sum, which is at most |x|_1 of its block; there are log2 p + m of them on
    the way to an output, and one product with a rounded scale; then the output is rounded once."""
    core = hadamard_core(order)
    steps = math.log2(order // core) + core + 2
    size = x.double().abs().unflatten(-1, (-1, order)).sum(-1, keepdim=True) / math.sqrt(order)
    return (steps * 2.0**-24 * size).expand(*x.shape[:-1], -1, order).flatten(-2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_values_and_levels(order: int, dtype: torch.dtype) -> None:
    """Within the rounding of float32 sums of the float64 transform, and equal bits on every level."""
    x = torch.randn(5, 2 * order, generator=generator(order)).to(dtype)
    before, level = x.clone(), _C.isa()
    for transpose in (False, True):
        results = []
        try:
            for name in LEVELS:
                _C.set_isa(name)
                results.append(hadamard(x, order, transpose=transpose))
        finally:
            _C.set_isa(level)
        assert all(same(y, results[0]) for y in results) and results[0].dtype == dtype
        truth = reference(x.double(), order, transpose)
        error = (results[0].double() - truth).abs()
        assert (error <= bound(x, order, dtype) + ROUNDING[dtype] * truth.abs() + 2.0**-24).all()
    assert same(x, before)


@given(
    order=st.sampled_from(ORDERS[:18]), blocks=st.integers(1, 3), rows=st.integers(0, 40), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES), transpose=st.booleans(),
)  # fmt: skip
def test_any_shape(isa: str, order: int, blocks: int, rows: int, seed: int, dtype: torch.dtype, transpose: bool) -> None:
    """Blocks and rows are independent: each row and block alone gives the same bits as all together."""
    x = torch.randn(rows, blocks * order, generator=generator(seed)).to(dtype)
    y = hadamard(x, order, transpose=transpose)
    assert y.shape == x.shape
    for row in range(min(rows, 3)):
        for block in range(blocks):
            piece = slice(block * order, (block + 1) * order)
            assert same(hadamard(x[row, piece].clone(), order, transpose=transpose), y[row, piece])


def test_layouts(isa: str) -> None:
    """Strided, offset, expanded, negated and misaligned inputs give the bits of a contiguous copy."""
    x = torch.randn(6, 48, generator=generator())
    for name, view in layouts(x):
        assert same(hadamard(view), hadamard(view.clone(memory_format=torch.contiguous_format))), name
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg() and same(hadamard(negated), hadamard(-x))


@pytest.mark.parametrize("order", [16, 64, 576, 1536, 4096])
def test_there_and_back(isa: str, order: int) -> None:
    """The transposed transform undoes it, and norms stay."""
    x = torch.randn(4, order, generator=generator())
    y = hadamard(x)
    assert torch.allclose(hadamard(y, transpose=True), x, atol=1e-5)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_a_spike_is_spread(isa: str) -> None:
    """One channel becomes a row of H: every channel carries 1 / sqrt(n) of it, exactly where sqrt(n) is a power of two."""
    x = torch.zeros(1, 64)
    x[0, 5] = 8.0
    assert torch.equal(hadamard(x).abs(), torch.ones(1, 64))
    assert torch.equal(hadamard(x)[0], hadamard_matrix(64, torch.float32)[5])


def test_not_finite_stays_in_its_block(isa: str) -> None:
    """NaN makes its own block NaN and no other."""
    x = torch.ones(3, 128)
    x[1, 70] = float("nan")
    y = hadamard(x, 64)
    assert y[1, 64:].isnan().all() and y.isnan().sum() == 64


def test_threads_give_the_same_bits(threads: None) -> None:
    x = torch.randn(100, 1536, generator=generator())
    torch.set_num_threads(1)
    one = hadamard(x)
    torch.set_num_threads(2)
    assert same(hadamard(x), one)


@pytest.mark.parametrize("transpose", [False, True])
def test_gradient_is_the_other_direction(transpose: bool) -> None:
    """dx = dy H^T; the reference passes gradcheck; a second derivative exists. H_24 is not symmetric."""
    assert not torch.equal(hadamard_matrix(24), hadamard_matrix(24).T)
    x = torch.randn(3, 72, generator=generator(), requires_grad=True)
    dy = torch.randn(3, 72, generator=generator(1), requires_grad=True)
    (dx,) = torch.autograd.grad(hadamard(x, 24, transpose=transpose), x, dy, create_graph=True)
    assert same(dx, hadamard(dy.detach(), 24, transpose=not transpose))
    (ddy,) = torch.autograd.grad(dx, dy, x.detach())
    assert same(ddy, hadamard(x.detach(), 24, transpose=transpose))
    wide = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: reference(t, 24, transpose), wide)


@pytest.mark.parametrize(
    ("x", "order", "message"),
    [
        (torch.zeros(3, 64), 0, "order is 0"),
        (torch.zeros(3, 64), 2.0, "whole number"),
        (torch.zeros(3, 64), True, "whole number"),
        (torch.zeros(3, 64), MAX_CHANNELS + 1, "allowed are"),
        (torch.zeros(3, 92), 92, "no Hadamard matrix of order 92"),
        (torch.zeros(3, 64), 128, "no multiple of order 128"),
        (torch.zeros(()), 1, "no dimensions"),
        (torch.zeros(()), None, "last dimension"),
        (torch.zeros(3, 0), None, "last dimension"),
    ],
)
def test_bad_orders(x: torch.Tensor, order: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hadamard(x, order)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="float64"):
        hadamard(torch.zeros(3, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="list"):
        hadamard([1.0, 2.0], 2)
    for order in (0, 92):
        with pytest.raises(ValueError, match=f"order {order}"):
            hadamard_matrix(order)
    with pytest.raises(ValueError, match="order 52"):
        core_matrix(52)
