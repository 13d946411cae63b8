"""ranvier.json: what a saved spiking model consists of, and the checks that it fits the tensors beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ranvier.config import QUANT_METHOD, SpikeConfig
from ranvier.methods.spikellm.grams import layer_class
from ranvier.nn.hadamard import Hadamard
from ranvier.nn.spike_linear import SpikingLinear
from ranvier.ops._args import DTYPES

FORMAT_VERSION = 1
ROTATED_VERSION = 2  # with layers behind a Hadamard transform, which a reader of version 1 would leave out
MANIFEST = "ranvier.json"
TENSORS = "ranvier.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
OWN_FILES = (MANIFEST, TENSORS, CONFIG, GENERATION)
CONTENT_KEY = "ranvier"  # of the tensor file's metadata: the digest of the manifest's content

FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
STORED = {  # names of dtypes in safetensors
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LayerEntry:
    """One spiking layer. bias: the name of its dtype, None without; config: index into the manifest's configs."""

    name: str
    in_features: int
    out_features: int
    bias: str | None
    salient_count: int
    config: int
    dtype: str


@dataclass(frozen=True)
class HadamardEntry:
    """One layer that a :class:`ranvier.nn.HadamardLinear` holds; order: of the matrix, a divisor of features."""

    name: str
    features: int
    order: int


@dataclass
class Manifest:
    """The content of ranvier.json.

    groups: layers that share one mask and one encode; the mask is stored under the first. tied: name -> name under
    which its tensor is stored. model: class, and for transformers' models the attention kernel and the dtypes of
    floating buffers that are not stored. files: size and sha256 of every file that loading reads. hadamards: layers behind
    a transform; without any the file is of version 1 and has no such entry.
    """

    configs: list[SpikeConfig]
    layers: list[LayerEntry]
    groups: list[list[str]]
    tied: dict[str, str]
    model: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    hadamards: list[HadamardEntry] = field(default_factory=list)

    @property
    def version(self) -> int:
        """The format version that a reader needs."""
        return ROTATED_VERSION if self.hadamards else FORMAT_VERSION

    def structure(self) -> dict[str, Any]:
        """What the spiking layers are, as plain json values."""
        rotated = {"hadamards": [vars(entry) for entry in self.hadamards]} if self.hadamards else {}
        return {
            "configs": [config.to_dict() for config in self.configs],
            "layers": [vars(layer) for layer in self.layers],
            "groups": self.groups,
            **rotated,
        }

    def content(self) -> dict[str, Any]:
        """Everything but the files, as plain json values."""
        return {"model": self.model, **self.structure(), "tied": self.tied}

    def digest(self) -> str:
        """sha256 of the content; the tensor file carries it, so that the two belong together."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    @property
    def aliases(self) -> dict[str, str]:
        """tied, and the masks that groups share."""
        shared = {f"{name}.salient_mask": f"{names[0]}.salient_mask" for names in self.groups for name in names[1:]}
        return {**shared, **self.tied}

    def write(self, path: Path, version: str) -> None:
        """One line a layer, group or config, so that people can read it."""
        head = {"format": "ranvier", "format_version": self.version, "ranvier": version, "files": self.files}
        lines = [f" {json.dumps(key)}: {_spread(value)}" for key, value in {**head, **self.content()}.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _spread(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n ]"
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
    return json.dumps(value)


def file_facts(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    digest, size = hashlib.sha256(), path.stat().st_size
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False, delay=2)
    with bar, path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return {"bytes": size, "sha256": digest.hexdigest()}


def is_pretrained(folder: Path) -> bool:
    """Whether this is a spiking model as transformers' save_pretrained writes it: config.json names our method."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return values["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read and check ranvier.json and that the files it names are whole. Raises ValueError naming file and fault."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {MANIFEST}"
        raise ValueError(f"{folder} {what}; pass a folder that ranvier.save wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not readable as json ({error}); save the model again") from error
    if not isinstance(values, dict) or values.get("format") != "ranvier":
        raise ValueError(f"{path} is not a ranvier file: its entry 'format' is missing or not 'ranvier'")
    check_version(values, str(path))
    try:
        manifest = _parse(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {reason}") from error
    for name, facts in manifest.files.items():
        _check_file(folder / name, facts)
    return manifest


def check_version(values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a description of another format version."""
    version = values.get("format_version")
    if version not in (FORMAT_VERSION, ROTATED_VERSION):
        raise ValueError(
            f"{where} has format_version {version!r}; this ranvier reads {FORMAT_VERSION} and {ROTATED_VERSION}:"
            " update ranvier, or save the model again"
        )


def parse_structure(values: Mapping[str, Any]) -> Manifest:
    """What the spiking layers of a model are: a manifest without files, tied names and model.

    Raises ValueError, or what a missing entry or a wrong type raises, naming the fault.
    """
    configs = [SpikeConfig.from_dict(config) for config in values["configs"]]
    layers = [LayerEntry(**entry) for entry in values["layers"]]
    for layer in layers:
        check_entry(layer, len(configs))
    by_name = {layer.name: layer for layer in layers}
    if not layers or len(by_name) != len(layers):
        raise ValueError("'layers' is empty or names a layer twice")
    groups = [list(names) for names in values["groups"]]
    members = [name for names in groups for name in names]
    strangers = [name for name in members if name not in by_name]
    if strangers or len(set(members)) != len(members):
        fault = f"names {strangers[0]!r}, which is no layer" if strangers else "names a layer twice"
        raise ValueError(f"'groups' {fault}")
    for names in groups:
        if len({(by_name[name].in_features, by_name[name].salient_count) for name in names}) != 1:
            raise ValueError(f"the group of {names[:1]} has layers of different in_features or salient_count")
    return Manifest(configs, layers, groups, {}, {}, hadamards=_parse_hadamards(values))


def _parse(values: Mapping[str, Any]) -> Manifest:
    manifest = parse_structure(values)
    tied = dict(values["tied"])
    if not all(isinstance(name, str) for name in tied.values()):
        raise ValueError("'tied' must map names to names")
    files = values["files"]
    unknown = set(files) - set(OWN_FILES[1:])
    if TENSORS not in files or unknown:
        raise ValueError(f"'files' lacks {TENSORS} or names others than {', '.join(OWN_FILES[1:])}")
    if not isinstance(values["model"], dict) or not isinstance(values["model"]["class"], str):
        raise ValueError("'model' must name a class")
    manifest.tied, manifest.model, manifest.files = tied, values["model"], {n: dict(f) for n, f in files.items()}
    return manifest


def _parse_hadamards(values: Mapping[str, Any]) -> list[HadamardEntry]:
    rotated = values["format_version"] == ROTATED_VERSION
    entries = [HadamardEntry(**entry) for entry in (values["hadamards"] if rotated else values.get("hadamards", ()))]
    if rotated != bool(entries) or len({entry.name for entry in entries}) != len(entries):
        raise ValueError(f"'hadamards' names a layer twice, or does not go with format_version {values['format_version']}")
    for entry in entries:
        if not isinstance(entry.name, str):
            raise ValueError(f"'hadamards' has a layer named {entry.name!r}")
        Hadamard(entry.features, entry.order)  # raises for sizes that no transform has
    return entries


def check_entry(layer: LayerEntry, configs: int) -> None:
    whole = (layer.in_features, layer.out_features, layer.salient_count, layer.config)
    if not isinstance(layer.name, str) or not all(type(value) is int and value >= 0 for value in whole):
        raise ValueError(f"layer {layer.name!r} needs a name and whole numbers for its sizes and config")
    if layer.config >= configs:
        raise ValueError(f"layer {layer.name} refers to config {layer.config} of {configs}")
    if layer.dtype not in FLOATS or layer.bias not in (None, *FLOATS):
        known = ", ".join(FLOATS)
        raise ValueError(f"layer {layer.name} has dtype {layer.dtype!r} and bias {layer.bias!r}; known are {known}")


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, but {MANIFEST} names it; save the model again")
    size = path.stat().st_size
    if size != facts.get("bytes"):
        said = facts.get("bytes")
        raise ValueError(f"{path} has {size} bytes, {MANIFEST} says {said}: it is truncated or was changed")
    if file_facts(path)["sha256"] != facts.get("sha256"):
        raise ValueError(f"{path} was changed since it was saved: its sha256 is not the one in {MANIFEST}")


def empty_layer(entry: LayerEntry, config: SpikeConfig) -> SpikingLinear:
    """A layer of this shape without storage. Raises ValueError for a shape no kernel takes."""
    bias, dtype = entry.bias is not None, FLOATS[entry.dtype]
    layer = layer_class(config)(entry.in_features, entry.out_features, bias, config, entry.salient_count, "meta", dtype)
    if bias:
        layer.bias = torch.nn.Parameter(layer.bias.detach().to(FLOATS[entry.bias]))
    return layer


def check_header(manifest: Manifest, layers: Mapping[str, SpikingLinear], header: Mapping[str, tuple], path: Path) -> None:
    """Compare names, shapes and dtypes of the layers with the tensor file's. header: name -> (dtype, shape).

    Raises ValueError naming the tensor.
    """
    aliases = manifest.aliases
    for alias, name in aliases.items():
        if name not in header or alias in header:
            fault = f"lacks {name}, which" if name not in header else f"holds {alias}, which"
            raise ValueError(f"{path} {fault} {MANIFEST} says is stored once for both {name} and {alias}")
    for layer_name, layer in layers.items():
        wanted = {f"{layer_name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        own = {name for name in header if name.rpartition(".")[0] == layer_name}
        if extra := sorted(own - set(wanted)):
            raise ValueError(f"{path} holds {extra[0]}, which {MANIFEST} does not give that layer")
        for name, tensor in wanted.items():
            stored = header.get(aliases.get(name, name))
            if stored is None:
                raise ValueError(f"{path} lacks {name}, which {MANIFEST} says the model has")
            expected = (STORED[tensor.dtype], tuple(tensor.shape))
            if stored != expected:
                raise ValueError(
                    f"{path}: {name} is {stored[0]} {list(stored[1])}; {MANIFEST} describes {expected[0]} {list(expected[1])}"
                )


def check_mask(entry: LayerEntry, mask: Tensor, path: Path) -> None:
    """Raises ValueError when the stored mask does not mark as many channels as the manifest says."""
    count = int(mask.sum())
    if count != entry.salient_count:
        said = f"{MANIFEST} says salient_count {entry.salient_count}"
        raise ValueError(f"{path}: {entry.name}.salient_mask marks {count} channels, {said}")
