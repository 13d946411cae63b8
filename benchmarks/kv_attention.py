"""kv_attention: one new token's attention over a cache, packed at 4 bits against bfloat16 by what torch offers.

Caches rotate through four times the last-level cache. Peers: scaled_dot_product_attention and matmul, softmax, matmul, both
in bfloat16; with fewer kv heads the matmul form reads each of them once for its group of query heads.

    python benchmarks/kv_attention.py --quick
    python benchmarks/kv_attention.py --csv kv.csv --plot kv.png --check
"""

from __future__ import annotations

import sys

import torch
from _claims import Claim, print_claims
from _harness import Bench, Candidate, WrongValuesError, arguments, copies_for, isa_level
from _plots import plot_kv
from _report import print_table, was_quiet, write
from torch import Tensor

from ranvier.ops import KVFormat, kv_attention, kv_decode, kv_encode

OURS, SDPA, MATMUL = "ranvier", "torch sdpa bfloat16", "torch matmul-softmax-matmul bfloat16"
SHAPES = ((32, 32, 128), (32, 8, 128), (9, 3, 64))  # heads, kv heads, D
TOKENS = (256, 1024, 4096, 16384)
CLAIMED = {(32, 32, 128), (32, 8, 128)}
LONGEST = 4096


class Problem:
    """One shape: its query, its packed caches and the bfloat16 ones."""

    def __init__(self, heads: int, kv_heads: int, channels: int, tokens: int) -> None:
        g = torch.Generator().manual_seed(tokens)
        self.shape, self.tokens, count = (heads, kv_heads, channels), tokens, channels - int(0.9 * channels)
        self.mask = torch.zeros(kv_heads, channels, dtype=torch.bool)
        self.mask.scatter_(1, torch.rand(kv_heads, channels, generator=g).argsort(1)[:, :count], True)
        self.form = KVFormat(channels, count, count)
        key, value = (torch.randn(1, kv_heads, tokens, channels, generator=g) for _ in range(2))
        first = self.form.empty(1, kv_heads, self.form.blocks(tokens))
        kv_encode(key, value, first, self.mask, self.mask, 0, form=self.form)
        self.packed = [first, *(first.clone() for _ in range(copies_for(first.numel(), 4) - 1))]
        pair = (key.bfloat16(), value.bfloat16())
        copies = copies_for(2 * pair[0].numel() * 2, 4)
        self.plain = [pair, *(tuple(t.clone() for t in pair) for _ in range(copies - 1))]
        self.query = torch.randn(1, heads, 1, channels, generator=g)
        self.length = torch.tensor([tokens])
        self.new = (key[:, :, -1:].contiguous(), value[:, :, -1:].contiguous())

    def labels(self, dtype: str) -> dict:
        heads, kv_heads, channels = self.shape
        note = f"{heads} heads, {kv_heads} kv heads of {channels}"
        return {"op": "kv_attention", "level": "op", "N": heads, "K": channels, "M": self.tokens, "dtype": dtype, "note": note}

    def ours(self, name: str = OURS, dtype: torch.dtype = torch.float32, isa: str | None = None) -> Candidate:
        """Checked against float64 attention on the dequantized cache."""
        query, options = self.query.to(dtype), {"form": self.form}
        with isa_level(isa):
            got = kv_attention(query, self.packed[0], self.mask, self.mask, self.length, **options)
        pair = (x.double() for x in kv_decode(self.packed[0], self.mask, self.mask, self.tokens, form=self.form))
        check(name, got, full_attention(query.double(), *pair), 2e-3 if dtype == torch.float32 else 1e-2)
        moved = self.packed[0].numel()
        memory = [(t.data_ptr(), t.numel()) for t in self.packed] if name == OURS else ()
        operations = 4.0 * query.numel() * self.tokens
        call = lambda i: kv_attention(query, self.packed[i], self.mask, self.mask, self.length, **options)  # noqa: E731
        labels = self.labels(str(dtype)[6:])
        return Candidate(name, call, operations, moved, len(self.packed), isa, labels, memory)

    def append(self) -> Candidate:
        """One token's keys and values into the cache."""
        at, labels = self.length - 1, {**self.labels("float32"), "op": "kv_attention_encode"}
        call = lambda i: kv_encode(*self.new, self.packed[i], self.mask, self.mask, at, form=self.form)  # noqa: E731
        return Candidate(f"{OURS} append one token", call, 0.0, 0.0, len(self.packed), None, labels)

    def peers(self) -> list[Candidate]:
        query, moved = self.query.bfloat16(), 4.0 * self.plain[0][0].numel()
        heads, kv_heads, channels = self.shape
        grouped, scale = query.view(1, kv_heads, heads // kv_heads, channels), channels**-0.5

        def sdpa(i: int) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, *self.plain[i], enable_gqa=heads != kv_heads)

        def matmul(i: int) -> Tensor:
            key, value = self.plain[i]
            return ((grouped @ key.transpose(-1, -2)) * scale).softmax(-1) @ value

        truth = full_attention(query.double(), *(x.double() for x in self.plain[0]))
        found = []
        for name, call in ((SDPA, sdpa), (MATMUL, matmul)):
            check(name, call(0).reshape(truth.shape), truth, 2e-2)
            found.append(Candidate(name, call, 0.0, moved, len(self.plain), None, self.labels("bfloat16")))
        return found


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value


def check(name: str, got: Tensor, truth: Tensor, tolerance: float) -> None:
    """Random values of size one: outputs are of size one and less, errors are absolute."""
    worst = float((got.double() - truth).abs().max())
    if not worst <= tolerance:
        raise WrongValuesError(f"kv_attention {name}: error {worst:.2e}, allowed {tolerance:.0e}; not timed")


def compare(problem: Problem, bench: Bench) -> list[dict]:
    candidates = [problem.ours(), problem.ours(f"{OURS} bfloat16", torch.bfloat16), problem.ours(f"{OURS} avx2", isa="avx2")]
    candidates += [*problem.peers(), problem.append()]
    results, rows = bench.compare(candidates)
    print(f"{problem.shape}, {problem.tokens} tokens: {1e3 * results[0].median:.3f} ms", file=sys.stderr)
    return rows


def claims(rows: list[dict]) -> list[Claim]:
    """What decode attention was to reach at 4,096 cached tokens on two threads."""
    found = {(r["provider"], r["note"]): r["ratio_to_ours"] for r in rows if r["M"] == LONGEST}
    notes = [f"{h} heads, {k} kv heads of {d}" for h, k, d in SHAPES if (h, k, d) in CLAIMED]
    made = [
        Claim(f"{note}, 4096 tokens, times as fast as {peer}", found.get((peer, note)), needed)
        for note in notes
        for peer, needed in ((SDPA, 8.0), (MATMUL, 3.0))
    ]
    shares = [KVFormat(d, d - int(0.9 * d), d - int(0.9 * d)).share_of_bf16 for d in (64, 128)]
    return [*made, Claim("bytes of the cache over bfloat16's, heads of 64 and 128", max(shares), 0.30, most=True)]


def main() -> None:
    options = arguments(__doc__, claims=True).parse_args()
    bench = Bench.begin(options)
    rows = []
    with torch.no_grad():
        for shape in SHAPES[:2] if bench.quick else SHAPES:
            for tokens in (LONGEST,) if bench.quick else TOKENS:
                rows += compare(Problem(*shape, tokens), bench)
    print_table(rows)
    if options.check:
        print_claims(claims(rows), was_quiet(rows))
    write(rows, options, plot_kv)


if __name__ == "__main__":
    main()
