"""flash_attention: attention of a prompt in float32 and bfloat16 against what torch offers on the CPU.

Peers: scaled_dot_product_attention with grouped heads, and matmul, softmax, matmul with a causal mask.

    python benchmarks/flash_attention.py --quick
    python benchmarks/flash_attention.py --csv flash.csv --plot flash.png --check
"""

from __future__ import annotations

import sys

import torch
from _claims import Claim, print_claims
from _harness import Bench, Candidate, WrongValuesError, arguments
from _plots import plot_kv
from _report import print_table, was_quiet, write
from torch import Tensor

from ranvier.ops import flash_attention
from ranvier.reference import flash_attention as reference

OURS, SDPA, MATMUL = "ranvier", "torch sdpa", "torch matmul-softmax-matmul"
SHAPES = ((9, 3, 64), (32, 32, 128), (32, 8, 128))  # heads, kv heads, D
TOKENS = (128, 512, 2048)
DTYPES = (torch.float32, torch.bfloat16)
CLAIMED = ((9, 3, 64), 512)  # SmolLM2-135M, a prompt of 512


def candidates(shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> list[Candidate]:
    """Ours first; every result is held against float64 attention."""
    (heads, kv_heads, channels), g = shape, torch.Generator().manual_seed(tokens)
    sizes = ((1, tokens, heads, channels), (1, tokens, kv_heads, channels), (1, tokens, kv_heads, channels))
    q, k, v = (torch.randn(size, generator=g).to(dtype).transpose(1, 2) for size in sizes)
    scale = channels**-0.5
    hidden = torch.zeros(tokens, tokens, dtype=dtype).masked_fill_(~reference.visible(tokens, tokens, True), -torch.inf)

    def sdpa(_: int) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def matmul(_: int) -> Tensor:
        grouped = q.unflatten(1, (kv_heads, -1))
        weights = (scale * (grouped @ k.unsqueeze(2).transpose(-1, -2)) + hidden).softmax(-1)
        return (weights @ v.unsqueeze(2)).flatten(1, 2)

    truth = reference.flash_attention(q.double(), k.double(), v.double(), True, scale)
    labels = {
        "op": "flash_attention", "level": "op", "N": heads, "K": channels, "M": tokens, "dtype": str(dtype)[6:],
        "note": f"{heads} heads, {kv_heads} kv heads of {channels}",
    }  # fmt: skip
    found = []
    for name, call in ((OURS, lambda _: flash_attention(q, k, v)), (SDPA, sdpa), (MATMUL, matmul)):
        worst, allowed = float((call(0).double() - truth).abs().max()), 1e-5 if dtype == torch.float32 else 4e-2
        if not worst <= allowed:
            raise WrongValuesError(f"flash_attention {name}: error {worst:.2e}, allowed {allowed:.0e}; not timed")
        moved = sum(t.numel() * t.element_size() for t in (q, q, k, v))
        full = name if dtype == torch.float32 else f"{name} bfloat16"
        found.append(Candidate(full, call, 0.0, moved, 1, None, labels))
    return found


def claims(rows: list[dict]) -> list[Claim]:
    """What the kernel is there for: the prompt of a small model."""
    (heads, kv_heads, channels), tokens = CLAIMED
    note = f"{heads} heads, {kv_heads} kv heads of {channels}"
    found = {(r["provider"], r["note"], r["M"]): r["ratio_to_ours"] for r in rows}
    best = [found[name, note, tokens] for name in (SDPA, MATMUL) if (name, note, tokens) in found]
    text = f"{note}, {tokens} tokens, float32, times as fast as the faster of sdpa and matmul-softmax-matmul"
    return [Claim(text, min(best) if best else None, 1.5)]


def main() -> None:
    options = arguments(__doc__, claims=True).parse_args()
    bench = Bench.begin(options)
    rows = []
    with torch.no_grad():
        for shape in SHAPES[:1] if bench.quick else SHAPES:
            for tokens in TOKENS[1:2] if bench.quick else TOKENS:
                for dtype in DTYPES:
                    results, found = bench.compare(candidates(shape, tokens, dtype))
                    rows += found
                    print(f"{shape}, {tokens}, {dtype}: {1e3 * results[0].median:.3f} ms", file=sys.stderr)
    print_table(rows)
    if options.check:
        print_claims(claims(rows), was_quiet(rows))
    write(rows, options, plot_flash)


def plot_flash(rows: list[dict], path: str) -> None:
    """Milliseconds a prompt over its length."""
    plot_kv(rows, path, "flash_attention", "tokens of the prompt", "ms a prompt", "Attention of a prompt, causal")


if __name__ == "__main__":
    main()
