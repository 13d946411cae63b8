"""spike_rms_norm: root mean square normalisation, then spike codes of what it gives.

    r = 1 / sqrt(mean_k x_k^2 + eps), in float32 (float64 for float64)
    after_cast     y = w T(x r)          Llama, Mistral, Qwen
    before_cast    y = T(x r w)          torch.nn.RMSNorm
    one_plus       y = T(x r (1 + w))    Gemma;       T: to the type of x

RMSNorm: Zhang and Sennrich, arXiv 1910.07467. Codes: :mod:`ranvier.reference.spike_encode`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ranvier.reference.spike_encode import SpikeCodes, spike_encode

WEIGHTINGS = ("after_cast", "before_cast", "one_plus")


def rms_norm(x: Tensor, weight: Tensor, eps: float, weighting: str = "after_cast") -> Tensor:
    """x [..., K] float, weight [K] of its type -> [..., K]."""
    value = x if x.dtype == torch.float64 else x.float()
    scaled = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    if weighting == "after_cast":
        return weight * scaled.to(x.dtype)
    factor = weight.to(value.dtype)
    return (scaled * (1 + factor if weighting == "one_plus" else factor)).to(x.dtype)


def spike_rms_norm(
    x: Tensor, weight: Tensor, eps: float, weighting: str, salient: Tensor, **rule: object
) -> tuple[Tensor, SpikeCodes]:
    """(y, its codes); rule: the keyword arguments of the reference's spike_encode."""
    y = rms_norm(x, weight, eps, weighting)
    return y, spike_encode(y, salient, **rule)
