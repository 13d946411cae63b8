"""Converting a transformers folder block by block, for models larger than memory; resumable after a kill.

At its peak it holds one block, that block's working space and the calibration set's hidden states; weights come from the
shards one block at a time, converted blocks go to a work folder beside the target as they are done. Llama-2-7B in bfloat16
with 128 x 2048 calibration tokens and gptq, in GB (1e9 bytes), where the most is held, in fitting a grid:

    python, torch, transformers         0.26    Gram matrix of down_proj, 11008^2 float32              0.48
    embeddings and head                 0.52    the rest: float32 copies of its weight, 0.18 each,
    one block, 202.4 M weights          0.40    activations of one batch, memory that is kept          1.6

The sum, 3.3, was measured on a model of its shape with two layers and one batch of 2048 tokens (rtn: 2.6), the last term is
what the others leave of it, not told apart. The factor of the Gram matrix comes after the fit and holds two matrices of
0.48. Layers add nothing; the other batches add their hidden states, 262,144 x 4096, 2.1, and position embeddings, 0.1: 5.6
in all (``benchmarks/stream_memory.py``, results beside it). omniquant holds the hidden states twice: its targets are a
second stream of them. So does gptq where layers outside the blocks are converted. The model has 13.5. The packed model, 3.8
GB, is put together from mapped files at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.config import SpikeConfig
from ranvier.integrations import folder as folders
from ranvier.integrations._manifest import CONFIG, GENERATION, LayerEntry, empty_layer, file_facts
from ranvier.integrations._staging import check_output
from ranvier.integrations._stream_files import Shards, Work
from ranvier.integrations.transformers import build_empty, import_transformers
from ranvier.methods.spikellm.blocks import Chain, Positions, capture, find_blocks, replace_modules, run_around
from ranvier.methods.spikellm.convert import (
    LayerReport,
    SpikeReport,
    check_batches,
    check_supported,
    convert_head,
    find_linears,
    report_layer,
    targets,
)
from ranvier.methods.spikellm.data import CALIBRATION_TOKENS, calibration_batches
from ranvier.methods.spikellm.engine import BlockConverter, ChainConverter, Conversion
from ranvier.methods.spikellm.rotate import (
    check_rotated,
    place_transform,
    probe_tokens,
    rotate_block,
    rotate_outside,
    rotation_of,
)
from ranvier.nn.hadamard import HadamardLinear
from ranvier.nn.spike_linear import SpikeGroup, check_convertible

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

    Layers outside the blocks come last, on the inputs that they have in the unquantized model; gptq then carries that
    model's hidden states along.

    Raises ValueError for a source that is no such folder or lacks weights, a model whose blocks are no chain, one that cannot
    be rotated where that is asked, omniquant with layers outside the blocks; OSError where it cannot be written.
    """
    config, source, target = SpikeConfig() if config is None else config, Path(source), Path(os.path.realpath(target))
    check_supported(config, "convert_folder")
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
    weights = Shards(source, dtype)
    stream = _Stream(source, config, weights, seed)
    work = Work(target.parent / f".{target.name}.ranvier-work", _key(source, config, batches, seed, dtype), resume)
    with torch.no_grad():
        outside = stream.convert(batches, work)
        report = stream.assemble(work, outside)
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


class _Turning:
    """Rotates a stream's parts as they come.

    In memory the logits of the whole model are compared before and after; here each block's outputs, on what a few tokens'
    embeddings hand to the first.
    """

    def __init__(self, model: nn.Module, path: str, seed: int) -> None:
        self.rotation = rotation_of(model, seed)
        probe = [probe_tokens(model)]
        before = capture(model, path, probe, CPU)
        rotate_outside(model, self.rotation)
        after = capture(model, path, probe, CPU)
        if before is None or after is None:
            raise ValueError(f"convert_folder: {path} is no chain of blocks; convert in memory with spike_")
        self.before, self.after = before, after

    def turn(self, block: nn.Module, index: int) -> None:
        """Rotate one block. Raises ValueError where it then does something else."""
        before = self.before.run(block, index, 0)
        rotate_block(block, self.rotation, index)
        check_rotated(before, self.after.run(block, index, 0), self.rotation, f"block {index}")


class _Stream:
    """A model without weights, whose blocks get theirs one at a time."""

    def __init__(self, source: Path, config: SpikeConfig, weights: Shards, seed: int) -> None:
        values = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        name = (values.get("architectures") or [""])[0]
        self.config, self.weights, self.seed = config, weights, seed
        self.model = build_empty(name, source, None, (source / GENERATION).is_file()).eval()
        self.model.tie_weights()
        layers, _, self.heads = targets(self.model, config)
        path = find_blocks(self.model, layers)
        if path is None:
            raise ValueError(
                "convert_folder: the model has no list of blocks with linear layers; convert in memory with spike_"
            )
        self.path = path
        self.outside = {name: layer for name, layer in layers.items() if not name.startswith(f"{path}.")}
        if self.outside and config.pipeline == "omniquant":
            raise ValueError(
                f"convert_folder: pipeline='omniquant' trains block by block, and {next(iter(self.outside))} lies in no block;"
                " skip it, or use pipeline='gptq'"
            )
        for layer_name, layer in layers.items():
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

    def convert(self, batches: list[Any], work: Work) -> Conversion:
        """Every block that is not done yet, which goes to ``work``, and then what is not in blocks, which is returned."""
        self._fill(self.model, "", blocks=False)
        self._fill(self.blocks[0], f"{self.path}.0.", blocks=True)
        turning = _Turning(self.model, self.path, self.seed) if self.config.rotate else None
        chain = capture(self.model, self.path, batches, CPU)
        if chain is None:
            raise ValueError(f"convert_folder: {self.path} is no chain of blocks; convert in memory with spike_")
        self._free(self.blocks[0])
        converter = ChainConverter(chain, self.config, self.seed, follow=bool(self.outside))
        if work.blocks:
            self._take_up(converter, chain, work)
        for index in tqdm(range(len(work.blocks), len(self.blocks)), desc="blocks", unit="block"):
            self._convert_block(converter, chain, turning, index, work)
        done = self._convert_outside(converter, batches) if self.outside else Conversion()
        done.made.update({name: convert_head(name, head) for name, head in self.heads.items()})
        return done

    def _convert_outside(self, converter: ChainConverter, batches: list[Any]) -> Conversion:
        """Layers before and behind the blocks, on the inputs they have in the unquantized model."""
        chain, positions = converter.chain, Positions()
        for name, linear in self.outside.items():
            check_convertible(f"convert_folder: {name}", linear, self.config)

        def run() -> None:
            for index, batch in enumerate(tqdm(batches, desc="outside the blocks", unit="batch", leave=False)):
                positions.real = chain.real[index]
                run_around(self.model, self.path, chain, batch, converter.unquantized[index], CPU)

        whole = BlockConverter(self.model, self.outside, run, self.config, positions, sequential=False)
        made = whole.convert(None)
        return Conversion(made, tokens=max(reader.tokens for reader in whole.observer.readers.values()))

    def _take_up(self, converter: ChainConverter, chain: Chain, work: Work) -> None:
        streams = work.streams()
        for batch in chain.batches():
            chain.hidden[batch] = streams[f"hidden.{batch}"].clone()
            if converter.floats is not None:
                converter.floats[batch] = streams[f"floats.{batch}"].clone()

    def _convert_block(self, converter: ChainConverter, chain: Chain, turning: _Turning | None, index: int, work: Work) -> None:
        block, prefix = self.blocks[index], f"{self.path}.{index}."
        self._fill(block, prefix, blocks=True)
        if turning is not None:
            turning.turn(block, index)
        found, _ = find_linears(self.model, self.config.skip)
        own = {name: layer for name, layer in found.items() if name.startswith(prefix)}
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

    def assemble(self, work: Work, outside: Conversion) -> SpikeReport:
        """The converted layers in the model, those of blocks mapped from the work folder; what was done."""
        around = {**self.outside, **self.heads}
        reports = {name: report_layer(name, around[name], made) for name, made in outside.made.items()}
        if self.config.rotate:
            self._place_transforms()
        _, skipped, _ = targets(self.model, self.config)
        replace_modules(self.model, {id(around[name]): made.module for name, made in outside.made.items()})
        for index, record in enumerate(work.blocks):
            made, groups = {}, {}
            for item in record["layers"]:
                entry, report = LayerEntry(**item["entry"]), item["report"]
                layer = made[entry.name] = empty_layer(entry, self.config)
                group = tuple(report["group"])
                reports[entry.name] = LayerReport(**{**report, "group": group})
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
        tokens = max([outside.tokens, *(record["tokens"] for record in work.blocks)])
        in_order = [reports[name] for name, _ in self.model.named_modules() if name in reports]
        return SpikeReport(self.config, in_order, skipped, tokens)

    def _place_transforms(self) -> None:
        """In the blocks that were converted before an interruption."""
        for index, block in enumerate(self.blocks):
            if not any(isinstance(module, HadamardLinear) for module in block.modules()):
                place_transform(block, index)
