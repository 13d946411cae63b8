"""Turning the linear layers of a whole model into spiking ones, and back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.blocks import Positions, call_model, check_module, real_positions, replace_modules
from ranvier.methods.spikellm.data import own_calibration
from ranvier.methods.spikellm.engine import (
    Conversion,
    Made,
    check_reached,
    convert_blocks,
    join,
    weight_error,
)
from ranvier.methods.spikellm.evaluate import evaluating
from ranvier.methods.spikellm.fuse import unfuse_
from ranvier.methods.spikellm.grams import layer_class
from ranvier.methods.spikellm.rotate import rotated
from ranvier.methods.spikellm.saliency import SaliencyObserver, salient_mask
from ranvier.nn.hadamard import HadamardLinear
from ranvier.nn.int8_linear import Int8Linear
from ranvier.nn.spike_linear import SpikingLinear, check_convertible


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. weight_error is ||W - W^|| / ||W||; group names the layers that share its mask."""

    name: str
    in_features: int
    out_features: int
    salient: int
    bytes_before: int
    bytes_after: int
    weight_error: float
    group: tuple[str, ...]


@dataclass(frozen=True)
class SpikeReport:
    """What :func:`spike_` did; ``print`` shows it as a table."""

    config: SpikeConfig
    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    calibration_tokens: int = 0

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights before the conversion."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all packed weights, with their tables and masks."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain json values."""
        return {
            "config": self.config.to_dict(),
            "layers": [{**vars(layer), "group": list(layer.group)} for layer in self.layers],
            "skipped": self.skipped,
            "calibration_tokens": self.calibration_tokens,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{'layer':{width}}  {'K':>6} {'N':>6} {'salient':>7} {'MB before':>9} {'after':>7} {'weight error':>12}"]
        for a in self.layers:
            size = f"{a.bytes_before / 1e6:9.2f} {a.bytes_after / 1e6:7.2f}"
            rows.append(f"{a.name:{width}}  {a.in_features:6} {a.out_features:6} {a.salient:7} {size} {a.weight_error:12.4f}")
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        rows.append(
            f"{len(self.layers)} layers, {before:.1f} MB of linear weights -> {after:.1f} MB; skipped {len(self.skipped)}"
        )
        return "\n".join(rows)


def find_linears(model: nn.Module, skip: Iterable[str] = ()) -> tuple[dict[str, nn.Linear], list[str]]:
    """The ``nn.Linear`` layers of a model by name, and the names of those that ``skip`` leaves out.

    A name in skip is one whole component of a dotted path. Subclasses of nn.Linear are left alone, and so are the layers of
    nn.TransformerEncoderLayer: their owners read the weight itself (attention's out_proj, adapters, the fast path). A layer
    found under two names counts once, under the first.
    """
    left_out, found, skipped = set(skip), {}, []
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    owned = {id(linear) for encoder in encoders for linear in (encoder.linear1, encoder.linear2)}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        if id(module) in owned or left_out & set(name.split(".")):
            skipped.append(name)
        else:
            found[name] = module
    return found, skipped


def output_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """The ``nn.Linear`` that makes the logits: transformers' ``get_output_embeddings``, or what is called lm_head.

    Raises ValueError where there is none.
    """
    given = getattr(model, "get_output_embeddings", None)
    head = given() if callable(given) else getattr(model, "lm_head", None)
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or type(head) is not nn.Linear:
        raise ValueError(
            f"spike_: head_bits=8 converts the output layer, and {type(model).__name__} has"
            f" {'none' if head is None else type(head).__name__} for it; leave head_bits out"
        )
    return name, head


def targets(model: nn.Module, config: SpikeConfig) -> tuple[dict[str, nn.Linear], list[str], dict[str, nn.Linear]]:
    """The layers to convert by ``config``, the names of those left out, and the output layer where it has its own bits."""
    layers, skipped = find_linears(model, config.skip)
    if config.head_bits is None:
        return layers, skipped, {}
    name, head = output_layer(model)
    layers.pop(name, None)
    return layers, [left for left in skipped if left != name], {name: head}


def convert_head(name: str, head: nn.Linear) -> Made:
    """The output layer at 8 bits."""
    layer = Int8Linear.from_linear(head)
    return Made(layer, (name,), weight_error(head, layer))


def _run_calibration(model: nn.Module, calibration: Iterable[Any], positions: Positions) -> int:
    """Runs every batch, saying which of its positions count; returns how many batches there were."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for batch in tqdm(calibration, desc="saliency", unit="batch", leave=False):
        positions.real = real_positions(batch)
        call_model(model, batch, device)
        count += 1
    return count


def _observe(model: nn.Module, layers: dict[str, nn.Linear], config: SpikeConfig, calibration: Any) -> SaliencyObserver:
    if calibration is None:
        if config.salient_share not in (0.0, 1.0):
            raise ValueError(
                f"spike_: salient = {config.salient} needs calibration batches to measure saliency; pass some, or salient=0"
            )
        return SaliencyObserver(layers, score=False)
    check_batches(calibration)
    positions = Positions()
    observer = SaliencyObserver(layers, config.salient_share not in (0.0, 1.0), positions)
    with evaluating(model), observer:
        batches = _run_calibration(model, calibration, positions)
    if batches == 0:
        raise ValueError("spike_: the calibration set is empty; pass at least one batch")
    if config.salient_share in (0.0, 1.0):
        return observer
    check_reached(observer)
    return observer


def _masks(observer: SaliencyObserver, config: SpikeConfig) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """For every layer its group and the one mask of that group."""
    groups = observer.groups()
    grouped = {name for names in groups for name in names}
    groups += [[name] for name in observer.readers if name not in grouped]
    result = {}
    for names in groups:
        try:
            mask = salient_mask(observer.scores(names), config.salient_share, absolute=config.saliency == "absolute")
        except ValueError as error:
            raise ValueError(f"spike_: {names[0]}: {error}") from error
        result.update({name: (tuple(names), mask) for name in names})
    return result


def _convert(
    layers: dict[str, nn.Linear], masks: dict[str, tuple[tuple[str, ...], Tensor]], config: SpikeConfig
) -> dict[str, Made]:
    made = {}
    for name, linear in tqdm(layers.items(), desc="spiking", unit="layer", leave=False):
        names, mask = masks[name]
        layer = layer_class(config).from_linear(linear, config, mask)
        made[name] = Made(layer, names, weight_error(linear, layer))
    join(made)
    return made


def report_layer(name: str, linear: nn.Linear, made: Made) -> LayerReport:
    """The report of one layer; a mask that several share counts for the first of them."""
    layer, names, error = made
    held = sum(t.numel() * t.element_size() for t in layer.packed_weight if t is not None)
    held += layer.salient_mask.numel() if name == names[0] else 0
    size = linear.weight.numel() * linear.weight.element_size()
    return LayerReport(name, linear.in_features, linear.out_features, layer.salient_count, size, held, error, names)


def check_supported(config: SpikeConfig, op: str = "spike_") -> None:
    """Raises TypeError for what is no SpikeConfig, ValueError for settings that this installation has no code for."""
    if not isinstance(config, SpikeConfig):
        raise TypeError(f"{op}: config is {type(config).__name__}; pass a ranvier.SpikeConfig")
    if config.pipeline == "omniquant" and config.weight_bits == 2:
        raise ValueError(f"{op}: pipeline='omniquant' trains 4-bit weights; use pipeline='gptq' with weight_bits=2")


def _converted(model: nn.Module, layers: dict[str, nn.Linear], config: SpikeConfig, calibration: Any, seed: int) -> Conversion:
    """What becomes of the layers; the model stays as it is."""
    simple = config.weight_bits != 2 or not config.needs_calibration
    if config.pipeline == "rtn" and simple:
        observer = _observe(model, layers, config, calibration)
        tokens = max(reader.tokens for reader in observer.readers.values())
        with torch.no_grad():
            return Conversion(_convert(layers, _masks(observer, config), config), {}, tokens)
    if calibration is None:
        what = f"pipeline={config.pipeline!r}" if config.pipeline != "rtn" else f"salient = {config.salient}"
        raise ValueError(f"spike_: {what} needs calibration batches to fit to; pass some")
    check_batches(calibration)
    with evaluating(model), torch.no_grad():
        return convert_blocks(model, layers, config, calibration, seed)


def check_batches(calibration: Any, op: str = "spike_") -> None:
    """Raises TypeError for what is one batch, or no batch at all."""
    if isinstance(calibration, (str, os.PathLike)):
        kind = type(calibration).__name__
        raise TypeError(
            f"{op}: calibration is {kind}; pass an iterable of batches, or the path of a text as SpikeConfig(calibration=...)"
        )
    if isinstance(calibration, (Tensor, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(f"{op}: calibration is {type(calibration).__name__}; pass an iterable of batches, such as a list")


def spike_(
    model: nn.Module, config: SpikeConfig | None = None, calibration: Iterable[Any] | None = None, *, seed: int = 0
) -> SpikeReport:
    """Replace every ``nn.Linear`` that is not skipped by a :class:`ranvier.nn.SpikingLinear`, in place.

    calibration: an iterable of input-id tensors or of dicts of keyword arguments for ``model``; None takes
    ``config.calibration``, batches too or the path of a text file. It may be None in both where nothing is measured: round
    to nearest with ``config.salient`` 0 or 1. Padding is left out of everything that is measured or fitted: positions where a
    batch's ``attention_mask`` [B, L] is 0. Layers that are handed the very same tensor (q, k and v; gate and up) share
    one mask and, in eager mode, one encoding.

    ``config.pipeline="rtn"`` runs each batch once through the model as it is, adding up the saliency of every channel, and
    rounds layer by layer: at its peak it holds the model, the packed layers (an eighth of a float32 model) and one layer's
    working space. ``"gptq"`` and ``"omniquant"`` go block by block, each fitted to what the quantized blocks before it hand
    on; they hold one block more, and the hidden states of all batches. ``config.rotate`` puts new parameters in place of those
    it turns, and holds both until the end.
    seed: of rotations and training; the same seed gives the same bits.

    The layers are swapped at the end: if anything fails the model is as it was. Returns a report.

    Raises ValueError for a model without linear layers, a layer with NaN or Inf or that does not fit ``group_size`` (it is
    named), an empty calibration set or one that misses a layer; TypeError for batches of another kind.
    SpikeLLM, arXiv 2407.04752.
    """
    check_module("spike_", model)
    config = SpikeConfig() if config is None else config
    check_supported(config)
    if type(model) is nn.Linear:
        raise ValueError(
            "spike_: the model is itself one nn.Linear and cannot be replaced in place; use SpikingLinear.from_linear"
        )
    if calibration is None and config.calibration is not None:
        calibration = own_calibration(model, config.calibration)
    config = replace(config, calibration=None)  # the layers keep their config, and an iterator cannot be copied or saved
    layers, skipped, heads = targets(model, config)
    if not layers:
        left = f" outside {', '.join(config.skip)}" if skipped else ""
        raise ValueError(f"spike_: {type(model).__name__} has no nn.Linear layer{left}; there is nothing to convert")
    for name, linear in {**layers, **heads}.items():
        check_convertible(f"spike_: {name}", linear, Int8Linear.default_config() if name in heads else config)
    with rotated(model, seed) if config.rotate else contextlib.nullcontext():
        layers, skipped, heads = targets(model, config)
        done = _converted(model, layers, config, calibration, seed)
        done.made.update({name: convert_head(name, head) for name, head in heads.items()})
        layers = {**layers, **heads}
        reports = [report_layer(name, layers[name], made) for name, made in done.made.items()]
        for name, made in done.made.items():
            made.module.train(layers[name].training)
        parameters = dict(model.named_parameters())
        replace_modules(model, {id(layers[name]): made.module for name, made in done.made.items()})
        for name, value in done.values.items():
            parameters[name].data = value
    return SpikeReport(config, reports, skipped, done.tokens)


def unspike_(model: nn.Module) -> nn.Module:
    """Replace every spiking layer by an ``nn.Linear`` with its dequantized weight, in place; returns the model.

    Modules that ``fuse_`` replaced come back too, and a transform before a layer is folded into its weight. What 4 bits
    lost stays lost. If anything fails the model is as it was. Raises ValueError where nothing is spiking, and for a model
    that is itself one spiking layer.
    """
    check_module("unspike_", model)
    if isinstance(model, SpikingLinear):
        raise ValueError("unspike_: the model is itself one SpikingLinear and cannot be replaced in place; use to_linear")
    layers = [module for module in model.modules() if isinstance(module, SpikingLinear)]
    if not layers:
        raise ValueError(f"unspike_: {type(model).__name__} has no spiking layer; there is nothing to undo")
    turned = {id(module.linear): module for module in model.modules() if isinstance(module, HadamardLinear)}
    linears: dict[int, nn.Module] = {}
    for layer in tqdm(layers, desc="unspiking", leave=False):
        wrapper = turned.get(id(layer))
        linear = layer.to_linear()
        linears[id(layer) if wrapper is None else id(wrapper)] = (
            linear if wrapper is None else wrapper.without_transform(linear)
        )
    replace_modules(unfuse_(model), linears)
    return model
