"""SpikeConfig as transformers' quantization_config: conversion on load, and folders that save_pretrained wrote."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from tiny_families import FAMILIES, continued, ids, outputs, tiny_model
from tiny_lm import TEXT, logits, spiking_llama, tiny_llama, tiny_tokenizer, token_batch

import ranvier
from ranvier.config import QUANT_METHOD
from ranvier.integrations import transformers as lm
from ranvier.integrations._conversion import conversion_note
from ranvier.nn import SpikeGroup, SpikingLinear

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _registered():
    lm.register()


def auto():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def spiking(plain, tmp_path_factory):
    """A folder that save_pretrained wrote, with the tokenizer beside."""
    path = tmp_path_factory.mktemp("spiking")
    lm.register()
    config = ranvier.SpikeConfig(calibration=[token_batch(32, seed=1)])
    auto().from_pretrained(plain, quantization_config=config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, SpikingLinear)]


# --- converting on load -----------------------------------------------------------------------------------------------


def test_loading_converts_as_spike_does(plain):
    batch = token_batch(32, seed=1)
    model = auto().from_pretrained(plain, quantization_config=ranvier.SpikeConfig(calibration=(b for b in [batch])))
    wanted = spiking_llama()
    assert torch.equal(logits(model), logits(wanted)) and not model.training
    assert len(layers(model)) == len(layers(wanted)) == 14 and not isinstance(model.lm_head, SpikingLinear)
    # Nothing keeps the calibration: the model can be copied and pickled.
    assert layers(model)[0].config.calibration is None
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_calibration_text_is_cut_by_the_folders_tokenizer(plain, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    model = auto().from_pretrained(plain, quantization_config=ranvier.SpikeConfig(calibration=tmp_path / "text"))
    wanted = tiny_llama()
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])[None]
    ranvier.spike_(wanted, ranvier.SpikeConfig(), list(ids.split(512, dim=1)))
    assert torch.equal(logits(model), logits(wanted))


def test_without_calibration_only_rounding_is_possible(plain):
    model = auto().from_pretrained(plain, quantization_config=ranvier.SpikeConfig(salient=0.0))
    wanted = tiny_llama()
    ranvier.spike_(wanted, ranvier.SpikeConfig(salient=0.0))
    assert torch.equal(logits(model), logits(wanted))
    for fields in ({}, {"salient": 0.0, "pipeline": "gptq"}):
        with pytest.raises(ValueError, match=r"needs calibration: pass SpikeConfig\(calibration="):
            auto().from_pretrained(plain, quantization_config=ranvier.SpikeConfig(**fields))


def test_dtype_and_device_map(plain, spiking):
    batch = token_batch(32, seed=1)
    config = ranvier.SpikeConfig(calibration=[batch])
    model = auto().from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    wanted = auto().from_pretrained(plain, dtype=torch.bfloat16)
    ranvier.spike_(wanted, ranvier.SpikeConfig(), [batch])
    assert model.dtype == torch.bfloat16 and torch.equal(logits(model), logits(wanted))
    # Loaded in another dtype: floats are cast, what gives the codes their meaning is not.
    cast = auto().from_pretrained(spiking, dtype=torch.bfloat16, device_map="cpu")
    wanted = auto().from_pretrained(spiking).to(torch.bfloat16)
    assert cast.dtype == torch.bfloat16 == layers(cast)[0].dtype == layers(cast)[0].bias.dtype
    assert layers(cast)[0].weight_scale.dtype == torch.float32
    cast.model.rotary_emb.inv_freq = wanted.model.rotary_emb.inv_freq  # .to casts this one, loading does not
    assert torch.equal(logits(cast), logits(wanted))


def test_spread_model_is_not_converted(plain):
    spread = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="convert it on one device"):
        auto().from_pretrained(plain, quantization_config=ranvier.SpikeConfig(salient=0.0), device_map=spread)


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_family_round_trip(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "plain")
    config = ranvier.SpikeConfig(calibration=[ids(32, seed=1)], salient=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a family that is tested needs no note
        model = auto().from_pretrained(tmp_path / "plain", quantization_config=config)
    assert len(layers(model)) == len([m for m in tiny_model(family).modules() if type(m) is torch.nn.Linear]) - 1
    model.save_pretrained(tmp_path / "spiking")
    loaded = auto().from_pretrained(tmp_path / "spiking")
    assert type(loaded) is type(model) and torch.equal(outputs(loaded), outputs(model))
    assert not torch.equal(outputs(model), outputs(tiny_model(family)))
    assert torch.equal(continued(loaded), continued(model))
    assert loaded.config.quantization_config == model.config.quantization_config
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[n], got[n]) for n in wanted)
    # A second round changes nothing.
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "spiking" / name).read_bytes()


def test_family_that_is_not_tested_is_converted_with_a_note(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    fields = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**fields)).eval()
    model.gpt_neox.register_parameter("prefix", torch.nn.Parameter(torch.zeros(2, 64)))
    model.save_pretrained(tmp_path / "plain")
    config = ranvier.SpikeConfig(salient=0.0)
    with pytest.warns(UserWarning, match=r"\(gpt_neox\) is of no family .* its 4 linear layers were converted generically"):
        model = auto().from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "spiking")
    assert torch.equal(outputs(auto().from_pretrained(tmp_path / "spiking")), outputs(model))


def test_note_counts_matrices_that_stay(tmp_path):
    model = spiking_llama()
    assert conversion_note(model) is None
    block = torch.nn.Sequential(SpikingLinear.from_linear(torch.nn.Linear(64, 64)), torch.nn.Conv1d(4, 4, 3))
    assert "(not of transformers)" in conversion_note(block) and "1 of Conv1d" in conversion_note(block)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_files_and_tied_output_layer(tied, tmp_path):
    model = lm.attach(spiking_llama(tied))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = auto().from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_spiking_output_layer_is_untied(plain, tied, tmp_path):
    tiny_llama(tied).save_pretrained(tmp_path / "plain")
    config = ranvier.SpikeConfig(salient=0.0, skip=())
    model = auto().from_pretrained(tmp_path / "plain", quantization_config=config)
    assert isinstance(model.lm_head, SpikingLinear) and not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "spiking")
    loaded = auto().from_pretrained(tmp_path / "spiking")
    assert isinstance(loaded.lm_head, SpikingLinear) and torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.model.embed_tokens.weight, tiny_llama(tied).model.embed_tokens.weight)


def test_groups_are_joined_again(spiking):
    model = auto().from_pretrained(spiking)
    q, k, v = (getattr(model.model.layers[1].self_attn, name) for name in ("q_proj", "k_proj", "v_proj"))
    assert isinstance(q.group, SpikeGroup) and q.group is k.group is v.group
    assert q.salient_mask is k.salient_mask is v.salient_mask and bool(q.salient_mask.any())
    assert model.model.layers[1].self_attn.o_proj.group is None


def test_layers_of_several_configs(tmp_path):
    model = tiny_llama()
    ranvier.spike_(model, ranvier.SpikeConfig(skip=("lm_head", "mlp")), [token_batch(32, seed=1)])
    ranvier.spike_(model, ranvier.SpikeConfig(act_bits=8, steps=1, group_size=32), [token_batch(32, seed=1)])
    lm.attach(model).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == QUANT_METHOD and stored["format_version"] == 1 and len(stored["configs"]) == 2
    assert torch.equal(logits(auto().from_pretrained(tmp_path)), logits(model))


def test_base_model_and_model_with_head_read_each_others_folders(spiking, tmp_path):
    from transformers import AutoModel

    model, base = auto().from_pretrained(spiking), AutoModel.from_pretrained(spiking)
    with torch.no_grad():
        assert torch.equal(base(token_batch())[0], model.model(token_batch())[0])
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(auto().from_pretrained(tmp_path)), logits(model))


def test_loaded_tensors_do_not_depend_on_the_file(spiking, tmp_path):
    for file in spiking.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = auto().from_pretrained(tmp_path)
    held = [tensor.data_ptr() for layer in layers(model) for tensor in layer.buffers()]
    assert all(address % 64 == 0 for address in held)
    wanted = layers(model)[0].weight_packed.clone()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(layers(model)[0].weight_packed, wanted)


def test_compiled_forward_is_the_same(spiking):
    model = auto().from_pretrained(spiking)
    wanted = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Everything round the spiking layers is recomputed by other kernels in the same order of operations.
    assert torch.equal(logits(compiled), wanted)


def test_dequantized_model_is_plain(spiking, tmp_path):
    model = auto().from_pretrained(spiking)
    wanted = ranvier.unspike_(auto().from_pretrained(spiking))
    model.dequantize()
    assert not layers(model) and torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(auto().from_pretrained(tmp_path)), logits(model))


def test_saving_says_what_the_model_is_now(spiking, tmp_path):
    model = auto().from_pretrained(spiking)
    layer = model.model.layers[0].mlp
    layer.up_proj = layer.up_proj.to_linear()
    model.save_pretrained(tmp_path)
    loaded = auto().from_pretrained(tmp_path)
    assert len(layers(loaded)) == 13 and torch.equal(logits(loaded), logits(model))


# --- the ways of ranvier ----------------------------------------------------------------------------------------------


def test_ranvier_loads_both_formats(spiking, tmp_path):
    model = auto().from_pretrained(spiking)
    assert torch.equal(logits(ranvier.load(spiking)), logits(model))
    assert torch.equal(logits(lm.load_causal_lm(spiking)[0]), logits(model))
    with pytest.raises(ValueError, match="leave out model="):
        ranvier.load(spiking, tiny_llama())
    # The same model in ranvier's own format carries no mark of the other.
    ranvier.save(model, tmp_path / "own")
    assert "quantization_config" not in json.loads((tmp_path / "own" / "config.json").read_text())
    assert torch.equal(logits(ranvier.load(tmp_path / "own")), logits(model))
    assert model.config.quantization_config is not None


FRESH = """
import sys
from transformers import AutoModelForCausalLM
folder, text = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except RuntimeError as error:
    print("refused", error)
from ranvier.cli import main
print("status", main(["eval", folder, "--text", text, "--window", "64"]), main(["generate", folder, "--prompt", "the"]))
"""


def test_commands_register_and_transformers_alone_refuses(spiking, tmp_path):
    """Without register transformers would put random linear layers there; the guard's shape stops it."""
    with safe_open(spiking / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118
    (tmp_path / "text").write_text(TEXT)
    run = [sys.executable, "-c", FRESH, str(spiking), str(tmp_path / "text")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert re.search(r"refused .*ignore_mismatched_sizes", done.stdout) and QUANT_METHOD in done.stderr, done.stderr
    assert "perplexity" in done.stdout and "status 0 0" in done.stdout, done.stderr


def test_attach_refuses_what_it_cannot(tmp_path):
    with pytest.raises(TypeError, match=r"ranvier\.save stores any module"):
        lm.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no spiking layer"):
        lm.attach(tiny_llama())
