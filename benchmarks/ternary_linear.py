"""ternary_linear: a whole TernaryLinear call against llama.cpp's ternary kernels, torch, and the machine's limits.

The call is the module's: encoding, integer product and epilogue, under no_grad. Weights rotate through four times the
last-level cache. Weights of every provider are made from one random matrix; each is checked against the numbers it stores.

    python benchmarks/ternary_linear.py --quick
    python benchmarks/ternary_linear.py --csv ternary.csv --plot ternary.png --check
"""

from __future__ import annotations

import copy
import sys
from functools import partial

import torch
from _claims import LARGE, print_claims, ternary_linear_claims
from _harness import Bench, Candidate, arguments, copies_for
from _plots import plot_ternary
from _report import print_table, was_quiet, write
from peers import llama_cpp, torch_float
from peers.base import Peer
from spike_linear import OURS, TOKENS, Variant, make_linear, our_candidate, peer_candidate, stored_bytes
from torch import Tensor

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm.saliency import salient_channels
from ranvier.nn import SpikingLinear, TernaryLinear

PEERS: list[Peer] = [*llama_cpp.TERNARY_PEERS, *(peer for peer in torch_float.PEERS if peer.dtype == "bfloat16")]
PROVIDERS = 8  # that hold weights at the same time: they share the memory cap
_TERNARY = {"weight_bits": 2, "act_bits": 8, "weight_grid": "ternary"}
_MAIN = SpikeConfig(**_TERNARY, steps=2, salient=0.05)
VARIANTS = [
    Variant(OURS, _MAIN),
    Variant(f"{OURS} bfloat16", _MAIN, torch.bfloat16),
    Variant(f"{OURS} no salient channel", SpikeConfig(**_TERNARY, steps=1, salient=0.0)),
    Variant(f"{OURS} 20 % salient", SpikeConfig(**_TERNARY, steps=2, salient=0.20)),
    Variant(f"{OURS} W4A8", SpikeConfig(act_bits=8, steps=1, salient=0.0)),
    Variant(f"{OURS} avx2", _MAIN, isa="avx2"),
    Variant(f"{OURS} scalar", _MAIN, isa="scalar", most_tokens=8),
]


class OurLayers:
    """Copies of a layer that rotate, made once a configuration and shared by the variants that run it."""

    def __init__(self, n: int, k: int) -> None:
        self._linear, self._made = make_linear(n, k), {}

    def of(self, config: SpikeConfig) -> list[SpikingLinear]:
        if config not in self._made:
            k = self._linear.in_features
            mask, generator = torch.zeros(k, dtype=torch.bool), torch.Generator().manual_seed(k)
            if config.salient:
                mask[torch.randperm(k, generator=generator)[: salient_channels(k, config.salient)]] = True
            cls = TernaryLinear if config.weight_bits == 2 else SpikingLinear
            first = cls.from_linear(self._linear, config, mask)
            count = copies_for(stored_bytes(first), PROVIDERS)
            self._made[config] = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        return self._made[config]


def named(candidate: Candidate) -> Candidate:
    candidate.labels["op"] = "ternary_linear"
    return candidate


def absent_rows(bench: Bench) -> list[dict]:
    """A row for every peer that this run leaves out."""
    missing = [(peer.name, peer.missing()) for peer in PEERS]
    row = {"op": "ternary_linear", "metric": "absent", **vars(bench.run)}
    return [{**row, "provider": name, "note": reason} for name, reason in missing if reason]


def compare(n: int, k: int, tokens: list[int], bench: Bench) -> list[dict]:
    """Every provider at every M of one shape."""
    ours, weight = OurLayers(n, k), make_linear(n, k).weight.data
    copies = partial(copies_for, providers=PROVIDERS)
    peers = [(peer, peer.load(weight, copies)) for peer in PEERS if not peer.missing() and k % peer.multiple == 0]
    levels, rows = ranvier._C.isa_levels(), []
    for m in tokens:
        x: Tensor = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        candidates = [our_candidate(v, ours.of(v.config), x) for v in VARIANTS if v.runs(m, k, levels)]
        candidates += [peer_candidate(p.name, p.dtype, layers, n, x) for p, layers in peers if p.sizes(m)]
        results, measured = bench.compare([named(c) for c in candidates])
        rows += measured
        best = results[0]
        text = f"{best.median * 1e6:.1f} us, {best.limit_fraction:.2f} of the {best.bound} limit"
        print(f"{n} x {k}, M = {m}: {text}", file=sys.stderr)
    return rows


def main() -> None:
    options = arguments(__doc__, claims=True).parse_args()
    bench = Bench.begin(options)
    rows = absent_rows(bench)
    shapes = [(4096, 4096, [1, 8, 512])] if bench.quick else [(n, k, TOKENS) for n, k in LARGE]
    with torch.no_grad():
        for n, k, tokens in shapes:
            rows += compare(n, k, tokens, bench)
    print_table(rows)
    write(rows, options, plot_ternary)
    if options.check:
        print_claims(ternary_linear_claims(rows), was_quiet(rows))


if __name__ == "__main__":
    main()
