"""torch._int_mm on codes that are already int8: the product alone, no quantization of x and no scales after it.

The weight [N, K] as a transposed view, and as a contiguous [K, N]: which is faster depends on M.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peers.base import Bound, Layers, Peer, call_bytes


def _codes(values: Tensor) -> Tensor:
    return torch.round(values * (127.0 / values.abs().amax())).to(torch.int8)


def _load(transposed: bool) -> Callable[[Tensor, Callable[[float], int]], Layers]:
    def load(weight: Tensor, copies_for: Callable[[float], int]) -> Layers:
        codes = _codes(weight)
        stored = codes if transposed else codes.t().contiguous()
        weights = [stored.clone() for _ in range(copies_for(stored.numel()))]
        views = [w.t() for w in weights] if transposed else weights

        def bind(x: Tensor) -> Bound:
            given = _codes(x)
            moved = call_bytes(given, len(weight), 4)
            return Bound(
                lambda i: torch._int_mm(given, views[i]), lambda: torch._int_mm(given, views[0]), given.double(), moved
            )

        # Integers: nothing may differ.
        return Layers(stored.numel(), len(weights), lambda n: codes[n].double(), 0.0, bind)

    return load


PEERS = [
    Peer("torch._int_mm, W^T view", "int8", _load(True)),
    Peer("torch._int_mm, W [K, N]", "int8", _load(False)),
]
