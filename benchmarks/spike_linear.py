"""spike_linear: a whole SpikingLinear call against what a user would pick instead and against the machine's limits.

The call is the module's: encoding, integer product and epilogue, under no_grad. Weights rotate through four times the
last-level cache. Variants of the layer, lower instruction-set levels and peers are measured in the same rounds.

    python benchmarks/spike_linear.py --quick
    python benchmarks/spike_linear.py --csv linear.csv --plot linear.png --check
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from _claims import LARGE, print_claims, spike_linear_claims
from _harness import (
    Bench,
    Candidate,
    Measured,
    arguments,
    check_values,
    copies_for,
    isa_level,
    some_outputs,
)
from _plots import plot_linear
from _report import print_table, was_quiet, write
from peers import PEERS
from peers.base import BFLOAT16, FLOAT32, Layers, call_bytes
from torch import Tensor, nn

import ranvier
from ranvier import SpikeConfig

OURS = "ranvier"
SMALL = [(576, 576), (1536, 576)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
SWEEP = [*range(1, 33), 36, 37, 40, 48, 49, 60, 61, 64, 72, 73, 80, 96, 97, 112, 128, 160, 192, 256, 320, 384, 448, 512]
PROVIDERS = 16  # that hold weights at the same time: they share the memory cap


@dataclass(frozen=True)
class Variant:
    """A layer as it may be configured, or run: rows carry its name."""

    name: str
    config: SpikeConfig
    dtype: torch.dtype = torch.float32
    isa: str | None = None
    most_tokens: int = 512

    def runs(self, m: int, k: int, levels: Sequence[str]) -> bool:
        group = self.config.group_size
        return m <= self.most_tokens and not (group and k % group) and (self.isa is None or self.isa in levels)


_MAIN = SpikeConfig()
VARIANTS = [
    Variant(OURS, _MAIN),
    Variant(f"{OURS} bfloat16", _MAIN, torch.bfloat16),
    Variant(f"{OURS} separate", SpikeConfig(span="separate")),
    Variant(f"{OURS} compat", SpikeConfig(grid="compat")),
    Variant(f"{OURS} group 128", SpikeConfig(group_size=128)),
    Variant(f"{OURS} W4A8", SpikeConfig(act_bits=8, steps=1, salient=0.0)),
    Variant(f"{OURS} avx2", _MAIN, isa="avx2"),
    Variant(f"{OURS} scalar", _MAIN, isa="scalar", most_tokens=8),
]


def make_linear(n: int, k: int, bias: bool = False) -> nn.Linear:
    """Random normal weights and bias."""
    generator = torch.Generator().manual_seed(n * 31 + k)
    linear = nn.Linear(k, n, bias=bias, device="meta")
    linear.weight = nn.Parameter(torch.randn(n, k, generator=generator) * k**-0.5, requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(torch.randn(n, generator=generator), requires_grad=False)
    return linear


def make_layer(linear: nn.Linear, config: SpikeConfig) -> ranvier.nn.SpikingLinear:
    """The spiking layer; its salient channels are anywhere."""
    k, generator = linear.in_features, torch.Generator().manual_seed(linear.in_features)
    mask = torch.zeros(k, dtype=torch.bool)
    mask[torch.randperm(k, generator=generator)[: k - int((1 - config.salient) * k)]] = True
    return ranvier.nn.SpikingLinear.from_linear(linear, config, mask)


def stored_bytes(layer: ranvier.nn.SpikingLinear) -> int:
    return sum(t.numel() * t.element_size() for t in layer.packed_weight if t is not None)


class OurLayers:
    """Copies of a layer that rotate, made once a configuration and shared by the variants that run it."""

    def __init__(self, n: int, k: int) -> None:
        self._shape, self._made = (n, k), {}

    def of(self, config: SpikeConfig) -> list[ranvier.nn.SpikingLinear]:
        if config not in self._made:
            first = make_layer(make_linear(*self._shape), config)
            count = copies_for(stored_bytes(first), PROVIDERS)
            self._made[config] = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        return self._made[config]


def our_candidate(variant: Variant, layers: list, x: Tensor) -> Candidate:
    """Checked against dequantized_input(x) @ dequantized_weight().T in float64 at the variant's own level."""
    first, given = layers[0], x.to(variant.dtype)
    outputs = some_outputs(first.out_features)
    weight, decoded = first.dequantized_weight()[outputs].double(), first.dequantized_input(given.float()).double()
    bias = torch.zeros(len(outputs)) if first.bias is None else first.bias[outputs]
    with isa_level(variant.isa):
        y = first(given)[:, outputs]
    tolerance = BFLOAT16 if variant.dtype == torch.bfloat16 else FLOAT32
    truth, magnitude = decoded @ weight.T + bias.double(), decoded.abs() @ weight.abs().T + bias.double().abs()
    check_values(f"{variant.name} {list(x.shape)}", y, truth, magnitude, tolerance)
    m, k = x.shape
    moved = stored_bytes(first) + call_bytes(given, first.out_features, given.element_size())
    labels = _labels(first.out_features, k, m, str(variant.dtype).removeprefix("torch."))
    return Candidate(
        variant.name,
        lambda i: layers[i](given),
        2.0 * m * k * first.out_features,
        moved,
        len(layers),
        variant.isa,
        labels,
        [(layer.weight_packed.data_ptr(), layer.weight_packed.numel()) for layer in layers],
    )


def peer_candidate(name: str, dtype: str, layers: Layers, n: int, x: Tensor) -> Candidate:
    bound, outputs = layers.bind(x), some_outputs(n)
    weight = layers.weight(outputs)
    y = bound.output()[:, outputs]
    check_values(f"{name} {list(x.shape)}", y, bound.x @ weight.T, bound.x.abs() @ weight.abs().T, layers.tolerance)
    m, k = x.shape
    return Candidate(
        name, bound.call, 2.0 * m * k * n, layers.bytes + bound.bytes, layers.copies, None, _labels(n, k, m, dtype)
    )


def _labels(n: int, k: int, m: int, dtype: str) -> dict:
    return {"op": "spike_linear", "level": "module", "N": n, "K": k, "M": m, "dtype": dtype}


def load_peers(n: int, k: int, quick: bool) -> Iterator[tuple]:
    """(peer, its layers) of those that can run here; the others are reported."""
    weight = make_linear(n, k).weight.data
    for peer in PEERS:
        if peer.missing() or (quick and "compiled" in peer.name):
            continue
        if k % peer.multiple:
            print(f"{peer.name}: not at K = {k}, which is not a multiple of {peer.multiple}", file=sys.stderr)
            continue
        yield peer, peer.load(weight, partial(copies_for, providers=PROVIDERS))


def absent_rows(bench: Bench) -> list[dict]:
    """A row for every peer that this run leaves out."""
    rows = []
    for peer in PEERS:
        reason = peer.missing() or ("left out by --quick" if bench.quick and "compiled" in peer.name else None)
        if reason:
            rows.append({"op": "spike_linear", "provider": peer.name, "metric": "absent", "note": reason, **vars(bench.run)})
    return rows


def compare(n: int, k: int, tokens: list[int], bench: Bench) -> list[dict]:
    """Every provider at every M of one shape."""
    ours, peers = OurLayers(n, k), list(load_peers(n, k, bench.quick))
    levels = ranvier._C.isa_levels()
    rows = []
    for m in tokens:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        candidates = [our_candidate(v, ours.of(v.config), x) for v in VARIANTS if v.runs(m, k, levels)]
        candidates += [peer_candidate(p.name, p.dtype, layers, n, x) for p, layers in peers if p.sizes(m)]
        results, measured = bench.compare(candidates)
        rows += measured
        print(f"{n} x {k}, M = {m}: {_summary(results)}", file=sys.stderr)
    return rows


def _summary(results: list[Measured]) -> str:
    ours = results[0]
    return f"{ours.median * 1e6:.1f} us, {ours.limit_fraction:.2f} of the {ours.bound} limit"


def sweep(n: int, k: int, bench: Bench) -> list[dict]:
    """Our layer alone at many M in the same rounds: does the time per token ever rise?"""
    layers, variant = OurLayers(n, k).of(_MAIN), VARIANTS[0]
    inputs = [torch.randn(m, k, generator=torch.Generator().manual_seed(m)) for m in SWEEP]
    results, rows = bench.compare([our_candidate(variant, layers, x) for x in inputs])
    per_token = [[t / m for t in r.seconds] for m, r in zip(SWEEP, results, strict=True)]
    for i, row in enumerate(rows):
        row["metric"] = "sweep time"
        row["ratio_to_ours"] = None
        if i:
            steps = [now / before for now, before in zip(per_token[i], per_token[i - 1], strict=True)]
            row["per_token_step"] = sorted(steps)[len(steps) // 2]
    return rows


def small_layer(bench: Bench) -> list[dict]:
    """64 x 64 at one token: what a call costs when there is nothing to compute."""
    linear = make_linear(64, 64, bias=True)
    layer, x = make_layer(linear, _MAIN), torch.randn(1, 64)
    ours = our_candidate(VARIANTS[0], [layer], x)
    torch_linear = Candidate("torch float32", lambda i: linear(x), 2.0 * 64 * 64, 4.0 * 65 * 64, labels=ours.labels)
    weight, given = linear.weight.double(), x.double()
    truth = given @ weight.T + linear.bias.double()
    check_values("nn.Linear(64, 64)", linear(x), truth, given.abs() @ weight.abs().T + linear.bias.abs(), FLOAT32)
    return bench.compare([ours, torch_linear], more_rounds=5)[1]


def plan(quick: bool) -> list[tuple[int, int, list[int]]]:
    if quick:
        return [(4096, 4096, [1, 8, 64, 512]), (576, 576, [1, 64])]
    return [(n, k, TOKENS) for n, k in itertools.chain(LARGE, SMALL)]


def main() -> None:
    parser = arguments(__doc__, claims=True)
    parser.add_argument("--no-sweep", action="store_true", help="leave out the fine sweep of M")
    options = parser.parse_args()
    bench = Bench.begin(options)
    rows = absent_rows(bench)
    with torch.no_grad():
        rows += small_layer(bench)
        for n, k, tokens in plan(bench.quick):
            rows += compare(n, k, tokens, bench)
        if not bench.quick and not options.no_sweep:
            rows += sweep(4096, 4096, bench)
    print_table(rows)
    write(rows, options, plot_linear)
    if options.check:
        print_claims(spike_linear_claims(rows), was_quiet(rows))


if __name__ == "__main__":
    main()
