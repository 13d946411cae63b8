"""The 260k-parameter Llama under shared/data as plain tensors: true float32 weights, and the inputs that its layers see."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BOS, EPS, BASE = 1, 1e-5, 10000.0


def _file() -> Path:
    folder = Path(os.environ.get("RANVIER_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "stories260k" / "stories260K.bin"
    if not path.is_file():
        pytest.skip(f"{path} is not here; RANVIER_DATA names the folder that holds stories260k")
    return path


class Stories:
    """Weights by name, a layer each, and a forward pass that shows every linear layer's input to ``see(name, layer, x)``."""

    def __init__(self) -> None:
        raw = np.fromfile(_file(), dtype=np.float32)
        width, hidden, self.layers, self.heads, self.kv_heads, vocabulary, _ = raw[:7].view(np.int32).tolist()
        kv, n, at = width // self.heads * self.kv_heads, self.layers, 7
        shapes = {
            "embedding": (vocabulary, width), "before": (n, width), "q": (n, width, width), "k": (n, kv, width),
            "v": (n, kv, width), "o": (n, width, width), "between": (n, width), "gate": (n, hidden, width),
            "down": (n, width, hidden), "up": (n, hidden, width), "last": (width,),
        }  # fmt: skip
        self.weights: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            self.weights[name] = torch.from_numpy(raw[at : at + size].copy()).view(shape)
            at += size

    def forward(self, ids: list[int], see=lambda name, layer, x: None) -> Tensor:
        """Logits [len(ids), vocabulary]."""
        w, x, count = self.weights, self.weights["embedding"][torch.tensor(ids)], len(ids)

        def linear(name: str, layer: int, x: Tensor) -> Tensor:
            see(name, layer, x)
            return x @ w[name][layer].T

        for layer in range(self.layers):
            y = _norm(x, w["before"][layer])
            q, k, v = (linear(name, layer, y).view(count, -1, x.shape[1] // self.heads) for name in "qkv")
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (_rope(k), v))
            q, k, v = (t.transpose(0, 1)[None] for t in (_rope(q), k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
            x = x + linear("o", layer, mixed.transpose(0, 1).reshape(count, -1))
            y = _norm(x, w["between"][layer])
            inner = torch.nn.functional.silu(linear("gate", layer, y)) * linear("up", layer, y)
            x = x + linear("down", layer, inner)
        return _norm(x, w["last"]) @ w["embedding"].T

    def linear_inputs(self, tokens: int = 96) -> list[tuple[Tensor, Tensor]]:
        """(weight [N, K], input [tokens, K]) of every linear layer, on text that the model itself writes."""
        ids, generator, seen = [BOS], torch.Generator().manual_seed(1), []
        while len(ids) < tokens:
            ids.append(int(torch.multinomial(self.forward(ids)[-1].softmax(-1), 1, generator=generator)))
        self.forward(ids, lambda name, layer, x: seen.append((self.weights[name][layer], x)))
        return seen


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain


def _rope(x: Tensor) -> Tensor:
    count, _, size = x.shape
    angle = torch.arange(count)[:, None, None] * BASE ** (-torch.arange(0, size, 2) / size)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, -1).flatten(-2)
