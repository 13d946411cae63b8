"""Perplexity: what a conversion costs a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.methods.spikellm.data import check_ids, token_ids


@dataclass(frozen=True)
class Perplexity:
    """value over this many windows and predicted tokens."""

    value: float
    windows: int
    tokens: int


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    window: int = 512,
    max_windows: int | None = None,
    *,
    progress: bool = True,
) -> Perplexity:
    """exp of the mean negative log likelihood of the next token.

    The text's tokens are cut into consecutive windows that do not overlap, a shorter rest is left out; in each window
    every token but the first is predicted from those before it. model(ids [1, window]) returns logits [1, window, V] or
    an object that has them. tokenizer(text)["input_ids"] is a list of ids.

    Raises ValueError for a text shorter than one window, a window under 2 tokens, max_windows under 1, and ids that the
    model's embedding does not have; TypeError where window or max_windows is no whole number.
    """
    if any(type(value) is not int for value in (window, 1 if max_windows is None else max_windows)):
        raise TypeError(f"perplexity: window={window!r}, max_windows={max_windows!r}; pass whole numbers")
    if window < 2 or (max_windows is not None and max_windows < 1):
        got = f"window={window}, max_windows={max_windows}"
        raise ValueError(f"perplexity: {got}; a window needs at least 2 tokens, and at least 1 window is needed")
    ids = token_ids(tokenizer, text)
    count = ids.numel() // window
    if count == 0:
        raise ValueError(f"perplexity: the text has {ids.numel()} tokens, not one window of {window}; pass more")
    check_ids(model, ids)
    count = count if max_windows is None else min(count, max_windows)
    device, total = _device(model), 0.0
    with evaluating(model):
        pieces = ids[: count * window].view(count, 1, window)
        for piece in tqdm(pieces, desc="perplexity", unit="window", leave=False, disable=not progress):
            row = piece.to(device)
            logits = _logits(model(row))[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
    tokens = count * (window - 1)
    return Perplexity(_exp(total / tokens), count, tokens)


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
