"""spike_ with every pipeline and kind of weight: deterministic, reloadable, all or nothing, and worth its time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spiking import same
from tiny_lm import logits, tiny_llama, token_batch

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm import engine
from ranvier.nn import HadamardLinear, SpikingLinear, TernaryLinear

CONFIGS = [
    SpikeConfig(pipeline="gptq"),
    SpikeConfig(pipeline="gptq", act_bits=None),
    SpikeConfig(pipeline="gptq", group_size=32, saliency="absolute"),
    SpikeConfig(pipeline="omniquant", span="separate", act_clip=0.9),
    SpikeConfig(rotate=True, act_bits=8, steps=1, salient=0.0),
    SpikeConfig(rotate=True, pipeline="gptq"),
    SpikeConfig(rotate=True, pipeline="omniquant"),
    SpikeConfig(weight_bits=2, act_bits=8, steps=1, salient=0.0),
    SpikeConfig(weight_bits=2, act_bits=8, steps=4, pipeline="gptq"),
    SpikeConfig(weight_bits=2, act_bits=None, weight_grid="ternary", steps=3, pipeline="gptq"),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.pipeline}-r{c.rotate:d}-W{c.weight_bits}A{c.act_bits}")


def calibration() -> list[torch.Tensor]:
    return [token_batch(32, seed=i) for i in range(3)]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@configs
def test_conversion_is_deterministic_and_reloads(config: SpikeConfig, tmp_path) -> None:
    """The same seed gives the same bits, the saved model the same logits; every layer is of its kind."""
    models = [tiny_llama() for _ in range(2)]
    reports = [ranvier.spike_(model, config, calibration()) for model in models]
    first, second = (state(model) for model in models)
    assert first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    layers = [m for m in models[0].modules() if isinstance(m, SpikingLinear)]
    assert len(layers) == len(reports[0].layers) == 14
    assert all(type(m) is (TernaryLinear if config.weight_bits == 2 else SpikingLinear) for m in layers)
    assert any(isinstance(m, HadamardLinear) for m in models[0].modules()) == config.rotate
    ranvier.save(models[0], tmp_path / "model")
    assert same(logits(ranvier.load(tmp_path / "model")), logits(models[0]))
    copied = copy.deepcopy(models[0])
    ranvier.fuse_(copied)
    # Fused norms may round a value of the tiny model the other way and move a code by one step.
    assert float((logits(copied) - logits(models[0])).norm() / logits(models[0]).norm()) < 0.02


@configs
def test_failure_leaves_the_model(config: SpikeConfig, monkeypatch) -> None:
    """A conversion that fails in its last block, or at its last layer, changes nothing of the model."""
    model = tiny_llama()
    before, expected, modules = state(model), logits(model), [(n, id(m)) for n, m in model.named_modules()]
    made, calls = engine.weight_error, []

    def failing(*args: object) -> float:
        calls.append(1)
        if len(calls) == 14:
            raise RuntimeError("the last layer")
        return made(*args)

    for module in (engine, ranvier.methods.spikellm.convert):
        monkeypatch.setattr(module, "weight_error", failing)
    with pytest.raises(RuntimeError, match="the last layer"):
        ranvier.spike_(model, config, calibration())
    assert all(same(before[name], value) for name, value in model.state_dict().items())
    assert same(logits(model), expected) and [(n, id(m)) for n, m in model.named_modules()] == modules


def test_another_seed_gives_another_rotation() -> None:
    """seed draws the signs of the rotation."""
    weights = []
    for seed in (0, 0, 1):
        model = tiny_llama()
        ranvier.spike_(model, SpikeConfig(rotate=True, salient=0.0, steps=1), seed=seed)
        weights.append(model.model.layers[0].self_attn.q_proj.weight_packed)
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


@pytest.mark.parametrize("pipeline", ["gptq", "omniquant"])
def test_what_fits_needs_data(pipeline: str) -> None:
    """Without calibration, or with an empty one, these pipelines say so."""
    for batches in (None, []):
        with pytest.raises(ValueError, match=r"calibration"):
            ranvier.spike_(tiny_llama(), SpikeConfig(pipeline=pipeline), batches)


def test_omniquant_has_no_2_bit_weights() -> None:
    """The setting without a trainer is refused at once, with what to use."""
    with pytest.raises(ValueError, match="use pipeline='gptq' with weight_bits=2"):
        ranvier.spike_(tiny_llama(), SpikeConfig(pipeline="omniquant", weight_bits=2, act_bits=8), calibration())


def test_config_carries_the_calibration() -> None:
    """config.calibration is used where the argument is None, and is not stored in the layers."""
    one, other = tiny_llama(), tiny_llama()
    ranvier.spike_(one, SpikeConfig(pipeline="gptq"), calibration())
    ranvier.spike_(other, SpikeConfig(pipeline="gptq", calibration=(batch for batch in calibration())))
    assert all(same(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert same(logits(pickle.loads(pickle.dumps(other))), logits(other))


@pytest.mark.parametrize("pipeline", ["gptq", "omniquant"])
def test_a_cache_that_a_batch_asks_for_changes_nothing(pipeline: str) -> None:
    """use_cache in a batch of keyword arguments leaves the blocks' inputs what they are."""
    models = [tiny_llama(), tiny_llama()]
    for model, batch in zip(models, (calibration()[0], {"input_ids": calibration()[0], "use_cache": True}), strict=True):
        ranvier.spike_(model, SpikeConfig(pipeline=pipeline), [batch])
    assert all(same(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_model_comes_back_as_a_plain_one(dtype: torch.dtype, tmp_path) -> None:
    """unspike_ folds the transform into the weight: same function, plain layers, and random numbers are left alone."""
    from transformers import AutoModelForCausalLM

    model = tiny_llama(dtype=dtype)
    ranvier.spike_(model, SpikeConfig(rotate=True, act_bits=None, steps=1, salient=0.0))
    expected, before = logits(model).float(), torch.get_rng_state()
    ranvier.unspike_(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not [m for m in model.modules() if isinstance(m, HadamardLinear | SpikingLinear)]
    # Weights rounded to their type and activations multiplied in another order: some units of the type's precision.
    assert float((logits(model).float() - expected).norm() / expected.norm()) < 20 * torch.finfo(dtype).eps
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    names = dict(again.named_parameters())
    assert names.keys() == dict(model.named_parameters()).keys()
    assert all(same(value, names[name]) for name, value in model.named_parameters())
    ranvier.spike_(model, SpikeConfig(rotate=True, act_bits=None, steps=1, salient=0.0))


def test_rotation_works_in_place() -> None:
    """The modules of the model stay the objects they were; only the layers that became others are replaced."""
    model = tiny_llama()
    inner, block, norm = model.model, model.model.layers[1], model.model.norm
    ranvier.spike_(model, SpikeConfig(rotate=True), calibration())
    assert model.model is inner and inner.layers[1] is block and inner.norm is norm


def test_omniquant_refuses_stray_layers_before_it_trains(monkeypatch) -> None:
    """A layer outside the blocks is named before any block is trained."""
    from ranvier.methods.spikellm import omniquant

    monkeypatch.setattr(omniquant, "omniquant_block", lambda *_: pytest.fail("a block was trained first"))
    with pytest.raises(ValueError, match="lm_head lies in no block"):
        ranvier.spike_(tiny_llama(), SpikeConfig(pipeline="omniquant", skip=()), calibration())
