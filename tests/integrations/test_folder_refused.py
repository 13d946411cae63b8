"""ranvier.load and ranvier.save refuse what is damaged or does not fit, and change nothing."""

from __future__ import annotations

import pytest
import torch
from folders import DOWN, FIRST, MANIFEST, TENSORS, Block, edit, reseal, rewrite, same, spiking_block, state
from safetensors.torch import load_file, save_file
from tiny_lm import tiny_llama
from torch import nn

import ranvier
from ranvier.integrations import folder
from ranvier.nn import SpikingLinear

pytest.importorskip("transformers")


def test_model_without_spiking_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no spiking layer"):
        ranvier.save(tiny_llama(), tmp_path / "model")
    with pytest.raises(ValueError, match="itself one spiking layer"):
        ranvier.save(SpikingLinear.from_linear(nn.Linear(64, 64)), tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_tensors_without_values_are_refused(tmp_path):
    block = spiking_block()
    block.skipped.to("meta")
    with pytest.raises(ValueError, match=r"skipped\.weight is on the meta device"):
        ranvier.save(block, tmp_path / "model")
    block = spiking_block()
    block.third.salient_mask = ~block.third.salient_mask
    with pytest.raises(ValueError, match=r"third\.salient_mask marks"):
        ranvier.save(block, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [TENSORS, "config.json", "generation_config.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "flipped"])
def test_damaged_file_is_refused(copied, name, fault):
    path = copied / name
    data = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    messages = {"missing": "is missing", "truncated": "it is truncated", "flipped": "was changed since it was saved"}
    with pytest.raises(ValueError, match=f"{name}.*{messages[fault]}"):
        ranvier.load(copied)


@pytest.mark.parametrize("size", [0, 1, 100, -3])
def test_truncated_manifest_is_refused(copied, size):
    path = copied / MANIFEST
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"ranvier\.json is damaged"):
        ranvier.load(copied)


def test_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is not a folder"):
        ranvier.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no ranvier\.json"):
        ranvier.load(tmp_path)


def layer(values: dict, name: str = FIRST) -> dict:
    return next(entry for entry in values["layers"] if entry["name"] == name)


def swap_name(values: dict) -> None:
    layer(values)["name"] = "model.layers.7.self_attn.q_proj"
    values["groups"] = []


EDITS = {
    "format_version": (lambda v: v.update(format_version=3), "format_version 3; this ranvier reads 1 and 2"),
    "format": (lambda v: v.update(format="other"), "'format' is missing or not 'ranvier'"),
    "name": (swap_name, "lacks model.layers.7.self_attn.q_proj"),
    "dropped_layer": (lambda v: v["layers"].remove(layer(v, DOWN)), "was changed since"),
    "in_features": (lambda v: layer(v, DOWN).update(in_features=64), "down_proj.weight_packed is"),
    "out_features": (lambda v: layer(v).update(out_features=128), r"q_proj.bias is F32 \[64\]; .* F32 \[128\]"),
    "bias_dtype": (lambda v: layer(v).update(bias="bfloat16"), "q_proj.bias is F32"),
    "bias": (lambda v: layer(v).update(bias=None), "q_proj.bias"),
    "dtype": (lambda v: layer(v).update(dtype="float64"), "dtype 'float64'"),
    "config": (lambda v: layer(v).update(config=5), "refers to config 5"),
    "config_field": (lambda v: v["configs"][0].update(act_bits=12), "SpikeConfig.act_bits is 12"),
    "config_unknown": (lambda v: v["configs"][0].update(colour=1), "does not know colour"),
    "steps": (lambda v: v["configs"][0].update(steps=4), "was changed since it was saved"),
    "count": (lambda v: layer(v, DOWN).update(salient_count=3), "marks .* salient_count 3"),
    "group": (lambda v: v["groups"].append(["nobody", FIRST]), "'nobody', which is no layer"),
    "group_twice": (lambda v: v["groups"].append([FIRST]), "names a layer twice"),
    "ungrouped": (lambda v: v.update(groups=[]), "lacks .*salient_mask"),
    "tied": (lambda v: v["tied"].update({"lm_head.weight": "model.embed_tokens.weight"}), "holds lm_head.weight"),
    "entry": (lambda v: v.pop("groups"), "no entry 'groups'"),
    "layers": (lambda v: v.update(layers=[]), "'layers' is empty"),
    "layers_type": (lambda v: v.update(layers={"a": 1}), "is damaged"),
    "sha256": (lambda v: v["files"][TENSORS].update(sha256="0"), "its sha256 is not the one"),
    "path": (lambda v: v["files"].update({"../other": {}}), "names others than"),
    "class": (lambda v: v["model"].update({"class": "GPT2LMHeadModel"}), "was changed since it was saved"),
}


@pytest.mark.parametrize("edited", EDITS)
def test_edited_manifest_is_refused(copied, edited):
    change, message = EDITS[edited]
    edit(copied, change)
    # The mask is read after the digest is compared: so that its own check is met, let the digest be of the edited text.
    if edited == "count":
        manifest = folder.manifests.read_manifest(copied)
        tensors = load_file(copied / TENSORS)
        save_file(tensors, copied / TENSORS, metadata={"ranvier": manifest.digest()})
        reseal(copied)
    with pytest.raises(ValueError, match=message):
        ranvier.load(copied)


ZERO = f"{FIRST}.weight_zero"
TENSOR_EDITS = {
    "missing": (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight, which the model has"),
    "extra": (lambda t: t.update(more=torch.zeros(2)), "holds more, which the model does not have"),
    "extra_in_layer": (lambda t: t.update({f"{FIRST}.more": torch.zeros(2)}), "q_proj.more"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.zeros(2)}), "model.norm.weight has shape"),
    "dtype": (lambda t: t.update({ZERO: t[ZERO].int()}), "q_proj.weight_zero is I32"),
    "kind": (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}), "model.norm.weight is I32"),
    "mask": (lambda t: t[f"{FIRST}.salient_mask"].fill_(True), "q_proj.salient_mask marks 64 channels"),
}


@pytest.mark.parametrize("edited", TENSOR_EDITS)
@pytest.mark.parametrize("given", [False, True])
def test_edited_tensors_are_refused(copied, edited, given):
    change, message = TENSOR_EDITS[edited]
    rewrite(copied, change)
    model = tiny_llama(tied=False).train() if given else None
    before = state(model) if given else None
    with pytest.raises(ValueError, match=message):
        ranvier.load(copied, model)
    assert not given or same(state(model), before)


def test_class_that_transformers_does_not_have_needs_a_model(tmp_path):
    ranvier.save(spiking_block(), tmp_path / "model")
    with pytest.raises(ValueError, match="holds a Block, which transformers cannot build; pass model="):
        ranvier.load(tmp_path / "model")


MISFITS = {
    "module": (lambda m: delattr(m, "second"), "second is spiking in the folder, but the model has no such module"),
    "kind": (lambda m: setattr(m, "second", nn.ReLU()), "the model has a ReLU there"),
    "size": (lambda m: setattr(m, "second", nn.Linear(64, 34, bias=False)), "second is 64 -> 34 in the model"),
    "bias": (lambda m: setattr(m, "second", nn.Linear(64, 33)), "second has a bias in the model only"),
    "shape": (lambda m: setattr(m, "norm", nn.BatchNorm1d(34)), "norm.weight has shape"),
    "more": (lambda m: setattr(m, "extra", nn.Linear(3, 3)), "lacks extra.bias and 1 more, which the model has"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_model_that_does_not_fit_stays_as_it_was(tmp_path, misfit):
    change, message = MISFITS[misfit]
    ranvier.save(spiking_block(), tmp_path / "model")
    given = Block()
    change(given)
    before = state(given)
    with pytest.raises(ValueError, match=message):
        ranvier.load(tmp_path / "model", given)
    assert same(state(given), before)


@pytest.mark.parametrize("calls", [0, 1, 5])
@pytest.mark.parametrize("step", ["put", "point"])
def test_load_interrupted_anywhere_leaves_the_given_model(saved, monkeypatch, step, calls):
    given = tiny_llama(tied=False)
    before, real, count = state(given), getattr(folder._Journal, step), []

    def interrupted(*args):
        real(*args)
        count.append(1)
        if len(count) > calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder._Journal, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranvier.load(saved, given)
    assert same(state(given), before)
