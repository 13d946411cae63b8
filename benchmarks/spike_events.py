"""spike_events: one token spike by spike against the merged product, by zero fraction and encoding.

All start from the same codes. The merged product has packed 4-bit weights and torch's threads; the event-driven executor
has int16 columns, channel by channel, and one thread. Its cost follows the events, the merged product's does not, and
only centred codes have zeros to skip. Zero points, two fixed columns a token, are taken off before values are checked.

    python benchmarks/spike_events.py --quick
    python benchmarks/spike_events.py --csv events.csv --plot events.png
"""

from __future__ import annotations

import copy
import sys

import torch
from _harness import Bench, Candidate, WrongValuesError, arguments, check_values, copies_for
from _plots import _finish, _new
from _report import print_table, write
from peers.base import FLOAT32
from torch import Tensor, nn

from ranvier import SpikeConfig
from ranvier.nn import SpikingLinear
from ranvier.ops import spike_encode, spike_events, spike_linear
from ranvier.ops.spike_events import op, weight_columns
from ranvier.reference import spike_events as reference
from ranvier.reference.spike_encode import spike_levels

MERGED = "ranvier"
SHAPES = ((4096, 4096), (4096, 11008))
ZEROS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
STYLE = {"unary": "#8c8c8c", "gif": "#d95f02", "ternary": "#7b3294", "bitplane": "#1b9e77", "naf": "#e7298a"}


def make_layer(n: int, k: int) -> SpikingLinear:
    """The paper's W4A4, T = 2 with a tenth of the channels salient, random weights."""
    generator = torch.Generator().manual_seed(n + k)
    linear = nn.Linear(k, n, bias=False)
    linear.weight = nn.Parameter(torch.randn(n, k, generator=generator) * k**-0.5, requires_grad=False)
    mask = torch.zeros(k, dtype=torch.bool)
    mask[torch.randperm(k, generator=generator)[: k - int(0.9 * k)]] = True
    return SpikingLinear.from_linear(linear, SpikeConfig(), mask)


def sparse_token(k: int, zeros: float) -> Tensor:
    """Gaussian, this share of it exactly zero; more of its centred codes are."""
    generator = torch.Generator().manual_seed(round(1e3 * zeros))
    return torch.randn(1, k, generator=generator) * (torch.rand(k, generator=generator) >= zeros)


class Shape:
    """A layer as both ways need it, in copies that rotate through four times the last-level cache."""

    def __init__(self, n: int, k: int) -> None:
        self.first = make_layer(n, k)
        stored = self.first.weight_packed.numel()
        self.layers = [self.first, *(copy.deepcopy(self.first) for _ in range(copies_for(stored, 2) - 1))]
        columns, self.groups, self.count = weight_columns(self.first)
        self.column_bytes = columns.numel() * columns.element_size()
        self.columns = [columns, *(columns.clone() for _ in range(copies_for(self.column_bytes, 2) - 1))]
        self.labels = {"op": "spike_events", "level": "op", "N": n, "K": k, "M": 1, "dtype": "int8"}

    def merged(self, x: Tensor) -> Candidate:
        first = self.first
        form, out, mask = first.format, first.out_features, first.salient_mask
        encoded = spike_encode(x, mask, **form.rule, salient_count=form.salient_count)
        weights = [layer.packed_weight for layer in self.layers]
        y = spike_linear(encoded, weights[0], form, out, salient_mask=mask)
        decoded, weight = first.dequantized_input(x).double(), first.dequantized_weight().double()
        check_values(MERGED, y, decoded @ weight.T, decoded.abs() @ weight.abs().T, FLOAT32)
        counts = spike_events(first, x, execute=False)
        labels = {**self.labels, "zero_fraction": counts.c.zero_fraction, "accumulates": counts.macs}
        return Candidate(
            MERGED, lambda i: spike_linear(encoded, weights[i], form, out, salient_mask=mask),
            2.0 * form.channels * out, first.weight_packed.numel(), len(weights), None, labels,
            [(weight.packed.data_ptr(), weight.packed.numel()) for weight in weights],
        )  # fmt: skip

    def events(self, x: Tensor, encoding: str) -> Candidate:
        """The executor on the code its encoding fires; its integers must be the merged product's."""
        form, mask = self.first.format, self.first.salient_mask
        counts = spike_events(self.first, x, encoding)
        u, c = spike_levels(x, mask, **form.rule)
        if not torch.equal(counts.output[..., 0].double(), c.double() @ self._signed()):
            raise WrongValuesError(f"{encoding}: the spikes do not sum to the merged product; not timed")
        which = reference.ENCODINGS[encoding]
        codes = u if which == "u" else (c // reference.thresholds(mask, **form.rule)).to(torch.int32)
        fired, level = getattr(counts, which), reference.step_level(encoding, form.act_bits)
        labels = {
            **self.labels, "zero_fraction": counts.c.zero_fraction, "spikes": fired.spikes.item(),
            "accumulates": fired.accumulates.item(), "note": f"spikes of {which}",
        }  # fmt: skip
        return Candidate(
            f"event-driven {encoding}",
            lambda i: op(codes, self.columns[i], self.groups, self.count, encoding, level),
            copies=len(self.columns), labels=labels,
        )  # fmt: skip

    def _signed(self) -> Tensor:
        """q - z_w, float64 [K, N]: the columns without their thresholds."""
        t = reference.thresholds(self.first.salient_mask, **self.first.format.rule)
        return self.columns[0].double() / t[:, None]


def plot_events(rows: list[dict], path: str) -> None:
    """Time against the merged product's, and events a channel, over the share of zero centred codes; a row a shape."""
    shapes = list(dict.fromkeys((r["N"], r["K"]) for r in rows))
    figure, axes = _new(len(shapes), 2, (10.5, 3.8 * len(shapes)), sharex=True)
    handles: dict[str, object] = {}
    for (left, right), shape in zip(axes, shapes, strict=True):
        handles["merged product"] = left.axhline(1.0, color="#0b4f9e", lw=2.6)
        for encoding, colour in STYLE.items():
            mine = [r for r in rows if (r["N"], r["K"]) == shape and r["provider"] == f"event-driven {encoding}"]
            line = sorted((r["zero_fraction"], r["ratio_to_ours"], r["spikes"] / r["K"]) for r in mine)
            zeros, ratios, spikes = zip(*line, strict=True)
            name = f"{encoding} ({reference.ENCODINGS[encoding]})"
            handles[name] = left.plot(zeros, ratios, color=colour, marker="o", ms=4)[0]
            right.plot(zeros, spikes, color=colour, marker="o", ms=4)
        left.set(yscale="log", ylabel="time / merged product", title=f"N x K = {shape[0]} x {shape[1]}, one token")
        right.set(yscale="log", ylabel="spikes a channel")
        for axis in (left, right):
            axis.grid(color="0.88", lw=0.6)
            axis.set_xlabel("share of centred codes that are zero")
    figure.legend(list(handles.values()), list(handles), loc="center right", frameon=False)
    figure.tight_layout(rect=(0, 0.36 / figure.get_figheight(), 0.86, 0.97))
    _finish(figure, rows, path, "A spiking linear layer, event by event")


def main() -> None:
    options = arguments(__doc__).parse_args()
    bench = Bench.begin(options)
    rows = []
    with torch.no_grad():
        for n, k in SHAPES[:1] if bench.quick else SHAPES:
            shape = Shape(n, k)
            for zeros in ZEROS[::3] if bench.quick else ZEROS:
                x = sparse_token(k, zeros)
                candidates = [shape.merged(x), *(shape.events(x, encoding) for encoding in reference.ENCODINGS)]
                results, made = bench.compare(candidates)
                rows += made
                best = min(results[1:], key=lambda r: r.ratio(results[0]))
                print(
                    f"{n} x {k}, {made[0]['zero_fraction']:.2f} zeros: {best.candidate.provider} takes"
                    f" {best.ratio(results[0]):.1f} times the merged product",
                    file=sys.stderr,
                )
    print_table(rows)
    write(rows, options, plot_events)


if __name__ == "__main__":
    main()
