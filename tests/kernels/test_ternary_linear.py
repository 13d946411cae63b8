"""The Triton kernels of ternary_linear: exact integers by the interpreter, compiled within the limits of four processors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spiking import generator, random_mask, same
from torch import Tensor
from triton_tools import TARGETS, assert_all_fit, device, interpreted

from ranvier.ops import PackedWeight
from ranvier.ops._ternary_triton import ternary_launches, ternary_places
from ranvier.ops._triton import Launch
from ranvier.ops.spike_encode import outputs_at
from ranvier.ops.ternary_linear import (
    TernaryFormat,
    _arguments,
    cpu_dynamic,
    dequantize_ternary,
    pack_ternary,
    ternary_format,
    triton_codes,
    triton_dynamic,
)
from ranvier.reference.weight_only_linear import TOP

N = 70


def layer(form: TernaryFormat, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, PackedWeight]:
    """q [N, K], scale and zero [N, 2] of ordinary and salient channels, and the packed weight; scales are powers of two."""
    g = generator(form.channels)
    q = torch.randint(0, 4, (N, form.channels), generator=g, dtype=torch.uint8)
    q = torch.where(mask, torch.randint(0, 16, q.shape, generator=g, dtype=torch.uint8), q)
    zero = torch.randint(0, 16, (N, 2), generator=g, dtype=torch.uint8)
    scale = torch.exp2(torch.randint(-3, 1, (N, 2), generator=g).float())
    return q, scale, zero, pack_ternary(q, scale, zero, mask, form)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("share", "channels"), [(0.0, 71), (0.1, 300), (0.5, 43), (1.0, 38)])
def test_products_are_exact(share: float, channels: int) -> None:
    """Scales are powers of two and sums stay below 2^24, so float32 holds every result: gemv and gemm equal the formula."""
    mask = random_mask(channels, share, generator(3))
    form = ternary_format(channels, int(mask.sum()))
    q, scale, zero, weight = layer(form, mask)
    g = generator(9)
    bias = torch.randint(-50, 50, (N,), generator=g).float()
    kind = mask.long()
    value = (scale[:, kind] * (q.float() - zero[:, kind])).double()
    for tokens in (1, 5, 18):
        codes = torch.randint(-127, 128, (tokens, channels), generator=g, dtype=torch.int8)
        code_scale = torch.exp2(torch.randint(-2, 2, (tokens, 1), generator=g).float())
        with interpreted():
            y = triton_codes(codes, code_scale, *_arguments(weight, mask, bias, N, form.salient_count), torch.float32)
        assert torch.equal(y.double(), bias.double() + code_scale.double() * (codes.double() @ value.T))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("share", "act_bits", "clip"), [(0.2, 8, 1.0), (0.2, 4, 0.7), (0.0, 8, 0.5), (1.0, 4, 1.0)])
def test_activations_have_the_cpus_bits(share: float, act_bits: int, clip: float) -> None:
    """Encoded and multiplied as the CPU does it, a token that is not finite among them; no tokens give no outputs."""
    mask = random_mask(77, share, generator(3))
    form = ternary_format(77, int(mask.sum()), act_bits)
    *_, weight = layer(form, mask)
    x = torch.randn(4, 77, generator=generator(4))
    x[2, 7] = float("inf")
    rest = (*_arguments(weight, mask, torch.randn(N, generator=generator(5)), N, form.salient_count), act_bits, clip)
    with interpreted():
        assert same(triton_dynamic(x, *rest), cpu_dynamic(x, *rest))
        assert triton_dynamic(x[:0], *rest).shape == (0, N)


@pytest.mark.usefixtures("poisoned")
def test_weight_only_takes_digits() -> None:
    """Three digits of float32: within half a step of each activation and the rounding of three products of 77 terms."""
    mask = random_mask(77, 0.2, generator(3))
    form = ternary_format(77, int(mask.sum()))
    *_, weight = layer(form, mask)
    x, bias = torch.randn(9, 77, generator=generator(4)), torch.randn(N, generator=generator(5))
    with interpreted():
        y = triton_dynamic(x, *_arguments(weight, mask, bias, N, form.salient_count), 0)
    value = dequantize_ternary(weight, mask, form, N).double()
    truth, size = bias.double() + x.double() @ value.T, bias.double().abs() + x.double().abs() @ value.T.abs()
    half_step = x.double().abs().amax(1, keepdim=True) / TOP[3] / 2 * value.abs().sum(1)
    assert bool(((y.double() - truth).abs() <= half_step + 8 * 2.0**-24 * size).all())


def launches(tokens: int, outputs: int, salient: int) -> list[Launch]:
    form = ternary_format(4096, salient)
    strips, ranges = -(-outputs // 32), len(form.lengths)
    tables = torch.empty(strips, ranges, 32), torch.empty(strips, ranges, 32, dtype=torch.uint8)
    weight = PackedWeight(torch.empty(strips, sum(form.blocks), 64, dtype=torch.uint8), *tables, None)
    encoded = outputs_at(torch.empty(tokens, 4096), form, ternary_places(form))
    return ternary_launches(form, encoded, weight, None, torch.empty(tokens, outputs, dtype=torch.bfloat16), outputs)


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """Every shape of the table compiles within the processor's memory and registers, without spills."""
    used: set = set()
    with device(target, used):
        shapes = ((1, 2048, 0), (1, 4096, 0), (8, 4096, 512), (64, 4096, 512), (2048, 4096, 0), (2048, 4096, 512))
        made = [launches(*shape)[0] for shape in shapes]
    for launch, needs in zip(made, assert_all_fit("ternary_linear", target, made, used, tmp_path), strict=True):
        if target == "sm_90" and launch.kernel.endswith("gemm"):
            assert "wgmma.mma_async" in needs.text
