"""The Triton kernels of ternary_linear: exact integers by the interpreter, compiled within the limits of four processors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from spiking import generator, random_mask
from torch import Tensor
from triton_tools import TARGETS, assert_all_fit, device, interpreted

from ranvier.ops import PackedWeight, SpikeFormat
from ranvier.ops._spike_triton import encode_launches
from ranvier.ops._ternary_triton import ternary_codes, ternary_launches, ternary_places
from ranvier.ops._triton import Launch, run
from ranvier.ops.spike_encode import outputs_at
from ranvier.ops.spike_linear import _by_block, pack_codes
from ranvier.reference.spike_encode import channel_order, spike_encode

N = 70


@dataclass(frozen=True)
class Format(SpikeFormat):
    """Tokens of one scale with their salient channels last."""

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        mixed = 0 < self.salient_count < self.channels
        return (self.channels - self.salient_count, self.salient_count) if mixed else (self.channels,)


def format_of(mask: Tensor, act_bits: int = 8) -> Format:
    return Format(mask.numel(), int(mask.sum()), act_bits, 1, "shared", "consistent", 0)


def two_bit(q: Tensor) -> Tensor:
    """q uint8 [N, K] -> [N/32, K/8, 64]; bits 0, 2, 4, 6 of byte 4 i + j: output i or 16 + i in turn, channels j then 4 + j."""
    q = torch.nn.functional.pad(q, (0, -q.shape[1] % 8, 0, -q.shape[0] % 32))
    packed = torch.zeros(q.shape[0] // 32, q.shape[1] // 8, 64, dtype=torch.uint8)
    for field, (upper, more) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        for i in range(16):
            for j in range(4):
                packed[:, :, 4 * i + j] |= q[16 * upper + i :: 32, 4 * more + j :: 8] << (2 * field)
    return packed


def layer(form: Format, mask: Tensor) -> tuple[Tensor, Tensor, PackedWeight]:
    """q [N, K] in the layer's order, zero [N, R], and the packed weight with scales that are powers of two."""
    g = generator(form.channels)
    q = torch.randint(0, 4, (N, form.channels), generator=g, dtype=torch.uint8)
    q = torch.where(mask, torch.randint(0, 16, q.shape, generator=g, dtype=torch.uint8), q)
    ranges = len(form.lengths)
    zero = torch.randint(0, 16, (N, ranges), generator=g, dtype=torch.uint8)
    scale = torch.exp2(torch.randint(-3, 1, (N, ranges), generator=g).float())
    parts = q[:, channel_order(mask)].split(form.lengths, 1)
    salient = [bool(mask.all())] if ranges == 1 else [False, True]
    packed = [pack_codes(p, [p.shape[1]]) if s else two_bit(p) for p, s in zip(parts, salient, strict=True)]
    return q, zero, PackedWeight(torch.cat(packed, 1), _by_block(scale), _by_block(zero), None)


def exact(
    codes: Tensor, code_scale: Tensor, q: Tensor, zero: Tensor, weight: PackedWeight, mask: Tensor, bias: Tensor
) -> Tensor:
    """The formula in float64, integers in int64."""
    scale = weight.scale.transpose(1, 2).reshape(-1, zero.shape[1])[:N].double()
    y = bias.double()
    for r in range(zero.shape[1]):
        chosen = mask == bool(r) if zero.shape[1] == 2 else torch.ones_like(mask)
        y = y + code_scale.double() * scale[:, r] * (
            codes[:, chosen].long() @ (q.long() - zero.long()[:, r : r + 1])[:, chosen].T
        )
    return y


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("share", "channels"), [(0.0, 71), (0.1, 300), (0.5, 43), (1.0, 38)])
def test_products_are_exact(share: float, channels: int) -> None:
    """Scales are powers of two and sums stay below 2^24, so float32 holds every result: gemv and gemm equal the formula."""
    mask = random_mask(channels, share, generator(3))
    form = format_of(mask)
    q, zero, weight = layer(form, mask)
    g = generator(9)
    bias = torch.randint(-50, 50, (N,), generator=g).float()
    for tokens in (1, 5, 18):
        codes = torch.randint(-127, 128, (tokens, channels), generator=g, dtype=torch.int8)
        code_scale = torch.exp2(torch.randint(-2, 2, (tokens, 1), generator=g).float())
        y = torch.empty(tokens, N)
        with interpreted():
            run(ternary_launches(form, ternary_codes(form, codes, code_scale, mask), weight, bias, y, N))
        assert torch.equal(y.double(), exact(codes, code_scale, q, zero, weight, mask, bias))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("act_bits", [4, 8])
def test_encode_kernel_writes_these_codes(act_bits: int) -> None:
    """spike_encode's kernel gives, with this format, what the product reads: codes, both sums, the one scale twice."""
    mask = random_mask(77, 0.2, generator(3))
    form = format_of(mask, act_bits)
    x = torch.randn(4, 77, generator=generator(4))
    out = outputs_at(x, form, ternary_places(form))
    with interpreted():
        run(encode_launches(form, x, mask, out, ternary_places(form)))
    plain = spike_encode(x, torch.zeros_like(mask), **form.rule, group_size=None)
    expected = ternary_codes(form, plain.codes, plain.scale, mask)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def launches(tokens: int, outputs: int) -> list[Launch]:
    mask = torch.zeros(4096, dtype=torch.bool)
    mask[:512] = True
    form = format_of(mask)
    strips = -(-outputs // 32)
    packed = torch.empty(strips, 3584 // 8 + 512 // 4, 64, dtype=torch.uint8)
    weight = PackedWeight(packed, torch.empty(strips, 2, 32), torch.empty(strips, 2, 32, dtype=torch.uint8), None)
    encoded = outputs_at(torch.empty(tokens, 4096), form, ternary_places(form))
    return ternary_launches(form, encoded, weight, None, torch.empty(tokens, outputs, dtype=torch.bfloat16), outputs)


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit(target: str, tmp_path: Path) -> None:
    """Every shape of the table compiles within the processor's memory and registers, without spills."""
    used: set = set()
    with device(target, used):
        made = [launches(*sizes)[0] for sizes in ((1, 2048), (1, 4096), (8, 4096), (64, 4096), (2048, 4096))]
    for launch, needs in zip(made, assert_all_fit("ternary_linear", target, made, used, tmp_path), strict=True):
        if target == "sm_90" and launch.kernel.endswith("gemm"):
            assert "wgmma.mma_async" in needs.text
