"""hadamard: the transform before down_proj, by width, input dtype, instruction-set level and number of tokens.

The limit is memory: x is read once and y is written once. A small x stays in the caches and can beat it, and a width whose
core is large (11008 = 172 x 64) is bound by its additions. torch has the same rotation as a product with the dense matrix.

    python benchmarks/hadamard.py --quick
    python benchmarks/hadamard.py --csv hadamard.csv --plot hadamard.png
"""

from __future__ import annotations

import functools
import sys

import torch
from _harness import Bench, Candidate, arguments, check_values, isa_level, last_level_cache
from _plots import plot_encode
from _report import print_table, write
from torch import Tensor

from ranvier import _C
from ranvier.ops import hadamard
from ranvier.reference.hadamard import hadamard as reference
from ranvier.reference.hadamard import hadamard_matrix

CHANNELS = (576, 1536, 4096, 11008, 14336)
TOKENS = (1, 8, 64, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("avx2", "scalar")
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@functools.cache
def dense(k: int) -> Tensor:
    return hadamard_matrix(k, torch.float32) / k**0.5


def inputs(m: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    """Copies of x that rotate through twice the last-level cache; one at small M, which a layer finds in the cache."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    copies = 1 if m < 64 else max(2, -(-2 * last_level_cache() // (2 * x.numel() * x.element_size())))
    return [x, *(x.clone() for _ in range(min(copies, 64) - 1))]


def candidates(xs: list[Tensor]) -> list[Candidate]:
    """The op, its lower levels, and torch: each must be the float64 transform up to rounding."""
    (m, k), dtype = xs[0].shape, xs[0].dtype
    labels = {"op": "hadamard", "level": "op", "N": None, "K": k, "M": m, "dtype": str(dtype).removeprefix("torch.")}
    moved = 2 * xs[0].numel() * xs[0].element_size()
    truth = reference(xs[0][:4].double(), k)
    size = xs[0][:4].double().norm(dim=-1, keepdim=True).expand_as(truth)
    ways = {"ranvier": (hadamard, None)}
    ways.update({f"ranvier {isa}": (hadamard, isa) for isa in LEVELS if isa in _C.isa_levels()})
    if k <= 4096:  # beyond, the matrix alone is half a gigabyte
        matrix = dense(k).to(dtype)
        ways[f"torch x @ H ({labels['dtype']})"] = (lambda x: x @ matrix, None)
    found = []
    for name, (call, isa) in ways.items():
        with isa_level(isa):
            # Of the size of a row: a float32 sum's rounding, and one of the output's type (of the matrix's for the product).
            check_values(f"{name} {[m, k]}", call(xs[0])[:4], truth, size, 4 * EPSILON[dtype])
        found.append(Candidate(name, lambda i, call=call: call(xs[i]), 0.0, moved, len(xs), isa, labels))
    return found


def compare(m: int, k: int, dtype: torch.dtype, bench: Bench) -> list[dict]:
    """Everything on one input."""
    results, rows = bench.compare(candidates(inputs(m, k, dtype)))
    for row in rows:
        row["ns_per_token"] = 1e3 * row["value"] / m
    print(f"{dtype}, {m} x {k}: {1e9 * results[0].median / m:.0f} ns a token, {rows[0]['gbs']:.1f} GB/s", file=sys.stderr)
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    bench = Bench.begin(options)
    quick = bench.quick
    rows = []
    with torch.no_grad():
        for k in (1536, 4096, 11008) if quick else CHANNELS:
            for dtype in DTYPES[:2] if quick else DTYPES:
                for m in (1, 64) if quick else TOKENS:
                    rows += compare(m, k, dtype, bench)
    print_table(rows)
    write(rows, options, functools.partial(plot_encode, title="Hadamard transform of the channels"))


if __name__ == "__main__":
    main()
