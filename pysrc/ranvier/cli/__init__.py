"""The command ``ranvier``: one module a command, each with ``add_parser(subparsers)`` and ``run(args) -> int``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

from ranvier.cli import demo, eval, generate, info, spike, spikellm

COMMANDS = {"info": info, "demo": demo, "spike": spike, "eval": eval, "generate": generate, "spikellm": spikellm}
USER_ERROR, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"ranvier: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from ranvier import __version__

    parser = _Parser(prog="ranvier", description="Compiled kernels that really execute published adaptation methods.")
    parser.add_argument("--version", action="version", version=f"ranvier {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS.values():
        module.add_parser(subparsers)
    return parser


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of the processes that torchrun starts only the first prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        with _one_voice():
            return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        print("ranvier: interrupted", file=sys.stderr)
        return INTERRUPTED
    # What the library raises for bad input (BackendError is a RuntimeError); anything else is a defect.
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"ranvier: error: {_describe(error)}", file=sys.stderr)
        return USER_ERROR


def _describe(error: BaseException) -> str:
    """The message in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__
