"""Conversion block by block: each block is fitted to what the quantized blocks before it hand on.

For every block of a chain: saliency with quantization off (masks, and which layers read one tensor); then, in the order in
which they run, the layers that read one tensor are quantized on the second moments of their *encoded* inputs and put in
place, so that those after them see what they will see; then the block's spiking layers make the next block's inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.blocks import (
    Chain,
    Positions,
    call_model,
    capture,
    find_blocks,
    real_positions,
    replace_modules,
)
from ranvier.methods.spikellm.gptq import quantize_gptq
from ranvier.methods.spikellm.grams import GramObserver, layer_class
from ranvier.methods.spikellm.saliency import SaliencyObserver, salient_mask, weight_saliency
from ranvier.nn.spike_linear import SpikeGroup, SpikingLinear
from ranvier.reference.spike_linear import Quantized

# (masks, groups) -> the codes of every layer
Omniquant = Callable[[dict[str, Tensor], list[list[str]]], dict[str, Quantized]]


class Made(NamedTuple):
    """A layer's replacement, the layers that share its mask, and ||W - W^|| / ||W||."""

    module: SpikingLinear
    group: tuple[str, ...]
    error: float


@dataclass
class Conversion:
    """What a conversion came to, before anything of the model is changed.

    values: new values of parameters beside the replaced layers (a transform folded into norms), by name.
    """

    made: dict[str, Made] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


def check_reached(observer: SaliencyObserver) -> None:
    """Raises ValueError naming a layer that no calibration token reached."""
    unseen = [name for name, reader in observer.readers.items() if reader.tokens == 0]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise ValueError(f"spike_: calibration never reached {unseen[0]}{more}; calibrate with inputs that do, or skip it")


def shared_groups(observer: SaliencyObserver) -> list[tuple[str, ...]]:
    """Every layer once, those that read one tensor together, in the order in which they first ran."""
    groups = [tuple(names) for names in observer.groups()]
    grouped = {name for names in groups for name in names}
    groups += [(name,) for name in observer.readers if name not in grouped]
    order = {name: i for i, name in enumerate(observer.sequence)}
    return sorted(groups, key=lambda names: order.get(names[0], len(order)))


def rounds(config: SpikeConfig) -> bool:
    """Whether weights are rounded to nearest, with saliency of the unquantized model's inputs."""
    return config.pipeline == "rtn" and config.spikes == "activations"


def weight_error(linear: nn.Linear, layer: SpikingLinear) -> float:
    """||W - W^|| / ||W||; 0 for a weight of zeros."""
    weight = linear.weight.detach().float()
    norm = float(weight.norm())
    return float((weight - layer.dequantized_weight()).norm()) / norm if norm else 0.0


def join(made: dict[str, Made]) -> None:
    """Layers of a group get one mask and one encoding."""
    shared: dict[tuple[str, ...], SpikeGroup] = {}
    for layer in made.values():
        if len(layer.group) > 1:
            layer.module.group = shared.setdefault(layer.group, SpikeGroup())
            layer.module.salient_mask = layer.module.group.share(layer.module.salient_mask)


class BlockConverter:
    """Converts the layers of one block (or of a whole model) on the inputs of a chain."""

    def __init__(
        self, block: nn.Module, layers: Mapping[str, nn.Linear], run: Callable[[], None], config: SpikeConfig,
        positions: Positions, sequential: bool = True,
    ) -> None:  # fmt: skip
        """run() sends all batches through the block as it then is, and says in ``positions`` which of each count.

        sequential: later layers see what earlier ones became.
        """
        self.block, self.layers, self.run, self.config = block, dict(layers), run, config
        self.positions, self.sequential = positions, sequential
        self.observer = SaliencyObserver(self.layers, self._scores_inputs, positions)

    @property
    def _scores_inputs(self) -> bool:
        return self.config.spikes == "activations" and self.config.salient_share not in (0.0, 1.0)

    def convert(self, omniquant: Omniquant | None) -> dict[str, Made]:
        """The replacements by name. The block holds them where ``sequential``, but for plain rounding; else it is as it was.

        omniquant(masks, groups) quantizes all layers at once in place of GPTQ.
        """
        with self.observer:
            self.run()
        if self._scores_inputs or not rounds(self.config):
            check_reached(self.observer)
        groups, made = shared_groups(self.observer), {}
        if omniquant is not None:
            masks = {name: self._mask(names, None) for names in groups for name in names}
            codes = omniquant(masks, [list(names) for names in groups if len(names) > 1])
            for names in groups:
                made.update({n: self._made(self._layer(n, masks[n], codes[n]), n, names) for n in names})
            join(made)
            self.place(made)
            return {name: made[name] for name in self.layers}
        if rounds(self.config):
            for names in groups:
                mask = self._mask(names, None)
                for name in names:
                    layer = layer_class(self.config).from_linear(self.layers[name], self.config, mask)
                    made[name] = self._made(layer, name, names)
            join(made)
            return {name: made[name] for name in self.layers}
        for names in [[group] for group in groups] if self.sequential else [groups]:
            made.update(self._quantize(names))
        return {name: made[name] for name in self.layers}

    def _quantize(self, groups: list[tuple[str, ...]]) -> dict[str, Made]:
        """Groups of layers on the inputs that they have now."""
        leads = {names[0]: self.layers[names[0]] for names in groups}
        second_order = self.config.spikes == "weights"
        if second_order:  # activations take one step on every channel: the mask does not touch their codes
            masks = {name: torch.zeros_like(layer.weight[0], dtype=torch.bool) for name, layer in leads.items()}
        else:
            masks = {names[0]: self._mask(names, None) for names in groups}
        with GramObserver(leads, masks, self.config, self.positions) as grams:
            self.run()
        made: dict[str, Made] = {}
        for names in groups:
            mask = self._mask(names, grams.hessians[names[0]]) if second_order else masks[names[0]]
            for name in names:
                last = name == names[-1]  # it may work on the matrix itself, and nothing here holds it any more
                take = grams.hessians.pop if last else grams.hessians.get
                layer = quantized_layer(self.layers[name], self.config, mask, take(names[0]), overwrite=last)
                made[name] = self._made(layer, name, names)
        join(made)
        if self.sequential:
            self.place(made)
        return made

    def _mask(self, names: tuple[str, ...], hessian: Tensor | None) -> Tensor:
        if hessian is None:
            scores = self.observer.scores(list(names))
        else:
            scores = sum(weight_saliency(self.layers[name].weight, hessian) for name in names)
        try:
            return salient_mask(scores, self.config.salient_share, absolute=self.config.saliency == "absolute")
        except ValueError as error:
            raise ValueError(f"spike_: {names[0]}: {error}") from error

    def _layer(self, name: str, mask: Tensor, codes: Quantized) -> SpikingLinear:
        return layer_class(self.config).from_quantized(
            linear=self.layers[name], config=self.config, salient_mask=mask, **codes._asdict()
        )

    def _made(self, module: SpikingLinear, name: str, names: tuple[str, ...]) -> Made:
        return Made(module, names, weight_error(self.layers[name], module))

    def place(self, made: Mapping[str, Made]) -> None:
        """Put the replacements where the linear layers are in the block."""
        replace_modules(self.block, {id(self.layers[name]): layer.module for name, layer in made.items()})


def quantized_layer(
    linear: nn.Linear, config: SpikeConfig, mask: Tensor, hessian: Tensor, *, overwrite: bool = False
) -> SpikingLinear:
    """One layer by the config's pipeline, rtn or gptq, on X^^T X^ of its inputs; ``overwrite``: these may be lost."""
    cls = layer_class(config)
    if config.pipeline == "rtn":
        return cls.from_linear(linear, config, mask)
    weight = linear.weight.detach().float()
    if config.weight_bits == 2:
        from ranvier.methods.spikellm.spike_grid import quantize_spikes

        codes = quantize_spikes(weight, hessian, mask, config, overwrite=overwrite)
    else:
        form = cls(linear.in_features, 1, False, config, int(mask.sum()), "meta").format
        codes = quantize_gptq(weight, hessian, mask, form, overwrite=overwrite)
    del hessian, weight  # the largest there are, and packing needs its own
    return cls.from_quantized(linear=linear, config=config, salient_mask=mask, **codes._asdict())


class ChainConverter:
    """Sends a chain of hidden states through blocks, converting each as it comes: one block is held at a time.

    Plain rounding measures saliency on the unquantized model; the other pipelines go on with the converted block's outputs.
    ``floats`` are the hidden states of the unquantized model, carried along where a pipeline fits a block's output to them,
    and where ``follow`` says that they are wanted behind the last block.
    """

    def __init__(self, chain: Chain, config: SpikeConfig, seed: int, follow: bool = False) -> None:
        self.chain, self.config, self.seed = chain, config, seed
        carried = config.pipeline == "omniquant" or (follow and not rounds(config))
        self.floats = list(chain.hidden) if carried else None

    @property
    def unquantized(self) -> list[Tensor]:
        """What the unquantized model's blocks hand on, where it is known (rounding to nearest, ``follow``, omniquant)."""
        return self.chain.hidden if self.floats is None else self.floats

    def convert(self, block: nn.Module, index: int, layers: Mapping[str, nn.Linear]) -> tuple[dict[str, Made], int]:
        """Convert block number ``index`` in place and move the chain behind it: replacements by name, calibration tokens.

        layers: the block's own linear layers by their names in the model.
        """
        chain, positions = self.chain, Positions()

        def run() -> None:
            for batch in chain.batches():
                positions.real = chain.real[batch]
                chain.run(block, index, batch)

        converter = BlockConverter(block, layers, run, self.config, positions)
        omniquant = None
        if self.floats is not None:
            for batch in chain.batches():
                self.floats[batch] = chain.run(block, index, batch, self.floats[batch])
            if self.config.pipeline == "omniquant":
                omniquant = self._omniquant(block, index, converter.layers)
        made = converter.convert(omniquant) if layers else {}
        for batch in chain.batches():
            chain.hidden[batch] = chain.run(block, index, batch)
        if rounds(self.config):
            converter.place(made)
        return made, max((reader.tokens for reader in converter.observer.readers.values()), default=0)

    def _omniquant(self, block: nn.Module, index: int, layers: dict[str, nn.Linear]) -> Omniquant:
        from ranvier.methods.spikellm.omniquant import omniquant_block

        def fit(masks: dict[str, Tensor], groups: list[list[str]]) -> dict[str, Quantized]:
            chain, bar = self.chain, tqdm(desc=f"block {index}", unit="epoch", leave=False)
            inputs = list(zip(chain.hidden, chain.arguments[index], strict=True))

            def progress(epoch: int, epochs: int, loss: float) -> None:
                bar.total = epochs
                bar.set_postfix(loss=f"{loss:.4g}")
                bar.update(1)

            with bar, torch.enable_grad():
                given = (block, layers, groups, masks, inputs, self.floats, self.config, self.seed, progress)
                return omniquant_block(*given, real=chain.real)

        return fit


def convert_blocks(
    model: nn.Module, layers: Mapping[str, nn.Linear], config: SpikeConfig, calibration: Iterable[Any], seed: int
) -> Conversion:
    """Convert a model's layers block by block, on copies of its blocks: the model itself stays as it is.

    Layers outside the blocks, and all of a model whose blocks are no chain, are fitted to the inputs they have in the
    unquantized model. Raises ValueError for a layer that calibration does not reach.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches, result = list(calibration), Conversion()
    if not batches:
        raise ValueError("spike_: the calibration set is empty; pass at least one batch")
    path = find_blocks(model, layers)
    chain = None if path is None else capture(model, path, batches, device)
    inside: dict[str, nn.Linear] = {}
    if config.pipeline == "omniquant":
        lost = [name for name in layers if chain is None or not name.startswith(f"{path}." if path else "")]
        if lost:
            raise ValueError(
                f"spike_: pipeline='omniquant' trains block by block, and {lost[0]} lies in no block of a chain;"
                " skip it, or use pipeline='gptq'"
            )
    if chain is not None:
        converter = ChainConverter(chain, config, seed)
        prefix = f"{path}." if path else ""
        for index, block in enumerate(tqdm(list(model.get_submodule(path)), desc="blocks", unit="block")):
            begin = f"{prefix}{index}."
            own = {name: layer for name, layer in layers.items() if name.startswith(begin)}
            inside.update(own)
            _convert_copy(converter, block, index, begin, own, result)
    outside = {name: layer for name, layer in layers.items() if name not in inside}
    if outside:
        positions = Positions()

        def run() -> None:
            for batch in tqdm(batches, desc="whole model", unit="batch", leave=False):
                positions.real = real_positions(batch)
                call_model(model, batch, device)

        whole = BlockConverter(model, outside, run, config, positions, sequential=False)
        result.made.update(whole.convert(None))
        result.tokens = max(result.tokens, *(reader.tokens for reader in whole.observer.readers.values()))
    result.made = {name: result.made[name] for name in layers}
    return result


def _convert_copy(
    converter: ChainConverter, block: nn.Module, index: int, begin: str, own: Mapping[str, nn.Linear], result: Conversion
) -> None:
    """One block, on a copy of it: what replaces its layers, and what else of it changed, goes to ``result``."""
    work = copy.deepcopy(block)
    layers = {name: work.get_submodule(name[len(begin) :]) for name in own}
    made, tokens = converter.convert(work, index, layers)
    result.made.update(made)
    result.tokens = max(result.tokens, tokens)
    before = dict(block.named_parameters())
    for name, value in work.named_parameters():
        known = before.get(name)
        replaced = begin + name.rpartition(".")[0] in made
        if known is not None and not replaced and not torch.equal(known, value):
            result.values[begin + name] = value.detach()
