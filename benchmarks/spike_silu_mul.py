"""spike_silu_mul: gated product and spike codes in one pass, against torch's two operations and an encoding.

python benchmarks/spike_silu_mul.py --quick
python benchmarks/spike_silu_mul.py --csv silu.csv --plot silu.png
"""

from __future__ import annotations

import sys

import torch
from _harness import Bench, Candidate, WrongValuesError, arguments
from _plots import plot_encode
from _report import print_table, write
from spike_encode import inputs, salient_mask

from ranvier.ops import spike_encode, spike_silu_mul
from ranvier.reference.spike_silu_mul import silu_mul

CHANNELS, TOKENS = (1536, 4096), (1, 8, 64, 512)
DTYPES = (torch.float32, torch.bfloat16)


def candidates(m: int, k: int, dtype: torch.dtype) -> list[Candidate]:
    """The fused op first; its codes must be those of its own float output, which must be torch's within a few."""
    xs, ups, mask = inputs(m, k, dtype), inputs(m, k, dtype)[::-1], salient_mask(k)
    count = int(mask.sum())
    y, codes = spike_silu_mul(xs[0], ups[0], mask, salient_count=count)
    close = torch.allclose(y.float(), silu_mul(xs[0], ups[0]).float(), rtol=1e-5 if dtype == torch.float32 else 2**-6)
    if not close or not all(map(torch.equal, codes, spike_encode(y, mask, salient_count=count))):
        raise WrongValuesError(f"spike_silu_mul {[m, k]}: not the product and its encoding; not timed")
    labels = {"op": "spike_silu_mul", "level": "op", "N": None, "K": k, "M": m, "dtype": str(dtype).removeprefix("torch.")}
    calls = {
        "product and encode in one": lambda i: spike_silu_mul(xs[i], ups[i], mask, salient_count=count),
        "torch product, then encode": lambda i: spike_encode(silu_mul(xs[i], ups[i]), mask, salient_count=count),
        "encode alone": lambda i: spike_encode(xs[i], mask, salient_count=count),
        "torch product alone": lambda i: silu_mul(xs[i], ups[i]),
    }
    moved = xs[0].numel() * (3 * xs[0].element_size() + 1)
    return [Candidate(name, call, 0.0, moved, len(xs), None, labels) for name, call in calls.items()]


def main() -> None:
    options = arguments(__doc__).parse_args()
    bench = Bench.begin(options)
    rows = []
    with torch.no_grad():
        for k in CHANNELS[1:] if bench.quick else CHANNELS:
            for dtype in DTYPES:
                for m in (1, 512) if bench.quick else TOKENS:
                    results, found = bench.compare(candidates(m, k, dtype))
                    rows += found
                    print(f"{dtype}, {m} x {k}: {results[1].ratio(results[0]):.2f}x two calls", file=sys.stderr)
    print_table(rows)
    write(rows, options, plot_encode)


if __name__ == "__main__":
    main()
