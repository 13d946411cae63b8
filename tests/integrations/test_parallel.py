"""Spiking layers split over processes: alone, in a model over two gloo processes, and under FSDP2."""

from __future__ import annotations

import socket
import subprocess
import sys
from itertools import pairwise

import parallel_worker as worker
import pytest
import tiny_lm
import torch
import torch.distributed as dist
from torch import nn

import ranvier
from ranvier import SpikeConfig
from ranvier.integrations.parallel import output_range, shard, tensor_parallel_
from ranvier.integrations.transformers import generate, load_causal_lm, save_pretrained
from ranvier.nn import SpikingLinear

pytest.importorskip("transformers")


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_features", [64, 65, 96, 165])
@pytest.mark.parametrize(
    "config",
    [
        SpikeConfig(),
        SpikeConfig(span="separate", group_size=32),
        SpikeConfig(grid="compat", steps=4),
        SpikeConfig(act_bits=8, steps=1),
    ],
)
def test_parts_side_by_side_are_the_layer(out_features, config):
    mask = torch.zeros(96, dtype=torch.bool)
    mask[::7] = True
    layer = SpikingLinear.from_linear(nn.Linear(96, out_features), config, mask)
    x = torch.randn(3, 5, 96)
    for world in (1, 2):
        parts = [shard(layer, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part(x) for part in parts], -1), layer(x))
        assert sum(part.out_features for part in parts) == out_features
        assert torch.equal(torch.cat([part.dequantized_weight() for part in parts]), layer.dequantized_weight())


def test_part_keeps_what_the_layer_is():
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).eval()
    part = shard(SpikingLinear.from_linear(linear, SpikeConfig(salient=0.0)), 1, 2)
    assert part.bias is None and part.dtype == torch.bfloat16 and not part.training
    frozen = SpikingLinear.from_linear(nn.Linear(64, 64).requires_grad_(False))
    assert not shard(frozen, 0, 2).bias.requires_grad


def test_ranges_are_blocks_that_cover_all():
    for size in (32, 64, 65, 4096, 11008, 165):
        for world in range(1, -(-size // 32) + 1):
            ranges = [output_range(size, rank, world) for rank in range(world)]
            assert ranges[0][0] == 0 and ranges[-1][1] == size
            assert all(one[1] == other[0] for one, other in pairwise(ranges))
            assert all(first % 32 == 0 and first < last for first, last in ranges)
    with pytest.raises(ValueError, match="too few for 3 processes"):
        output_range(64, 0, 3)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        output_range(64, 2, 2)


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found; they run once for all tests below."""
    folder = tmp_path_factory.mktemp("processes")
    ranvier.save(worker.even_llama(), folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker.run, (str(folder), port), nprocs=worker.WORLD)
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(worker.WORLD)]


@pytest.fixture(scope="module")
def whole():
    return worker.wide_llama()


def test_split_model_gives_the_same_bits(found, whole):
    for mine in found:
        for length, logits in zip((1, 7), mine["logits"], strict=True):
            with torch.no_grad():
                assert torch.equal(logits, whole(worker.ids(length)).logits)
        assert torch.equal(mine["generated"], whole.generate(worker.ids(5), max_new_tokens=6, do_sample=False))


def test_blocks_work_on_their_share_where_they_divide(found, whole):
    styles = found[0]["styles"]
    for layer in (0, 1):
        block = f"model.layers.{layer}.self_attn"
        assert [styles[f"{block}.{name}_proj"] for name in "qkvo"] == [(False, False)] * 3 + [(True, True)]
    assert styles["model.layers.0.mlp.up_proj"] == (False, False) and styles["model.layers.0.mlp.down_proj"] == (True, True)
    # 165 channels do not divide: these take the whole input and gather their output.
    for name in ("gate", "up", "down"):
        assert styles[f"model.layers.1.mlp.{name}_proj"] == (False, True)
    assert sum(mine["bytes"] for mine in found) == worker.held_bytes(whole)
    assert max(mine["bytes"] for mine in found) < 0.55 * worker.held_bytes(whole)


def test_gradients_of_the_split_model(found, whole):
    wanted = worker.gradients(whole)
    whole.zero_grad()
    for rank, mine in enumerate(found):
        # The same sums in another order: a few roundings of float32 each.
        torch.testing.assert_close(mine["gradients"]["input"], wanted["input"], rtol=1e-4, atol=1e-6)
        for name, grad in mine["gradients"].items():
            if name != "input":
                whole_grad = wanted[name.replace(".part.", ".")]
                first, last = output_range(len(whole_grad), rank, worker.WORLD)
                torch.testing.assert_close(grad, whole_grad[first:last], rtol=1e-4, atol=1e-6)


def test_each_process_reads_its_share_of_a_folder(found):
    whole = worker.even_llama()
    for mine in found:
        with torch.no_grad():
            assert torch.equal(mine["loaded"], whole(worker.ids(7)).logits)
        assert mine["loaded_group"] and mine["loaded_bytes"] == worker.held_bytes(whole) // 2


def test_fsdp2_gives_the_same_bits_and_trains(found, whole):
    model = worker.wide_llama()
    with torch.no_grad():
        wanted = model(worker.ids(7)).logits
    model(worker.ids(9)).logits.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), 0.1).step()
    for mine in found:
        assert mine["fsdp_local"] == 64  # of 128: split
        assert all(torch.equal(logits, wanted) for logits in mine["fsdp_logits"])
        for name, grad in mine["fsdp_gradients"].items():
            assert torch.equal(grad, grads[name]), name  # the mean of two equal ones
        with torch.no_grad():
            assert torch.equal(mine["fsdp_trained"], model(worker.ids(7)).logits)


# --- torchrun ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_generates_what_one_process_does(tmp_path):
    model = tiny_lm.spiking_llama(tied=False)
    ranvier.save(model, tmp_path / "model", tiny_lm.tiny_tokenizer())
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ranvier"]
    command = ["generate", tmp_path / "model", "--prompt", "the node", "--max-new-tokens", "5"]
    run = [sys.executable, *launch, *map(str, command)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    wanted = generate(model, tiny_lm.tiny_tokenizer(), "the node", 5)
    assert done.returncode == 0 and done.stdout == wanted + "\n", done.stderr


@pytest.fixture
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_split_model_is_not_saved_as_if_it_were_whole(tmp_path, process_group):
    model = tensor_parallel_(tiny_lm.spiking_llama())
    for save in (ranvier.save, save_pretrained):
        with pytest.raises(ValueError, match=r"q_proj is split over processes.*; save the model before it is split"):
            save(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()
    before = tiny_lm.logits(model)
    with pytest.raises(ValueError, match="q_proj is split over processes already"):
        tensor_parallel_(model)
    assert torch.equal(tiny_lm.logits(model), before)
    with pytest.raises(ValueError, match="no spiking layer of 1 blocks"):
        tensor_parallel_(tiny_lm.tiny_llama())


def test_only_ranvier_folders_are_split(tmp_path):
    tiny_lm.tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"only a folder that ranvier\.save wrote can be split"):
        load_causal_lm(tmp_path, split=True)
