"""A spiking model on disk: safetensors, a readable ranvier.json, and for transformers' models their own json files."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.integrations import _manifest as manifests
from ranvier.integrations._manifest import FLOATS, MANIFEST, OWN_FILES, STORED, TENSORS, HadamardEntry, LayerEntry, Manifest
from ranvier.integrations._staging import check_output, staged
from ranvier.methods.spikellm.blocks import check_module
from ranvier.nn.hadamard import Hadamard, HadamardLinear
from ranvier.nn.spike_linear import SpikeGroup, SpikingLinear


class _Slot(NamedTuple):
    """One place of a model that holds a tensor to be stored."""

    name: str
    module: nn.Module
    table: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        return self.table[self.key]


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every parameter and persistent buffer under each of its names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        transient = module._non_persistent_buffers_set
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and key not in transient:
                    yield _Slot(f"{prefix}.{key}" if prefix else key, module, table, key)


# --- save -------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write a model with spiking layers to a folder, all or nothing; :func:`load` brings it back bit for bit.

    Tensors go to ranvier.safetensors, each once however many names it has; what they mean to ranvier.json; a
    transformers model adds config.json and generation_config.json, a tokenizer its own files. The folder is written
    beside its place and swapped in at the end; other files of an existing ranvier folder are carried over.

    Raises ValueError for a model without spiking layers, one that is split over processes, or tensors that have no plain
    values (meta, subclasses),
    FileExistsError for a folder with files that is not a ranvier one, OSError where it cannot be written; the old
    folder is then as it was.
    """
    from ranvier import __version__

    check_module("save", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}
    if not layers or "" in layers:
        fault = "is itself one spiking layer; put it in a module" if layers else "has no spiking layer; spike_ it first"
        raise ValueError(f"save: {type(model).__name__} {fault}")
    tensors, tied = _collect(model)
    manifest = _describe(model, layers, tied)
    for names in manifest.groups:
        for name in names[1:]:
            tensors.pop(f"{name}.salient_mask", None)
    header = {name: (STORED.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}
    manifests.check_header(manifest, _empty_layers(manifest), header, Path("save"))
    for entry in manifest.layers:
        manifests.check_mask(entry, layers[entry.name].salient_mask, Path("save"))
    with staged(folder, MANIFEST, OWN_FILES) as stage:
        metadata = {"format": "pt", manifests.CONTENT_KEY: manifest.digest()}
        save_file(tensors, stage / TENSORS, metadata=metadata)
        _order_metadata(stage / TENSORS, metadata)
        os.chmod(stage / TENSORS, stage.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
        if _is_transformers(model):
            _write_configs(model, stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        manifest.files = {n: manifests.file_facts(stage / n) for n in OWN_FILES[1:] if (stage / n).is_file()}
        manifest.write(stage / MANIFEST, __version__)


def _order_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Give the header's metadata this order: safetensors writes them in any, and equal models should be equal files."""
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        written = header[: header.index(b"}") + 1]
        ordered = b'{"__metadata__":' + json.dumps(metadata, separators=(",", ":")).encode()
        if len(ordered) == len(written):  # another version's spelling stays as it is
            file.seek(8)
            file.write(ordered)


def check_folder(folder: str | os.PathLike) -> None:
    """Raises OSError when :func:`save` could not write there: call it before long work whose result goes there."""
    check_output(folder, MANIFEST)


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store by their first name, on the CPU, and the further names of each."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for module in model.modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"save: {type(module).__name__} keeps extra state that is no tensor; it cannot be stored")
    for slot in _slots(model):
        tensor = slot.tensor
        if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} of layout {tensor.layout}"
            raise ValueError(f"save: {slot.name} is {kind}; only plain tensors with values can be stored")
        where = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        if where in first:
            if first[where] != slot.name:
                tied[slot.name] = first[where]
            continue
        first[where] = slot.name
        held = tensor.detach().cpu().contiguous()
        storage = held.untyped_storage().data_ptr()
        tensors[slot.name] = held.clone() if storage in storages else held
        storages.add(storage)
    return tensors, tied


def _describe(model: nn.Module, layers: Mapping[str, SpikingLinear], tied: Mapping[str, str]) -> Manifest:
    from ranvier.integrations.parallel import ParallelSpikingLinear

    split = next((name for name, module in model.named_modules() if isinstance(module, ParallelSpikingLinear)), None)
    if split is not None:
        raise ValueError(f"save: {split} is split over processes, each of which has a part; save the model before it is split")
    configs = list(dict.fromkeys(layer.config for layer in layers.values()))
    entries = []
    for name, layer in layers.items():
        bias = None if layer.bias is None else _name(layer.bias.dtype)
        shape = (layer.in_features, layer.out_features, bias, layer.salient_count)
        entry = LayerEntry(name, *shape, configs.index(layer.config), _name(layer.dtype))
        manifests.check_entry(entry, len(configs))
        entries.append(entry)
    manifest = Manifest(configs, entries, _groups(layers), {}, _describe_model(model), hadamards=_hadamards(model))
    implied = manifest.aliases
    manifest.tied = {alias: name for alias, name in tied.items() if implied.get(alias) != name}
    return manifest


def _hadamards(model: nn.Module) -> list[HadamardEntry]:
    """The layers that are behind a transform; loading puts it there again, so signs and direction must be the plain ones."""
    entries = []
    for name, module in model.named_modules():
        if isinstance(module, HadamardLinear):
            turn = module.hadamard
            if turn.signs is not None or turn.transpose:
                raise ValueError(f"save: {name} has a transform with signs or transposed; fold the signs into the layer before")
            entries.append(HadamardEntry(name, turn.features, turn.order))
    return entries


def _groups(layers: Mapping[str, SpikingLinear]) -> list[list[str]]:
    """Names of layers with the same SpikeGroup and, as it should be, the same mask."""
    groups: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        if layer.group is not None:
            key = (id(layer.group), layer.salient_mask.cpu().numpy().tobytes())
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _describe_model(model: nn.Module) -> dict[str, Any]:
    if not _is_transformers(model):
        return {"library": None, "class": type(model).__name__}
    attention = getattr(model.config, "_attn_implementation", None)
    buffers = {
        f"{prefix}.{key}" if prefix else key: _name(module._buffers[key].dtype)
        for prefix, module in model.named_modules()
        for key in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(key) is not None and module._buffers[key].is_floating_point()
    }
    kernel = attention if attention in ("eager", "sdpa") else None
    return {"library": "transformers", "class": type(model).__name__, "attention": kernel, "buffers": buffers}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_transformers(model: nn.Module) -> bool:
    library = sys.modules.get("transformers")  # a model of a library that was never imported cannot be one of its own
    return library is not None and isinstance(model, library.PreTrainedModel)


def _write_configs(model: Any, stage: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # ranvier.json says it here; this tells the folder from one of save_pretrained
    config.save_pretrained(stage)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(stage)


# --- load -------------------------------------------------------------------------------------------------------------


def load(folder: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model that :func:`save` wrote, with equal outputs bit for bit.

    Without ``model`` transformers builds it from config.json, no weight is initialised, and it is in eval mode. With
    one (what transformers cannot build) its ``nn.Linear`` layers are replaced in place by the spiking ones, its
    parameters and persistent buffers take the folder's values and dtypes on the devices where they are, and it is
    returned; if anything fails it is as it was. Everything else of it stays.

    A folder that transformers' ``save_pretrained`` wrote of a spiking model is loaded too, by transformers, without
    ``model``.

    Raises ValueError naming file and fault for a missing, truncated, changed or unknown file, and the tensor or layer
    where folder and model do not fit; ImportError where transformers is needed and missing.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() and manifests.is_pretrained(folder):
        if model is not None:
            raise ValueError(f"load: {folder} was written by transformers, which builds the model itself; leave out model=")
        from ranvier.integrations.transformers import load_pretrained

        return load_pretrained(folder)
    manifest = manifests.read_manifest(folder)
    path = folder / TENSORS
    layers = _empty_layers(manifest)
    header = _check_tensors(manifest, layers, path)
    built = _build(manifest, folder) if model is None else model
    tensors = _read_tensors(path)
    masks = manifest.aliases
    for entry in manifest.layers:
        mask = f"{entry.name}.salient_mask"
        manifests.check_mask(entry, tensors[masks.get(mask, mask)], path)
    journal = _Journal()
    try:
        _place_hadamards(built, manifest, journal)
        devices = _place_layers(built, manifest, layers, journal)
        _check_names(built, manifest, header, path)
        _fill(built, manifest, tensors, devices, journal)
        for names in manifest.groups:
            layers[names[0]].group.share(layers[names[0]].salient_mask)
    except BaseException:
        journal.roll_back()
        raise
    return built.eval() if model is None else built


class _Journal:
    """Changes to a model that can be undone."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def put(self, table: dict[str, Any], key: str, value: Any) -> None:
        old = table[key]
        self._undo.append(lambda: table.__setitem__(key, old))
        table[key] = value

    def point(self, parameter: nn.Parameter, values: Tensor) -> None:
        """The same parameter with other values, so that whoever holds it sees them."""
        old = parameter.data
        self._undo.append(lambda: setattr(parameter, "data", old))
        parameter.data = values

    def roll_back(self) -> None:
        for step in reversed(self._undo):
            step()


def _empty_layers(manifest: Manifest) -> dict[str, SpikingLinear]:
    """The layers without storage, those of a group joined."""
    layers = {}
    for entry in manifest.layers:
        try:
            layers[entry.name] = manifests.empty_layer(entry, manifest.configs[entry.config])
        except ValueError as error:
            raise ValueError(f"{MANIFEST}: layer {entry.name}: {error}") from error
    for names in manifest.groups:
        group = SpikeGroup()
        for name in names:
            layers[name].group = group
    return layers


def _check_tensors(manifest: Manifest, layers: Mapping[str, SpikingLinear], path: Path) -> dict[str, tuple]:
    """name -> (dtype, shape) of every stored tensor, after comparing them with the manifest."""
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get(manifests.CONTENT_KEY)
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            header = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in pieces.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    manifests.check_header(manifest, layers, header, path)
    if digest != manifest.digest():
        fault = f"was changed since it was saved: {path.name} belongs to another one"
        raise ValueError(f"{path.with_name(MANIFEST)} {fault}")
    return header


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors, copied out of the mapped file: aligned for the kernels, safe from what happens to the file later."""
    with safe_open(path, framework="pt") as file:
        names = tqdm(list(file.keys()), desc="loading", unit="tensor", leave=False, delay=2)
        return {name: file.get_tensor(name).clone() for name in names}


def _build(manifest: Manifest, folder: Path) -> nn.Module:
    about = manifest.model
    if about.get("library") != "transformers":
        raise ValueError(f"{folder} holds a {about['class']}, which transformers cannot build; pass model=")
    if manifests.CONFIG not in manifest.files:
        raise ValueError(f"{folder / MANIFEST} names no {manifests.CONFIG} to build the model from; pass model=")
    from ranvier.integrations.transformers import build_empty

    model = build_empty(about["class"], folder, about.get("attention"), manifests.GENERATION in manifest.files)
    for name, dtype in dict(about.get("buffers") or {}).items():
        parent, _, key = name.rpartition(".")
        buffers = _module(model, parent)._buffers if _module(model, parent) is not None else {}
        if buffers.get(key) is not None and dtype in FLOATS:
            buffers[key] = buffers[key].to(FLOATS[dtype])
    return model


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _place_hadamards(model: nn.Module, manifest: Manifest, journal: _Journal) -> None:
    """Put the transforms before the layers that the folder has behind them."""
    for entry in manifest.hadamards:
        old = _module(model, entry.name)
        if isinstance(old, HadamardLinear) and (old.hadamard.features, old.hadamard.order) == (entry.features, entry.order):
            continue
        if not isinstance(old, (nn.Linear, SpikingLinear)) or old.in_features != entry.features:
            what = "has no such module" if old is None else f"has another {type(old).__name__} there"
            raise ValueError(f"load: {entry.name} has a Hadamard transform of {entry.features} in the folder, the model {what}")
        wrapped = HadamardLinear(Hadamard(entry.features, entry.order), old).train(old.training)
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is old:
                    journal.put(parent._modules, key, wrapped)


def _place_layers(
    model: nn.Module, manifest: Manifest, layers: Mapping[str, SpikingLinear], journal: _Journal
) -> dict[int, torch.device]:
    """Put the empty layers where the linear ones were; returns where each new module's tensors belong."""
    replacements: dict[int, SpikingLinear] = {}
    devices: dict[int, torch.device] = {}
    for entry in manifest.layers:
        old, new = _module(model, entry.name), layers[entry.name]
        if not isinstance(old, (nn.Linear, SpikingLinear)):
            what = "has no such module" if old is None else f"has a {type(old).__name__} there"
            raise ValueError(f"load: {entry.name} is spiking in the folder, but the model {what}; pass a fitting model")
        sizes, wanted = (old.in_features, old.out_features), (entry.in_features, entry.out_features)
        if sizes != wanted:
            raise ValueError(
                f"load: {entry.name} is {sizes[0]} -> {sizes[1]} in the model"
                f" and {wanted[0]} -> {wanted[1]} in the folder; pass a fitting model"
            )
        if (old.bias is None) != (entry.bias is None):
            raise ValueError(f"load: {entry.name} has a bias in the {'folder' if old.bias is None else 'model'} only")
        held = old.weight_packed if isinstance(old, SpikingLinear) else old.weight
        devices[id(new)] = held.device
        if new.bias is not None:
            new.bias.requires_grad_(old.bias.requires_grad)
        replacements[id(old)] = new.train(old.training)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                journal.put(parent._modules, key, replacements[id(child)])
    return devices


def _check_names(model: nn.Module, manifest: Manifest, header: Mapping[str, tuple], path: Path) -> None:
    aliases = manifest.aliases
    slots = {slot.name: slot.tensor for slot in _slots(model)}
    stored = {**header, **{alias: header[name] for alias, name in aliases.items()}}
    for have, lack, fault in ((slots, stored, "lacks"), (stored, slots, "holds")):
        names = sorted(set(have) - set(lack))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            rest = "which the model has" if fault == "lacks" else "which the model does not have"
            raise ValueError(f"{path} {fault} {names[0]}{more}, {rest}")
    for name, tensor in slots.items():
        dtype, shape = stored[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {name} has shape {list(shape)}; the model's is {list(tensor.shape)}")
        if tensor.is_floating_point() != ("F" in dtype):
            raise ValueError(f"{path}: {name} is {dtype}; the model's is {tensor.dtype}")


def _fill(
    model: nn.Module,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    devices: Mapping[int, torch.device],
    journal: _Journal,
) -> None:
    """Give every slot its stored values: one object for all names of a tensor."""
    aliases = manifest.aliases
    placed: dict[str, Tensor] = {}
    reused: set[int] = set()
    for slot in sorted(_slots(model), key=lambda slot: slot.name in aliases):  # stored names first
        old, source = slot.tensor, aliases.get(slot.name, slot.name)
        is_parameter = isinstance(old, nn.Parameter)
        if source not in placed:
            device = devices.get(id(slot.module), old.device)
            values = tensors[source].to("cpu" if device.type == "meta" else device)
            if is_parameter and not old.is_meta and id(old) not in reused:
                journal.point(old, values)
                placed[source] = old
            else:
                placed[source] = nn.Parameter(values, requires_grad=old.requires_grad) if is_parameter else values
            reused.add(id(old))
        new = placed[source]
        if is_parameter != isinstance(new, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new.detach()
        if new is not old:
            journal.put(slot.table, slot.key, new)
