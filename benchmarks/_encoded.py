"""What the benchmarks of ops that compute a float output and encode it in the same pass share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from _harness import Bench, Candidate, WrongValuesError, arguments
from _plots import plot_encode
from _report import print_table, write
from spike_encode import inputs, salient_mask
from torch import Tensor

from ranvier.ops import spike_encode

TOKENS, DTYPES = (1, 8, 64, 512), (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Fused:
    """An op, what its float output is called, the two ways to compute it, and the values a channel reads and writes.

    one_pass(x, other, mask, count) gives (float output, codes), plain(x, other) the float output by torch's operations;
    other(xs) is the second input, one a repetition.
    """

    op: str
    output: str
    channels: tuple[int, ...]
    other: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    one_pass: Callable[..., tuple]
    plain: Callable[[Tensor, Tensor], Tensor]
    values: int

    def candidates(self, m: int, k: int, dtype: torch.dtype) -> list[Candidate]:
        """The op first; its codes must be those of its own float output, which must be torch's within a rounding."""
        xs, mask = inputs(m, k, dtype), salient_mask(k)
        others, count = self.other(xs), int(mask.sum())
        y, codes = self.one_pass(xs[0], others[0], mask, count)
        close = torch.allclose(y.float(), self.plain(xs[0], others[0]).float(), rtol=1e-5 if dtype == torch.float32 else 2**-6)
        if not close or not all(map(torch.equal, codes, spike_encode(y, mask, salient_count=count))):
            raise WrongValuesError(f"{self.op} {[m, k]}: not the {self.output} and its encoding; not timed")
        labels = {"op": self.op, "level": "op", "N": None, "K": k, "M": m, "dtype": str(dtype).removeprefix("torch.")}
        calls = {
            f"{self.output} and encode in one": lambda i: self.one_pass(xs[i], others[i], mask, count),
            f"torch {self.output}, then encode": lambda i: spike_encode(
                self.plain(xs[i], others[i]), mask, salient_count=count
            ),
            "encode alone": lambda i: spike_encode(xs[i], mask, salient_count=count),
            f"torch {self.output} alone": lambda i: self.plain(xs[i], others[i]),
        }
        moved = xs[0].numel() * (self.values * xs[0].element_size() + 1)
        return [Candidate(name, call, 0.0, moved, len(xs), None, labels) for name, call in calls.items()]

    def main(self, doc: str) -> None:
        """The command line of the benchmark whose module says doc."""
        options = arguments(doc).parse_args()
        bench = Bench.begin(options)
        rows = []
        with torch.no_grad():
            for k in self.channels[1:] if bench.quick else self.channels:
                for dtype in DTYPES:
                    for m in (1, 512) if bench.quick else TOKENS:
                        results, found = bench.compare(self.candidates(m, k, dtype))
                        rows += found
                        print(f"{dtype}, {m} x {k}: {results[1].ratio(results[0]):.2f}x two calls", file=sys.stderr)
        print_table(rows)
        write(rows, options, plot_encode)
