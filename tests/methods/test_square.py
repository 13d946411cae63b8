"""Matrices rearranged in place: the values of the copies, and how much memory that leaves a factor."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from spiking import generator, same

from ranvier.methods.spikellm import _square as square
from ranvier.methods.spikellm.gptq import inverse_factor, quantize_gptq
from ranvier.ops.spike_encode import SpikeFormat


@pytest.mark.parametrize("size", [1, 2, 7, 300, 513])
@pytest.mark.parametrize("columns", [False, True])
def test_in_place(monkeypatch: pytest.MonkeyPatch, size: int, columns: bool) -> None:
    """Permuted and reversed matrices are those that indexing and flip make, over pieces that do not divide them."""
    monkeypatch.setattr(square, "VALUES", 1000)
    matrix = torch.randn(size, size, generator=generator(1))
    matrix = matrix.T if columns else matrix
    order = torch.randperm(size, generator=generator(2))
    truth, address = matrix[order][:, order], matrix.data_ptr()
    assert same(square.permute_(matrix, order), truth)
    assert same(square.reverse_(matrix), truth.flip(0, 1)) and matrix.data_ptr() == address


def test_not_finite_is_seen() -> None:
    """In the first and in the last row, NaN and Inf."""
    for row, fault in ((0, float("nan")), (600, float("inf"))):
        matrix = torch.zeros(601, 3)
        assert square.all_finite(matrix)
        matrix[row, 1] = fault
        assert not square.all_finite(matrix)


def factor(hessian: torch.Tensor, percdamp: float) -> torch.Tensor:
    """U by copies, as the formula reads."""
    damped = hessian + percdamp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(hessian), dtype=hessian.dtype), upper=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 65, 300])
def test_factor_has_the_bits_of_the_copies(dtype: torch.dtype, size: int) -> None:
    """In place, on a copy, in another order, and after a trial that was not positive definite."""
    x = torch.randn(2 * size, size, generator=generator(3), dtype=dtype)
    hessian, order = x.T @ x, torch.randperm(size, generator=generator(4))
    given = hessian.clone()
    assert same(inverse_factor(given, 0.01), factor(hessian, 0.01)) and same(given, hessian)
    assert same(inverse_factor(given, 0.01, order), factor(hessian[order][:, order], 0.01)) and same(given, hessian)
    assert same(inverse_factor(given, 0.01, order, overwrite=True), factor(hessian[order][:, order], 0.01))
    short = x[: size // 2].T @ x[: size // 2] - 0.05 * torch.eye(size, dtype=dtype) * (size > 1)
    if size > 1:  # not positive definite by its smallest damping, 0.05 below what the diagonal's mean is a hundredth of
        damp = next(d for d in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0) if not _indefinite(short, d))
        assert damp > 1e-6 and same(inverse_factor(short, 1e-6), factor(short, damp))


def _indefinite(hessian: torch.Tensor, damp: float) -> bool:
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    return bool(torch.linalg.cholesky_ex(damped.flip(0, 1)).info)


def test_overwriting_changes_no_code() -> None:
    """Equal codes and tables with and without; without, the Hessian stays."""
    x = torch.randn(200, 96, generator=generator(5))
    weight, hessian, mask = torch.randn(8, 96, generator=generator(6)), x.T @ x, torch.arange(96) % 9 == 0
    form = SpikeFormat(96, int(mask.sum()), 4, 1, "separate", "consistent", 32)
    kept, lost = hessian.clone(), hessian.clone()
    one, other = quantize_gptq(weight, kept, mask, form), quantize_gptq(weight, lost, mask, form, overwrite=True)
    assert same(kept, hessian) and not torch.equal(lost, hessian)
    assert all(same(a, b) for a, b in zip(one, other, strict=True))


MEASURED = """
import sys, torch
from pathlib import Path
from ranvier.methods.spikellm.gptq import UniformGrid, gptq
from ranvier.methods.spikellm.saliency import weight_saliency
torch.set_num_threads(1)

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def call(size, dtype, overwrite):
    weight, hessian = torch.ones(4, size), torch.eye(size, dtype=dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    if overwrite is None:
        weight_saliency(weight, hessian)
    else:
        gptq(weight, hessian, UniformGrid(4, (size,), None, torch.arange(size), shrink=1), overwrite=overwrite)
    return (resident("VmHWM") - before) / (size * size * (8 if overwrite is None else 4))

for overwrite in (True, False, None):
    call(1000, torch.float32, overwrite)  # what a library loads at its first call does not count
    print(call(3000, torch.float32, overwrite))  # above 32 MB glibc hands memory back
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's high-water mark is read from /proc")
def test_matrices_that_are_held() -> None:
    """gptq makes one matrix [K, K] beside a Hessian that it may overwrite, else two; weight_saliency two in float64.

    Pieces that are copied, the codes and LAPACK's own buffers are below 0.4 of a matrix at this size.
    """
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    made = [float(line) for line in done.stdout.split()]
    for count, most in zip(made, (1, 2, 2), strict=True):
        assert most - 0.2 <= count <= most + 0.4, made
