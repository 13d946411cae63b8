"""ranvier.save and ranvier.load: what comes back is what was saved."""

from __future__ import annotations

import json

import pytest
import torch
from folders import MANIFEST, TENSORS, Block, content, spiking_block
from safetensors import safe_open
from tiny_lm import logits, spiking_llama, tiny_llama
from torch import nn

import ranvier
from ranvier import SpikeConfig
from ranvier.nn import SpikeGroup, SpikingLinear, TernaryLinear

pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_model_comes_back_bit_for_bit(tmp_path, tied, dtype):
    model = spiking_llama(tied, dtype, grid="compat")
    model.generation_config.max_length = 33
    model.set_attn_implementation("eager" if tied else "sdpa")
    ranvier.save(model, tmp_path / "model")
    loaded = ranvier.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded) is type(model) and not any(module.training for module in loaded.modules())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.max_length == 33 and loaded.dtype == dtype
    assert loaded.config._attn_implementation == model.config._attn_implementation
    # Also those that are not stored: here the rotary frequencies, which a cast of the model has rounded.
    wanted, got = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert "model.rotary_emb.inv_freq" in got and wanted.keys() == got.keys()
    for name, buffer in wanted.items():
        assert torch.equal(buffer, got[name]) and buffer.dtype == got[name].dtype, name
    wanted, got = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[n], got[n]) for n in wanted)


def test_groups_share_one_stored_mask_and_one_encode(saved):
    loaded = ranvier.load(saved)
    q, k, v = (getattr(loaded.model.layers[1].self_attn, name) for name in ("q_proj", "k_proj", "v_proj"))
    assert q.salient_mask is k.salient_mask is v.salient_mask and bool(q.salient_mask.any())
    assert isinstance(q.group, SpikeGroup) and q.group is k.group is v.group
    assert loaded.model.layers[0].self_attn.q_proj.group is not q.group
    with safe_open(saved / TENSORS, framework="pt") as file:
        masks = [name for name in file.keys() if name.endswith("salient_mask")]  # noqa: SIM118
    # q = k = v and gate = up: of the seven layers of a block four masks are stored.
    assert len(masks) == 2 * 4


def test_layers_of_two_bits_come_back(tmp_path):
    block, config = Block().eval(), SpikeConfig(weight_bits=2, act_bits=8, steps=2, weight_grid="ternary")
    for name, source in list(block.named_children()):
        if isinstance(source, nn.Linear):
            setattr(block, name, TernaryLinear.from_linear(source, config, torch.arange(source.in_features) % 5 == 0))
    ranvier.save(block, tmp_path / "model")
    loaded = ranvier.load(tmp_path / "model", Block().eval())
    assert type(loaded.first) is TernaryLinear and loaded.first.config == config
    wanted, got = block.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_group_survives_masks_that_are_equal_copies(tmp_path):
    block = spiking_block()
    block.third.salient_mask = block.second.salient_mask.clone()
    ranvier.save(block, tmp_path / "model")
    loaded = ranvier.load(tmp_path / "model", Block().eval())
    assert loaded.second.salient_mask is loaded.third.salient_mask and loaded.second.group is loaded.third.group


def test_tied_tensor_is_stored_once(tmp_path):
    ranvier.save(spiking_llama(tied=True), tmp_path / "model")
    with safe_open(tmp_path / "model" / TENSORS, framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_given_model_takes_layers_of_different_configs(tmp_path):
    block = spiking_block()
    block.norm.running_mean.normal_()
    ranvier.save(block, tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert len(manifest["configs"]) == 2 and [layer["config"] for layer in manifest["layers"]] == [0, 1, 1]
    given = Block()
    given.skipped.bias.requires_grad_(False)
    given.first.eval()
    embedding, transient = given.embedding.weight, given.transient
    loaded = ranvier.load(tmp_path / "model", given)
    assert loaded is given
    # Loading resets nothing else: modes, frozen parameters and the parameters' identities stay.
    assert given.training and given.second.training and not given.first.training
    assert given.embedding.weight is embedding is given.head.weight and given.transient is transient
    assert not given.skipped.bias.requires_grad and given.first.bias.requires_grad
    assert [layer.config for layer in (given.first, given.second)] == [block.first.config, block.second.config]
    ids = torch.arange(10)
    for got, wanted in zip(given.eval()(ids), block(ids), strict=True):
        assert torch.equal(got, wanted)


def test_given_model_is_untied_or_tied_as_the_folder_says(tmp_path):
    for tied in (True, False):
        model = spiking_llama(tied)
        ranvier.save(model, tmp_path / "model")
        given = ranvier.load(tmp_path / "model", tiny_llama(not tied))
        assert (given.lm_head.weight is given.model.embed_tokens.weight) == tied
        assert torch.equal(logits(given), logits(model))


def test_given_model_may_be_spiking_or_meta(saved):
    wanted = logits(ranvier.load(saved))
    given = spiking_llama(tied=False, steps=4, salient=0.3)
    assert torch.equal(logits(ranvier.load(saved, given)), wanted)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 33))
    layer = SpikingLinear.from_linear(nn.Linear(64, 33))
    ranvier.save(nn.Sequential(layer), saved.parent / "one")
    x = torch.randn(3, 64)
    assert torch.equal(ranvier.load(saved.parent / "one", empty)[0](x), layer(x))


def test_module_under_two_names_stays_one(tmp_path):
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    layer = SpikingLinear.from_linear(shared)
    model[0] = model[2] = layer
    ranvier.save(model, tmp_path / "model")
    twice = nn.Linear(64, 64)
    loaded = ranvier.load(tmp_path / "model", nn.Sequential(twice, nn.ReLU(), twice))
    assert loaded[0] is loaded[2] and torch.equal(loaded[0].weight_packed, layer.weight_packed)


def test_loading_initialises_nothing(saved):
    before = torch.get_rng_state()
    ranvier.load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_pickled(saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("pickle was used")

    for module, name in ((torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, refuse)
    assert set(content(saved)) == {MANIFEST, TENSORS, "config.json", "generation_config.json"}
    ranvier.load(saved)


def test_loaded_tensors_do_not_depend_on_the_file(copied):
    loaded = ranvier.load(copied)
    wanted = logits(loaded)
    with (copied / TENSORS).open("r+b") as file:
        file.write(b"\0" * (copied / TENSORS).stat().st_size)
    assert torch.equal(logits(loaded), wanted)
