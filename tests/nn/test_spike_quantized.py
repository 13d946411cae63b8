"""SpikingLinear.from_quantized: a layer with ready codes, scales and zeros."""

from __future__ import annotations

import pytest
import torch
from spiking import CONFIGS, K, N, config_id, generator, linear, mask, same, spiking, tokens
from torch import Tensor, nn

from ranvier import SpikeConfig
from ranvier.nn import SpikingLinear
from ranvier.reference.spike_encode import channel_order
from ranvier.reference.spike_linear import Quantized, group_index, quantize_weight

pytestmark = pytest.mark.usefixtures("poisoned")
configs = pytest.mark.parametrize("config", CONFIGS, ids=config_id)
some_configs = pytest.mark.parametrize("config", CONFIGS[::3], ids=config_id)


def natural(layer: SpikingLinear, weight: Tensor) -> Quantized:
    """What quantize_weight gives this layer's format, the codes' channels put back into the order of x."""
    form, order = layer.format, torch.arange(weight.shape[1])
    if len(form.lengths) == 2:
        order = channel_order(layer.salient_mask)
    q, scale, zero = quantize_weight(weight[:, order], form.lengths, form.group_size or None)
    return Quantized(torch.empty_like(q).index_copy_(1, order, q), scale, zero)


@configs
def test_from_quantized_with_rounded_codes_is_from_linear(config: SpikeConfig) -> None:
    """Round to nearest through ready codes gives the same layer bit for bit: buffers, bias, mask, dtype, mode."""
    source = linear(torch.bfloat16).eval()
    source.bias.requires_grad_(False)
    plain = SpikingLinear.from_linear(source, config, mask())
    made = SpikingLinear.from_quantized(source, config, mask(), *natural(plain, source.weight.detach().float()))
    assert plain.state_dict().keys() == made.state_dict().keys()
    assert all(same(made.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert made.dtype == plain.dtype and not made.training and not made.bias.requires_grad
    assert same(made(tokens(dtype=torch.bfloat16)), plain(tokens(dtype=torch.bfloat16)))


@some_configs
def test_from_quantized_keeps_any_codes(config: SpikeConfig) -> None:
    """Codes, scales and zeros of any values come back: W^ = scale (q - zero) with the groups of the codes' order."""
    shell = spiking(config)
    groups = sum(shell.format.groups)
    q = torch.randint(0, 16, (N, K), generator=generator(5), dtype=torch.uint8)
    scale = torch.rand(N, groups, generator=generator(6)) + 0.5
    zero = torch.randint(0, 16, (N, groups), generator=generator(7), dtype=torch.uint8)
    layer = SpikingLinear.from_quantized(linear(), config, mask(), q, scale, zero)
    index, _ = group_index(shell.format.lengths, config.group_size)
    if len(shell.format.lengths) == 2:
        index = torch.empty_like(index).index_copy_(0, channel_order(mask()), index)
    truth = scale[:, index] * (q.float() - zero[:, index].float())
    assert same(layer.dequantized_weight(), truth)


def test_from_quantized_refuses() -> None:
    """Tables of other shapes, dtypes or values are named, with what is allowed."""
    source, config = linear(), SpikeConfig()
    q, scale, zero = natural(spiking(config), source.weight.detach())
    bad_scale = scale.clone()
    bad_scale[3, 0] = float("nan")
    cases = [
        ((q[:-1], scale, zero), ValueError, "q has shape"),
        ((q.int(), scale, zero), TypeError, "q is torch.int32"),
        ((q, scale.double(), zero), TypeError, "scale is torch.float64"),
        ((q, scale.repeat(1, 2), zero), ValueError, "scale has shape"),
        ((q, scale, zero[0]), ValueError, "zero has shape"),
        ((q + 16, scale, zero), ValueError, "q reaches 31; 4-bit codes end at 15"),
        ((q, scale, zero + 16), ValueError, "zero reaches"),
        ((q, bad_scale, zero), ValueError, "a scale is NaN"),
        ((q, -scale, zero), ValueError, "not above 0"),
        ((q, scale, None), TypeError, "zero is a NoneType"),
    ]
    for given, error, words in cases:
        with pytest.raises(error, match=words):
            SpikingLinear.from_quantized(source, config, mask(), *given)
    with pytest.raises(TypeError, match="from_quantized: got Identity"):
        SpikingLinear.from_quantized(nn.Identity(), config, mask(), q, scale, zero)
