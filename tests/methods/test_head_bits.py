"""SpikeConfig.head_bits: the output layer at 8 bits, with every pipeline, in files and back."""

from __future__ import annotations

import warnings

import pytest
import torch
from folders import content
from tiny_lm import logits, tiny_llama, token_batch
from torch import nn

import ranvier
from ranvier import SpikeConfig
from ranvier.integrations import transformers as lm
from ranvier.integrations.stream import convert_folder
from ranvier.nn import Int8Linear, SpikingLinear

pytest.importorskip("transformers")
CALIBRATION = [token_batch(32, seed=1)]


def converted(tied: bool = True, **fields) -> nn.Module:
    model = tiny_llama(tied)
    ranvier.spike_(model, SpikeConfig(head_bits=8, **fields), CALIBRATION)
    return model


def test_the_output_layer_gets_8_bits_and_the_embedding_stays() -> None:
    """A tied head is parted from the embedding; the report has it as one more layer; all else is as without."""
    model, without = tiny_llama(True), tiny_llama(True)
    embedding = model.model.embed_tokens.weight
    report = ranvier.spike_(model, SpikeConfig(head_bits=8), CALIBRATION)
    ranvier.spike_(without, SpikeConfig(), CALIBRATION)
    head = model.lm_head
    assert type(head) is Int8Linear and model.model.embed_tokens.weight is embedding
    step = float(embedding.detach().abs().max()) / 100  # above 2 max / 255, the widest step of a row
    torch.testing.assert_close(head.dequantized_weight(), embedding.detach(), rtol=0, atol=step)
    assert report.layers[-1].name == "lm_head" and report.skipped == [] and report.layers[-1].weight_error < 0.01
    assert report.layers[-1].salient == 0 and report.layers[-1].group == ("lm_head",)
    hidden = without.model(CALIBRATION[0]).last_hidden_state
    assert torch.equal(model.model(CALIBRATION[0]).last_hidden_state, hidden)
    assert torch.equal(model(CALIBRATION[0]).logits, head(hidden))


def test_it_goes_before_skip() -> None:
    """With or without lm_head in skip it has 8 bits, and never 4."""
    for skip in ((), ("lm_head",)):
        assert type(converted(skip=skip).lm_head) is Int8Linear
    assert type(converted(weight_bits=8, act_bits=8, salient=0.0).model.layers[0].mlp.up_proj) is Int8Linear


@pytest.mark.parametrize("fields", [{}, {"pipeline": "gptq", "rotate": True}], ids=["rtn", "rotate + gptq"])
def test_files(tmp_path, fields: dict) -> None:
    """ranvier.save and load, save_pretrained and from_pretrained: equal logits, a head of its own."""
    model = converted(**fields)
    want = logits(model)
    ranvier.save(model, tmp_path / "model")
    loaded = ranvier.load(tmp_path / "model")
    assert torch.equal(logits(loaded), want) and type(loaded.lm_head) is Int8Linear
    lm.register()
    tiny_llama(True).save_pretrained(tmp_path / "plain")
    streamed = convert_folder(tmp_path / "plain", tmp_path / "streamed", SpikeConfig(head_bits=8, **fields), CALIBRATION)
    assert streamed.layers[-1].name == "lm_head" and streamed.skipped == []
    assert content(tmp_path / "streamed") == content(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    given = SpikeConfig(head_bits=8, calibration=CALIBRATION, **fields)
    spiking = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=given)
    assert torch.equal(logits(spiking), want)
    spiking.save_pretrained(tmp_path / "pretrained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    assert type(again.lm_head) is Int8Linear and torch.equal(logits(again), want)
    assert not again.config.tie_word_embeddings


def test_undone_fused_and_generated() -> None:
    """unspike_ gives a plain head with the 8-bit values, fuse_ leaves it, generate runs."""
    model = converted()
    weight = model.lm_head.dequantized_weight()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranvier.fuse_(model)
        assert model.generate(CALIBRATION[0][:, :4], max_new_tokens=3, do_sample=False).shape[1] == 7
    ranvier.unspike_(model)
    assert type(model.lm_head) is nn.Linear and torch.equal(model.lm_head.weight, weight)
    assert not any(isinstance(module, SpikingLinear) for module in model.modules())


def test_refused() -> None:
    """A model without an output layer, a head with NaN: named, and the model is as it was."""
    with pytest.raises(ValueError, match="head_bits=8 converts the output layer, and Sequential has none"):
        ranvier.spike_(nn.Sequential(nn.Linear(4, 4)), SpikeConfig(head_bits=8, salient=0.0))
    with pytest.raises(ValueError, match="head_bits is 4; allowed are None, 8"):
        SpikeConfig(head_bits=4)
    with pytest.raises(ValueError, match="weight_bits is 8"):
        SpikeConfig(weight_bits=8)
    model = tiny_llama(False)
    model.lm_head.weight.data[3, 1] = torch.nan
    with pytest.raises(ValueError, match="lm_head"):
        ranvier.spike_(model, SpikeConfig(head_bits=8), CALIBRATION)
    assert not any(isinstance(module, SpikingLinear) for module in model.modules())
