"""Measurements of a language model: spikes a token, speed, and the raster of one layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_lm import spiking_llama, tiny_llama, token_batch
from torch import Tensor, nn

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm.measure import (
    COUNTS,
    generation_speed,
    layer_raster,
    spikes_per_token,
    spiking_layers,
    watching,
)
from ranvier.nn import SpikingLinear
from ranvier.ops import spike_events

FORMATS = [
    {"salient": 0.25},
    {"salient": 0.25, "steps": 4, "grid": "compat"},
    {"salient": 0.25, "span": "separate"},
    {"act_bits": 8, "steps": 1, "salient": 0.0},
]
formats = pytest.mark.parametrize("fields", FORMATS, ids=["shared", "compat", "separate", "A8"])
SHARED = ("k_proj", "v_proj", "up_proj")  # read what q_proj and gate_proj have encoded


def read_by(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What every spiking layer reads, [L, K]."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0].reshape(-1, args[0].shape[-1])}))
        for name, layer in model.named_modules()
        if isinstance(layer, SpikingLinear)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def hooked(model: nn.Module) -> bool:
    return any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@formats
def test_spikes_add_up_over_layers(fields: dict) -> None:
    """Executed event by event layer by layer: shared encodings fire once, every layer adds its own columns."""
    model, ids = spiking_llama(**fields), token_batch(11)
    found = spikes_per_token(model, ids)
    wanted, silent, codes = dict.fromkeys(COUNTS, 0.0), {"u": 0, "c": 0}, 0
    for name, x in read_by(model, ids).items():
        events = spike_events(model.get_submodule(name), x, "unary")
        wanted["macs"] += events.macs
        wanted["ace"] += events.ace
        for code, counts in (("u", events.u), ("c", events.c)):
            wanted[f"accumulates_{code}"] += int(counts.spikes.sum()) * counts.out_features / 11
            if not name.endswith(SHARED):
                wanted[f"spikes_{code}"] += int(counts.spikes.sum()) / 11
                silent[code] += int(counts.silent.sum())
        codes += 0 if name.endswith(SHARED) else x.numel()
    wanted |= {f"zero_fraction_{code}": silent[code] / codes for code in silent}
    assert tuple(found) == COUNTS
    # Integers and their elevenths, summed in float64 in another order: a few dozen roundings of 2^-53.
    assert found == pytest.approx(wanted, rel=1e-13)
    assert all(found[name] > 0 for name in COUNTS) and found["macs"] == sum(
        layer.in_features * layer.out_features for layer in spiking_layers(model).values()
    )


def test_groups_change_spikes_and_nothing_else() -> None:
    """Without groups every layer fires for itself; accumulates and the rest stay."""
    model, ids = spiking_llama(salient=0.25), token_batch(11)
    together = spikes_per_token(model, ids)
    for layer in spiking_layers(model).values():
        layer.group = None
    alone = spikes_per_token(model, ids)
    for name in ("accumulates_u", "accumulates_c", "macs", "ace"):
        assert alone[name] == together[name]
    # In units: q, k, v count three times and gate, up twice.
    assert together["spikes_u"] < alone["spikes_u"] < 3 * together["spikes_u"]


def test_nothing_spikes_without_spiking_layers() -> None:
    """All None for a float model, which is not even run."""

    class Unrunnable(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            raise AssertionError

    for model in (Unrunnable(), nn.Sequential(nn.Linear(4, 4))):
        assert spikes_per_token(model, token_batch(3)) == dict.fromkeys(COUNTS)


def test_measuring_leaves_the_model_as_it_was() -> None:
    """Modes stay, hooks go, also when the model fails on the way."""
    model = spiking_llama().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    layer = model.model.layers[0].mlp.down_proj
    for measure in (
        lambda ids: spikes_per_token(model, ids),
        lambda ids: layer_raster(model, layer, ids),
        lambda ids: generation_speed(model, ids, new_tokens=2, context=4, repeats=1),
    ):
        measure(token_batch(9))
        with pytest.raises(IndexError):
            measure(torch.tensor([[99]]))
        assert [module.training for module in model.modules()] == modes and not hooked(model)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [tiny_llama, spiking_llama], ids=["float", "spiking"])
def test_generation_speed(make) -> None:
    """Both speeds are positive and finite; prompt, steps and repeats are as asked, in eval mode without gradients."""
    model, calls = make().train(), []

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        assert not module.training and not torch.is_grad_enabled()
        state = kwargs.get("past_key_values")
        calls.append((args[0].shape[1], kwargs["use_cache"], 0 if state is None else state.get_seq_length()))

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    rate = generation_speed(model, token_batch(20), new_tokens=5, context=8, repeats=2)
    handle.remove()
    assert 0 < rate.prefill < float("inf") and 0 < rate.decode < float("inf") and rate == (rate.prefill, rate.decode)
    # One prefill and one step more than measured, to warm up.
    assert calls == [(20, False, 0)] * 3 + [(8, True, 0)] + [(1, True, 8 + i) for i in range(6)]
    assert model.training


class Next(nn.Module):
    """A language model to which the number after the last one is likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def forward(self, ids: Tensor, past_key_values: int | None = None, use_cache: bool = True) -> SimpleNamespace:
        self.read.append(ids[0, -1].item())
        length = (past_key_values or 0) + ids.shape[1]
        return SimpleNamespace(logits=nn.functional.one_hot(ids + 1, 30), past_key_values=length)


def test_steps_are_greedy() -> None:
    """Every step reads what the last token's logits of the step before say."""
    model = Next()
    generation_speed(model, torch.arange(9)[None], new_tokens=4, context=6, repeats=1)
    assert model.read == [8, 8, 5, 6, 7, 8, 9, 10]


@formats
def test_layer_raster_is_what_reaches_the_layer(fields: dict) -> None:
    """[L, steps, K], never more levels a step than its bits allow, and in all the spikes of the layer's inputs."""
    model, ids = spiking_llama(**fields), token_batch(11)
    name = "model.layers.1.mlp.gate_proj"
    layer = model.get_submodule(name)
    counts = layer_raster(model, layer, ids)
    spikes = spike_events(layer, read_by(model, ids)[name], "unary", execute=False).u.spikes
    assert counts.dtype == torch.int32 and (counts.shape[0], counts.shape[2]) == (11, 64)
    assert torch.equal(counts.abs().sum((1, 2)).long(), spikes)
    assert int(counts.abs().max()) <= 2**layer.config.act_bits - 1
    if layer.config.span == "shared" and layer.config.grid == "consistent":
        assert counts.shape[1] == layer.config.steps
        assert not counts[:, 1:, ~layer.salient_mask].any()  # one step off the salient channels
    if layer.config.steps == 2 and layer.config.span == "shared":
        assert counts[:, 1:, layer.salient_mask].any()


def test_plain_modules_are_measured_too() -> None:
    """Any module that takes ids: a layer that runs twice counts twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(14, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.layer(self.words(ids)))

    torch.manual_seed(5)
    model = Twice()
    ranvier.spike_(model, SpikeConfig(salient=0.25), [token_batch(9)])
    ids, seen = token_batch(6), []
    with torch.no_grad(), watching([model.layer], lambda layer, x: seen.append(x.clone())):
        model(ids)
    single = [spike_events(model.layer, x, "unary").per_token() for x in seen]
    found = spikes_per_token(model, ids)
    assert len(single) == 2 and found["macs"] == 2 * 16 * 16
    for key in ("spikes_u", "spikes_c", "accumulates_u", "accumulates_c"):
        assert found[key] == pytest.approx(single[0][key] + single[1][key], rel=1e-13)  # roundings of float64


class Expert(nn.Module):
    """A layer that reads every other token, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(14, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor, step: int = 2) -> Tensor:
        return self.layer(input=self.words(ids)[:, ::step])


def test_layers_that_see_some_tokens_count_for_those() -> None:
    """A layer that reads half of the tokens counts half as much a token; called by keyword as nn.Linear is."""
    torch.manual_seed(5)
    model = Expert()
    ranvier.spike_(model, SpikeConfig(salient=0.25), [token_batch(9)])
    ids = token_batch(8)
    found = spikes_per_token(model, ids)
    alone = spike_events(model.layer, model.words(ids)[:, ::2], "unary", execute=False).per_token()
    assert found["macs"] == 16 * 16 / 2
    for name in ("spikes_u", "accumulates_c", "ace"):
        assert found[name] == pytest.approx(alone[name] / 2, rel=1e-13)  # roundings of float64
    assert found["zero_fraction_u"] == pytest.approx(alone["silent_u"] / 16, rel=1e-13)


def test_tokens_that_reach_no_layer_are_refused() -> None:
    """There is no zero fraction of no code."""
    model = nn.ModuleDict({"layer": SpikingLinear.from_linear(nn.Linear(16, 16))})
    model.forward = lambda ids: ids
    with pytest.raises(ValueError, match="these tokens reach no spiking layer"):
        spikes_per_token(model, token_batch(3))


def test_weight_only_layers_fire_nothing() -> None:
    """Beside spiking layers they are left out; alone there is nothing to count."""
    mixed = nn.Sequential(nn.Embedding(14, 16), SpikingLinear.from_linear(nn.Linear(16, 16)))
    alone, ids = spikes_per_token(mixed, token_batch(6)), token_batch(6)
    config = SpikeConfig(act_bits=None)
    mixed.append(SpikingLinear.from_linear(nn.Linear(16, 16), config))
    assert spikes_per_token(mixed, ids) == alone
    only = nn.Sequential(nn.Embedding(14, 16), SpikingLinear.from_linear(nn.Linear(16, 16), config))
    assert spikes_per_token(only, ids) == dict.fromkeys(COUNTS)
