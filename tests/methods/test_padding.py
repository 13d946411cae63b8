"""Padded calibration batches: positions whose attention_mask is 0 count for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spiking import same
from tiny_lm import tiny_llama, token_batch
from torch import Tensor, nn

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm.blocks import Positions, call_model, real_positions, real_rows
from ranvier.methods.spikellm.convert import find_linears
from ranvier.methods.spikellm.grams import GramObserver
from ranvier.methods.spikellm.saliency import SaliencyObserver
from ranvier.nn import SpikingLinear

CPU = torch.device("cpu")
sides = pytest.mark.parametrize("side", ["left", "right"])


def texts() -> list[Tensor]:
    return [token_batch(28, seed=1), token_batch(40, seed=2), token_batch(17, seed=3)]


def padded(ids: Tensor, side: str, length: int = 64, seed: int = 9) -> dict[str, Tensor]:
    """One text in a window of ``length``; what stands where it is padded is drawn."""
    window, mask = token_batch(length, seed=seed), torch.zeros(1, length, dtype=torch.int64)
    place = slice(0, ids.shape[1]) if side == "right" else slice(length - ids.shape[1], length)
    window[:, place], mask[:, place] = ids, 1
    return {"input_ids": window, "attention_mask": mask}


def test_positions_of_a_batch() -> None:
    """A mask by batch and position says which; none, a full one and one of another form say nothing."""
    ids = token_batch(6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert real_positions({"input_ids": ids, "attention_mask": mask}).tolist() == [[False, False, True, True, True, True]]
    for batch in (ids, {"input_ids": ids}, {"attention_mask": mask * 0 + 1}, {"attention_mask": mask[None, None]}):
        assert real_positions(batch) is None


def test_rows_of_a_tensor() -> None:
    """By batch and position, flattened, or as an expert gets them, where no position can be told."""
    x, real = torch.arange(24.0).view(2, 3, 4), torch.tensor([[True, False, True], [False, False, True]])
    chosen = x.view(6, 4)[[0, 2, 5]]
    assert same(real_rows(x, real), chosen) and same(real_rows(x.view(6, 4), real), chosen)
    assert same(real_rows(x, None), x.view(6, 4)) and same(real_rows(x[0], real), x[0])
    assert real_rows(x, torch.zeros_like(real)).shape == (0, 4)


def statistics(batches: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Scores, X^T X and tokens of every layer of a small model."""
    model = tiny_llama()
    layers, positions = find_linears(model, ("lm_head",))[0], Positions()
    masks = {name: torch.zeros(layer.in_features, dtype=torch.bool) for name, layer in layers.items()}
    observer = SaliencyObserver(layers, positions=positions)
    with torch.no_grad(), observer, GramObserver(layers, masks, SpikeConfig(act_bits=None), positions) as grams:
        for batch in batches:
            positions.real = real_positions(batch)
            call_model(model, batch, CPU)
    scores = {name: observer.scores([name]) for name in layers}
    return scores, grams.hessians, [reader.tokens for reader in observer.readers.values()]


@sides
def test_statistics_are_those_without_padding(side: str) -> None:
    """Scores and X^T X of padded batches are those of the texts, as near as float32 sums of other lengths are.

    Attention with a mask is another kernel than without, and on the left rotary angles are those of later positions: each
    differs by a few roundings of values near 1, some 1e-6 of the largest entry over two blocks; 1e-4 leaves room.
    """
    plain, filled = statistics(texts()), statistics([padded(ids, side) for ids in texts()])
    assert plain[2] == filled[2] == [28 + 40 + 17] * len(plain[2])
    for one, other in zip(plain[:2], filled[:2], strict=True):
        for name, value in one.items():
            assert (value - other[name]).abs().max() <= 1e-4 * value.abs().max(), name


CONFIGS = {
    "rtn": SpikeConfig(),
    "gptq": SpikeConfig(pipeline="gptq"),
    "omniquant": SpikeConfig(pipeline="omniquant"),
}


def converted(config: SpikeConfig, batches: list[Any]) -> tuple[nn.Module, int]:
    model = tiny_llama()
    return model, ranvier.spike_(model, config, batches).calibration_tokens


@sides
@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_there_does_not_matter(name: str, side: str) -> None:
    """Other ids in the padding, equal bits of the whole model; its masks are those of the texts without padding."""
    model, tokens = converted(CONFIGS[name], [padded(ids, side) for ids in texts()])
    other, _ = converted(CONFIGS[name], [padded(ids, side, seed=8) for ids in texts()])
    state = other.state_dict()
    assert tokens == 28 + 40 + 17
    assert all(same(value, state[key]) for key, value in model.state_dict().items())
    plain = dict(converted(CONFIGS[name], texts())[0].named_modules())
    for path, layer in model.named_modules():
        if isinstance(layer, SpikingLinear) and ("layers.0" in path or name == "rtn"):
            assert same(layer.salient_mask, plain[path].salient_mask), path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_of_padding_alone(name: str) -> None:
    """It adds nothing; nothing else is an error that says so."""
    empty = {"input_ids": token_batch(16), "attention_mask": torch.zeros(1, 16, dtype=torch.int64)}
    model, tokens = converted(CONFIGS[name], [*texts(), empty])
    plain, _ = converted(CONFIGS[name], texts())
    state = plain.state_dict()
    assert tokens == 28 + 40 + 17
    assert all(same(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="calibration never reached"):
        ranvier.spike_(tiny_llama(), CONFIGS[name], [empty])
