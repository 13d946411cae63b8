"""All Triton kernels on one GPU: values against the reference, then Llama-2-7B's linear layers against what a user would pick.

Nothing is timed before every value was checked. Times are CUDA events around replays of a captured graph that calls each copy
of a layer once; copies together are four times the second-level cache, so that weights come from memory. Candidates take
turns; a result is the median over rounds. The limits, a large copy and torch's int8 product, are measured between them.

    python benchmarks/gpu.py --csv benchmarks/results/gpu.csv --check

Peers, where they are installed: pip install torchao gemlite. One that cannot run has a row that says why, and no time.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ranvier import SpikeConfig
from ranvier.nn import SpikingLinear
from ranvier.ops import SpikeFormat, pack_weight, spike_encode, spike_linear, spike_linear_dynamic, spike_rms_norm

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
TOKENS = (1, 8, 16, 64, 2048)
MEMORY_CLAIM, COMPUTE_CLAIM = 0.65, 0.60  # of the bandwidth floor at one token, of the int8 peak at 2048
COPIED = 1 << 30
SLEEP = 1 << 19  # cycles, some 0.3 ms
PEAK_SIZE = 8192
CHECKED_LAYERS = ((4096, 4096, 0), (1030, 70, 0), (4096, 2048, 128), (1000, 96, 32), (11008, 4096, 0))  # K, N, group size
CHECKED_TOKENS = (1, 2, 8, 16, 33, 130)
CHECKED_TERNARY = ((512, 64, 0.0), (1030, 70, 0.3), (4096, 4096, 0.05))  # K, N, share of salient channels
CHECKED_ORDERS = (64, 5120, 11008, 16384, 65536)  # one pass, cores, the longest piece of one pass, two passes
CHECKED_CACHES = ((8, 1, 65), (32, 8, 1000), (32, 32, 4096))  # heads, kv heads, tokens
FORMATS = (
    {"act_bits": 4, "steps": 2, "span": "shared", "grid": "consistent"},
    {"act_bits": 4, "steps": 4, "span": "shared", "grid": "compat"},
    {"act_bits": 4, "steps": 1, "span": "separate", "grid": "consistent"},
    {"act_bits": 8, "steps": 1, "span": "shared", "grid": "consistent"},
)


class WrongValuesError(RuntimeError):
    """A kernel's result is not the reference's; nothing is timed."""


def _same(what: str, got: Tensor, expected: Tensor, tolerance: Tensor | float = 0.0) -> None:
    """Raises WrongValuesError unless |got - expected| <= tolerance everywhere, or both are NaN."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    off = (got - expected).abs() > tolerance
    off |= got.isnan() != expected.isnan()
    if got.shape != expected.shape or bool(off.any()):
        worst = float((got - expected).abs().nan_to_num().max())
        raise WrongValuesError(f"{what}: {int(off.sum())} of {off.numel()} values are off, the worst by {worst:.3e}")


def _layer_input(tokens: int, channels: int) -> Tensor:
    x = torch.randn(tokens, channels)
    x[:, ::97] *= 20
    if tokens > 2:
        x[1, 3] = float("nan")
    return x


def check_spikes(device: torch.device, backend: str | None) -> int:
    """spike_encode has the reference's integers, spike_linear the reference's values: every kernel, split, tail and group."""
    count = 0
    for rule in FORMATS:
        for channels, outputs, group in CHECKED_LAYERS:
            mask = torch.rand(channels) < 0.1
            form = SpikeFormat(channels, int(mask.sum()), **rule, group_size=group)
            weight, bias = pack_weight(torch.randn(outputs, channels), mask, form), torch.randn(outputs)
            there = type(weight)(*(t if t is None else t.to(device) for t in weight))
            for tokens in CHECKED_TOKENS:
                x = _layer_input(tokens, channels)
                options = {"salient_count": form.salient_count, **form.rule, "group_size": group}
                truth = spike_encode(x, mask, **options, backend="reference")
                codes = spike_encode(x.to(device), mask.to(device), **options, backend=backend)
                what = f"{rule}, K={channels}, N={outputs}, M={tokens}, groups of {group}"
                for name, a, b in zip(truth._fields, codes, truth, strict=True):
                    _same(f"spike_encode {name}, {what}", a, b)
                y = spike_linear(truth, weight, form, outputs, bias, mask, dtype=torch.float32, backend="reference")
                given = (there, form, outputs, bias.to(device), mask.to(device))
                # Roundings of float32 in sums whose terms are up to sqrt(K) times the result's size.
                allowed = 2e-5 * y.abs().nan_to_num().amax(-1, keepdim=True)
                _same(f"spike_linear, {what}", spike_linear(codes, *given, backend=backend), y, allowed)
                _same(f"spike_linear_dynamic, {what}", spike_linear_dynamic(x.to(device), *given, backend=backend), y, allowed)
                count += 3
    return count


def check_ternary(device: torch.device, backend: str | None) -> int:
    """ternary_linear: integers exact, so the CPU kernel's values within a rounding."""
    from ranvier.ops.ternary_linear import pack_ternary, ternary_format, ternary_linear, ternary_linear_dynamic

    count = 0
    for channels, outputs, share in CHECKED_TERNARY:
        mask = torch.rand(channels) < share
        form = ternary_format(channels, int(mask.sum()))
        q = torch.where(mask, torch.randint(0, 13, (outputs, channels)), torch.randint(0, 4, (outputs, channels)))
        weight = pack_ternary(q.byte(), torch.rand(outputs, 2), torch.randint(0, 4, (outputs, 2)).byte(), mask, form)
        there = type(weight)(*(t if t is None else t.to(device) for t in weight))
        for tokens in (1, 8, 16, 130):
            codes, scale = torch.randint(-127, 128, (tokens, channels), dtype=torch.int8), torch.rand(tokens, 1)
            y = ternary_linear(codes, scale, weight, outputs, None, mask, backend="reference")
            got = ternary_linear(codes.to(device), scale.to(device), there, outputs, None, mask.to(device), backend=backend)
            _same(f"ternary_linear, K={channels}, M={tokens}", got, y, 2e-6 * float(y.abs().max()))
            x = torch.randn(tokens, channels)
            y = ternary_linear_dynamic(x, weight, form, outputs, None, mask, backend="reference")
            got = ternary_linear_dynamic(x.to(device), there, form, outputs, None, mask.to(device), backend=backend)
            _same(f"ternary_linear_dynamic, K={channels}, M={tokens}", got, y, 2e-6 * float(y.abs().max()))
            count += 2
    return count


def check_weight_only(device: torch.device, backend: str | None) -> int:
    """weight_only_linear against the float product of the dequantized weights, within the steps of its digits."""
    from ranvier.ops import digit_format, weight_only_linear

    count = 0
    for channels, outputs, group in CHECKED_LAYERS:
        form = digit_format(channels, group)
        weight = pack_weight(torch.randn(outputs, channels), None, form)
        there = type(weight)(*(t if t is None else t.to(device) for t in weight))
        for dtype, share in ((torch.float32, 2e-5), (torch.bfloat16, 2.0**-7)):
            for tokens in (1, 33):
                x = torch.randn(tokens, channels).to(dtype)
                y = weight_only_linear(x, weight, form, outputs, backend="reference")
                got = weight_only_linear(x.to(device), there, form, outputs, backend=backend)
                _same(f"weight_only_linear, K={channels}, M={tokens}, {dtype}", got, y, share * float(y.abs().max()))
                count += 1
    return count


def check_hadamard(device: torch.device, backend: str | None) -> int:
    """hadamard: the CPU kernel's bits in both directions."""
    from ranvier.ops import hadamard

    count = 0
    for order in CHECKED_ORDERS:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, order).to(dtype)
            for transpose in (False, True):
                got = hadamard(x.to(device), order, transpose=transpose, backend=backend)
                _same(f"hadamard, {order}, {dtype}", got, hadamard(x, order, transpose=transpose))
                count += 1
    return count


def check_kv(device: torch.device, backend: str | None) -> int:
    """kv_attention in float32 against the formula, at lengths within and at the end of a block, with shared kv heads."""
    from ranvier.ops.kv_attention import KVFormat, kv_attention, kv_encode

    count = 0
    for heads, kv_heads, tokens in CHECKED_CACHES:
        masks = [torch.zeros(kv_heads, 128, dtype=torch.bool) for _ in range(2)]
        for mask in masks:
            mask[:, ::10] = True
        form = KVFormat(128, 13, 13)
        cache = form.empty(1, kv_heads, form.blocks(tokens))
        keys, values = torch.randn(2, 1, kv_heads, tokens, 128).unbind()
        kv_encode(keys, values, cache, *masks, 0, form=form)
        packed = form.empty(1, kv_heads, form.blocks(tokens), device)
        kv_encode(*(t.to(device) for t in (keys, values, packed, *masks)), 0, form=form, backend=backend)
        _same(f"kv_encode, {tokens} tokens", packed, cache)
        query = torch.randn(1, heads, 1, 128)
        truth = kv_attention(query, cache, *masks, tokens, form=form, backend="reference")
        there = [t.to(device) for t in (query, cache, *masks)]
        _same(f"kv_attention, {tokens} tokens", kv_attention(*there, tokens, form=form, backend=backend), truth, 1e-3)
        count += 2
    return count


def check_gate(device: torch.device, backend: str | None) -> int:
    """spike_silu_mul: the CPU kernel's bits, codes included."""
    from ranvier.ops import spike_silu_mul

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        gate, up = (5 * torch.randn(2, 33, 5000)).to(dtype)
        y, codes = spike_silu_mul(gate, up)
        got, its = spike_silu_mul(gate.to(device), up.to(device), backend=backend)
        for name, a, b in (("y", got, y), *zip(codes._fields, its, codes, strict=True)):
            _same(f"spike_silu_mul {name}, {dtype}", a, b)
    return len(dtypes)


def check_norm(device: torch.device, backend: str | None) -> int:
    """spike_rms_norm: torch's values but for the order of one sum, and exactly the codes of the values it returns."""
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        x, weight, mask = torch.randn(33, 5000).to(dtype), torch.rand(5000).to(dtype), torch.rand(5000) < 0.1
        y, codes = spike_rms_norm(x.to(device), weight.to(device), 1e-5, mask.to(device), backend=backend)
        truth = nn.functional.rms_norm(x.double(), (5000,), weight.double(), 1e-5)
        _same(f"spike_rms_norm y, {dtype}", y, truth, 4 * torch.finfo(dtype).eps * truth.abs() + 1e-6)
        for name, a, b in zip(codes._fields, codes, spike_encode(y.cpu(), mask), strict=True):
            _same(f"spike_rms_norm {name}, {dtype}", a, b)
    return len(dtypes)


# Each check and the ops whose kernels it runs.
CHECKS = {
    check_spikes: ("spike_encode", "spike_linear", "spike_linear_dynamic"),
    check_ternary: ("ternary_linear", "ternary_linear_dynamic"),
    check_weight_only: ("weight_only_linear",),
    check_kv: ("kv_attention_encode", "kv_attention"),
    check_gate: ("spike_silu_mul",),
    check_norm: ("spike_rms_norm",),
    check_hadamard: ("hadamard",),
}


def check_values(device: torch.device, backend: str | None = None) -> dict[str, int]:
    """How many results of each group of ops were compared. Raises WrongValuesError for the first that is wrong."""
    torch.manual_seed(1)
    return {", ".join(ops): check(device, backend) for check, ops in CHECKS.items()}


# --- timing -------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One provider at one size; floor_fraction: the larger of the two limits' times over the measured one."""

    device: str
    shape: str
    m: int
    n: int
    k: int
    provider: str
    us: float
    p20: float
    p80: float
    ratio_to_ours: float
    gbs: float
    tops: float
    floor_fraction: float
    copy_gbs: float
    int8_tops: float
    torch: str
    triton: str
    graph: bool
    note: str = ""  # why there is no time


@dataclass
class Candidate:
    provider: str
    calls: list[Callable[[], object]]  # one a copy of the weights
    bytes: float
    replay: Callable[[], None] | None = None
    graph: bool = True


def _capture(candidate: Candidate) -> None:
    """A graph of one call a copy; where capturing fails the calls themselves, which the row then says."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in candidate.calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in candidate.calls:
                call()
        candidate.replay = graph.replay
    except RuntimeError as error:
        print(f"  {candidate.provider}: no graph ({str(error).splitlines()[0]}); timed call by call")
        candidate.graph = False
        candidate.replay = lambda: [call() for call in candidate.calls] and None


def _seconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP)  # all of it is queued before the first event passes: no launch is waited for
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Limits:
    """Bytes a second of a large copy, read and written, and int8 operations a second of torch's own product."""

    def __init__(self, device: torch.device) -> None:
        self._from, self._to = (torch.randint(0, 99, (COPIED,), dtype=torch.uint8, device=device) for _ in range(2))
        self._a, self._b = (torch.randint(-9, 9, (PEAK_SIZE,) * 2, dtype=torch.int8, device=device) for _ in range(2))
        self.measure()

    def measure(self) -> tuple[float, float]:
        copy = _seconds(lambda: self._to.copy_(self._from))
        product = _seconds(lambda: torch._int_mm(self._a, self._b.t()))
        return 2 * COPIED / copy, 2.0 * PEAK_SIZE**3 / product


def _peers(weight: Tensor, x: Tensor, copies: Callable[[float], int]) -> tuple[list[Candidate], dict[str, str]]:
    """What runs, and of what does not the reason."""
    n, k = weight.shape
    moved = 2 * (x.numel() + x.shape[0] * n)
    dense = [weight.clone() for _ in range(copies(2 * n * k))]
    found = [Candidate("torch bf16", [lambda w=w: nn.functional.linear(x, w) for w in dense], 2 * n * k + moved)]
    absent = {}
    for name, (bits, make) in PEERS.items():
        try:
            layers = [make(weight) for _ in range(copies(bits / 8 * n * k))]
            layers[0](x)
        except Exception as error:  # noqa: BLE001  a peer that cannot run is reported and left out
            lines = str(error).splitlines() or [""]
            absent[name] = f"absent: {type(error).__name__}: {lines[0][:160]}"
            continue
        found.append(Candidate(name, [lambda layer=layer: layer(x) for layer in layers], bits / 8 * n * k + moved))
    return found, absent


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _torchao_int4(weight: Tensor) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = _linear(weight)
    # The format whose kernel is torch's own; the default one's comes with another package.
    quantize_(linear, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return linear


def _torchao_int8(weight: Tensor) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = _linear(weight)
    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    return linear


def _torchao_int8_compiled(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.compile(_torchao_int8(weight), dynamic=False)


def _gemlite(weight: Tensor) -> nn.Module:
    from gemlite.helper import A16Wn

    grouped = weight.float().view(-1, 128)  # W = (q - zero) scale
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-low / scale).round()
    q = ((grouped / scale).round() + zero).clamp(0, 15).to(torch.uint8).view(weight.shape)
    return A16Wn(device=str(weight.device)).from_weights(q, scale.to(weight.dtype), zero.to(weight.dtype), 4, 128, None)


# Name: bits of a weight, and how a layer is made.
PEERS = {
    "torchao int4": (4, _torchao_int4),
    "torchao int8": (8, _torchao_int8),
    "torchao int8 compiled": (8, _torchao_int8_compiled),
    "gemlite int4": (4, _gemlite),
}


def _ours(weight: Tensor, x: Tensor, copies: Callable[[float], int], group: int | None) -> Candidate:
    n, k = weight.shape
    mask = torch.zeros(k, dtype=torch.bool, device=weight.device)
    mask[torch.randperm(k, device=weight.device)[: k // 10]] = True
    config = SpikeConfig(act_bits=4, steps=2, group_size=group)
    layers = [SpikingLinear.from_linear(_linear(weight), config, mask) for _ in range(copies(n * k / 2))]
    held = sum(t.numel() * t.element_size() for t in layers[0].packed_weight if t is not None)
    name = "ranvier" if group is None else f"ranvier g{group}"
    return Candidate(name, [lambda layer=layer: layer(x) for layer in layers], held + 2 * (x.numel() + x.shape[0] * n))


def measure(shape: str, tokens: int, rounds: int, limits: Limits, device: torch.device) -> list[Row]:
    """Times every provider at one size, in turns."""
    import triton

    n, k = SHAPES[shape]
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    cache = torch.cuda.get_device_properties(device).L2_cache_size

    def copies(size: float) -> int:
        return max(2, int(4 * cache / size) + 1)

    torch.compiler.reset()  # or later sizes would pass its limit of compilations, and run uncompiled
    peers, absent = _peers(weight, x, copies)
    candidates = [_ours(weight, x, copies, None), _ours(weight, x, copies, 128), *peers]
    for candidate in candidates:
        _capture(candidate)
    seconds: list[list[float]] = [[] for _ in candidates]
    measured = []
    for round_ in range(rounds):
        measured.append(limits.measure())
        for place in range(len(candidates)):
            index = (place + round_) % len(candidates)
            candidate = candidates[index]
            seconds[index].append(_seconds(candidate.replay) / len(candidate.calls))
    bandwidth, peak = (statistics.median(values) for values in zip(*measured, strict=True))
    rows, operations = [], 2.0 * tokens * n * k
    name = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    for candidate, times in zip(candidates, seconds, strict=True):
        time, ordered = statistics.median(times), sorted(times)
        floor = max(candidate.bytes / bandwidth, operations / peak)
        ratio = statistics.median(t / o for t, o in zip(times, seconds[0], strict=True))
        row = Row(
            name, shape, tokens, n, k, candidate.provider, time * 1e6, ordered[len(ordered) // 5] * 1e6,
            ordered[-1 - len(ordered) // 5] * 1e6, ratio, candidate.bytes / time / 1e9, operations / time / 1e12, floor / time,
            bandwidth / 1e9, peak / 1e12, **versions, graph=candidate.graph,
        )  # fmt: skip
        rows.append(row)
        share = f"{row.us:9.1f} us  {row.floor_fraction:5.0%} of the floor  x{ratio:.2f}"
        print(f"  {shape:8} M={tokens:5} {row.provider:22} {share}", flush=True)
    limits_of_row = (bandwidth / 1e9, peak / 1e12)
    for provider, why in absent.items():
        rows.append(
            Row(name, shape, tokens, n, k, provider, *[math.nan] * 7, *limits_of_row, **versions, graph=False, note=why)
        )
        print(f"  {shape:8} M={tokens:5} {provider:22} {why}", flush=True)
    return rows


def claims(rows: list[Row]) -> list[str]:
    """One line a claim and size, beginning with "reached" or "missed"."""
    lines = []
    for row in rows:
        if row.provider != "ranvier" or row.m not in (1, 2048):
            continue
        if row.m == 1:
            share, claim, what = row.gbs / row.copy_gbs, MEMORY_CLAIM, "bandwidth"
        else:
            share, claim, what = row.tops / row.int8_tops, COMPUTE_CLAIM, "int8 peak"
        verdict = "reached" if share >= claim else "missed"
        lines.append(f"{verdict}: {row.shape}, M={row.m}: {share:.0%} of the {what}, {claim:.0%} claimed")
    return lines


def write(path: Path, rows: list[Row]) -> None:
    """All rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, three rounds")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of interleaved timing")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write rows to FILE")
    parser.add_argument("--check", action="store_true", help="say of each speed claim whether this run reached it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device and torch sees none; nothing was checked or timed", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for name, count in check_values(device).items():
        print(f"  {name}: {count} results equal the reference's")
    limits, rows = Limits(device), []
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
    for shape in ("o",) if options.quick else SHAPES:
        for tokens in TOKENS:
            rows += measure(shape, tokens, 3 if options.quick else options.rounds, limits, device)
            if options.csv:  # after each size: what was measured stays if a later one fails
                write(options.csv, rows)
    lines = claims(rows)
    if options.check:
        print("\n".join(lines))
    return 1 if options.check and any(line.startswith("missed") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
