"""One decoder block of a tiny model with what an engine hands over, and its spiking version."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_lm import tiny_llama, token_batch
from torch import Tensor, nn

import ranvier
from ranvier.methods.spikellm.fake_quant import weight_layout
from ranvier.methods.spikellm.omniquant import SimulatedBlock, omniquant_block
from ranvier.methods.spikellm.saliency import SaliencyObserver, salient_mask
from ranvier.nn import SpikingLinear
from ranvier.ops.spike_linear import _by_block, pack_codes
from ranvier.reference.spike_encode import channel_order

CONFIGS = {
    "shared": {},
    "W4A8": {"act_bits": 8, "steps": 1, "salient": 0.0},
    "separate-groups": {"span": "separate", "group_size": 32},
    "compat": {"grid": "compat"},
    "weight-only": {"act_bits": None, "group_size": 32},
}


class Frozen:
    """The surrogate whose true derivative the straight-through one is.

    Rounding errors, zero points and what is clipped stay as they were in the first run: a token's largest value lies on the
    end of the grid, where a clip that is free to move has no derivative.
    """

    def __init__(self) -> None:
        self.known: list[tuple[Tensor, Tensor, Tensor]] = []
        self.calls = 0

    def restart(self) -> Frozen:
        self.calls = 0
        return self

    def __call__(self, x: Tensor, step: Tensor, zero: Tensor, floor: Any, ceiling: Any) -> Tensor:
        if self.calls == len(self.known):
            ratio = (x / step).detach()
            level = ratio.round() + zero
            inside = (level >= floor) & (level <= ceiling)
            self.known.append((ratio.round() - ratio, level.clamp(floor, ceiling) - zero, inside))
        error, code, inside = self.known[self.calls]
        self.calls += 1
        return torch.where(inside, x + error * step, code * step)


class Setup:
    """One decoder block with what an engine hands over."""

    def __init__(self, model: nn.Module, block: nn.Module, ids: list[Tensor], config: ranvier.SpikeConfig) -> None:
        self.model, self.block, self.config = model, block, config
        self.inputs: list[tuple[Tensor, dict]] = []

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given = dict(kwargs)
            self.inputs.append((args[0] if args else given.pop("hidden_states"), given))

        handle = block.register_forward_pre_hook(before, with_kwargs=True)
        self.linears = {name: m for name, m in block.named_modules() if type(m) is nn.Linear}
        with torch.no_grad(), SaliencyObserver(self.linears, score=config.salient_share > 0) as observer:
            for row in ids:
                model(row, use_cache=False)
        handle.remove()
        self.groups = observer.groups()
        share = config.salient_share
        self.masks = {n: salient_mask(observer.scores(names), share) for names in self.groups for n in names}
        self.targets = [self.output(block, item) for item in self.inputs]

    @staticmethod
    @torch.no_grad()
    def output(block: nn.Module, item: tuple[Tensor, dict]) -> Tensor:
        result = block(item[0], **item[1])
        return result[0] if isinstance(result, tuple) else result

    def simulated(self, **options: Any) -> SimulatedBlock:
        return SimulatedBlock(self.block, self.linears, self.groups, self.masks, self.config, **options)

    def quantize(self, seed: int = 0, **options: Any) -> dict:
        rest = (self.groups, self.masks, self.inputs, self.targets, self.config, seed)
        return omniquant_block(self.block, self.linears, *rest, **options)

    def deploy(self, result: dict) -> nn.Module:
        """The block with real packed layers in it."""
        block = copy.deepcopy(self.block)
        for name in self.linears:
            parent, _, child = name.rpartition(".")
            old = block.get_submodule(name)
            setattr(block.get_submodule(parent), child, packed_layer(old, result[name], self.masks[name], self.config))
        return block


def packed_layer(linear: nn.Linear, quantized: Any, mask: Tensor, config: ranvier.SpikeConfig) -> SpikingLinear:
    """A layer that holds exactly these codes."""
    layer = SpikingLinear.from_linear(linear, config, mask)
    form = layer.format
    q = quantized.q[:, channel_order(mask)] if len(form.lengths) == 2 else quantized.q
    layer.weight_packed, layer.weight_scale = pack_codes(q, form.lengths), _by_block(quantized.scale)
    layer.weight_zero = _by_block(quantized.zero)
    if form.grid == "compat":
        signed = quantized.q.int() - quantized.zero.int()[:, weight_layout(form, mask).groups]
        groups = weight_layout(form, mask).groups
        layer.weight_sum = _by_block(torch.zeros(quantized.scale.shape, dtype=torch.int32).index_add_(1, groups, signed))
    return layer


def outlier_llama(seed: int = 3) -> nn.Module:
    """tiny_llama (GQA, biases) with channels that are far larger than the others, in the norms and in v and up."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(torch.exp(torch.randn(64, generator=generator)))
            for linear in (layer.self_attn.v_proj, layer.mlp.up_proj):
                linear.weight.mul_(torch.exp(torch.randn(linear.out_features, 1, generator=generator)))
                linear.weight.mul_(10.0)
    return model


def llama_setup(count: int = 2, length: int = 24, **fields: Any) -> Setup:
    model = outlier_llama()
    ids = [token_batch(length, seed=i) for i in range(count)]
    return Setup(model, model.model.layers[0], ids, ranvier.SpikeConfig(**fields))


def mask_of(channels: int, count: int) -> Tensor:
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[torch.randperm(channels, generator=torch.Generator().manual_seed(channels + count))[:count]] = True
    return mask
