"""The quantization method "ranvier-spike" of transformers: what its config.json says, and how it loads and saves.

The classes here are the halves that need no transformers; :func:`registered` joins them with transformers' own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ranvier.config import QUANT_METHOD, SpikeConfig
from ranvier.integrations import _manifest as manifests
from ranvier.integrations._conversion import check_calibration, conversion_note, text_batches, untie
from ranvier.integrations._manifest import HadamardEntry, LayerEntry, Manifest
from ranvier.methods.spikellm.convert import check_supported
from ranvier.nn.spike_linear import SpikingLinear

# A tensor of this shape under the name of a weight that is no more: transformers without this method would make a plain
# linear layer, give it random values and say so in a report; the shape makes that an error.
GUARD_SHAPE = (1,)


class StoredConfig:
    """config.json's entry quantization_config: the spiking layers of one model, as ranvier.json describes them.

    Its class is called SpikeConfig, because transformers compares the names of classes where a quantized model is
    loaded with a ``quantization_config``.
    """

    quant_method = QUANT_METHOD

    def __init__(self, manifest: Manifest | None = None) -> None:
        """manifest: None where the layers are still to come."""
        self.manifest = manifest or Manifest([], [], [], {}, {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredConfig) and self.to_dict() == other.to_dict()

    __hash__ = None

    @classmethod
    def describe(cls, model: nn.Module) -> StoredConfig:
        """Of a model that is spiking. Raises ValueError where it is not."""
        from ranvier.integrations.folder import _describe

        layers = {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}
        if not layers:
            raise ValueError(f"{type(model).__name__} has no spiking layer; spike_ it first, or dequantize() what is left")
        return cls(_describe(model, layers, {}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Raises ValueError for another format version and for a damaged description."""
        manifests.check_version(values, "quantization_config in config.json")
        try:
            config = cls(manifests.parse_structure(values))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"quantization_config of {QUANT_METHOD} is damaged: {reason}") from error
        return (config, kwargs) if return_unused_kwargs else config

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """So that ``dict(config)`` is :meth:`to_dict`."""
        yield from self.to_dict().items()

    def to_dict(self) -> dict[str, Any]:
        """Plain json values."""
        return {"quant_method": QUANT_METHOD, "format_version": self.manifest.version, **self.manifest.structure()}


class _Place(NamedTuple):
    """Where a layer of the description is in the model: its entry and its name there."""

    entry: LayerEntry
    name: str


class SpikeQuantizer:
    """Converts a model after transformers loaded it, or puts empty spiking layers in place before it loads them."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        self.spike_config, self._calibration = None, None
        if isinstance(quantization_config, SpikeConfig):
            self._calibration = quantization_config.calibration
            self.spike_config = dataclasses.replace(quantization_config, calibration=None)
            quantization_config = registered().config()  # described once there are layers
        super().__init__(quantization_config, **kwargs)
        self._layers: dict[str, SpikingLinear] = {}

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Raises ValueError for what would fail after the weights were loaded."""
        if self.pre_quantized:
            return
        if self.spike_config is None:
            raise ValueError(
                "quantization_config describes the spiking layers of another model, and this one has plain ones;"
                " pass a ranvier.SpikeConfig"
            )
        check_supported(self.spike_config)
        check_calibration(self.spike_config, self._calibration)
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in places or len(places) > 1:
            raise ValueError(
                f"device_map={device_map!r} spreads the model; convert it on one device, save it, and load the result so"
            )

    # --- loading a spiking model --------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **_: Any) -> None:
        model.config.quantization_config = self.quantization_config  # without the calibration
        if not self.pre_quantized:
            return
        from ranvier.integrations.folder import _empty_layers, _Journal, _place_hadamards

        prefix = getattr(model, "base_model_prefix", "")
        manifest = self.quantization_config.manifest
        _place_hadamards(model, dataclasses.replace(manifest, hadamards=_hadamard_places(model, manifest)), _Journal())
        places = _places(model, manifest)
        dtypes = {entry.name: model.get_submodule(name).weight.dtype for entry, name in places}
        cast = [_cast(entry, dtypes.get(entry.name)) for entry in manifest.layers]
        layers = _empty_layers(dataclasses.replace(manifest, layers=cast))
        for entry, name in places:
            parent, _, key = name.rpartition(".")
            self._layers[name] = model.get_submodule(parent)._modules[key] = layers[entry.name]
        if checkpoint_files is not None:
            _check_files(self._layers, prefix, checkpoint_files)
        # A folder of the base model has them without its prefix.
        guards = {rf"(^|\.){re.escape(name.removeprefix(f'{prefix}.'))}\.weight$" for name in self._layers}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | guards

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if not self.pre_quantized:
            self._convert(model)
            return model
        for name, layer in self._layers.items():
            for key, held in list(layer._buffers.items()):
                if held is not None and not held.is_meta:
                    # Out of the mapped file: aligned for the kernels, safe from what happens to the file later.
                    layer._buffers[key] = held.clone(memory_format=torch.contiguous_format)
            marked = layer.salient_mask
            if not marked.is_meta and int(marked.sum()) != layer.salient_count:
                count, said = int(marked.sum()), layer.salient_count
                raise ValueError(f"{name}.salient_mask marks {count} channels, config.json says {said}: the folder was changed")
            if layer.group is not None:
                layer.salient_mask = layer.group.share(marked)
        return model

    def _convert(self, model: Any) -> None:
        from ranvier.methods.spikellm import spike_

        calibration = self._calibration
        if isinstance(calibration, (str, os.PathLike)):
            calibration = text_batches(model, Path(calibration))
        self.report = spike_(model, self.spike_config, calibration)
        self._calibration = None
        untie(model)
        self.quantization_config = type(self.quantization_config).describe(model)
        model.config.quantization_config = self.quantization_config
        if note := conversion_note(model):
            warnings.warn(note, stacklevel=2)

    # --- saving -------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any, **_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes; config.json, which it writes after, says what the model is now."""
        self.quantization_config = type(self.quantization_config).describe(model)
        model.config.quantization_config = self.quantization_config
        state = model.state_dict()
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SpikingLinear)]
        for name, layer in layers:
            if layer.group is not None:  # files cannot hold one tensor under two names
                state[f"{name}.salient_mask"] = layer.salient_mask.clone()
        state[f"{layers[0][0]}.weight"] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
        return state, {}

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow straight through to inputs and biases, so adapters and what is not quantized can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from ranvier.methods.spikellm import unspike_

        return unspike_(model).to(dtype)


class Registered(NamedTuple):
    """The two classes that transformers is given."""

    config: type
    quantizer: type


@cache
def registered() -> Registered:
    """transformers' classes with ours in front of them, registered under the method's name."""
    from ranvier.integrations.transformers import import_transformers

    import_transformers()
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    about = {"__module__": __name__}
    config = type("SpikeConfig", (StoredConfig, QuantizationConfigMixin), {**about, "__qualname__": "RegisteredConfig"})
    quantizer = type("SpikeQuantizer", (SpikeQuantizer, HfQuantizer), {**about, "__qualname__": "RegisteredQuantizer"})
    register_quantization_config(QUANT_METHOD)(config)
    register_quantizer(QUANT_METHOD)(quantizer)
    return Registered(config, quantizer)


def __getattr__(name: str) -> Any:
    """The registered classes under the names that pickle looks for."""
    if name in ("RegisteredConfig", "RegisteredQuantizer"):
        return getattr(registered(), name.removeprefix("Registered").lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _cast(entry: LayerEntry, dtype: torch.dtype | None) -> LayerEntry:
    """The entry with the dtype in which the model is loaded."""
    if dtype is None:
        return entry
    name = str(dtype).removeprefix("torch.")
    return dataclasses.replace(entry, dtype=name, bias=None if entry.bias is None else name)


class _Names:
    """The names of a description in a model: a folder of a model with a head may be loaded as the base model without it,
    and the other way round."""

    def __init__(self, model: Any) -> None:
        self.modules = dict(model.named_modules())
        self._prefix = f"{base}." if (base := getattr(model, "base_model_prefix", "")) else ""
        self._is_base = bool(base) and not any(name.startswith(self._prefix) for name in self.modules)

    def find(self, name: str) -> str | None:
        """The module's name in the model, None where it has none."""
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((n for n in candidates if n in self.modules), None)

    def of_head(self, name: str) -> bool:
        """Whether the model has no such module because it is a base model."""
        return self._is_base and not name.startswith(self._prefix) and name not in self.modules


def _hadamard_places(model: Any, manifest: Manifest) -> list[HadamardEntry]:
    """The transforms under their names in the model."""
    names = _Names(model)
    held = [entry for entry in manifest.hadamards if not names.of_head(entry.name)]
    return [dataclasses.replace(entry, name=names.find(entry.name) or entry.name) for entry in held]


def _places(model: Any, manifest: Manifest) -> list[_Place]:
    """Raises ValueError for a layer that the model does not have, or has in another size."""
    names, places = _Names(model), []
    for entry in manifest.layers:
        if names.of_head(entry.name):
            continue
        name = names.find(entry.name)
        old = None if name is None else names.modules[name]
        if not isinstance(old, nn.Linear):
            what = "has no such layer" if old is None else f"has a {type(old).__name__} there"
            raise ValueError(f"config.json says that {entry.name} is spiking, but {type(model).__name__} {what}")
        if (old.in_features, old.out_features) != (entry.in_features, entry.out_features):
            raise ValueError(
                f"config.json says that {entry.name} is {entry.in_features} -> {entry.out_features};"
                f" in {type(model).__name__} it is {old.in_features} -> {old.out_features}"
            )
        if old.bias is not None and entry.bias is None:
            raise ValueError(f"{entry.name} has a bias in {type(model).__name__}, and none by config.json")
        places.append(_Place(entry, name))
    if not places:
        raise ValueError(f"config.json names no spiking layer of {type(model).__name__}")
    return places


def _check_files(layers: Mapping[str, SpikingLinear], prefix: str, files: Iterable[str]) -> None:
    """Raises ValueError for a tensor of a spiking layer that the files lack or hold in another shape or dtype.

    transformers would fill it with random values and go on.
    """
    header: dict[str, tuple] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            return
        try:
            with safe_open(path, framework="pt") as file:
                pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                header |= {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in pieces.items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    folder = Path(str(path)).parent
    for layer_name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            name = f"{layer_name}.{key}"
            stored = next((header[n] for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in header), None)
            if stored is None:
                raise ValueError(f"{folder} lacks {name}, which config.json says the model has; save the model again")
            dtype = manifests.STORED[tensor.dtype]
            if stored[1] != tuple(tensor.shape) or (stored[0] != dtype and key != "bias"):
                got, wanted = f"{stored[0]} {list(stored[1])}", f"{dtype} {list(tensor.shape)}"
                raise ValueError(f"{folder}: {name} is {got}; config.json describes {wanted}")
