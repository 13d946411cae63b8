"""A model as a chain of blocks: which they are, what calibration batches hand to them, and running one by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.methods.spikellm.data import check_batch


def real_positions(batch: Any) -> Tensor | None:
    """Where a calibration batch is text: bool [B, L], False where its ``attention_mask`` [B, L] is 0.

    None where everything is: no mask, one without zeros, or one of another form (per query and key), which says of no
    position that it is padding.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    real = mask != 0
    return None if bool(real.all()) else real


def real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """x [..., K] as rows [M, K], without those of padding.

    real: of :func:`real_positions`. A tensor that is not laid out by batch and position (what reaches an expert) has no
    padding that could be told, and all of its rows are given.
    """
    rows = x.reshape(-1, x.shape[-1])
    if real is None or (x.shape[:-1] != real.shape and (x.ndim != 2 or x.shape[0] != real.numel())):
        return rows
    return rows[real.reshape(-1).to(x.device)]


@dataclass
class Positions:
    """Which positions of the batch that is running count (``real_positions``): who runs batches says it to who watches."""

    real: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """:func:`real_rows` of what is running."""
        return real_rows(x, self.real)


@dataclass
class Chain:
    """Calibration batches on their way through a model's blocks.

    hidden: what goes into the next block, one tensor a batch. arguments: for every block and batch the keyword arguments
    beside it (masks, position embeddings); tensors that blocks have in common are one object. name: the parameter that
    takes the hidden states. real: :func:`real_positions` of each batch. wrap: hidden states in the form that blocks return.
    """

    hidden: list[Tensor]
    arguments: list[list[dict[str, Any]]]
    names: list[str] = field(default_factory=list)
    real: list[Tensor | None] = field(default_factory=list)
    wrap: Callable[[Tensor], Any] = lambda hidden: hidden

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """What block number ``index`` makes of one batch (or of other hidden states in its place)."""
        given = self.hidden[batch] if hidden is None else hidden
        return leading(block(**{self.names[index]: given}, **self.arguments[index][batch]))

    def batches(self) -> range:
        """The numbers of the batches."""
        return range(len(self.hidden))


def leading(output: Any) -> Tensor:
    """The hidden states in what a block returned: itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def find_blocks(model: nn.Module, layers: Mapping[str, nn.Linear]) -> str | None:
    """The path of the nn.ModuleList with most of these layers inside its items (the longest of equals); None without one."""
    best, found = (0, 0), None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            prefix = f"{path}." if path else ""
            held = (sum(name.startswith(prefix) for name in layers), len(module))
            if held > best and held[0]:
                best, found = held, path
    return found


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put ``replacements[id(old)]`` wherever a module holds ``old``: first every place is found, then all are set."""
    places = [
        (parent, name, replacements[id(child)])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in replacements
    ]
    done = []
    try:
        for parent, name, new in places:
            done.append((parent, name, parent._modules[name]))
            parent._modules[name] = new
    except BaseException:
        for parent, name, old in reversed(done):
            parent._modules[name] = old
        raise


class _Captured(Exception):
    """Every block was seen: the rest of the model need not run."""


class _NoChain(Exception):
    """These modules do not call each other in turn."""


def _bound(block: nn.Module, args: tuple, kwargs: dict) -> tuple[str, Tensor, dict[str, Any]]:
    """The parameter of the hidden states, the hidden states, and the other arguments by name."""
    try:
        call = inspect.signature(type(block).forward).bind(block, *args, **kwargs)
    except (TypeError, ValueError) as error:
        raise _NoChain from error
    given: dict[str, Any] = {}
    for key, value in list(call.arguments.items())[1:]:
        kind = call.signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise _NoChain
        given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {key: value})
    name = next(iter(given), None)
    if name is None or not isinstance(given[name], Tensor):
        raise _NoChain
    return name, given.pop(name), given


@contextmanager
def _standing_in(blocks: list[nn.Module], stand_in: Any) -> Iterator[None]:
    """Calls of block i run stand_in(i, its own forward, args, kwargs)."""
    own = [block.__dict__.get("forward") for block in blocks]
    for i, block in enumerate(blocks):
        block.forward = lambda *args, i=i, real=block.forward, **kwargs: stand_in(i, real, args, kwargs)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


class _Recorder:
    """Stands in for the blocks of one batch: hands its input on, in the form in which the first block returns it."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks, self.chain = blocks, Chain([], [[] for _ in blocks], [""] * len(blocks))
        self._known = False
        self._at, self._passed = 0, None

    def begin(self) -> None:
        self._at, self._passed = 0, None

    def __call__(self, index: int, real: Any, args: tuple, kwargs: dict) -> Any:
        # A batch may ask for a cache itself; a block that is run again must not find the keys of its last run.
        kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
        name, hidden, given = _bound(self.blocks[index], args, kwargs)
        if index != self._at or (index and hidden is not self._passed) or (self.chain.names[index] or name) != name:
            raise _NoChain
        if index == 0:
            self.chain.hidden.append(hidden)
            if not self._known:
                self._known, output = True, real(*args, **kwargs)
                if not isinstance(output, Tensor):
                    kind, rest = type(output), output[1:]
                    self.chain.wrap = lambda hidden: kind((hidden, *rest))
        self.chain.names[index] = name
        self.chain.arguments[index].append(given)
        self._at, self._passed = index + 1, hidden
        if index + 1 == len(self.blocks):
            raise _Captured
        return self.chain.wrap(hidden)


def check_module(op: str, model: Any) -> None:
    """Raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: got {type(model).__name__}; pass a torch.nn.Module")


def call_model(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """One calibration batch: a tensor, or keyword arguments. Raises TypeError or ValueError for another kind."""
    check_batch(model, batch)
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    raise TypeError(f"spike_: calibration yields {type(batch).__name__}; yield input tensors or dicts of keyword arguments")


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model that keeps no keys and values: a block that is run again must not find those of its last run."""
    config = getattr(model, "config", None)
    held = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    before = [(c, c.use_cache) for c in held if getattr(c, "use_cache", None) is not None]
    for part, _ in before:
        part.use_cache = False
    try:
        yield
    finally:
        for part, value in before:
            part.use_cache = value


def capture(model: nn.Module, path: str, batches: Iterable[Any], device: torch.device) -> Chain | None:
    """What reaches the blocks under ``path`` while the model reads the batches; None where they do not form a chain.

    A chain: each block is called once a batch, in order, with what the one before returned. The blocks themselves do not
    run, but for the first on the first batch, and neither does what follows them.
    """
    blocks = list(model.get_submodule(path))
    recorder = _Recorder(blocks)
    with torch.no_grad(), without_cache(model), _standing_in(blocks, recorder):
        for batch in tqdm(batches, desc="embedding", unit="batch", leave=False):
            recorder.begin()
            recorder.chain.real.append(real_positions(batch))
            try:
                call_model(model, batch, device)
            except _Captured:
                continue
            except _NoChain:
                return None
            return None  # the model came to its end without calling every block
    return recorder.chain


def run_around(model: nn.Module, path: str, chain: Chain, batch: Any, last: Tensor, device: torch.device) -> None:
    """A batch through all of a model but its blocks: what follows them reads ``last`` in place of the last one's output."""
    blocks = list(model.get_submodule(path))

    def stand_in(index: int, real: Any, args: tuple, kwargs: dict) -> Any:
        return chain.wrap(last if index + 1 == len(blocks) else _bound(blocks[index], args, kwargs)[1])

    with _standing_in(blocks, stand_in):
        call_model(model, batch, device)
