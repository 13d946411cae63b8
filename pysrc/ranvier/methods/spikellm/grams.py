"""Second moments of what a layer sees: X^^T X^ of its encoded inputs, and X^^T X with the inputs as they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranvier.config import SpikeConfig
from ranvier.nn.spike_linear import SpikingLinear


def encoder(channels: int, mask: Tensor, config: SpikeConfig) -> SpikingLinear:
    """A layer of one output, for what its codes make of an input (``dequantized_input``)."""
    layer = SpikingLinear(channels, 1, False, config, int(mask.sum()), mask.device)
    layer.salient_mask = mask
    return layer


@dataclass
class Gram:
    """Sums over tokens: hessian X^^T X^ and cross X^^T X, float32 [K, K] each."""

    hessian: Tensor
    cross: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Gram:
        """Of no token."""
        return cls(*(torch.zeros((channels, channels), device=device) for _ in range(2)))

    def add(self, seen: Tensor, wanted: Tensor) -> None:
        """Tokens of [M, K]: what the layer's codes stand for, and what they should."""
        seen, wanted = seen.float(), wanted.float()
        self.hessian.addmm_(seen.T, seen)
        self.cross.addmm_(seen.T, wanted)
        self.tokens += seen.shape[0]


class GramObserver:
    """Adds up the Gram matrices of layers while a model runs; a context manager."""

    def __init__(self, layers: dict[str, nn.Linear], masks: dict[str, Tensor], config: SpikeConfig) -> None:
        self.grams: dict[str, Gram] = {}
        self._layers, self._encoders, self._handles = layers, {}, []
        for name, layer in layers.items():
            self.grams[name] = Gram.empty(layer.in_features, layer.weight.device)
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
        flat = x.detach().reshape(-1, x.shape[-1])
        if flat.shape[0]:
            self.grams[name].add(self._encoders[name].dequantized_input(flat), flat)
