"""``ranvier spike``: convert a language model and write it to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ranvier.cli._options import add_calibration, add_config, add_model, calibration_of, config_of, load_model


def add_parser(subparsers: argparse._SubParsersAction, name: str = "spike") -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help="convert a model's linear layers to spiking ones and save it")
    add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; an existing ranvier folder is replaced")
    add_config(parser)
    add_calibration(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    config = config_of(args)

    from ranvier import save, spike_
    from ranvier.integrations._conversion import conversion_note
    from ranvier.integrations.folder import check_folder
    from ranvier.methods.spikellm.convert import check_supported

    check_supported(config)
    check_folder(args.out)
    batches = calibration_of(args)
    model, tokenizer = load_model(args)
    report = spike_(model, config, batches(tokenizer))
    save(model, args.out, tokenizer)
    print(report)
    if note := conversion_note(model):
        print(f"note: {note}")
    print(f"wrote {args.out}")
    return 0
