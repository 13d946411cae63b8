"""spike_rms_norm: norm and spike codes in one pass, against the same in two calls and torch's operations for the norm.

python benchmarks/spike_rms_norm.py --quick
python benchmarks/spike_rms_norm.py --csv norm.csv --plot norm.png
"""

from __future__ import annotations

import sys

import torch
from _harness import Bench, Candidate, WrongValuesError, arguments
from _plots import plot_encode
from _report import print_table, write
from spike_encode import inputs, salient_mask

from ranvier.ops import spike_encode, spike_rms_norm
from ranvier.reference.spike_rms_norm import rms_norm

CHANNELS, TOKENS, EPS = (576, 4096), (1, 8, 64, 512), 1e-5
DTYPES = (torch.float32, torch.bfloat16)


def candidates(m: int, k: int, dtype: torch.dtype) -> list[Candidate]:
    """The fused op first; its codes must be those of its own float output, which must be torch's within a rounding."""
    xs, mask = inputs(m, k, dtype), salient_mask(k)
    weight, count = (1 + torch.rand(k)).to(dtype), int(mask.sum())
    y, codes = spike_rms_norm(xs[0], weight, EPS, mask, salient_count=count)
    close = torch.allclose(y.float(), rms_norm(xs[0], weight, EPS).float(), rtol=1e-5 if dtype == torch.float32 else 2**-6)
    if not close or not all(map(torch.equal, codes, spike_encode(y, mask, salient_count=count))):
        raise WrongValuesError(f"spike_rms_norm {[m, k]}: not the norm and its encoding; not timed")
    labels = {"op": "spike_rms_norm", "level": "op", "N": None, "K": k, "M": m, "dtype": str(dtype).removeprefix("torch.")}
    calls = {
        "norm and encode in one": lambda i: spike_rms_norm(xs[i], weight, EPS, mask, salient_count=count),
        "torch norm, then encode": lambda i: spike_encode(rms_norm(xs[i], weight, EPS), mask, salient_count=count),
        "encode alone": lambda i: spike_encode(xs[i], mask, salient_count=count),
        "torch norm alone": lambda i: rms_norm(xs[i], weight, EPS),
    }
    moved = xs[0].numel() * (2 * xs[0].element_size() + 1)
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
