"""spike_rms_norm: norm and spike codes in one pass, against the same in two calls and torch's operations for the norm.

python benchmarks/spike_rms_norm.py --quick
python benchmarks/spike_rms_norm.py --csv norm.csv --plot norm.png
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from _encoded import Fused
from torch import Tensor

from ranvier.ops import spike_rms_norm
from ranvier.reference.spike_rms_norm import rms_norm

EPS = 1e-5


def weights(xs: Sequence[Tensor]) -> list[Tensor]:
    """One weight, which every repetition reads again, as a layer's calls do."""
    return [(1 + torch.rand(xs[0].shape[-1])).to(xs[0].dtype)] * len(xs)


FUSED = Fused(
    op="spike_rms_norm",
    output="norm",
    channels=(576, 4096),
    other=weights,
    one_pass=lambda x, weight, mask, count: spike_rms_norm(x, weight, EPS, mask, salient_count=count),
    plain=lambda x, weight: rms_norm(x, weight, EPS),
    values=2,
)

if __name__ == "__main__":
    FUSED.main(__doc__)
