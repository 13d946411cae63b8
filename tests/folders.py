"""What tests of saved folders share: reading, damaging and comparing them, and a model not of transformers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ranvier import SpikeConfig
from ranvier.nn import SpikeGroup, SpikingLinear

MANIFEST, TENSORS = "ranvier.json", "ranvier.safetensors"
FIRST = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def state(model: nn.Module) -> dict:
    """Everything of a model that loading might change, by identity and by value."""
    modules = {name: (type(module), id(module), module.training) for name, module in model.named_modules()}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values = {name: (id(t), t.dtype, t.requires_grad, t.detach().clone()) for name, t in tensors}
    return {"modules": modules, "values": values}


def same(one: dict, other: dict) -> bool:
    values, others = one["values"], other["values"]
    if one["modules"] != other["modules"] or values.keys() != others.keys():
        return False
    return all(values[n][:3] == others[n][:3] and torch.equal(values[n][3], others[n][3]) for n in values)


def edit(path: Path, change) -> None:
    values = json.loads((path / MANIFEST).read_text())
    change(values)
    (path / MANIFEST).write_text(json.dumps(values))


def reseal(path: Path) -> None:
    """Make size and sha256 of the tensor file right again, as one who tampers would."""
    data = (path / TENSORS).read_bytes()
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(path, lambda values: values["files"].update({TENSORS: facts}))


def rewrite(path: Path, change) -> None:
    with safe_open(path / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS, metadata=metadata)
    reseal(path)


@contextlib.contextmanager
def small_disk(size: int):
    """No file may grow beyond this; what writes more gets an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Block(nn.Module):
    """What transformers cannot build: layers of different configs, a tied weight, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 33, bias=False), nn.Linear(64, 33)
        self.skipped = nn.Linear(33, 5)
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(33)
        self.register_buffer("transient", torch.full((33,), 2.0), persistent=False)

    def forward(self, ids):
        x = self.first(self.embedding(ids))
        return self.skipped(self.norm((self.second(x) + self.third(x)) * self.transient)), self.head(x)


def spiking_block() -> Block:
    torch.manual_seed(3)
    block = Block().eval()
    mask = torch.zeros(64, dtype=torch.bool)
    mask[::9] = True
    configs = {
        "first": SpikeConfig(grid="compat", steps=4),
        "second": SpikeConfig(span="separate", group_size=32),
        "third": SpikeConfig(span="separate", group_size=32),
    }
    for name, config in configs.items():
        setattr(block, name, SpikingLinear.from_linear(getattr(block, name), config, mask))
    block.second.group = block.third.group = SpikeGroup()
    block.third.salient_mask = block.second.salient_mask
    return block
