"""``ranvier generate``: continue a prompt, always with the likeliest token."""

from __future__ import annotations

import argparse

from ranvier.cli._options import add_model, load_model, positive


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("generate", help="continue a prompt with a model, spiking or not")
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, default=32, help="of them (default 32)")
    return parser


def run(args: argparse.Namespace) -> int:
    from ranvier.integrations.transformers import generate

    model, tokenizer = load_model(args)
    print(generate(model, tokenizer, args.prompt, args.max_new_tokens))
    return 0
