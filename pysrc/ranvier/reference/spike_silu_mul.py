"""spike_silu_mul: the product of a gated layer, then spike codes of it.

    y = T(T(g / (1 + e^-g)) u),    T: to the type of g, computed in float32 (float64 for float64)

SwiGLU: Shazeer, arXiv 2002.05202. Codes: :mod:`ranvier.reference.spike_encode`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from ranvier.reference.spike_encode import SpikeCodes, spike_encode


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [..., K] float of one type -> [..., K]."""
    return silu(gate) * up


def spike_silu_mul(gate: Tensor, up: Tensor, salient: Tensor, **rule: object) -> tuple[Tensor, SpikeCodes]:
    """(y, its codes); rule: the keyword arguments of the reference's spike_encode."""
    y = silu_mul(gate, up)
    return y, spike_encode(y, salient, **rule)
