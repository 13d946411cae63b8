"""Converting a transformers folder block by block, for models larger than memory; resumable after a kill.

At its peak it holds one block, that block's working space and the calibration set's hidden states; weights come from the
shards one block at a time, converted blocks go to a work folder beside the target as they are done. Llama-2-7B in bfloat16
with 128 x 2048 calibration tokens and gptq, in GB (1e9 bytes):

    one block, 202.4 M weights            0.40    its float32 working copies, one layer at a time (11008 x 4096)   0.36
    embeddings and head                   0.52    Gram matrix of down_proj, 11008^2 float32, with its factor: x 4  1.94
    hidden states, 262,144 x 4096         2.15    activations of one 2048-token batch in a block                   0.4

These are the tensors themselves. gptq works on further copies of the Gram matrix, 0.48 GB each for down_proj, so the peak lies
above their sum; ``benchmarks/stream_memory.py`` measures it. omniquant holds the hidden states twice: its targets are a second
stream of them. The model has 13.5. The packed model, 3.8 GB, is put together from mapped files at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.config import SpikeConfig
from ranvier.integrations import folder as folders
from ranvier.integrations._manifest import CONFIG, GENERATION, LayerEntry, empty_layer, file_facts
from ranvier.integrations._staging import check_output, naming
from ranvier.integrations.transformers import build_empty, import_transformers
from ranvier.methods.spikellm.blocks import Chain, capture, find_blocks, replace_modules
from ranvier.methods.spikellm.convert import (
    LayerReport,
    SpikeReport,
    check_batches,
    check_supported,
    find_linears,
    report_layer,
)
from ranvier.methods.spikellm.data import CALIBRATION_TOKENS, calibration_batches
from ranvier.methods.spikellm.engine import ChainConverter
from ranvier.nn.spike_linear import SpikeGroup, check_convertible

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROGRESS = "progress.json"
CPU = torch.device("cpu")


def convert_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    config: SpikeConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    resume: bool = True,
) -> SpikeReport:
    """Convert a transformers folder (config.json, safetensors) to a ranvier folder, the same bytes as in memory.

    calibration as for :func:`ranvier.spike_`, which this follows bit for bit on a model loaded in ``dtype`` (None: as
    stored). Work goes to ``.NAME.ranvier-work`` beside the target: if that holds blocks of the same config, calibration,
    source and seed, they are taken over (``resume``), else it is begun anew. The target appears at the end, whole.

    Raises ValueError for a source that is no such folder or lacks weights, a model whose blocks are no chain, layers to be
    converted outside its blocks, a rotation (it needs the whole model: use spike_); OSError where it cannot be written.
    """
    config, source, target = SpikeConfig() if config is None else config, Path(source), Path(os.path.realpath(target))
    check_supported(config, "convert_folder")
    if config.rotate:
        raise ValueError("convert_folder: rotate=True turns all weights at once; convert in memory with spike_")
    if calibration is None:
        given = config.calibration
        calibration = _text(source, Path(given), tokenizer) if isinstance(given, (str, os.PathLike)) else given
    config = replace(config, calibration=None)
    if calibration is None:
        raise ValueError("convert_folder: pass calibration batches; they also show which layers read the same tensor")
    check_batches(calibration, "convert_folder")
    batches = list(calibration)
    if not batches:
        raise ValueError("convert_folder: the calibration set is empty; pass at least one batch")
    check_output(target, folders.MANIFEST)
    weights = _Shards(source, dtype)
    stream = _Stream(source, config, weights)
    work = _Work(target.parent / f".{target.name}.ranvier-work", _key(source, config, batches, seed, dtype), resume)
    with torch.no_grad():
        stream.convert(batches, work, seed)
    report = stream.assemble(work)
    folders.save(stream.model, target, tokenizer)
    work.remove()
    return report


def _text(source: Path, path: Path, tokenizer: Any) -> list[Tensor]:
    """Batches of a text file, cut by the given tokenizer or the source's own."""
    if tokenizer is None:
        transformers = import_transformers()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"convert_folder: {source} has no readable tokenizer ({reason}); pass tokenizer=") from error
    return list(calibration_batches(tokenizer, path.read_text(encoding="utf-8"), CALIBRATION_TOKENS))


def _key(source: Path, config: SpikeConfig, batches: list[Any], seed: int, dtype: torch.dtype | None) -> str:
    """What the result depends on: version, config, seed, every calibration tensor, every byte of the source's weights."""
    from ranvier import __version__

    digest = hashlib.sha256(json.dumps([__version__, config.to_dict(), seed, str(dtype)], sort_keys=True).encode())
    for batch in batches:
        for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]:
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(
                    value.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
                )
            else:
                digest.update(repr(value).encode())
    for path in sorted(p for p in source.iterdir() if p.suffix == ".safetensors" or p.name in (CONFIG, GENERATION)):
        digest.update(f"{path.name} {file_facts(path)['sha256']}".encode())
    return digest.hexdigest()


class _Shards:
    """The tensors of a transformers folder, read one at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.folder, self.dtype = folder, dtype
        if not (folder / CONFIG).is_file():
            raise ValueError(f"convert_folder: {folder} has no {CONFIG}; pass a transformers folder with safetensors")
        try:
            if (folder / INDEX).is_file():
                files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            elif (folder / SINGLE).is_file():
                with safe_open(folder / SINGLE, framework="pt") as file:
                    files = dict.fromkeys(file.keys(), SINGLE)
            else:
                raise ValueError(f"neither {SINGLE} nor {INDEX} is there")
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            raise ValueError(f"convert_folder: {folder} holds no readable safetensors: {error}") from error
        self.files: dict[str, str] = dict(files)

    def read(self, name: str) -> Tensor:
        """One tensor, copied out of its shard, in the wanted dtype."""
        try:
            with safe_open(self.folder / self.files[name], framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"convert_folder: {self.folder / self.files[name]} cannot be read: {error}") from error
        wanted = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(wanted, copy=True)


class _Work:
    """The work folder: what is done, block files, hidden states. progress.json is replaced as the last step of each block."""

    def __init__(self, folder: Path, key: str, resume: bool) -> None:
        self.folder, self.state = folder, {"key": key, "blocks": []}
        path = folder / PROGRESS
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = {}
            if resume and found.get("key") == key:
                self.state = found
                return
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """A record for each block that is done."""
        return self.state["blocks"]

    def _write(self) -> None:
        stage = self.folder / f"{PROGRESS}.new"
        with stage.open("w", encoding="utf-8") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, self.folder / PROGRESS)

    def block_path(self, index: int) -> Path:
        """Where the tensors of a converted block lie."""
        return self.folder / f"block-{index:05}.safetensors"

    def _streams_path(self, count: int) -> Path:
        return self.folder / f"hidden-{count:05}.safetensors"

    def streams(self) -> dict[str, Tensor]:
        """The hidden states behind the blocks that are done."""
        return load_file(self._streams_path(len(self.blocks)))

    def add(self, record: dict[str, Any], tensors: dict[str, Tensor], streams: dict[str, Tensor]) -> None:
        """Another block is done. Raises OSError naming the folder where it cannot be written."""
        with naming(self.folder):
            self._add(record, tensors, streams)

    def _add(self, record: dict[str, Any], tensors: dict[str, Tensor], streams: dict[str, Tensor]) -> None:
        index = len(self.blocks)
        for path, content in ((self.block_path(index), tensors), (self._streams_path(index + 1), streams)):
            stage = path.with_suffix(".new")
            save_file(content, stage)
            with stage.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(stage, path)
        self.state = {**self.state, "blocks": [*self.blocks, record]}
        self._write()
        self._streams_path(index).unlink(missing_ok=True)

    def remove(self) -> None:
        """Everything is in the target."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _Stream:
    """A model without weights, whose blocks get theirs one at a time."""

    def __init__(self, source: Path, config: SpikeConfig, weights: _Shards) -> None:
        values = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        name = (values.get("architectures") or [""])[0]
        self.config, self.weights = config, weights
        self.model = build_empty(name, source, None, (source / GENERATION).is_file()).eval()
        self.model.tie_weights()
        self.layers, self.skipped = find_linears(self.model, config.skip)
        self.path = find_blocks(self.model, self.layers)
        outside = [n for n in self.layers if self.path is None or not n.startswith(f"{self.path}.")]
        if outside:
            raise ValueError(
                f"convert_folder: {outside[0]} lies outside the model's blocks, which are all that is streamed; put a part"
                " of its name into config.skip, or convert in memory with spike_"
            )
        for layer_name, layer in self.layers.items():
            if config.group_size and layer.in_features % config.group_size:
                fault = f"K = {layer.in_features} of {layer_name} is not a multiple of group_size = {config.group_size}"
                raise ValueError(f"convert_folder: {fault}; choose another group_size or skip this layer")
        self.blocks = list(self.model.get_submodule(self.path))
        self._free(self.model)

    def _free(self, module: nn.Module) -> None:
        """Parameters to the meta device: one object stays one where it has several names."""
        held: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for key, value in part._parameters.items():
                if value is not None:
                    part._parameters[key] = held.setdefault(id(value), nn.Parameter(value.detach().to("meta"), False))

    def _fill(self, module: nn.Module, prefix: str, blocks: bool) -> None:
        """Parameters and persistent buffers of a module from the shards; without blocks: of what is outside them."""
        slots = [(slot, slot.tensor) for slot in folders._slots(module) if blocks or not slot.name.startswith(f"{self.path}.")]
        held: dict[int, Tensor] = {}
        for slot, old in sorted(slots, key=lambda pair: prefix + pair[0].name not in self.weights.files):
            name = prefix + slot.name
            if id(old) not in held:
                if name not in self.weights.files:
                    raise ValueError(f"convert_folder: {self.weights.folder} has no tensor {name}, which the model has")
                value = self.weights.read(name)
                if value.shape != old.shape:
                    got = f"{name} is {list(value.shape)}, the model's {list(old.shape)}"
                    raise ValueError(f"convert_folder: {self.weights.folder}: {got}")
                held[id(old)] = nn.Parameter(value, False) if isinstance(old, nn.Parameter) else value
            slot.table[slot.key] = held[id(old)]

    def convert(self, batches: list[Any], work: _Work, seed: int) -> None:
        """Every block that is not done yet."""
        self._fill(self.model, "", blocks=False)
        self._fill(self.blocks[0], f"{self.path}.0.", blocks=True)
        chain = capture(self.model, self.path, batches, CPU)
        if chain is None:
            raise ValueError(f"convert_folder: {self.path} is no chain of blocks; convert in memory with spike_")
        self._free(self.blocks[0])
        converter = ChainConverter(chain, self.config, seed)
        if work.blocks:
            self._take_up(converter, chain, work)
        for index in tqdm(range(len(work.blocks), len(self.blocks)), desc="blocks", unit="block"):
            self._convert_block(converter, chain, index, work)

    def _take_up(self, converter: ChainConverter, chain: Chain, work: _Work) -> None:
        streams = work.streams()
        for batch in chain.batches():
            chain.hidden[batch] = streams[f"hidden.{batch}"].clone()
            if converter.floats is not None:
                converter.floats[batch] = streams[f"floats.{batch}"].clone()

    def _convert_block(self, converter: ChainConverter, chain: Chain, index: int, work: _Work) -> None:
        block, prefix = self.blocks[index], f"{self.path}.{index}."
        self._fill(block, prefix, blocks=True)
        own = {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}
        for name, linear in own.items():
            check_convertible(f"convert_folder: {name}", linear, self.config)
        made, tokens = converter.convert(block, index, own)
        entries = []
        for name, layer in made.items():
            report = report_layer(name, own[name], layer)
            module = layer.module
            bias = None if module.bias is None else folders._name(module.bias.dtype)
            shape = (module.in_features, module.out_features, bias, module.salient_count, 0, folders._name(module.dtype))
            entries.append({"entry": vars(LayerEntry(name, *shape)), "report": {**vars(report), "group": list(layer.group)}})
        tensors = {prefix + name: value.detach().clone() for name, value in block.state_dict().items()}
        streams = {f"hidden.{i}": value.contiguous() for i, value in enumerate(chain.hidden)}
        streams |= {f"floats.{i}": value.contiguous() for i, value in enumerate(converter.floats or [])}
        work.add({"layers": entries, "tokens": tokens}, tensors, streams)
        for linear in own.values():
            self._free(linear)
        self._free_block(block)

    def _free_block(self, block: nn.Module) -> None:
        self._free(block)
        for part in block.modules():
            transient = part._non_persistent_buffers_set
            for key, value in part._buffers.items():
                if value is not None and key not in transient:
                    part._buffers[key] = value.to("meta")

    def assemble(self, work: _Work) -> SpikeReport:
        """The converted layers in the model, their tensors mapped from the work folder; what was done."""
        reports: list[LayerReport] = []
        for index, record in enumerate(work.blocks):
            made, groups = {}, {}
            for item in record["layers"]:
                entry, report = LayerEntry(**item["entry"]), item["report"]
                layer = made[entry.name] = empty_layer(entry, self.config)
                group = tuple(report["group"])
                reports.append(LayerReport(**{**report, "group": group}))
                if len(group) > 1:
                    layer.group = groups.setdefault(group, SpikeGroup())
            replace_modules(self.model, {id(self.model.get_submodule(name)): layer for name, layer in made.items()})
            tensors, prefix = load_file(work.block_path(index)), f"{self.path}.{index}."
            for slot in folders._slots(self.model.get_submodule(f"{self.path}.{index}")):
                value = tensors[prefix + slot.name]
                slot.table[slot.key] = nn.Parameter(value, False) if isinstance(slot.tensor, nn.Parameter) else value
            for layer in made.values():
                if layer.group is not None:
                    layer.salient_mask = layer.group.share(layer.salient_mask)
        tokens = max((record["tokens"] for record in work.blocks), default=0)
        return SpikeReport(self.config, reports, self.skipped, tokens)
