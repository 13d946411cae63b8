"""torchao: int8 weights, activations quantized per token on the fly; eager, and compiled by inductor."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peers.base import INT8_INPUT, Bound, Layers, Peer, call_bytes


def _quantized(weight: Tensor) -> nn.Linear:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it reports CUDA libraries that a CPU does not need
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    return linear


def _load(compiled: bool) -> Callable[[Tensor, Callable[[float], int]], Layers]:
    def load(weight: Tensor, copies_for: Callable[[float], int]) -> Layers:
        first = _quantized(weight)
        layers = [first, *(copy.deepcopy(first) for _ in range(copies_for(weight.numel()) - 1))]
        called = [torch.compile(layer, dynamic=True) for layer in layers] if compiled else layers
        dequantized = first.weight.dequantize()

        def bind(x: Tensor) -> Bound:
            moved = call_bytes(x, len(weight), 4)
            return Bound(lambda i: called[i](x), lambda: called[0](x), x.double(), moved)

        return Layers(weight.numel(), len(layers), lambda n: dequantized[n].double(), INT8_INPUT, bind)

    return load


_INSTALL = {"module": "torchao", "install": "pip install torchao"}
# Each compilation takes seconds.
_COMPILED_SIZES = (1, 8, 64, 512)
PEERS = [
    Peer("torchao int8 dynamic", "float32", _load(False), **_INSTALL),
    Peer("torchao int8 dynamic, compiled", "float32", _load(True), sizes=_COMPILED_SIZES.__contains__, **_INSTALL),
]
