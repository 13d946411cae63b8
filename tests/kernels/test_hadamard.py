"""The Triton kernels of hadamard: by the interpreter the CPU kernel's bits, compiled within the limits of four processors."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from spiking import generator, same
from triton_tools import TARGETS, interpreted, resources

ops = import_module("ranvier.ops.hadamard")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("order", "channels", "dtype"),
    [(1, 3, torch.float32), (128, 256, torch.float32), (24, 48, torch.float16), (5120, 5120, torch.float32)],
)
def test_values_are_the_cpus(order: int, channels: int, dtype: torch.dtype) -> None:
    """Both directions, powers of two, cores and several blocks a row; strided tokens, none, and one that is not finite."""
    x = torch.randn(channels, 3, generator=generator(order)).to(dtype).t()
    x[1, 0] = float("inf")
    for transpose in (False, True):
        with interpreted():
            assert same(ops.triton(x, order, transpose), ops.cpu(x, order, transpose))
            assert ops.triton(x[:0], order, transpose).shape == (0, channels)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("order", "tile"), [(65536, None), (128, 64), (4096, 64), (192, 8), (768, 16)])
def test_long_pieces_take_two_passes(order: int, tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece too long for one program is transformed in parts that a second kernel joins: the same bits, cores included."""
    if tile is not None:  # as if a program held no more
        monkeypatch.setattr(ops, "WHOLE_PIECE", tile)
        monkeypatch.setattr(ops, "TILE", tile)
    x = torch.randn(2, order, generator=generator(order))
    matrix = ops._matrix(ops.hadamard_core(order), False) if ops.hadamard_core(order) > 1 else None
    kernels = [launch.kernel for launch in ops.launches(x, order, matrix, torch.empty_like(x))]
    assert kernels == ["hadamard_pieces"] * 2 + ["hadamard_core"] * (matrix is not None)
    with interpreted():
        assert same(ops.triton(x, order, False), ops.cpu(x, order, False))


# Order, core: Llama-2-7B's widths, the longest piece of one pass, the longest there can be of two.
ORDERS = [(4096, 1), (11008, 172), (16384, 1), (1 << 19, 1)]


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """The widths of Llama-2-7B, and pieces of every length, fit in memory and registers without spills."""
    for order, core in ORDERS:
        x = torch.empty(2, order, dtype=torch.bfloat16)
        for launch in ops.launches(x, order, torch.empty(core, core) if core > 1 else None, torch.empty_like(x)):
            resources(launch, target, tmp_path).check(target)


def test_a_grid_never_passes_its_limit() -> None:
    """CUDA takes 65,535 programs in the second and third dimension: rows are counted in the first."""
    for order in (64, 11008, 1 << 19, 12 << 16):
        core = ops.hadamard_core(order)
        x = torch.empty(100_000, order, device="meta")
        for launch in ops.launches(x, order, torch.empty(core, core) if core > 1 else None, x):
            assert max(launch.grid[1:]) <= 65535
