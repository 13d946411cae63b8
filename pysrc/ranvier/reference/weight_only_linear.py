"""weight_only_linear: float activations x 4-bit weights.

    y = x W^^T + b,   W^ = s_w (q - z_w)

The compiled form writes a token as radix-256 digits, x = s sum_p 256^p d_p with |d_p| <= 128, and sums integer products:

    y[m, n] = b[n] + sum_p 256^p s[m] sum_g s_w[n, g] sum_{k in g} d_p[m, k] (q[n, k] - z_w[n, g])

s = max_k |x| / TOP[P], so |x - x^| <= s / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = {1: 127, 2: 127 * 257, 3: 127 * 65793}  # 127 (256^P - 1) / 255: the largest number of P digits of at most 127
STEP_MIN = 1e-37


def digit_count(dtype: torch.dtype) -> int:
    """Digits whose step is finer than this dtype's own rounding at the token's largest magnitude: 3 for float32, else 2."""
    return 2 if dtype in (torch.bfloat16, torch.float16) else 3


def radix_digits(x: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (int8 [..., P, K] the lowest digit first, step float32 [..., 1]). NaN or Inf: step NaN, digits 0."""
    x = x.float()
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    step = (x.abs().amax(-1, keepdim=True) / TOP[digits]).clamp(min=STEP_MIN)
    rest = torch.round(x / step).clamp(-TOP[digits], TOP[digits]).to(torch.int32)
    found = []
    for _ in range(digits):
        digit = ((rest + 128) & 255) - 128
        found.append(digit)
        rest = (rest - digit) >> 8
    return torch.stack(found, -2).to(torch.int8), torch.where(finite, step, float("nan"))


def weight_only_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the dequantized weight [N, K] in float64: [..., N]."""
    y = x.to(torch.float64) @ weight.to(torch.float64).T
    return y if bias is None else y + bias.to(torch.float64)
