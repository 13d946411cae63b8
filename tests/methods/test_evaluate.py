"""perplexity: of a model whose probabilities are known, which tokens count and which do not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ranvier.methods.spikellm.evaluate import evaluating, perplexity

COUNTING = "01234567" * 5  # 40 tokens


def digits(text: str, **_: object) -> dict[str, list[int]]:
    return {"input_ids": [int(character) for character in text]}


class Counter(nn.Module):
    """To the next number half the probability, the other half to the seven others."""

    def __init__(self, dtype: torch.dtype = torch.float32, gain: float = 1.0) -> None:
        super().__init__()
        self.dtype, self.gain, self.shapes = dtype, gain, []

    def forward(self, ids: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(ids.shape))
        logits = torch.zeros(*ids.shape, 8).scatter_(-1, ((ids + 1) % 8)[..., None], self.gain * math.log(7))
        return logits.to(self.dtype)


@pytest.mark.parametrize(("most", "windows"), [(None, 3), (2, 2), (9, 3)])
def test_value_windows_and_tokens(most: int | None, windows: int) -> None:
    """1 / (1/2) for a text that counts; a rest of four tokens is left out, and in each window the first token."""
    model = Counter()
    found = perplexity(model, digits, COUNTING, 12, most, progress=False)
    assert (found.windows, found.tokens) == (windows, 11 * windows) and model.shapes == [(1, 12)] * windows
    assert found.value == pytest.approx(2.0, rel=1e-6)  # some roundings of float32


def test_tokens_are_predicted_from_those_before() -> None:
    """One wrong step of 33 costs log 14 in place of log 2; between two windows it costs nothing."""
    wrong = COUNTING[:5] + COUNTING[6:] + "0"  # 5 is left out: 6 comes after 4
    expected = math.exp((32 * math.log(2) + math.log(14)) / 33)
    assert perplexity(Counter(), digits, wrong, 12, progress=False).value == pytest.approx(expected, rel=1e-6)
    between = COUNTING[:12] + COUNTING[13:] + "0"
    assert perplexity(Counter(), digits, between, 12, progress=False).value == pytest.approx(2.0, rel=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    """The logit itself is rounded, the sum of exponentials and the mean are not."""
    logit = float(torch.tensor(math.log(7)).bfloat16())
    found = perplexity(Counter(torch.bfloat16), digits, COUNTING, 12, progress=False)
    assert found.value == pytest.approx((math.exp(logit) + 7) / math.exp(logit), rel=1e-6)


def test_a_hopeless_model_is_inf() -> None:
    """Beyond what a float holds."""
    assert perplexity(Counter(gain=-1e4), digits, COUNTING, 12, progress=False).value == math.inf


def test_modes_come_back_one_by_one() -> None:
    """A frozen part of a model in training stays in eval mode, the rest in training, also after an error."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    model[1][0].train()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize(
    ("text", "window", "most", "message"),
    [
        (COUNTING, 1, None, "at least 2 tokens"),
        (COUNTING, 12, 0, "at least 1 window"),
        (COUNTING, 41, None, "40 tokens, not one window of 41"),
    ],
)
def test_refused(text: str, window: int, most: int | None, message: str) -> None:
    """What leaves nothing to predict."""
    with pytest.raises(ValueError, match=message):
        perplexity(Counter(), digits, text, window, most, progress=False)
