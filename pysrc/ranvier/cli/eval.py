"""``ranvier eval``: the perplexity of a language model on a text."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from ranvier.cli._options import add_model, load_model, positive, read_text


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("eval", help="perplexity of a model, spiking or not, on a text")
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--window", type=positive, default=512, help="tokens that are read at once (default 512)")
    parser.add_argument("--max-windows", metavar="N", type=positive, help="stop after so many (default: all)")
    parser.add_argument("--json", action="store_true", help="print json")
    return parser


def run(args: argparse.Namespace) -> int:
    from ranvier.methods.spikellm.evaluate import perplexity

    text = read_text(args.text)
    model, tokenizer = load_model(args)
    started = time.perf_counter()
    result = perplexity(model, tokenizer, text, args.window, args.max_windows)
    seconds = time.perf_counter() - started
    if args.json:
        facts = {"model": args.model, "text": str(args.text), "window": args.window}
        print(json.dumps({**facts, "perplexity": result.value, **asdict(result), "seconds": round(seconds, 3)}))
    else:
        of = f"{result.windows} windows of {args.window} tokens, {result.tokens} predicted, {seconds:.1f} s"
        print(f"perplexity {result.value:.3f} ({of})")
    return 0
