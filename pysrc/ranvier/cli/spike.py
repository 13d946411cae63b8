"""``ranvier spike``: convert a language model and write it to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ranvier.cli._options import add_model, load_model, positive, read_text
from ranvier.config import GRIDS, GROUP_SIZES, SPANS, SpikeConfig

DEFAULTS = SpikeConfig()


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("spike", help="convert a model's linear layers to spiking ones and save it")
    add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; an existing ranvier folder is replaced")
    parser.add_argument("--act-bits", type=int, default=DEFAULTS.act_bits, help="bits of a time step (default 4)")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps, help="time steps on salient channels (default 2)")
    parser.add_argument("--salient", type=float, default=DEFAULTS.salient, help="share of such channels (default 0.10)")
    parser.add_argument("--span", choices=SPANS, default=DEFAULTS.span, help="their range (default shared)")
    parser.add_argument("--grid", choices=GRIDS, default=DEFAULTS.grid, help="ratio of scales (default consistent)")
    sizes = [size for size in GROUP_SIZES if size]
    parser.add_argument("--group-size", type=int, choices=sizes, help="channels a weight scale (default: row)")
    names = {"metavar": "NAME", "nargs": "*", "default": list(DEFAULTS.skip)}
    parser.add_argument("--skip", **names, help="components of layer names to leave alone (default lm_head)")
    parser.add_argument("--calibration", metavar="FILE", type=Path, help="UTF-8 text (default: Python help topics)")
    parser.add_argument("--calibration-tokens", metavar="N", type=positive, default=2048, help="of it (default 2048)")
    return parser


def run(args: argparse.Namespace) -> int:
    fields = ("act_bits", "steps", "salient", "span", "grid", "group_size")
    config = SpikeConfig(**{name: getattr(args, name) for name in fields}, skip=tuple(args.skip))
    text = read_text(args.calibration) if args.calibration else None

    from ranvier import save, spike_
    from ranvier.integrations._conversion import conversion_note
    from ranvier.integrations.folder import check_folder
    from ranvier.methods.spikellm.data import calibration_batches, topics_text

    check_folder(args.out)
    model, tokenizer = load_model(args)
    batches = calibration_batches(tokenizer, topics_text(0) if text is None else text, args.calibration_tokens)
    report = spike_(model, config, batches)
    save(model, args.out, tokenizer)
    print(report)
    if note := conversion_note(model):
        print(f"note: {note}")
    print(f"wrote {args.out}")
    return 0
