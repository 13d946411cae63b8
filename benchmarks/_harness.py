"""Interleaved timing: candidates take turns (A B C A B C) in one process, between the limits of the machine.

A round visits every candidate once, beginning with another one each time, and reads memory and issues registers-only
dot products on the same threads. A result is the median over rounds with its 20th and 80th percentile; a ratio is the
median of the ratios within each round, so that a machine that slows down slows both sides. A candidate's values are
checked before it is timed: a wrong kernel is never timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import ranvier
from ranvier import _C

MEMORY_CAP = 2 << 30
READ_PIECE = 4 << 20
# libgomp's idle threads spin for a few milliseconds; a peer with a runtime of its own must not share cores with them.
SETTLE_SECONDS = 0.005
WARM_SECONDS = 0.001
DISTURBED = 1.2  # spread of a comparison that is made again
TRIES = 3


class WrongValuesError(RuntimeError):
    """A candidate's result is not the reference's; it must not be timed."""


@dataclass
class Candidate:
    """Something to time. call(i) uses the i-th copy of its weights; bytes is what one call must at least move.

    memory: (address, bytes) of each copy; where the first candidate says, the bandwidth is measured on these.
    """

    provider: str
    call: Callable[[int], object]
    operations: float = 0.0
    bytes: float = 0.0
    copies: int = 1
    isa: str | None = None
    labels: dict = field(default_factory=dict)
    memory: Sequence[tuple[int, int]] = ()


@dataclass
class Measured:
    """Seconds a call of one candidate, one value a round, and the machine's limits in the same rounds.

    others: how many cores other processes kept busy meanwhile; above 0.1 the figures are not worth keeping.
    """

    candidate: Candidate
    seconds: list[float]
    peak: list[float]
    bandwidth: list[float]
    others: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def limits(self) -> list[float]:
        """The time no kernel can beat, one value a round: max(operations / peak, bytes / bandwidth)."""
        c = self.candidate
        return [max(c.operations / p, c.bytes / b) for p, b in zip(self.peak, self.bandwidth, strict=True)]

    @property
    def limit_fraction(self) -> float:
        return statistics.median(limit / t for limit, t in zip(self.limits(), self.seconds, strict=True))

    @property
    def bound(self) -> str:
        c = self.candidate
        compute = c.operations / statistics.median(self.peak)
        return "compute" if compute > c.bytes / statistics.median(self.bandwidth) else "memory"

    def ratio(self, ours: Measured) -> float:
        """How many times as long as ours it takes: the median of the rounds' ratios."""
        return statistics.median(t / o for t, o in zip(self.seconds, ours.seconds, strict=True))


def spread(results: Sequence[Measured]) -> float:
    """The 80th percentile of the rounds over the 20th, of the median candidate."""
    return statistics.median(quantile(r.seconds, 0.8) / quantile(r.seconds, 0.2) for r in results)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@contextlib.contextmanager
def isa_level(name: str | None) -> Iterator[None]:
    """Runs a block at a lower instruction-set level, then goes back."""
    before = _C.isa()
    if name is not None and _C.set_isa(name) != name:
        _C.set_isa(before)
        raise ValueError(f"this processor has no {name}; it has {_C.detected_isa()}")
    try:
        yield
    finally:
        _C.set_isa(before)


class Machine:
    """The limits, measured by the library's own loops with torch's threads."""

    def __init__(self) -> None:
        self._buffer = torch.ones(4 * last_level_cache(), dtype=torch.uint8)
        self._iterations = 1_000
        while self._dot_seconds() < 0.004:
            self._iterations *= 2

    def _dot_seconds(self) -> float:
        start = time.perf_counter()
        self._work = _C.machine_dot(self._iterations)
        return time.perf_counter() - start

    def limits(self, memory: Sequence[tuple[int, int]] = ()) -> tuple[float, float]:
        """(peak, bandwidth), after the threads of whatever ran before have come to rest."""
        time.sleep(SETTLE_SECONDS)
        self._dot_seconds()
        return self.peak(), self.bandwidth(memory)

    def peak(self) -> float:
        """Operations a second of 8-bit dot products on registers; a multiply-accumulate is two."""
        return 2.0 * statistics.median(self._work / self._dot_seconds() for _ in range(3))

    def bandwidth(self, memory: Sequence[tuple[int, int]] = ()) -> float:
        """Bytes a second of reading ``memory`` piece by piece in turn, by default a buffer of four last-level caches.

        Pages differ in speed by where they lie, and a cache keeps a little of what rotates through it: so weights are
        held against reading the same addresses in the same rotation. Small pieces would measure the call instead.
        """
        if not memory or min(size for _, size in memory) < READ_PIECE:
            address, count = self._buffer.data_ptr(), self._buffer.numel() // READ_PIECE
            memory = [(address + i * READ_PIECE, READ_PIECE) for i in range(count)]
        values = []
        for address, size in (*memory, *memory):
            start = time.perf_counter()
            _C.machine_read(address, size)
            values.append(size / (time.perf_counter() - start))
        return statistics.median(values[len(memory) :])


class OtherLoad:
    """How many cores other processes use, or other guests of the host, by the kernel's counters (0 where there are none)."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        try:
            fields = [int(v) for v in Path("/proc/stat").read_text().split(None, 9)[1:9]]
        except (OSError, ValueError):
            return 0.0, time.perf_counter()
        # user, nice, system, -, -, irq, softirq, steal: ticks of all cores; idle and waiting for disks are left out.
        busy = sum(fields[:3] + fields[5:8]) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4]), time.perf_counter()

    def cores(self) -> float:
        busy, now = self._now()
        return max(0.0, (busy - self._start[0]) / max(now - self._start[1], 1e-9))


def _batches(candidate: Candidate, seconds: float) -> tuple[int, int]:
    """(batches, calls a batch) that fill about `seconds`, after a first calls that warm up."""
    for i in range(min(2, candidate.copies)):
        candidate.call(i)
    start = time.perf_counter()
    candidate.call(0)
    once = max(time.perf_counter() - start, 1e-7)
    calls = max(1, round(1e-4 / once))
    return max(1, min(64, int(seconds / (once * calls)))), calls


def measure(candidates: Sequence[Candidate], rounds: int, machine: Machine, visit_seconds: float = 0.02) -> list[Measured]:
    """Times every candidate once a round, the limits before the first and after the last of them."""
    plans, turn = [], [0] * len(candidates)
    for c in candidates:
        with isa_level(c.isa):
            plans.append(_batches(c, visit_seconds))
    seconds: list[list[float]] = [[] for _ in candidates]
    peak, bandwidth, load = [], [], OtherLoad()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(rounds):
            before = machine.limits(candidates[0].memory)
            for place in range(len(candidates)):
                n = (place + round_) % len(candidates)
                c, (batches, calls) = candidates[n], plans[n]
                with isa_level(c.isa):
                    time.sleep(SETTLE_SECONDS)
                    turn[n], value = _visit(c, turn[n], batches, calls)
                seconds[n].append(value)
            after = machine.limits(candidates[0].memory)
            peak.append((before[0] + after[0]) / 2)
            bandwidth.append((before[1] + after[1]) / 2)
    finally:
        if collecting:
            gc.enable()
    others = load.cores()
    return [Measured(c, s, peak, bandwidth, others) for c, s in zip(candidates, seconds, strict=True)]


def _visit(candidate: Candidate, turn: int, batches: int, calls: int) -> tuple[int, float]:
    call, copies, times = candidate.call, candidate.copies, []
    warm = time.perf_counter() + WARM_SECONDS
    while True:  # wakes the threads; not timed
        call(turn % copies)
        turn += 1
        if time.perf_counter() > warm:
            break
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call(turn % copies)
            turn += 1
        times.append((time.perf_counter() - start) / calls)
    return turn, statistics.median(times)


def check_values(name: str, got: Tensor, truth: Tensor, magnitude: Tensor, tolerance: float) -> None:
    """Raises WrongValuesError unless |got - truth| <= tolerance * magnitude everywhere.

    magnitude: what the error scales with, |x| |W|^T for a sum whose every term is rounded.
    """
    error = (got.double() - truth).abs()
    worst = float((error / magnitude.clamp_min(1e-30)).max())
    if got.shape != truth.shape or not worst <= tolerance:
        raise WrongValuesError(f"{name}: error is {worst:.2e} of the terms' magnitude, {tolerance:.1e} is allowed; not timed")


def some_outputs(n: int) -> Tensor:
    """Output channels to check: the first, the last, and one of every 16, so that every tile is looked at."""
    return torch.unique(torch.cat([torch.arange(0, n, max(1, n // 256)), torch.tensor([n - 1])]))


def last_level_cache() -> int:
    """Bytes of the last-level cache of the first core, 32 MiB where the system does not say."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=32 << 20)


def copies_for(weight_bytes: float, providers: int) -> int:
    """How many copies of a weight rotate through four times the last-level cache, all providers within the cap."""
    wanted = min(4 * last_level_cache(), MEMORY_CAP / max(1, providers))
    return max(2, -int(-wanted // weight_bytes))


def _git(*args: str) -> str:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


@dataclass(frozen=True)
class Run:
    """What every row of a run shares."""

    threads: int
    isa: str
    cpu: str
    commit: str
    dirty: bool
    torch: str
    ranvier: str
    python: str
    date: str
    mode: str
    command: str

    @classmethod
    def start(cls, mode: str) -> Run:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!benchmarks/results")
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(
            torch.get_num_threads(), _C.isa(), _C.cpu_features()["brand"], _git("rev-parse", "--short=12", "HEAD"),
            bool(changed), torch.__version__, ranvier.__version__, platform.python_version(), now, mode,
            " ".join(["python", *map(_relative, sys.argv)]),
        )  # fmt: skip

    def line(self) -> str:
        commit = self.commit + ("+dirty" if self.dirty else "")
        return f"{self.cpu}, {self.threads} threads, {self.isa}; ranvier {self.ranvier} {commit}, torch {self.torch}"


def _relative(argument: str) -> str:
    """A path as seen from the checkout, elsewhere its name alone; other arguments as they are."""
    path, root = Path(argument).resolve(), Path(__file__).resolve().parents[1]
    if path.is_relative_to(root) and path.exists():
        return str(path.relative_to(root))
    return path.name if "/" in argument else argument


def rows_of(results: Sequence[Measured], ours: Measured, run: Run) -> list[dict]:
    """One row a candidate: the time of a call."""
    rows = []
    for r in results:
        c, t = r.candidate, r.median
        rows.append(
            {
                **c.labels,
                "provider": c.provider,
                "metric": "time",
                "value": t * 1e6,
                "unit": "us",
                "p20": quantile(r.seconds, 0.2) * 1e6,
                "p80": quantile(r.seconds, 0.8) * 1e6,
                "ratio_to_ours": r.ratio(ours),
                "gops": c.operations / t / 1e9 if c.operations else None,
                "gbs": c.bytes / t / 1e9 if c.bytes else None,
                "limit_fraction": r.limit_fraction if c.bytes else None,
                "bound": r.bound if c.bytes else None,
                "peak_gops": statistics.median(r.peak) / 1e9,
                "read_gbs": statistics.median(r.bandwidth) / 1e9,
                "bytes": c.bytes or None,
                "copies": c.copies,
                "rounds": len(r.seconds),
                "other_load": round(r.others, 2),
                **asdict(run),
                "isa": c.isa or run.isa,
            }
        )
    return rows


def arguments(doc: str, claims: bool = False) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, under a minute")
    if claims:
        parser.add_argument("--check", action="store_true", help="say of each speed claim whether this run reached it")
    parser.add_argument("--rounds", type=int, help="rounds of interleaved timing (default: 3 quick, 9 full)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads before anything is measured")
    for kind, what in (("json", "rows"), ("csv", "rows"), ("plot", "a plot (png)")):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write {what} to FILE")
    return parser


@dataclass
class Bench:
    """One run: how it is measured and what its rows share."""

    run: Run
    machine: Machine
    rounds: int

    @classmethod
    def begin(cls, options: argparse.Namespace) -> Bench:
        """Sets the threads and describes the run."""
        for name in ("threads", "rounds"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise SystemExit(f"--{name} is {getattr(options, name)}; at least 1 is needed")
        for path in (options.json, options.csv, options.plot):
            if path is not None and not path.parent.is_dir():
                raise SystemExit(f"{path}: the folder does not exist; create it first")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        run = Run.start("quick" if options.quick else "full")
        print(run.line(), file=sys.stderr)
        return cls(run, Machine(), options.rounds or (3 if options.quick else 9))

    @property
    def quick(self) -> bool:
        return self.run.mode == "quick"

    def compare(self, candidates: Sequence[Candidate], more_rounds: int = 1) -> tuple[list[Measured], list[dict]]:
        """Measures the candidates and makes a row of each; the first one is ours.

        Where something outside disturbed half of the candidates the comparison is made again, all of it; the calmest of
        three counts.
        """
        tries: list[list[Measured]] = []
        while not tries or (len(tries) < TRIES and spread(tries[-1]) > DISTURBED):
            tries.append(measure(candidates, more_rounds * self.rounds, self.machine))
        results = min(tries, key=spread)
        rows = rows_of(results, results[0], self.run)
        return results, [{**row, "tries": len(tries)} for row in rows]
