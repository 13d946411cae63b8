"""OmniQuant: weight clipping (LWC) and equivalent transform (LET) learned on a decoder block's output.

    minimise over clipping g, b of every weight row and log s of every transform
    mean over tokens m of |block(x; W^, x^)_m - target_m|^2 / |target_m|^2

W^ and x^ are the values that SpikingLinear computes with (:mod:`~ranvier.methods.spikellm.fake_quant`), s the channel scales
of :mod:`~ranvier.methods.spikellm.equivalent`. A token's error counts relative to the token, as the norm that reads it divides
by its size: in a plain mean square the one token of thousands whose values reach tens of thousands would be all there is.
Saliency masks stay as they are: X^T X and W^T W scale inversely. OmniQuant, arXiv 2308.13137, section 3; its place in
SpikeLLM: arXiv 2407.04752, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.blocks import real_rows
from ranvier.methods.spikellm.equivalent import Pair, PairFinder, hooked, initial_scales, storable, transformed
from ranvier.methods.spikellm.fake_quant import (
    Quantized,
    clip_shape,
    fake_input,
    fake_weight,
    quantized_weight,
    rounded,
    search_clip,
    weight_layout,
)
from ranvier.nn.spike_linear import SpikingLinear

JUDGES = 4  # inputs by which the starts of the transform are compared
TOKEN_FLOOR = 1e-6  # of the mean square

Clip = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class OmniquantOptions:
    """How a block is trained.

    epochs: passes over the inputs, one step of AdamW (no weight decay) an input. alphas: starts of the transform,
    s = act_max^alpha / w_max^(1 - alpha); every pair takes the one with the least loss, or none. let_lr, lwc_lr: rates of
    log s and of the clipping. let, lwc: what is learned. clip_start: g and b of every row, 4 in OmniQuant (0.982 of the
    range); None searches each row, or group, for the clipping with the least error under its channels' power. per_token:
    errors relative to each token's own size; False takes the plain mean square, as OmniQuant does.
    """

    epochs: int = 4
    alphas: tuple[float, ...] = (0.75, 0.5)
    let_lr: float = 5e-3
    lwc_lr: float = 1e-2
    let: bool = True
    lwc: bool = True
    clip_start: float | None = None
    per_token: bool = True


OPTIONS = OmniquantOptions()


class Candidate(NamedTuple):
    """A point of the search: a scale vector a pair (None: ones), and clipping by layer (absent: none)."""

    scales: list[Tensor] | None
    clip: Clip


class Fit(NamedTuple):
    """What :func:`fit_block` found.

    Losses of rounding to nearest, of the transform's start, of that with clipping's, and of the best point.
    """

    pairs: list[Pair]
    best: Candidate
    rtn_loss: float
    let_loss: float
    start_loss: float
    loss: float


class _Seen:
    """What a layer read: per channel the largest magnitude and the mean square, [K]."""

    def __init__(self) -> None:
        self.peak, self.squares, self.tokens = torch.zeros(()), torch.zeros(()), 0

    def add(self, x: Tensor) -> None:
        self.peak = torch.maximum(self.peak.to(x), x.abs().amax(0))
        self.squares = self.squares.to(x) + x.square().sum(0)
        self.tokens += x.shape[0]

    @property
    def power(self) -> Tensor:
        return self.squares / self.tokens


class SimulatedBlock:
    """One decoder block with every linear layer replaced by what its spiking layer will compute.

    The block itself is never changed: parameters are handed in by name, and inputs replaced by hooks while
    :meth:`watched` lasts.
    """

    def __init__(
        self, block: nn.Module, linears: Mapping[str, nn.Linear], groups: list[list[str]], masks: Mapping[str, Tensor],
        config: SpikeConfig, through: Any = rounded,
    ) -> None:  # fmt: skip
        self.block, self.through = block, through
        local = {id(module): name for name, module in block.named_modules()}
        self.names = {name: local[id(linear)] for name, linear in linears.items()}
        parameters = dict(block.named_parameters())
        self.dtypes = {name: p.dtype for name, p in parameters.items()}
        self.dtype = torch.float64 if torch.float64 in self.dtypes.values() else torch.float32
        self.tensors = {name: p.detach().to(self.dtype) for name, p in parameters.items()}
        self.linears = {self.names[name]: linear for name, linear in linears.items()}
        self.masks = {self.names[name]: masks[name].to(linear.weight.device) for name, linear in linears.items()}
        self.groups = [[self.names[name] for name in names] for names in groups]
        loose = set(self.linears) - {name for names in self.groups for name in names}
        self.groups += [[name] for name in self.linears if name in loose]
        self.forms, self.layouts = {}, {}
        weight_only = config.act_bits is None
        for name, linear in self.linears.items():
            count = 0 if weight_only else int(self.masks[name].sum())
            rule = SpikeConfig(act_bits=4, salient=0.0, group_size=config.group_size) if weight_only else config
            form = SpikingLinear(linear.in_features, linear.out_features, False, rule, count, "meta").format
            self.forms[name], self.layouts[name] = None if weight_only else form, weight_layout(form, self.masks[name])
        self.quantizing = True
        self.reading: dict[str, _Seen] | None = None
        self.real: Tensor | None = None  # positions of what is read that count
        self._last: tuple | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks in place, dropout off."""
        modes = {module: module.training for module in self.block.modules()}
        self.block.eval()
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, kwargs, n=name: self._read(n, args, kwargs), with_kwargs=True)
            for name, linear in self.linears.items()
        ]
        try:
            with hooked(hooks):
                yield
        finally:
            self._last = None
            for module, mode in modes.items():
                module.training = mode

    def _read(self, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = args[0] if args else kwargs["input"]
        if self.reading is not None and (rows := real_rows(x.detach(), self.real)).numel():
            self.reading.setdefault(name, _Seen()).add(rows)
        form = self.forms[name]
        if not self.quantizing or form is None:
            return None
        # Layers of a group are handed the very same tensor; its encoding is made once, as SpikeGroup does.
        mask, last = self.masks[name], self._last
        if last is None or last[0] is not x or last[1] != form or not torch.equal(last[2], mask):
            self._last = last = (x, form, mask, fake_input(x, mask, form, self.through))
        return (last[3], *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    def run(self, item: tuple[Tensor, dict], tensors: Mapping[str, Tensor], quantizing: bool = True) -> Tensor:
        """The block's output on one input, cast to :attr:`dtype`, with these parameters in place of its own."""
        x, kwargs = tree_map(self.cast, item)
        self.quantizing, self._last = quantizing, None
        output = functional_call(self.block, {**self.tensors, **tensors}, (x,), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def changed(self, pairs: list[Pair], scales: list[Tensor] | None) -> dict[str, Tensor]:
        """The transformed parameters, not quantized."""
        return transformed(self.tensors, pairs, scales) if scales is not None else {}

    def weights(self, changed: Mapping[str, Tensor], clip: Clip) -> dict[str, Tensor]:
        """The transformed parameters with every linear layer's weight on its grid."""
        result = dict(changed)
        for name in self.linears:
            weight = changed.get(f"{name}.weight", self.tensors[f"{name}.weight"])
            result[f"{name}.weight"] = fake_weight(weight, self.layouts[name], clip.get(name), self.through)
        return result

    def cast(self, value: Any) -> Any:
        """A tensor that autograd can use, floats in :attr:`dtype`; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        value = value.detach().to(self.dtype) if value.is_floating_point() else value
        return value.clone() if value.is_inference() else value


class _Trainer:
    def __init__(
        self, block: SimulatedBlock, items: list, targets: list[Tensor], real: list[Tensor | None],
        options: OmniquantOptions, seed: int,
    ) -> None:  # fmt: skip
        self.block, self.items, self.targets, self.real, self.options = block, items, targets, real, options
        squares = [real_rows(block.cast(t), r).square().mean(-1, keepdim=True) for t, r in zip(targets, real, strict=True)]
        mean = max(sum(float(s.mean()) for s in squares) / len(squares), torch.finfo(torch.float32).tiny)
        # A token of nothing must not count without bound.
        self.sizes = [s.clamp(min=TOKEN_FLOOR * mean) if options.per_token else torch.full_like(s, mean) for s in squares]
        self.random = torch.Generator().manual_seed(seed)
        self.pairs: list[Pair] = []
        with torch.no_grad():
            block.reading = {}
            for item, block.real in zip(items, real, strict=True):
                block.run(item, {}, quantizing=False)
            self.seen, block.reading = block.reading, None
            if options.let:
                finder = PairFinder(
                    block.block, block.linears, block.tensors, block.cast(items[0][0]),
                    lambda tensors: block.run(items[0], tensors, quantizing=False), seed,
                )  # fmt: skip
                self.pairs = finder.find(block.groups)

    def loss(self, i: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Of input i, with these parameters; its scale is near 1 for any block, as AdamW's epsilon wants it."""
        output, target = self.block.run(self.items[i], tensors), self.block.cast(self.targets[i])
        return (real_rows(output - target, self.real[i]).square() / self.sizes[i]).mean()

    @torch.no_grad()
    def evaluate(self, candidate: Candidate, count: int | None = None) -> float:
        """The mean loss over the first ``count`` inputs, or all."""
        tensors = self.block.weights(self.block.changed(self.pairs, candidate.scales), candidate.clip)
        losses = [float(self.loss(i, tensors)) for i in range(len(self.items))[:count]]
        return sum(losses) / len(losses)

    def storable(self, scales: list[Tensor]) -> list[Tensor]:
        return storable(self.block.tensors, self.block.dtypes, self.pairs, scales)

    @torch.no_grad()
    def start(self) -> list[Tensor] | None:
        """For every pair in turn the best of no scaling and each alpha, the pairs before it as decided."""
        if not self.pairs:
            return None
        scales = [torch.ones(pair.channels, dtype=self.block.dtype, device=pair.index.device) for pair in self.pairs]
        least = self.evaluate(Candidate(scales, {}), JUDGES)
        for i, pair in enumerate(self.pairs):
            for alpha in self.options.alphas:
                first = initial_scales(pair, self.block.tensors, self.seen[pair.readers[0]].peak, alpha)
                tried = self.storable([*scales[:i], first, *scales[i + 1 :]])
                loss = self.evaluate(Candidate(tried, {}), JUDGES)
                if loss < least:
                    least, scales = loss, tried
        return scales

    @torch.no_grad()
    def clipping(self, scales: list[Tensor] | None) -> Clip:
        """Where the clipping of every layer that was reached starts."""
        block, changed, result = self.block, self.block.changed(self.pairs, scales), {}
        columns = {r: s[p.index] for p, s in zip(self.pairs, scales or [], strict=True) for r in p.readers}
        for name in block.linears if self.options.lwc else ():
            weight, layout = changed.get(f"{name}.weight", block.tensors[f"{name}.weight"]), block.layouts[name]
            start = self.options.clip_start
            if name not in self.seen:  # an expert that no input reached has nothing to learn from
                continue
            if start is None:
                logit = search_clip(weight, layout, self.seen[name].power / columns.get(name, torch.ones(())) ** 2)
            else:
                logit = weight.new_full(clip_shape(weight, layout), start)
            result[name] = (logit, logit.clone())
        return result

    def train(self, start: Candidate, keep: Callable[[int, Candidate], None]) -> None:
        """Steps of AdamW; ``keep`` sees the point that every epoch ends at."""
        options, block = self.options, self.block
        logs = [s.log().requires_grad_() for s in start.scales or []]
        clip = {name: tuple(t.clone().requires_grad_() for t in ends) for name, ends in start.clip.items()}
        learned = [{"params": logs, "lr": options.let_lr}] if logs else []
        learned += [{"params": [t for pair in clip.values() for t in pair], "lr": options.lwc_lr}] if clip else []
        if not learned:
            return
        optimizer = torch.optim.AdamW(learned, weight_decay=0.0)
        for epoch in range(options.epochs):
            for i in torch.randperm(len(self.items), generator=self.random).tolist():
                tensors = block.weights(block.changed(self.pairs, [t.exp() for t in logs] if logs else None), clip)
                loss = self.loss(i, tensors)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                now = self.storable([t.exp() for t in logs]) if logs else None
                keep(epoch, Candidate(now, {name: (g.detach().clone(), b.detach().clone()) for name, (g, b) in clip.items()}))


def _check(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    masks: Mapping[str, Tensor],
    inputs: list,
    targets: list,
    config: SpikeConfig,
) -> None:
    if config.weight_bits != 4:
        raise ValueError(f"omniquant_block: weight_bits is {config.weight_bits}; learned clipping and transform take 4")
    if not linears:
        raise ValueError("omniquant_block: there is no linear layer; pass a block's own by name")
    if not inputs or len(inputs) != len(targets):
        got = f"{len(inputs)} inputs and {len(targets)} targets"
        raise ValueError(f"omniquant_block: {got}; pass as many of each, at least one")
    own = {id(p) for p in block.parameters()}
    for name, linear in linears.items():
        if id(linear.weight) not in own:
            raise ValueError(f"omniquant_block: {name} is no layer of this block, or shares its weight; pass the block's own")
        own.remove(id(linear.weight))
        mask = masks.get(name)
        if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != (linear.in_features,):
            got = "missing" if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"omniquant_block: the mask of {name} is {got}; pass bool [{linear.in_features}]")


def fit_block(
    block: SimulatedBlock, inputs: list, targets: list[Tensor], seed: int, progress: Callable | None = None,
    options: OmniquantOptions | None = None, real: list[Tensor | None] | None = None,
) -> Fit:  # fmt: skip
    """The best point seen, by the loss over all inputs: rounding to nearest, the starts, and the end of every epoch.

    real: for each input the positions that count, bool, or None for all; an input without any is left out.

    Raises ValueError where the loss of rounding to nearest is not finite.
    """
    options = options or OPTIONS
    with torch.inference_mode(False), torch.enable_grad(), block.watched():
        kept = real or [None] * len(inputs)
        counting = [i for i, positions in enumerate(kept) if positions is None or bool(positions.any())]
        if not counting:
            raise ValueError("omniquant_block: every position of every input is padding; pass inputs with text")
        chosen = ([values[i] for i in counting] for values in (inputs, targets, kept))
        trainer = _Trainer(block, *chosen, options, seed)
        best = Candidate(None, {})
        least = rtn_loss = trainer.evaluate(best)
        if not math.isfinite(rtn_loss):
            raise ValueError("omniquant_block: the block's inputs, targets or weights have NaN or Inf")

        def offer(candidate: Candidate) -> float:
            nonlocal best, least
            loss = trainer.evaluate(candidate)
            if loss < least:
                best, least = candidate, loss
            return loss

        def keep(epoch: int, candidate: Candidate) -> None:
            loss = offer(candidate)
            if progress is not None:
                progress(epoch + 1, options.epochs, loss)

        scales = trainer.start()
        let_loss = rtn_loss if scales is None else offer(Candidate(scales, {}))
        start = Candidate(scales, trainer.clipping(scales))
        start_loss = offer(start) if start.clip else let_loss
        trainer.train(start, keep)
        return Fit(trainer.pairs, best, rtn_loss, let_loss, start_loss, least)


def omniquant_block(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    groups: list[list[str]],
    masks: dict[str, Tensor],
    inputs: list[tuple[Tensor, dict]],
    targets: list[Tensor],
    config: SpikeConfig,
    seed: int,
    progress: Callable[[int, int, float], None] | None = None,
    *,
    real: list[Tensor | None] | None = None,
) -> dict[str, Quantized]:
    """Learn clipping and transform of one decoder block, fold the transform into it and return its weights' codes.

    block(x, **kwargs) gives the hidden states, or a tuple that begins with them; inputs are (x, kwargs), without a cache.
    targets: what the block should give. linears: layers of the block by name; groups: names that read one tensor; masks:
    salient channels, bool [K]. progress(epoch, epochs, loss) is called after each epoch. real: for each input the positions
    that count, bool [B, L]; None for all. Settings: :data:`OPTIONS`.

    The result is never worse than rounding to nearest without a transform, by the loss over all inputs; it is the same for
    the same seed. The block's norms, weights and biases are scaled in place at the very end; on failure it is as it was.
    Raises ValueError for what does not belong together, 2-bit weights, or values that are not finite.
    """
    _check(block, linears, masks, inputs, targets, config)
    simulated = SimulatedBlock(block, linears, groups, masks, config)
    fit = fit_block(simulated, inputs, targets, seed, progress, real=real)
    with torch.no_grad():
        changed = simulated.changed(fit.pairs, fit.best.scales)
        result = {}
        for name, local in simulated.names.items():
            weight = changed.get(f"{local}.weight", simulated.tensors[f"{local}.weight"])
            result[name] = quantized_weight(weight, simulated.layouts[local], fit.best.clip.get(local))
        parameters = dict(block.named_parameters())
        for name, value in changed.items():
            parameters[name].copy_(value)
    return result
