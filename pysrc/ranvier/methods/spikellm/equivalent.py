"""Equivalent transforms of a decoder block: scaling a channel where it is made and undoing that where it is read.

For a source (a norm, or a linear layer) whose output channels reach the readers' inputs one to one, any s > 0 leaves the
block's function as it is:

    x -> x diag(1 / s): norm weight and bias, or the rows and bias of a linear layer, over s
    W -> W diag(s):     the readers' columns times s

Pairs are found by running the block: a norm whose output is the tensor that a group of layers reads (as w x or (1 + w) x),
and a linear layer behind which a group's input is linear, channel by channel: v before o (with grouped queries a channel of
a key-value head is every query head's), up before down, the two of a ReLU network. A candidate counts when the block,
transformed by random powers of two, gives what it gave: no name of a module is trusted. Shifts (OmniQuant's delta) are not
made, and queries are not scaled against keys: both are rows of their weights, whose scales absorb any s.

SmoothQuant, arXiv 2211.10438, section 4; OmniQuant, arXiv 2308.13137, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

AGREES = 1e-4  # relative; a wrong pair is off by a factor of up to four, a right one by float32's rounding


class Pair(NamedTuple):
    """source: a module of the block with that many channels; offset 1 where a norm multiplies by 1 + w, else 0.

    readers: linear layers of the block. index int64 [K]: which of the source's channels each of the readers' is.
    """

    source: str
    readers: tuple[str, ...]
    index: Tensor
    channels: int
    offset: float


def transformed(tensors: Mapping[str, Tensor], pairs: list[Pair], scales: list[Tensor]) -> dict[str, Tensor]:
    """The parameters that change, by name: of readers and sources. tensors: all of the block's, in one float type."""
    changed: dict[str, Tensor] = {}
    for pair, s in zip(pairs, scales, strict=True):
        columns = s[pair.index]
        for reader in pair.readers:
            name = f"{reader}.weight"
            changed[name] = changed.get(name, tensors[name]) * columns
        name = f"{pair.source}.weight"
        weight = changed.get(name, tensors[name])
        changed[name] = weight / s[:, None] if weight.ndim == 2 else (weight + pair.offset) / s - pair.offset
        if (name := f"{pair.source}.bias") in tensors:
            changed[name] = changed.get(name, tensors[name]) / s
    return changed


def storable(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], pairs: list[Pair], scales: list[Tensor]
) -> list[Tensor]:
    """The nearest scales for which a norm's new weight is a number of its own dtype, so that folding loses nothing."""
    names = [f"{pair.source}.weight" for pair in pairs]
    given = zip(names, pairs, scales, strict=True)
    return [_storable(tensors[name], dtypes[name], pair.offset, s) for name, pair, s in given]


def _storable(weight: Tensor, dtype: torch.dtype, offset: float, s: Tensor) -> Tensor:
    if weight.ndim == 2 or dtype == weight.dtype:
        return s
    stored = ((weight + offset) / s - offset).to(dtype).to(weight.dtype)
    exact = (weight + offset) / (stored + offset)
    return torch.where(exact.isfinite() & (exact > 0), exact, s)


def initial_scales(pair: Pair, tensors: Mapping[str, Tensor], act_max: Tensor, alpha: float) -> Tensor:
    """s = act_max^alpha / w_max^(1 - alpha) over its geometric mean, [channels]. act_max: max |x| of the readers' input [K]."""
    w_max = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in pair.readers]).amax(0)
    none = torch.zeros(pair.channels, dtype=w_max.dtype, device=w_max.device)
    peaks = [none.scatter_reduce(0, pair.index, peak, "amax") for peak in (act_max, w_max)]
    log = [peak.clamp(min=1e-5).log() for peak in peaks]
    s = alpha * log[0] - (1 - alpha) * log[1]
    return (s - s.mean()).exp()


@contextmanager
def hooked(handles: list) -> Iterator[None]:
    """Removes these hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Trace(NamedTuple):
    read: dict[str, Tensor]
    made: dict[str, Tensor]
    output: Tensor


def _trace(linears: Mapping[str, nn.Module], norms: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> _Trace:
    """One run: what every linear layer read, and what every linear layer and norm made."""
    read, made = {}, {}

    def before(name: str) -> Callable:
        return lambda _, args, kwargs: read.__setitem__(name, args[0] if args else kwargs["input"])

    def after(name: str) -> Callable:
        return lambda _, args, output: made.__setitem__(name, output)

    handles = [m.register_forward_pre_hook(before(name), with_kwargs=True) for name, m in linears.items()]
    handles += [m.register_forward_hook(after(name)) for name, m in {**linears, **norms}.items()]
    with hooked(handles):
        output = run()
    return _Trace(read, made, output)


class PairFinder:
    """Finds the pairs of one block. run(tensors) gives its output on one input, unquantized, with these parameters replaced."""

    def __init__(
        self, block: nn.Module, linears: Mapping[str, nn.Linear], tensors: Mapping[str, Tensor], x: Tensor,
        run: Callable[[dict[str, Tensor]], Tensor], seed: int,
    ) -> None:  # fmt: skip
        self.linears, self.tensors, self.x, self.run = linears, tensors, x, run
        modules = dict(block.named_modules())
        own = {name: getattr(module, "weight", None) for name, module in modules.items() if name not in linears}
        self.norms = {name: modules[name] for name, w in own.items() if isinstance(w, Tensor) and w.ndim == 1}
        self.random = torch.Generator().manual_seed(seed)
        self.head_dims = sorted({m.head_dim for m in modules.values() if isinstance(getattr(m, "head_dim", None), int)})
        self.plain = self._trace({})

    def _trace(self, tensors: dict[str, Tensor]) -> _Trace:
        return _trace(self.linears, self.norms, lambda: self.run(tensors))

    def find(self, groups: list[list[str]]) -> list[Pair]:
        """groups: layers that read one tensor. At most one pair a group and a source."""
        found: list[Pair] = []
        for names in groups:
            taken = {pair.source for pair in found}
            candidates = (pair for pair in self._candidates(tuple(names)) if pair.source not in taken)
            pair = next((pair for pair in candidates if self._holds(pair)), None)
            found += [pair] if pair is not None else []
        return found

    def _candidates(self, readers: tuple[str, ...]) -> Iterator[Pair]:
        x = self.plain.read.get(readers[0])
        if x is None or any(self.plain.read.get(name) is not x for name in readers):
            return
        channels = torch.arange(x.shape[-1], device=x.device)
        above = [name for name, output in self.plain.made.items() if output is x and name in self.norms]
        for name in above:
            yield from (Pair(name, readers, channels, len(channels), offset) for offset in (0.0, 1.0))
        if above:
            return
        for name in self.linears:
            width = self.tensors[f"{name}.weight"].shape[0]
            if name in readers or name not in self.plain.made or len(channels) % width:
                continue
            if width == len(channels):
                yield Pair(name, readers, channels, width, 0.0)
                continue
            for size in self.head_dims:
                if width % size == 0:
                    head = channels // size // (len(channels) // width)
                    yield Pair(name, readers, head * size + channels % size, width, 0.0)

    def _holds(self, pair: Pair) -> bool:
        """Whether the transform leaves the output of every layer but the source, and of the block, as it is."""
        s = 2.0 ** torch.randint(-1, 2, (pair.channels,), generator=self.random)
        s = s.to(self.tensors[f"{pair.source}.weight"])
        if pair.index.shape[0] != self.plain.read[pair.readers[0]].shape[-1] or s.shape != (pair.channels,):
            return False
        other = self._trace(transformed(self.tensors, [pair], [s]))
        for name in self.linears:
            if name != pair.source and name in self.plain.made and not _agrees(self.plain.made[name], other.made[name]):
                return False
        moved = self.plain.output - self.x if self.plain.output.shape == self.x.shape else self.plain.output
        return _agrees(self.plain.output, other.output, float(moved.abs().max()))


def _agrees(a: Any, b: Any, size: float | None = None) -> bool:
    largest = float(a.abs().max())
    noise = 8 * torch.finfo(a.dtype).eps * largest
    return float((a - b).abs().max()) <= AGREES * (largest if size is None else size) + noise
