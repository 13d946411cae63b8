"""OmniQuant: weight clipping (LWC) and equivalent transform (LET) learned on a decoder block's output.

    minimise mean (block(x; W^, x^) - target)^2 over clipping g, b of every weight row and log s of every transform

W^ and x^ are the values that SpikingLinear computes with (:mod:`~ranvier.methods.spikellm.fake_quant`), s the channel scales
of :mod:`~ranvier.methods.spikellm.equivalent`. Saliency masks stay as they are: X^T X and W^T W scale inversely. OmniQuant,
arXiv 2308.13137, section 3; its place in SpikeLLM: arXiv 2407.04752, section 4.1.
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
from ranvier.methods.spikellm.equivalent import Pair, PairFinder, hooked, initial_scales, storable, transformed
from ranvier.methods.spikellm.fake_quant import (
    Quantized,
    clip_shape,
    fake_input,
    fake_weight,
    quantized_weight,
    rounded,
    weight_layout,
)
from ranvier.nn.spike_linear import SpikingLinear

CLIP_START = 4.0  # sigmoid(4) = 0.982 of the range
JUDGES = 4  # inputs by which the starts of the transform are compared

Clip = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class OmniquantOptions:
    """How a block is trained.

    epochs: passes over the inputs, one step of AdamW (no weight decay) an input. alphas: starts of the transform,
    s = act_max^alpha / w_max^(1 - alpha); every pair takes the one with the least loss, or none. let_lr, lwc_lr: rates of
    log s and of the clipping. let, lwc: what is learned.
    """

    epochs: int = 4
    alphas: tuple[float, ...] = (0.75, 0.5)
    let_lr: float = 1e-3
    lwc_lr: float = 1e-2
    let: bool = True
    lwc: bool = True


OPTIONS = OmniquantOptions()


class Candidate(NamedTuple):
    """A point of the search: a scale vector a pair (None: ones), and clipping by layer (absent: none)."""

    scales: list[Tensor] | None
    clip: Clip


class Fit(NamedTuple):
    """What :func:`fit_block` found: losses are relative to the mean square of the targets."""

    pairs: list[Pair]
    best: Candidate
    rtn_loss: float
    start_loss: float
    loss: float


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
        parameters = dict(block.named_parameters(remove_duplicate=False))
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
        self.read_max: dict[str, Tensor] | None = None
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
        if self.read_max is not None and x.numel():
            peak = x.detach().abs().reshape(-1, x.shape[-1]).amax(0)
            self.read_max[name] = torch.maximum(self.read_max[name], peak) if name in self.read_max else peak
        form = self.forms[name]
        if not self.quantizing or form is None:
            return None
        # Layers of a group are handed the very same tensor; its encoding is made once, as SpikeGroup does.
        mask, last = self.masks[name], self._last
        if last is None or last[0] is not x or last[1] != form or not torch.equal(last[2], mask):
            self._last = last = (x, form, mask, fake_input(x, mask, form, self.through))
        return (last[3], *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    def run(self, item: tuple[Tensor, dict], tensors: Mapping[str, Tensor], quantizing: bool = True) -> Tensor:
        """The block's output on one input with these parameters in place of its own."""
        x, kwargs = item
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

    def prepared(self, item: tuple[Tensor, dict]) -> tuple[Tensor, dict]:
        """An input in the float type that the block is simulated in."""
        return tree_map(self.cast, item)

    def cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().to(self.dtype) if value.is_floating_point() else value
        return value.clone() if value.is_inference() else value


class _Trainer:
    def __init__(self, block: SimulatedBlock, items: list, targets: list[Tensor], options: OmniquantOptions, seed: int) -> None:
        self.block, self.items, self.targets, self.options = block, items, targets, options
        self.size = max(sum(float(t.square().mean()) for t in targets) / len(targets), torch.finfo(torch.float32).tiny)
        self.random = torch.Generator().manual_seed(seed)
        self.pairs: list[Pair] = []
        with torch.no_grad():
            block.read_max = {}
            for item in items:
                block.run(item, {}, quantizing=False)
            self.read_max, block.read_max = block.read_max, None
            if options.let:
                finder = PairFinder(
                    block.block, block.linears, block.tensors, items[0][0],
                    lambda tensors: block.run(items[0], tensors, quantizing=False), seed,
                )  # fmt: skip
                self.pairs = finder.find(block.groups)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean() / self.size

    @torch.no_grad()
    def evaluate(self, candidate: Candidate, count: int | None = None) -> float:
        """The mean loss over the first ``count`` inputs, or all."""
        tensors = self.block.weights(self.block.changed(self.pairs, candidate.scales), candidate.clip)
        pieces = list(zip(self.items, self.targets, strict=True))[:count]
        return sum(float(self.loss(self.block.run(item, tensors), target)) for item, target in pieces) / len(pieces)

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
                first = initial_scales(pair, self.block.tensors, self.read_max[pair.readers[0]], alpha)
                tried = self.storable([*scales[:i], first, *scales[i + 1 :]])
                loss = self.evaluate(Candidate(tried, {}), JUDGES)
                if loss < least:
                    least, scales = loss, tried
        return scales

    def train(self, scales: list[Tensor] | None, keep: Callable[[int, Candidate], None]) -> None:
        """Steps of AdamW; ``keep`` sees the point that every epoch ends at."""
        options, block = self.options, self.block
        logs = [s.log().requires_grad_() for s in scales] if scales is not None else []
        clip: Clip = {}
        for name in block.linears if options.lwc else ():
            if name in self.read_max:
                weight = block.tensors[f"{name}.weight"]
                like = torch.full(clip_shape(weight, block.layouts[name]), CLIP_START, dtype=block.dtype, device=weight.device)
                clip[name] = (like.requires_grad_(), like.detach().clone().requires_grad_())
        learned = [{"params": logs, "lr": options.let_lr}] if logs else []
        learned += [{"params": [t for pair in clip.values() for t in pair], "lr": options.lwc_lr}] if clip else []
        if not learned:
            return
        optimizer = torch.optim.AdamW(learned, weight_decay=0.0)
        for epoch in range(options.epochs):
            for i in torch.randperm(len(self.items), generator=self.random).tolist():
                tensors = block.weights(block.changed(self.pairs, [t.exp() for t in logs] if logs else None), clip)
                loss = self.loss(block.run(self.items[i], tensors), self.targets[i])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                now = self.storable([t.exp() for t in logs]) if logs else None
                keep(epoch, Candidate(now, {name: (g.detach().clone(), b.detach().clone()) for name, (g, b) in clip.items()}))


def _check(linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor], inputs: list, targets: list, config: SpikeConfig) -> None:
    if config.weight_bits != 4:
        raise ValueError(f"omniquant_block: weight_bits is {config.weight_bits}; learned clipping and transform take 4")
    if not linears:
        raise ValueError("omniquant_block: there is no linear layer; pass a block's own by name")
    if not inputs or len(inputs) != len(targets):
        raise ValueError(f"omniquant_block: {len(inputs)} inputs and {len(targets)} targets; pass as many of each, at least one")
    for name, linear in linears.items():
        mask = masks.get(name)
        if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != (linear.in_features,):
            got = "missing" if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"omniquant_block: the mask of {name} is {got}; pass bool [{linear.in_features}]")


def fit_block(
    block: SimulatedBlock, inputs: list, targets: list[Tensor], seed: int, progress: Callable | None = None,
    options: OmniquantOptions | None = None,
) -> Fit:  # fmt: skip
    """The best point seen: rounding to nearest, the starts of the transform, and the end of every epoch, by the loss over all inputs.

    Raises ValueError where the loss of rounding to nearest is not finite.
    """
    options = options or OPTIONS
    with torch.inference_mode(False), torch.enable_grad(), block.watched():
        trainer = _Trainer(block, [block.prepared(i) for i in inputs], [block.cast(t) for t in targets], options, seed)
        best = Candidate(None, {})
        least = rtn_loss = trainer.evaluate(best)
        if not math.isfinite(rtn_loss):
            raise ValueError("omniquant_block: the block's inputs, targets or weights have NaN or Inf")
        start = trainer.start()
        start_loss = rtn_loss if start is None else trainer.evaluate(Candidate(start, {}))
        if start_loss < least:
            best, least = Candidate(start, {}), start_loss

        def keep(epoch: int, candidate: Candidate) -> None:
            nonlocal best, least
            loss = trainer.evaluate(candidate)
            if loss < least:
                best, least = candidate, loss
            if progress is not None:
                progress(epoch + 1, options.epochs, loss)

        trainer.train(start, keep)
        return Fit(trainer.pairs, best, rtn_loss, start_loss, least)


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
) -> dict[str, Quantized]:
    """Learn clipping and transform of one decoder block, fold the transform into it and return its weights' codes.

    block(x, **kwargs) gives the hidden states, or a tuple that begins with them; inputs are (x, kwargs), without a cache.
    targets: what the block should give. linears: layers of the block by name; groups: names that read one tensor; masks:
    salient channels, bool [K]. progress(epoch, epochs, loss) is called after each epoch. Settings: :data:`OPTIONS`.

    The result is never worse than rounding to nearest without a transform, by the loss over all inputs; it is the same for
    the same seed. The block's norms, weights and biases are scaled in place at the very end; on failure it is as it was.
    Raises ValueError for what does not belong together, 2-bit weights, or values that are not finite.
    """
    _check(linears, masks, inputs, targets, config)
    simulated = SimulatedBlock(block, linears, groups, masks, config)
    fit = fit_block(simulated, inputs, targets, seed, progress)
    with torch.no_grad():
        changed = simulated.changed(fit.pairs, fit.best.scales)
        result = {}
        for name, local in simulated.names.items():
            weight = changed.get(f"{local}.weight", simulated.tensors[f"{local}.weight"])
            result[name] = quantized_weight(weight, simulated.layouts[local], fit.best.clip.get(local))
        parameters = dict(block.named_parameters(remove_duplicate=False))
        for name, value in changed.items():
            parameters[name].copy_(value)
    return result
