"""spike_encode: activations to spike codes, by input dtype, format, instruction-set level and number of tokens.

The limit is memory: x is read once and the codes are written once. A small x stays in the caches and can beat it. The
torch reference is what the released code does in float tensors, one operation after the other.

    python benchmarks/spike_encode.py --quick
    python benchmarks/spike_encode.py --csv encode.csv --plot encode.png
"""

from __future__ import annotations

import sys

import torch
from _harness import Bench, Candidate, WrongValuesError, arguments, isa_level, last_level_cache
from _plots import plot_encode
from _report import print_table, write
from torch import Tensor

from ranvier import _C
from ranvier.ops import spike_encode
from ranvier.reference.spike_encode import spike_encode as reference

CHANNELS = (576, 1536, 4096, 11008)
TOKENS = (1, 8, 64, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS: dict[str, dict] = {
    "consistent": {"act_bits": 4, "steps": 2, "span": "shared", "grid": "consistent", "group_size": None},
    "separate": {"act_bits": 4, "steps": 1, "span": "separate", "grid": "consistent", "group_size": None},
    "compat": {"act_bits": 4, "steps": 2, "span": "shared", "grid": "compat", "group_size": None},
    "group 128": {"act_bits": 4, "steps": 2, "span": "shared", "grid": "consistent", "group_size": 128},
    "W4A8": {"act_bits": 8, "steps": 1, "span": "shared", "grid": "consistent", "group_size": None},
}
LEVELS = ("avx2", "scalar")


def salient_mask(k: int) -> Tensor:
    """A tenth of the channels, anywhere."""
    mask = torch.zeros(k, dtype=torch.bool)
    mask[torch.randperm(k, generator=torch.Generator().manual_seed(k))[: k - int(0.9 * k)]] = True
    return mask


def inputs(m: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    """Copies of x that rotate through twice the last-level cache; one at small M, which a layer finds in the cache."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    copies = 1 if m < 64 else max(2, -(-2 * last_level_cache() // (x.numel() * x.element_size())))
    return [x, *(x.clone() for _ in range(min(copies, 64) - 1))]


def candidate(name: str, rule: dict, xs: list[Tensor], isa: str | None = None) -> Candidate:
    """The op under a format; its codes, scales and sums must be the reference's, bit for bit."""
    m, k = xs[0].shape
    mask = salient_mask(k) if rule["act_bits"] < 8 else None
    count = int(mask.sum()) if mask is not None else 0
    with isa_level(isa):
        got = spike_encode(xs[0], mask, salient_count=count, **rule)
    none = torch.zeros(k, dtype=torch.bool)
    truth = reference(xs[0], none if mask is None else mask, **rule)
    for field, ours, theirs in zip(got._fields, got, truth, strict=True):
        if not torch.equal(ours, theirs):
            raise WrongValuesError(f"spike_encode {name} {[m, k]}: {field} differs from the reference; not timed")
    moved = xs[0].numel() * (xs[0].element_size() + 1)
    return Candidate(
        name, lambda i: spike_encode(xs[i], mask, salient_count=count, **rule), 0.0, moved, len(xs), isa, labels(xs[0])
    )


def reference_candidate(xs: list[Tensor]) -> Candidate:
    rule, mask = FORMATS["consistent"], salient_mask(xs[0].shape[1])
    moved = xs[0].numel() * (xs[0].element_size() + 1)
    return Candidate("torch reference", lambda i: reference(xs[i], mask, **rule), 0.0, moved, len(xs), None, labels(xs[0]))


def labels(x: Tensor) -> dict:
    (m, k), dtype = x.shape, str(x.dtype).removeprefix("torch.")
    return {"op": "spike_encode", "level": "op", "N": None, "K": k, "M": m, "dtype": dtype}


def compare(m: int, k: int, dtype: torch.dtype, bench: Bench) -> list[dict]:
    """Every format, the lower levels and the reference on one input."""
    xs = inputs(m, k, dtype)
    candidates = [candidate(name, rule, xs) for name, rule in FORMATS.items()]
    candidates += [candidate(f"consistent {isa}", FORMATS["consistent"], xs, isa) for isa in LEVELS if isa in _C.isa_levels()]
    candidates.append(reference_candidate(xs))
    results, rows = bench.compare(candidates)
    for row in rows:
        row["ns_per_token"] = 1e3 * row["value"] / m
    first = results[0]
    print(f"{dtype}, {m} x {k}: {1e9 * first.median / m:.0f} ns a token, {rows[0]['gbs']:.1f} GB/s", file=sys.stderr)
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    bench = Bench.begin(options)
    quick = bench.quick
    rows = []
    with torch.no_grad():
        for k in (4096,) if quick else CHANNELS:
            for dtype in DTYPES[:2] if quick else DTYPES:
                for m in (1, 64, 512) if quick else TOKENS:
                    rows += compare(m, k, dtype, bench)
    print_table(rows)
    write(rows, options, plot_encode)


if __name__ == "__main__":
    main()
