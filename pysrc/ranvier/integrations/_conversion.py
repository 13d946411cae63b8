"""What converting a model of transformers on load needs besides ``spike_``: its calibration text, and what to say after."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ranvier.config import SpikeConfig
from ranvier.nn.spike_linear import SpikingLinear

TESTED = ("gemma2", "gemma3_text", "llama", "mistral", "opt", "qwen2", "qwen3")  # model types


def check_calibration(config: SpikeConfig, calibration: Any) -> None:
    """Raises ValueError where calibration is needed and missing, OSError or ValueError for a text that cannot be read."""
    if calibration is None and config.needs_calibration:
        raise ValueError(
            f"SpikeConfig(pipeline={config.pipeline!r}, salient={config.salient}) needs calibration: pass"
            " SpikeConfig(calibration=...) with batches or the path of a text file; without it only pipeline='rtn' with"
            " salient=0 can be converted"
        )
    if isinstance(calibration, (str, os.PathLike)):
        _read(Path(calibration))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def text_batches(model: Any, path: Path) -> Iterable[Tensor]:
    """Windows of a text, by the tokenizer that lies where the model was loaded from."""
    from transformers import AutoTokenizer

    from ranvier.methods.spikellm.data import CALIBRATION_TOKENS, calibration_batches, check_ids

    source = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"calibration {path} is a text, and {source} has no readable tokenizer ({reason}); pass batches of ids"
        ) from error
    batches = list(calibration_batches(tokenizer, _read(path), CALIBRATION_TOKENS))
    for batch in batches:
        check_ids(model, batch)
    return batches


def untie(model: Any) -> None:
    """Let the configuration say so where a conversion has parted the output layer from the embedding."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parted = [target for target, source in tied.items() if _tensor(model, target) is not _tensor(model, source)]
    if parted:
        model.all_tied_weights_keys = {target: source for target, source in tied.items() if target not in parted}
        if not model.all_tied_weights_keys:
            model.config.tie_word_embeddings = False


def _tensor(model: nn.Module, name: str) -> Any:
    parent, _, key = name.rpartition(".")
    return getattr(model.get_submodule(parent), key, None)


def conversion_note(model: Any) -> str | None:
    """What a user should know of a model of a family that the tests do not cover; None for one that they do."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in TESTED:
        return None
    spiking = sum(isinstance(module, SpikingLinear) for module in model.modules())
    left: dict[str, int] = {}
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            count = sum(p.dim() > 1 for p in module.parameters(recurse=False))
            if count:
                left[type(module).__name__] = left.get(type(module).__name__, 0) + count
    kinds = ", ".join(f"{count} of {name}" for name, count in sorted(left.items()))
    rest = f"; matrices that are not nn.Linear stay as they are: {kinds}" if kinds else ""
    return (
        f"{type(model).__name__} ({family or 'not of transformers'}) is of no family that ranvier is tested with"
        f" ({', '.join(TESTED)}): its {spiking} linear layers were converted generically, nothing was fused{rest}"
    )
