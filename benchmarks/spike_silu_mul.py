"""spike_silu_mul: gated product and spike codes in one pass, against torch's two operations and an encoding.

python benchmarks/spike_silu_mul.py --quick
python benchmarks/spike_silu_mul.py --csv silu.csv --plot silu.png
"""

from __future__ import annotations

from _encoded import Fused

from ranvier.ops import spike_silu_mul
from ranvier.reference.spike_silu_mul import silu_mul

FUSED = Fused(
    op="spike_silu_mul",
    output="product",
    channels=(1536, 4096),
    other=lambda xs: [x.clone() for x in reversed(xs)],
    one_pass=lambda x, up, mask, count: spike_silu_mul(x, up, mask, salient_count=count),
    plain=silu_mul,
    values=3,
)

if __name__ == "__main__":
    FUSED.main(__doc__)
