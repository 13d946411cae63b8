"""What the commands' options have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
