"""ranvier.save and ranvier.load of models with layers behind a Hadamard transform."""

from __future__ import annotations

import json

import pytest
import torch
from folders import MANIFEST, TENSORS, edit, same, state
from safetensors.torch import load_file
from tiny_lm import logits, spiking_llama, tiny_llama, token_batch
from torch import nn

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm.rotate import rotate_
from ranvier.nn import Hadamard, HadamardLinear, SpikingLinear

pytest.importorskip("transformers")
DOWN = "model.layers.0.mlp.down_proj"


def rotated_llama(dtype: torch.dtype = torch.float32, **fields):
    model = tiny_llama(True, dtype)
    rotate_(model, 4)
    ranvier.spike_(model, SpikeConfig(**fields), [token_batch(32, seed=1)])
    return model


@torch.no_grad()
def hidden(base) -> torch.Tensor:
    return base(token_batch()).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotated_model_comes_back_bit_for_bit(tmp_path, dtype) -> None:
    """Transforms, untied head and logits are those that were saved; the file is of version 2 and says where they are."""
    model = rotated_llama(dtype)
    ranvier.save(model, tmp_path / "model")
    loaded = ranvier.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    down = loaded.model.layers[0].mlp.down_proj
    assert isinstance(down, HadamardLinear) and isinstance(down.linear, SpikingLinear) and not down.training
    values = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert values["format_version"] == 2
    assert values["hadamards"][0] == {"name": DOWN, "features": 96, "order": 96} and len(values["hadamards"]) == 2
    ranvier.save(loaded, tmp_path / "again")
    first, again = (load_file(tmp_path / name / TENSORS) for name in ("model", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_without_transforms_it_is_version_1(tmp_path) -> None:
    """A folder that an older ranvier can read stays one it can read."""
    ranvier.save(spiking_llama(), tmp_path / "model")
    values = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert values["format_version"] == 1 and "hadamards" not in values


def test_given_model_plain_or_rotated(tmp_path) -> None:
    """A plain model gets the transforms, one that has them keeps them."""
    model = rotated_llama()
    ranvier.save(model, tmp_path / "model")
    for given in (tiny_llama(False), rotated_llama(steps=4)):
        down = given.model.layers[0].mlp.down_proj
        loaded = ranvier.load(tmp_path / "model", given)
        assert loaded is given and torch.equal(logits(given), logits(model))
        assert isinstance(down, nn.Linear) or given.model.layers[0].mlp.down_proj is down


def test_model_that_does_not_fit_stays_as_it_was(tmp_path) -> None:
    """A layer of another width, no layer at all, a transform of another order, a transform that the folder has not."""
    from transformers import LlamaForCausalLM

    ranvier.save(rotated_llama(), tmp_path / "model")
    ranvier.save(spiking_llama(), tmp_path / "plain")
    config = tiny_llama().config
    config.intermediate_size = 128
    missing, other = tiny_llama(), tiny_llama()
    missing.model.layers[1].mlp.down_proj = nn.Identity()
    other.model.layers[1].mlp.down_proj = HadamardLinear(Hadamard(96, 24), nn.Linear(96, 64))
    rotated = tiny_llama()
    rotate_(rotated)
    for given, folder, message in (
        (LlamaForCausalLM(config), "model", "Hadamard transform of 96"),
        (missing, "model", "another Identity"),
        (other, "model", "another HadamardLinear"),
        (rotated, "plain", "HadamardLinear there"),
    ):
        before = state(given)
        with pytest.raises(ValueError, match=message):
            ranvier.load(tmp_path / folder, given)
        assert same(state(given), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("hadamards"), "no entry 'hadamards'"),
        (lambda v: v.update(hadamards=[]), "does not go with format_version 2"),
        (lambda v: v.update(format_version=1), "does not go with format_version 1"),
        (lambda v: v["hadamards"].append(v["hadamards"][0]), "names a layer twice"),
        (lambda v: v["hadamards"][0].update(order=64), "order 64 does not divide"),
        (lambda v: v["hadamards"][0].update(features="96"), "features is '96'"),
        (lambda v: v["hadamards"][0].update(name=3), "named 3"),
        (lambda v: v["hadamards"][0].update(colour=3), "colour"),
        (lambda v: v["hadamards"][0].update(order=48), "was changed since it was saved"),
    ],
)
def test_edited_entries_are_refused(tmp_path, change, message: str) -> None:
    ranvier.save(rotated_llama(), tmp_path / "model")
    edit(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        ranvier.load(tmp_path / "model")


def test_a_transform_with_signs_is_not_saved(tmp_path) -> None:
    """What loading could not put back is refused, and the folder does not come to be."""
    turn = Hadamard(64, signs=torch.ones(64))
    model = nn.Sequential(HadamardLinear(turn, SpikingLinear.from_linear(nn.Linear(64, 8))))
    with pytest.raises(ValueError, match="fold the signs"):
        ranvier.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_base_model_and_model_with_head_read_each_others_folders(tmp_path, rotated, tied) -> None:
    """transformers' own folders, of both kinds, as the other kind: hidden states are equal bit for bit."""
    from transformers import AutoModel, AutoModelForCausalLM

    from ranvier.integrations import transformers as lm

    model = tiny_llama(tied)
    if rotated:
        rotate_(model, 4)
    # With a spiking head: the base model has no place for it.
    ranvier.spike_(model, SpikeConfig(skip=()), [token_batch(32, seed=1)])
    wanted = hidden(model.model)
    lm.attach(model).save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert isinstance(base.layers[0].mlp.down_proj, HadamardLinear if rotated else SpikingLinear)
    assert torch.equal(hidden(base), wanted)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "base")), wanted)
    whole, found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert torch.equal(hidden(whole.model), wanted)
    # The guard of a spiking weight is nothing to report, the head that nobody saved is.
    assert not found["unexpected_keys"] and found["missing_keys"] == {"lm_head.weight"}
