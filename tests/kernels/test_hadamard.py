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


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """The widths of Llama-2-7B, 4096 = 2^12 and 11008 = 172 * 64, compile with next to no spills and without contraction."""
    for order, matrix in ((4096, None), (11008, torch.empty(172, 172))):
        x = torch.empty(2, order, dtype=torch.bfloat16)
        for launch in ops.launches(x, order, matrix, torch.empty_like(x)):
            resources(launch, target, tmp_path).check(target)
