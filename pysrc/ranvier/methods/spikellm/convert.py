"""Turning the linear layers of a whole model into spiking ones, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.fuse import replace_modules, unfuse_
from ranvier.methods.spikellm.saliency import SaliencyObserver, salient_mask
from ranvier.nn.spike_linear import SpikeGroup, SpikingLinear, check_convertible


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


def _run_calibration(model: nn.Module, calibration: Iterable[Any]) -> int:
    """Runs every batch; returns how many there were."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for batch in tqdm(calibration, desc="saliency", unit="batch", leave=False):
        if isinstance(batch, Mapping):
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        elif isinstance(batch, Tensor):
            model(batch.to(device))
        else:
            raise TypeError(
                f"spike_: calibration yields {type(batch).__name__}; yield input tensors or dicts of keyword arguments"
            )
        count += 1
    return count


def _observe(model: nn.Module, layers: dict[str, nn.Linear], config: SpikeConfig, calibration: Any) -> SaliencyObserver:
    if calibration is None:
        if config.salient not in (0.0, 1.0):
            raise ValueError(
                f"spike_: salient = {config.salient} needs calibration batches to measure saliency; pass some, or salient=0"
            )
        return SaliencyObserver(layers, score=False)
    if isinstance(calibration, (Tensor, str, bytes, Mapping)):
        raise TypeError(f"spike_: calibration is {type(calibration).__name__}; pass an iterable of batches, such as a list")
    was_training = {m: m.training for m in model.modules()}
    observer = SaliencyObserver(layers, score=config.salient not in (0.0, 1.0))
    model.eval()
    try:
        with torch.no_grad(), observer:
            batches = _run_calibration(model, calibration)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    if batches == 0:
        raise ValueError("spike_: the calibration set is empty; pass at least one batch")
    if config.salient in (0.0, 1.0):
        return observer
    unseen = [name for name, reader in observer.readers.items() if reader.tokens == 0]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise ValueError(f"spike_: calibration never reached {unseen[0]}{more}; calibrate with inputs that do, or skip it")
    return observer


def _masks(observer: SaliencyObserver, config: SpikeConfig) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """For every layer its group and the one mask of that group."""
    groups = observer.groups()
    grouped = {name for names in groups for name in names}
    groups += [[name] for name in observer.readers if name not in grouped]
    result = {}
    for names in groups:
        try:
            mask = salient_mask(observer.scores(names), config.salient)
        except ValueError as error:
            raise ValueError(f"spike_: {names[0]}: {error}") from error
        result.update({name: (tuple(names), mask) for name in names})
    return result


def _convert(
    layers: dict[str, nn.Linear], masks: dict[str, tuple[tuple[str, ...], Tensor]], config: SpikeConfig
) -> tuple[dict[int, nn.Module], list[LayerReport]]:
    shared: dict[tuple[str, ...], SpikeGroup] = {}
    replacements: dict[int, nn.Module] = {}
    reports = []
    for name, linear in tqdm(layers.items(), desc="spiking", unit="layer", leave=False):
        names, mask = masks[name]
        layer = SpikingLinear.from_linear(linear, config, mask)
        if len(names) > 1:
            layer.group = shared.setdefault(names, SpikeGroup())
            layer.salient_mask = layer.group.share(mask)
        weight = linear.weight.detach().float()
        norm = float(weight.norm())
        error = float((weight - layer.dequantized_weight()).norm()) / norm if norm else 0.0
        held = sum(t.numel() * t.element_size() for t in layer.packed_weight if t is not None)
        held += mask.numel() if name == names[0] else 0
        size = linear.weight.numel() * linear.weight.element_size()
        reports.append(LayerReport(name, linear.in_features, linear.out_features, int(mask.sum()), size, held, error, names))
        replacements[id(linear)] = layer
    return replacements, reports


def spike_(model: nn.Module, config: SpikeConfig | None = None, calibration: Iterable[Any] | None = None) -> SpikeReport:
    """Replace every ``nn.Linear`` that is not skipped by a :class:`ranvier.nn.SpikingLinear`, in place.

    calibration: an iterable of input-id tensors or of dicts of keyword arguments for ``model``; each batch runs once
    through the model as it is, and the saliency of every channel is added up on the way. It may be None when
    ``config.salient`` is 0 or 1. Layers that are handed the very same tensor (q, k and v; gate and up) share one mask and,
    in eager mode, one encoding.

    Works layer by layer, and swaps at the end: at its peak it holds the model, the packed layers (an eighth of a float32
    model) and one layer's working space. If anything fails the model is as it was. Returns a report.

    Raises ValueError for a model without linear layers, a layer with NaN or Inf or that does not fit ``group_size`` (it is
    named), an empty calibration set or one that misses a layer; TypeError for batches of another kind.
    SpikeLLM, arXiv 2407.04752.
    """
    config = config or SpikeConfig()
    if config.pipeline != "rtn" or config.rotate or config.weight_bits != 4 or config.act_bits is None:
        raise ValueError("spike_: this version converts with pipeline='rtn', weight_bits=4 and act_bits 1 to 8 only")
    if type(model) is nn.Linear:
        raise ValueError(
            "spike_: the model is itself one nn.Linear and cannot be replaced in place; use SpikingLinear.from_linear"
        )
    layers, skipped = find_linears(model, config.skip)
    if not layers:
        left = f" outside {', '.join(config.skip)}" if skipped else ""
        raise ValueError(f"spike_: {type(model).__name__} has no nn.Linear layer{left}; there is nothing to convert")
    for name, linear in layers.items():
        check_convertible(f"spike_: {name}", linear, config)
    observer = _observe(model, layers, config, calibration)
    tokens = max(reader.tokens for reader in observer.readers.values())
    with torch.no_grad():
        replacements, reports = _convert(layers, _masks(observer, config), config)
    replace_modules(model, replacements)
    return SpikeReport(config, reports, skipped, tokens)


def unspike_(model: nn.Module) -> nn.Module:
    """Replace every spiking layer by an ``nn.Linear`` with its dequantized weight, in place; returns the model.

    Modules that ``fuse_`` replaced come back too. What 4 bits lost stays lost. If anything fails the model is as it was.
    Raises ValueError where nothing is spiking, and for a model that is itself one spiking layer.
    """
    if isinstance(model, SpikingLinear):
        raise ValueError("unspike_: the model is itself one SpikingLinear and cannot be replaced in place; use to_linear")
    layers = [module for module in model.modules() if isinstance(module, SpikingLinear)]
    if not layers:
        raise ValueError(f"unspike_: {type(model).__name__} has no spiking layer; there is nothing to undo")
    linears = {id(layer): layer.to_linear() for layer in tqdm(layers, desc="unspiking", leave=False)}
    replace_modules(unfuse_(model), linears)
    return model
