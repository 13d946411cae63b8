"""``ranvier spikellm``: the whole method: quantize, eval, generate, report."""

from __future__ import annotations

import argparse

from ranvier.cli import _report, eval, generate, spike

COMMANDS = {"quantize": spike, "eval": eval, "generate": generate, "report": _report}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("spikellm", help="SpikeLLM: quantize, eval, generate, report")
    inner = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    spike.add_parser(inner, "quantize")
    for name in ("eval", "generate", "report"):
        COMMANDS[name].add_parser(inner)
    return parser


def run(args: argparse.Namespace) -> int:
    return COMMANDS[args.action].run(args)
