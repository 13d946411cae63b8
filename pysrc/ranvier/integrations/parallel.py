"""Spiking layers over several processes of ``torch.distributed``: tensor parallelism, and what FSDP2 needs.

A layer is split over its outputs, in blocks of 32, as its weight is packed: each process holds some rows and computes
these outputs from the whole input. It is never split over its inputs, as others do to the second of two layers: a token's
codes depend on the range of all its channels, and the sum of partial products would round otherwise. Instead the second
layer gathers its input. So every output is computed by one process, in the order in which one process alone computes it,
and is the same bit for bit; the price is that each pair of layers gathers twice where others add once.

A model larger than one machine is saved by ``ranvier.save`` and read by every machine, each only its share (embedding,
norms and an output layer that is not spiking are held by all)::

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m ranvier generate FOLDER --prompt "Once upon a time"

The same on both machines, HOST being one of them; ``ranvier eval`` works likewise, and one machine with two sockets takes
``--standalone --nproc-per-node 2``.

FSDP2 (``torch.distributed.fsdp.fully_shard``) needs nothing of this: it splits parameters (embeddings, norms, biases) and
leaves buffers, which spiking weights are, whole.
"""

from __future__ import annotations

import atexit
import fnmatch
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from ranvier.integrations._manifest import TENSORS, read_manifest
from ranvier.methods.spikellm.convert import replace_modules
from ranvier.nn.spike_linear import WEIGHT_BUFFERS, SpikeGroup, SpikingLinear

BLOCK = 32  # outputs that are packed together


def output_range(out_features: int, rank: int, world: int) -> tuple[int, int]:
    """The outputs [first, last) of a process, whole blocks of 32 but for the layer's own end.

    Raises ValueError where there are more processes than blocks, or no such rank.
    """
    blocks = -(-out_features // BLOCK)
    if not 0 <= rank < world:
        raise ValueError(f"output_range: rank is {rank} of {world} processes; allowed are 0 to {world - 1}")
    if blocks < world:
        raise ValueError(
            f"output_range: {out_features} outputs are {blocks} blocks of {BLOCK}, too few for {world} processes; use fewer"
        )
    return blocks * rank // world * BLOCK, min(blocks * (rank + 1) // world * BLOCK, out_features)


def shard(layer: SpikingLinear, rank: int, world: int) -> SpikingLinear:
    """The layer with the outputs of one process only: its y is ``layer(x)[..., first:last]`` bit for bit.

    Range and mask are those of the whole token, so that codes do not change. Raises what :func:`output_range` does.
    """
    first, last = output_range(layer.out_features, rank, world)
    rows = slice(first // BLOCK, -(-last // BLOCK))
    shape = (layer.in_features, last - first, layer.bias is not None, layer.config, layer.salient_count)
    part = type(layer)(*shape, device="meta", dtype=layer.dtype)
    for name, tensor in layer._buffers.items():
        if tensor is not None:
            setattr(part, name, tensor[rows].clone() if name in WEIGHT_BUFFERS else tensor)
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias.detach()[first:last].clone(), requires_grad=layer.bias.requires_grad)
    return part.train(layer.training)


class _Spread(torch.autograd.Function):
    """x as every process has it; its gradient is the sum of what their outputs say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gather(torch.autograd.Function):
    """The parts [..., width of each process] side by side, everywhere.

    sum_gradients: whether what follows differs between the processes, so that the gradient is the sum of theirs.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, widths: list[int], group: Any, sum_gradients: bool) -> Tensor:
        ctx.widths, ctx.group, ctx.sum_gradients = widths, group, sum_gradients
        widest = max(widths)
        sent = part.new_zeros(*part.shape[:-1], widest)
        sent[..., : part.shape[-1]] = part
        # The flat shape suits gloo and NCCL alike.
        got = part.new_empty(len(widths) * sent.numel())
        dist.all_gather_into_tensor(got, sent.view(-1), group=group)
        pieces = got.view(len(widths), *sent.shape).unbind(0)
        return torch.cat([piece[..., :width] for piece, width in zip(pieces, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if ctx.sum_gradients:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.widths[:rank])
        return grad[..., first : first + ctx.widths[rank]], None, None, None


class ParallelSpikingLinear(nn.Module):
    """A spiking layer of which every process of a group holds a part.

    part: this process's outputs, by :func:`shard`. split_input: x comes in parts of equal width, [..., K / processes], and
    is gathered; else every process is given the same x. gather_output: y [..., N] everywhere, else this process's outputs.
    """

    def __init__(
        self, part: SpikingLinear, out_features: int, group: Any = None, split_input: bool = False, gather_output: bool = True
    ) -> None:
        super().__init__()
        self.part, self.process_group = part, group
        self.in_features, self.out_features = part.in_features, out_features
        self.split_input, self.gather_output = split_input, gather_output
        world = dist.get_world_size(group)
        ranges = [output_range(out_features, rank, world) for rank in range(world)]
        self.widths, self.world = [last - first for first, last in ranges], world

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] or this process's share of it -> [..., N] or this process's outputs."""
        x, group = input, self.process_group
        if self.split_input:
            x = _Gather.apply(x, [self.in_features // self.world] * self.world, group, True)
        elif x.requires_grad and torch.is_grad_enabled():
            x = _Spread.apply(x, group)
        y = self.part(x)
        return _Gather.apply(y, self.widths, group, False) if self.gather_output else y

    def extra_repr(self) -> str:
        return f"processes={self.world}, split_input={self.split_input}, gather_output={self.gather_output}"


def tensor_parallel_(model: nn.Module, group: Any = None) -> nn.Module:
    """Split the spiking layers of a model over the processes of a group, in place; returns the model.

    The model must be the same in all of them, and gives the same outputs bit for bit. Where transformers' own plan for
    the architecture (``base_model_tp_plan``) says that a block can work on its share of heads or channels, and they
    divide into blocks of 32 and whole heads, it does; every other layer takes the whole input and gathers its output.
    A layer with fewer blocks of outputs than there are processes stays whole in each.

    Raises ValueError where no layer can be split, or was before; the model is then as it was.
    """
    split = next((name for name, module in model.named_modules() if isinstance(module, ParallelSpikingLinear)), None)
    if split is not None:
        raise ValueError(f"tensor_parallel_: {split} is split over processes already; a part of it cannot be split again")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    names = _divisible(model, layers, world)
    parts, shared = {}, {}
    for name in names:
        parts[name], encoding = shard(layers[name], rank, world), layers[name].group
        if encoding is not None:
            parts[name].group = shared.setdefault(id(encoding), SpikeGroup())
            parts[name].salient_mask = parts[name].group.share(parts[name].salient_mask)
    _put(model, parts, {name: layers[name].out_features for name in names}, group)
    return model


def _divisible(model: nn.Module, layers: Mapping[str, SpikingLinear], world: int) -> list[str]:
    names = [name for name, layer in layers.items() if -(-layer.out_features // BLOCK) >= world]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no spiking layer of {world} blocks of {BLOCK} outputs;"
            " spike_ it first, or use fewer processes"
        )
    return names


def _put(model: nn.Module, parts: Mapping[str, SpikingLinear], sizes: Mapping[str, int], group: Any) -> None:
    """Put the parts, of layers of these sizes, in place."""
    styles, replacements = _plan(model, parts, sizes, dist.get_world_size(group)), {}
    for name, part in parts.items():
        style = styles.get(name)
        parallel = ParallelSpikingLinear(part, sizes[name], group, style == "rowwise", style != "colwise")
        replacements[id(model.get_submodule(name))] = parallel.train(part.training)
    replace_modules(model, replacements)


def _plan(model: nn.Module, parts: Mapping[str, SpikingLinear], sizes: Mapping[str, int], world: int) -> dict[str, str]:
    """name -> "colwise" or "rowwise", for the layers of blocks that can work on their share."""
    rules = getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    blocks: dict[str, dict[str, str]] = {}
    for name in parts:
        inner = name.removeprefix(f"{prefix}.")
        style = next((style for rule, style in rules.items() if fnmatch.fnmatchcase(inner, rule)), None)
        blocks.setdefault(name.rpartition(".")[0], {})[name] = style or "none"
    chosen: dict[str, str] = {}
    for block, styles in blocks.items():
        # Every layer of the block that the plan names has to be here: one that is not spiking would see half a tensor.
        inner = block.removeprefix(f"{prefix}.")
        wanted = sum(fnmatch.fnmatchcase(inner, rule.rpartition(".")[0]) for rule, style in rules.items() if "wise" in style)
        unit = world * math.lcm(BLOCK, getattr(model.get_submodule(block), "head_dim", 1))
        fits = all(
            (style == "colwise" and sizes[name] % unit == 0) or (style == "rowwise" and parts[name].in_features % unit == 0)
            for name, style in styles.items()
        )
        if fits and wanted == len(styles) and "rowwise" in styles.values():
            chosen |= styles
    return chosen


def load_parallel(folder: str | os.PathLike, group: Any = None) -> nn.Module:
    """The model that ``ranvier.save`` wrote, split as by :func:`tensor_parallel_`: of spiking weights only a share is read.

    Raises what ``ranvier.load`` does, and ValueError where no layer can be split.
    """
    from ranvier.integrations import folder as folders

    folder = Path(folder)
    manifest = read_manifest(folder)
    layers, path = folders._empty_layers(manifest), folder / TENSORS
    header = folders._check_tensors(manifest, layers, path)
    model = folders._build(manifest, folder)  # its parameters are not touched, so they take no memory
    folders._place_hadamards(model, manifest, folders._Journal())
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    split, parts, replacements = _divisible(model, layers, world), {}, {}
    for name, layer in layers.items():
        part = shard(layer, rank, world) if name in split else layer
        part.group = layer.group
        replacements[id(model.get_submodule(name))] = parts[name] = part
    replace_modules(model, replacements)
    ranges = {name: output_range(layers[name].out_features, rank, world) for name in split}
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            owner, _, key = name.rpartition(".")
            first, last = ranges.get(owner, (0, 0))
            if owner not in ranges or key == "salient_mask":
                tensors[name] = file.get_tensor(name).clone()
            else:
                rows = slice(first, last) if key == "bias" else slice(first // BLOCK, -(-last // BLOCK))
                tensors[name] = file.get_slice(name)[rows].clone()
    header = {name: (header[name][0], tuple(tensor.shape)) for name, tensor in tensors.items()}
    folders._check_names(model, manifest, header, path)
    folders._fill(model, manifest, tensors, {}, folders._Journal())
    for names in manifest.groups:
        layers[names[0]].group.share(parts[names[0]].salient_mask)
    _put(model, {name: parts[name] for name in split}, {name: layers[name].out_features for name in split}, group)
    return model.eval()


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Join the other processes that torchrun started; further calls do nothing."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
