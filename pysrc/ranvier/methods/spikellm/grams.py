"""Second moments of what a layer sees: X^^T X^ of its encoded inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.blocks import Positions
from ranvier.nn.spike_linear import SpikingLinear


def layer_class(config: SpikeConfig) -> type[SpikingLinear]:
    """The module for weights of this config."""
    if config.weight_bits == 2:
        from ranvier.nn.ternary_linear import TernaryLinear

        return TernaryLinear
    if config.weight_bits == 8:
        from ranvier.nn.int8_linear import Int8Linear

        return Int8Linear
    return SpikingLinear


def encoder(channels: int, mask: Tensor, config: SpikeConfig) -> SpikingLinear:
    """A layer of one output, for what its codes make of an input (``dequantized_input``)."""
    layer = layer_class(config)(channels, 1, False, config, int(mask.sum()), mask.device)
    layer.salient_mask = mask
    return layer


class GramObserver:
    """Adds up X^^T X^ over tokens, float32 [K, K] a layer, while a model runs; a context manager.

    X^ is what a layer's spike codes stand for, its own inputs where ``config.act_bits`` is None. positions: which of a
    batch's positions count, as whoever runs it says; None: all.
    """

    def __init__(
        self, layers: dict[str, nn.Linear], masks: dict[str, Tensor], config: SpikeConfig, positions: Positions | None = None
    ) -> None:
        self._positions = positions or Positions()
        self.hessians: dict[str, Tensor] = {}
        self._layers, self._encoders, self._handles = layers, {}, []
        for name, layer in layers.items():
            size = (layer.in_features, layer.in_features)
            self.hessians[name] = torch.zeros(size, device=layer.weight.device)
            self._encoders[name] = encoder(layer.in_features, masks[name], config)

    def __enter__(self) -> GramObserver:
        for name, layer in self._layers.items():
            hook = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: self._observe(name, args[0] if args else kwargs["input"]), with_kwargs=True
            )
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observe(self, name: str, x: Tensor) -> None:
        flat = self._positions.rows(x.detach())
        if flat.shape[0]:
            seen = self._encoders[name].dequantized_input(flat).float()
            self.hessians[name].addmm_(seen.T, seen)
