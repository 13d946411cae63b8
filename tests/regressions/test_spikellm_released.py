"""The released SpikeLLM code's two defects, kept here as formulas, and that this library has neither."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ranvier import SpikeConfig
from ranvier.nn import SpikingLinear
from ranvier.ops import spike_events
from ranvier.reference import spike_events as reference
from ranvier.reference.spike_encode import quantizers, spike_decode, spike_levels


def released_expansion(codes: Tensor, bits: int, added: int) -> Tensor:
    """What T = 2^added steps of the released code fire in all: spike = mem if mem < L else L - 1, T times."""
    levels, membrane, fired = 2**bits, codes.clone(), torch.zeros_like(codes)
    for _ in range(2**added):
        spike = torch.where(membrane < levels, membrane, levels - 1)
        fired, membrane = fired + spike, membrane - spike
    return fired


@pytest.mark.parametrize(("bits", "added", "lost"), [(4, 1, [31]), (4, 2, [61, 62, 63]), (2, 1, [7]), (2, 2, [13, 14, 15])])
def test_top_codes_are_not_lost(bits: int, added: int, lost: list[int]) -> None:
    """The released expansion loses exactly its top codes; ours fires every code of either grid.  # spec spikellm O3"""
    steps, level = 2**added, 2**bits - 1
    codes = torch.arange(2 ** (bits + added))
    fired = released_expansion(codes, bits, added)
    assert codes[fired != codes].tolist() == lost
    assert fired[lost].tolist() == [steps * level] * len(lost)
    for grid in ("consistent", "compat"):
        top = reference.top_code(1, act_bits=bits, steps=steps, span="shared", grid=grid)
        assert top == (steps * level if grid == "consistent" else codes[-1])
        every = torch.arange(top + 1)
        assert torch.equal(reference.expand(every, "gif", level).sum(0), every)
    # The consistent grid caps its codes where T steps end, so it needs no step more than the released code takes.
    assert reference.planes(steps * level, "gif", level) == steps


def test_top_codes_of_a_layer_are_fired() -> None:
    """A token whose largest value is salient has the released grid's top code 31, and the executor fires all of it."""
    layer = SpikingLinear.from_linear(nn.Linear(8, 3), SpikeConfig(grid="compat"), torch.arange(8) < 4)
    x = torch.linspace(8, 1, 8)[None]
    u, c = spike_levels(x, layer.salient_mask, **layer.format.rule)
    assert u[0, 0] == 31 and released_expansion(u, 4, 1)[0, 0] == 30
    weight, scale = layer.dequantized_weight().double(), layer.weight_scale[0, :, :3].double()  # scale [range, output]
    parts = (slice(4, 8), slice(0, 4))  # the ranges: ordinary channels first
    own = [c[:, part].double() @ weight[:, part].T / scale[r] for r, part in enumerate(parts)]
    for encoding in reference.ENCODINGS:
        assert torch.equal(spike_events(layer, x, encoding).output, torch.stack(own, -1).round().long())


@pytest.mark.parametrize("added", [1, 2])
def test_zero_point_is_summed_over_its_own_channels(added: int) -> None:
    """z_h times the weights of S gives the dequantized reference; times all columns' it does not.  # spec spikellm O4

    float64 throughout: each sum has K = 96 terms below 2^10, so their rounding stays below 96 * 2^10 * 2^-53 < 1e-10.
    """
    rule = {"act_bits": 4, "steps": 2**added, "span": "shared", "grid": "compat"}
    x, weight = torch.randn(5, 96, dtype=torch.float64) + 0.3, torch.randint(-15, 16, (96, 24)).to(torch.int16)
    salient = torch.rand(96) < 0.2
    low, high = quantizers(x, salient, **rule)
    u, centred = spike_levels(x, salient, **rule)
    assert (high.zero != 0).all()
    zero = reference.zero_points(u, centred, salient)
    assert torch.equal(zero, torch.cat([low.zero, high.zero], -1).long())
    groups = salient.long()  # one group a range, so that each can have its scale
    spikes, _ = reference.spike_events(u, weight, groups, 2, "gif", 15)
    ours = spikes - reference.correction(zero, weight, groups, 2, salient)
    scale = torch.stack([low.step, high.step], 1)
    truth = spike_decode(x, salient, **rule) @ weight.double()
    assert ((scale * ours).sum(1) - truth).abs().max() < 1e-10
    every_column = weight.long().sum(0)
    released = spikes - torch.stack([zero[:, :1] * weight[~salient].long().sum(0), zero[:, 1:] * every_column], 1)
    assert ((scale * released).sum(1) - truth).abs().max() > 1.0
