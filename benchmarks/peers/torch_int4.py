"""torch's 4-bit weight-only product on CPUs: bfloat16 activations, groups of 128, w = (q - 8) scale + zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peers.base import BFLOAT16, Bound, Layers, Peer, call_bytes

GROUP = 128


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Asymmetric round to nearest: q int32 [N, K], scale and zero bfloat16 [K / group, N, 2]."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    q = (torch.round((groups - zero) / scale) + 8).clamp(0, 15)
    table = torch.stack([scale.squeeze(-1).t(), zero.squeeze(-1).t()], -1)
    return q.view_as(weight).to(torch.int32), table.bfloat16().contiguous()


def load(weight: Tensor, copies_for: Callable[[float], int]) -> Layers:
    q, table = quantize(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    stored = packed.numel() + 2 * table.numel()
    weights = [(packed.clone(), table.clone()) for _ in range(copies_for(stored))]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def rows(outputs: Tensor) -> Tensor:
        scale, zero = table[:, outputs].double().repeat_interleave(GROUP, 0).permute(2, 1, 0)
        return (q[outputs].double() - 8) * scale + zero

    def bind(x: Tensor) -> Bound:
        given = x.bfloat16()
        moved = call_bytes(given, len(weight), 2)

        def call(i: int) -> Tensor:
            codes, scales = weights[i]
            return product(given, codes, GROUP, scales)

        return Bound(call, lambda: call(0), given.double(), moved)

    return Layers(stored, len(weights), rows, BFLOAT16, bind)


PEERS = [Peer("torch int4 weight-only", "bfloat16", load, multiple=GROUP)]
