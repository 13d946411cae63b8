"""Conversion block by block: which blocks, what they are handed, and that nothing changes before the end."""

from __future__ import annotations

import copy

import pytest
import torch
from spiking import generator, same
from tiny_lm import TEXT, WORDS, logits, tiny_llama, tiny_tokenizer, token_batch
from torch import Tensor, nn

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm.blocks import capture, find_blocks, leading
from ranvier.methods.spikellm.convert import find_linears
from ranvier.methods.spikellm.evaluate import evaluating
from ranvier.methods.spikellm.gptq import quantize_gptq
from ranvier.nn import SpikingLinear

CPU = torch.device("cpu")
GPTQ = SpikeConfig(pipeline="gptq")


def batches() -> list[Tensor]:
    return [token_batch(32, seed=1), token_batch(7, seed=2), token_batch(64, seed=3)]


def layers(model: nn.Module) -> dict[str, SpikingLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}


class Tower(nn.Module):
    """Blocks that return tuples and take the hidden states by another name; a layer before and one after them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, states: Tensor, scale: float, gate: Tensor) -> tuple[Tensor, None]:
            return states + self.two(self.one(states).relu()) * scale * gate, None

    def __init__(self, chained: bool = True) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.first, self.tail = nn.Linear(16, 16), nn.Linear(16, 3)
        self.blocks, self.chained = nn.ModuleList([Tower.Block() for _ in range(3)]), chained

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(x if self.chained else x * 1.0, 0.5 * i + 0.5, gate=x.new_ones(()))[0]
        return self.tail(x)


def rows(count: int = 40, seed: int = 4) -> Tensor:
    return torch.randn(count, 16, generator=generator(seed))


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_found_and_reached_alike() -> None:
    """What a chain hands from block to block is, bit for bit, what the blocks see inside the model."""
    for model, path, calls in ((tiny_llama(), "model.layers", batches()), (Tower().eval(), "blocks", [rows(), rows(9, 5)])):
        found, _ = find_linears(model, ("lm_head",))
        assert find_blocks(model, found) == path
        blocks, seen = model.get_submodule(path), []
        hooks = [block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(leading(out))) for block in blocks]
        with torch.no_grad():
            for call in calls:
                model(call)
        for hook in hooks:
            hook.remove()
        chain = capture(model, path, calls, CPU)
        assert "forward" not in blocks[0].__dict__ and len(chain.hidden) == len(calls)
        with torch.no_grad():
            for i, block in enumerate(blocks):
                chain.hidden = [chain.run(block, i, b) for b in chain.batches()]
                for b in chain.batches():
                    assert same(chain.hidden[b], seen[b * len(blocks) + i])


def test_what_is_no_chain_is_seen() -> None:
    """Blocks with something between them, called twice or never, are no chain; without a list there are none."""
    model = Tower(chained=False)
    assert capture(model, "blocks", [rows()], CPU) is None
    assert find_blocks(nn.Sequential(nn.Linear(4, 4)), {"0": nn.Linear(4, 4)}) is None
    model = Tower()
    model.forward = lambda x: model.tail(model.blocks[0](x, 1.0, x.new_ones(()))[0])
    assert capture(model, "blocks", [rows()], CPU) is None
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_no_cache_is_captured() -> None:
    """A block that runs again finds no keys of its last run; the model's own use_cache is back after the capture."""
    model = tiny_llama()
    assert model.config.use_cache is True
    chain = capture(model, "model.layers", batches(), CPU)
    assert model.config.use_cache is True
    assert all(given.get("past_key_values") is None for block in chain.arguments for given in block)
    block = model.model.layers[0]
    with torch.no_grad():
        assert same(chain.run(block, 0, 0), chain.run(block, 0, 0))


# --- spike_ with gptq ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"span": "separate", "group_size": 32}, {"act_bits": None}, {"act_bits": 8, "steps": 1, "salient": 0.0}]
)
def test_each_layer_is_fitted_to_its_quantized_upstream(fields: dict) -> None:
    """Codes equal GPTQ by hand on X^^T X^ of the encoded inputs that the converted model itself gives the layer."""
    model = tiny_llama()
    weights = {name: layer.weight.detach().clone() for name, layer in find_linears(model, ("lm_head",))[0].items()}
    config = SpikeConfig(pipeline="gptq", **fields)
    report = ranvier.spike_(model, config, batches())
    made, sums = layers(model), {}
    assert [layer.name for layer in report.layers] == list(weights) == list(made)
    assert report.calibration_tokens == 32 + 7 + 64

    def see(name: str, layer: SpikingLinear, x: Tensor) -> None:
        x = layer.dequantized_input(x.reshape(-1, x.shape[-1])).float()
        sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1])).addmm(x.T, x)

    hooks = [m.register_forward_pre_hook(lambda m, args, name=n: see(name, m, args[0])) for n, m in made.items()]
    with torch.no_grad():
        for ids in batches():
            model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, layer in made.items():
        codes = quantize_gptq(weights[name], sums[name], layer.salient_mask, layer.format)
        truth = SpikingLinear.from_quantized(
            model.lm_head.__class__(layer.in_features, layer.out_features), config, layer.salient_mask, *codes
        )
        assert same(truth.weight_packed, layer.weight_packed) and same(truth.weight_scale, layer.weight_scale), name


def test_groups_share_mask_and_encoding() -> None:
    """q, k and v, and gate and up, share one mask and one encoding as with rtn."""
    model = tiny_llama()
    report = ranvier.spike_(model, GPTQ, batches())
    made = layers(model)
    for layer in report.layers:
        first = made[layer.group[0]]
        assert made[layer.name].salient_mask is first.salient_mask and made[layer.name].group is first.group
    assert {len(layer.group) for layer in report.layers} == {1, 2, 3}


def test_deterministic_and_better_than_rounding() -> None:
    """Equal bits from equal calls; outputs nearer the float model's than rounding to nearest on the same inputs."""
    truth, made = tiny_llama(), {}
    for name in ("gptq", "again", "rtn"):
        made[name] = tiny_llama()
        pipeline = "rtn" if name == "rtn" else "gptq"
        ranvier.spike_(made[name], SpikeConfig(pipeline=pipeline, act_bits=None), [token_batch(64, seed=s) for s in range(6)])
    assert same(logits(made["gptq"]), logits(made["again"]))
    error = {name: float((logits(model) - logits(truth)).norm()) for name, model in made.items()}
    assert error["gptq"] < 0.9 * error["rtn"]


def test_modes_are_kept() -> None:
    """Training flags are those of the float model, and it is in them again after a failure."""
    model = tiny_llama().train()
    model.model.layers[1].eval()
    ranvier.spike_(model, GPTQ, batches())
    made = layers(model)
    assert made["model.layers.0.mlp.up_proj"].training and not made["model.layers.1.mlp.up_proj"].training
    assert model.training and not model.model.layers[1].training


def test_a_failure_leaves_the_model() -> None:
    """Batches that fail, or miss a layer, leave every module, tensor and mode as it was."""
    model = tiny_llama().train()
    before = {name: (id(m), m.training) for name, m in model.named_modules()}
    values = copy.deepcopy(model.state_dict())
    for given, error, words in (
        ([], ValueError, "calibration set is empty"),
        ([token_batch(8), "text"], TypeError, "calibration yields str"),
        (None, ValueError, "pipeline='gptq' needs calibration"),
        (token_batch(8), TypeError, "pass an iterable of batches"),
        ([torch.full((1, 4), len(WORDS))], ValueError, "the id 14, and the embedding has 14 rows"),
    ):
        with pytest.raises(error, match=words):
            ranvier.spike_(model, GPTQ, given)
        assert {name: (id(m), m.training) for name, m in model.named_modules()} == before
        assert all(same(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("chained", [True, False])
def test_layers_outside_the_blocks(chained: bool) -> None:
    """Every layer is converted: those outside the blocks, or all where blocks are no chain, on the float model's inputs."""
    model = Tower(chained)
    report = ranvier.spike_(model, SpikeConfig(pipeline="gptq", salient=0.25), [rows(), rows(9, 5)])
    assert len(report.layers) == 8 and list(layers(model)) == [layer.name for layer in report.layers]
    with torch.no_grad():
        assert bool(model(rows()).isfinite().all())


def test_unreached_layers_are_named() -> None:
    """A layer that no batch reaches cannot be fitted."""
    model = Tower()
    model.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="never reached spare"):
        ranvier.spike_(model, SpikeConfig(pipeline="gptq", salient=0.0), [rows()])
    assert not layers(model)


# --- calibration in the config ------------------------------------------------------------------------------------------


def test_calibration_of_the_config(tmp_path) -> None:
    """Batches or a text file in the config stand in for the argument; the tokenizer is that of the model's folder."""
    given, own = tiny_llama(), tiny_llama()
    ranvier.spike_(given, SpikeConfig(), batches())
    ranvier.spike_(own, SpikeConfig(calibration=batches()))
    assert same(logits(given), logits(own))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(ValueError, match=r"tokenizer cannot be found .*pass batches"):
        ranvier.spike_(tiny_llama(), SpikeConfig(calibration=text))
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2))
    ranvier.spike_(model, SpikeConfig(calibration=str(text)))
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
    ranvier.spike_(other, SpikeConfig(), list(ids.split(512, dim=1)))
    assert same(logits(model), logits(other))
    with pytest.raises(FileNotFoundError):
        ranvier.spike_(tiny_llama(), SpikeConfig(calibration=tmp_path / "none.txt"))


def test_evaluating_restores() -> None:
    """Modes come back after an error inside."""
    model = tiny_llama().train()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert all(module.training for module in model.modules())
