"""torch.nn.functional.linear in float32 and bfloat16."""

from __future__ import annotations

import torch

from peers.base import BFLOAT16, FLOAT32, Peer, float_layers

PEERS = [
    Peer("torch float32", "float32", lambda w, copies: float_layers(w, copies(4 * w.numel()), torch.float32, FLOAT32)),
    Peer("torch bfloat16", "bfloat16", lambda w, copies: float_layers(w, copies(2 * w.numel()), torch.bfloat16, BFLOAT16)),
]
