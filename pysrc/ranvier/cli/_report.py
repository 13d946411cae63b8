"""``ranvier spikellm report``: one page on what a conversion does to a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ranvier.cli._options import add_calibration, add_model, calibration_of, load_model, positive, read_text
from ranvier.config import PIPELINES


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("report", help="compare settings of a model: an HTML page with its pictures")
    add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write report.html, report.json and the pictures to")
    parser.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text to evaluate (default: WikiText-2 if found)")
    parser.add_argument("--windows", type=positive, default=6, help="evaluation windows (default 6)")
    parser.add_argument("--window", type=positive, default=512, help="tokens of a window (default 512)")
    pipelines = {"choices": PIPELINES, "nargs": "+", "default": ["rtn"], "metavar": "PIPELINE"}
    parser.add_argument("--pipelines", **pipelines, help=f"spiking settings of each of {', '.join(PIPELINES)} (default rtn)")
    parser.add_argument("--rotate", action="store_true", help="rotated models too")
    add_calibration(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ranvier.integrations._staging import naming
    from ranvier.methods.spikellm.data import topics_text, wikitext2_path
    from ranvier.methods.spikellm.plots import check_matplotlib
    from ranvier.methods.spikellm.report import write_report

    check_matplotlib()
    path = args.text or wikitext2_path()
    text = read_text(path) if path else topics_text(1)
    batches = calibration_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args)
    with naming(args.out):
        page = write_report(
            model, tokenizer, args.out, text, batches(tokenizer),
            name=Path(args.model).name, text_name=path.name if path else "the second half of pydoc_data.topics",
            pipelines=args.pipelines, rotate=args.rotate, windows=args.windows, window=args.window,
        )  # fmt: skip
    print(f"wrote {page}")
    return 0
