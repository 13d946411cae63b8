"""Activations that are not quantized, on the GPU: a token's radix-256 digits as rows of codes, their products added up.

Formulas: :mod:`ranvier.reference.weight_only_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ranvier.reference.weight_only_linear import digit_count, radix_digits


def digit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes int8 [M * P, K] and their scales float32 [M * P, 1], a token's P digits in neighbouring rows."""
    count = digit_count(x.dtype)
    digits, step = radix_digits(x.reshape(-1, x.shape[-1]), count)
    scale = step * 256.0 ** torch.arange(count, device=x.device)
    return digits.flatten(0, 1), scale.reshape(-1, 1)


def add_digits(products: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Fills y [..., N] with the sums of float32 products [M * P, N], the lowest digit's first, and the bias."""
    count = digit_count(y.dtype)
    parts = products.unflatten(0, (-1, count)).unbind(1)
    total = sum(parts[1:], parts[0])
    if bias is not None:
        total = total + bias.float()
    return y.copy_(total.view(y.shape))
