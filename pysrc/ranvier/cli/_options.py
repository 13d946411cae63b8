"""What the commands' options have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranvier.config import GRIDS, GROUP_SIZES, HEAD_BITS, PIPELINES, SALIENCY, SPANS, WEIGHT_BITS, WEIGHT_GRIDS, SpikeConfig

DEFAULTS = SpikeConfig()
WEIGHT_FIELDS = ("weight_bits", "weight_grid", "group_size", "head_bits", "pipeline", "rotate")
SPIKE_FIELDS = ("act_bits", "act_clip", "steps", "salient", "saliency", "span", "grid")
DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="ranvier or transformers folder, .gguf file, or name on the hub")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the float tensors (default float32)")


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) as the options of :func:`add_model` name them; under torchrun each process reads its share."""
    import torch

    from ranvier.integrations.parallel import join, launched
    from ranvier.integrations.transformers import load_causal_lm

    if launched():
        join()
    return load_causal_lm(args.model, getattr(torch, args.dtype), split=launched())


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises OSError, or ValueError where it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _bits_or_none(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'none'") from None


def add_config(parser: argparse.ArgumentParser) -> None:
    """The fields of :class:`ranvier.SpikeConfig` as options."""
    d = DEFAULTS
    parser.add_argument("--pipeline", choices=PIPELINES, default=d.pipeline, help="how weights are quantized (default rtn)")
    parser.add_argument("--rotate", action="store_true", help="fold a randomized Hadamard rotation into the weights first")
    parser.add_argument("--weight-bits", type=int, choices=WEIGHT_BITS, default=d.weight_bits, help="of a weight (default 4)")
    parser.add_argument("--weight-grid", choices=WEIGHT_GRIDS, default=d.weight_grid, help="of 2-bit weights (default uniform)")
    bits = "bits of a time step, none: weight-only (default 4)"
    parser.add_argument("--act-bits", type=_bits_or_none, default=d.act_bits, metavar="BITS", help=bits)
    parser.add_argument("--act-clip", type=float, default=d.act_clip, help="share of a token's range to span (default 1)")
    parser.add_argument("--steps", type=int, default=d.steps, help="time steps on salient channels (default 2)")
    parser.add_argument("--salient", type=float, default=d.salient, help="share of such channels (default 0.10)")
    parser.add_argument("--saliency", choices=SALIENCY, default=d.saliency, help="by sign or size (default signed)")
    parser.add_argument("--span", choices=SPANS, default=d.span, help="their range (default shared)")
    parser.add_argument("--grid", choices=GRIDS, default=d.grid, help="ratio of scales (default consistent)")
    sizes = [size for size in GROUP_SIZES if size]
    parser.add_argument("--group-size", type=int, choices=sizes, help="channels a weight scale (default: row)")
    heads = [bits for bits in HEAD_BITS if bits]
    parser.add_argument("--head-bits", type=int, choices=heads, help="of the output layer (default: it stays as --skip says)")
    names = {"metavar": "NAME", "nargs": "*", "default": list(d.skip)}
    parser.add_argument("--skip", **names, help="components of layer names to leave alone (default lm_head)")


def config_of(args: argparse.Namespace) -> SpikeConfig:
    """What :func:`add_config`'s options say. Raises ValueError naming the field."""
    return SpikeConfig(**{name: getattr(args, name) for name in WEIGHT_FIELDS + SPIKE_FIELDS}, skip=tuple(args.skip))


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration", metavar="FILE", type=Path, help="UTF-8 text (default: Python help topics)")
    parser.add_argument("--calibration-tokens", metavar="N", type=positive, default=2048, help="of it (default 2048)")


def calibration_of(args: argparse.Namespace) -> Callable[[Any], list[Any]]:
    """Reads the text now; the function returned cuts it into batches by a tokenizer."""
    from ranvier.methods.spikellm.data import calibration_batches, topics_text

    text = read_text(args.calibration) if args.calibration else topics_text(0)
    return lambda tokenizer: list(calibration_batches(tokenizer, text, args.calibration_tokens))
