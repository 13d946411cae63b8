"""SpikeLLM on SmolLM2-135M: what each pipeline, setting and calibration draw costs in perplexity on WikiText-2.

A row is one converted model on one number of windows; rows that the CSV already has are not measured again, so that an
interrupted run goes on where it stopped. Draw d calibrates on another part of CPython's help topics.

    python benchmarks/spikellm.py --csv spikellm.csv --plot spikellm.png --check
    python benchmarks/spikellm.py --csv spikellm.csv --windows 0 --only best   # the whole test text, the headline settings
"""

from __future__ import annotations

import argparse
import copy
import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _plots import plot_quality
from tqdm import tqdm

import ranvier
from ranvier import SpikeConfig
from ranvier.integrations.transformers import load_causal_lm, smollm2_path
from ranvier.methods.spikellm.data import calibration_batches, topics_text, wikitext2_path
from ranvier.methods.spikellm.evaluate import perplexity

WINDOW, WINDOWS, CALIBRATION_TOKENS, DRAWS = 512, 6, 8192, 3
NONE = {"steps": 1, "salient": 0.0}
PIPELINES = {
    "rtn": {},
    "gptq": {"pipeline": "gptq"},
    "omniquant": {"pipeline": "omniquant"},
    "rotate": {"rotate": True},
    "rotate + gptq": {"rotate": True, "pipeline": "gptq"},
}
SETTINGS = {
    "W4A16": {"act_bits": None, **NONE},
    "W4A8": {"act_bits": 8, **NONE},
    "W4A4": NONE,
    "T=2, 10 %": {"steps": 2, "salient": 0.10},
    "T=4, 5 %": {"steps": 4, "salient": 0.05},
    "separate, 10 %": {"span": "separate", "salient": 0.10},
    "separate, 20 %": {"span": "separate", "salient": 0.20},
    "separate, 20 %, clip 0.9": {"span": "separate", "salient": 0.20, "act_clip": 0.9},
}
# Settings whose weights and ordinary activations have 4 bits and whose salient share is at most a fifth.
W4A4_CLASS = ("W4A4", "T=2, 10 %", "T=4, 5 %", "separate, 10 %", "separate, 20 %", "separate, 20 %, clip 0.9")
KEY = ("pipeline", "setting", "group_size", "draw", "windows")
COLUMNS = (
    *KEY, "perplexity", "ratio", "weight_error", "convert_seconds", "calibration_tokens", "tokens", "window", "text",
    "threads", "isa", "torch", "commit", "command",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One row to measure."""

    pipeline: str
    setting: str
    draw: int = 0
    group_size: int | None = None

    def config(self) -> SpikeConfig | None:
        if self.pipeline == "float32":
            return None
        return SpikeConfig(**PIPELINES[self.pipeline], **SETTINGS[self.setting], group_size=self.group_size)

    def key(self, windows: int) -> tuple[str, ...]:
        return (self.pipeline, self.setting, str(self.group_size or ""), str(self.draw), str(windows))


def cells(only: str) -> Iterator[Cell]:
    """The rows of a run: "table" (every pipeline and setting), "draws" (again on the other draws), "best", "groups"."""
    yield Cell("float32", "float32")
    if only in ("table", "all"):
        yield from (Cell(pipeline, setting) for pipeline in PIPELINES for setting in SETTINGS)
    if only in ("draws", "all"):
        headline = [("rtn", s) for s in ("W4A4", "T=2, 10 %", "T=4, 5 %", "separate, 10 %")]
        headline += [("rotate + gptq", s) for s in ("W4A8", "W4A4", "separate, 20 %, clip 0.9")]
        yield from (Cell(pipeline, setting, draw) for draw in range(1, DRAWS) for pipeline, setting in headline)
    if only in ("groups", "all"):
        for size in (32, 128):
            yield from (Cell("gptq", setting, group_size=size) for setting in ("W4A8", "separate, 20 %, clip 0.9"))
    if only == "best":
        yield from (Cell("rtn", s) for s in ("W4A4", "T=2, 10 %"))
        yield from (Cell("rotate + gptq", s) for s in ("W4A8", "separate, 20 %, clip 0.9"))


def read_rows(path: Path | None) -> list[dict[str, str]]:
    if path is None or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path | None, row: dict) -> None:
    if path is None:
        return
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def calibration(tokenizer, draw: int, tokens: int) -> list[torch.Tensor]:
    """Draw d: the topics from the d-th third of their first half on, wrapped around."""
    text = topics_text(0)
    start = draw * len(text) // DRAWS
    return list(calibration_batches(tokenizer, text[start:] + "\n\n" + text[:start], tokens, WINDOW))


def measure(cell: Cell, model, tokenizer, text: str, windows: int, tokens: int) -> dict:
    variant, config, started, error = copy.deepcopy(model), cell.config(), time.perf_counter(), ""
    if config is not None:
        report = ranvier.spike_(variant, config, calibration(tokenizer, cell.draw, tokens))
        error = f"{sum(layer.weight_error for layer in report.layers) / len(report.layers):.5f}"
    seconds = time.perf_counter() - started
    found = perplexity(variant, tokenizer, text, WINDOW, windows or None)
    return {
        **dict(zip(KEY, cell.key(windows), strict=True)),
        "perplexity": f"{found.value:.4f}",
        "weight_error": error,
        "convert_seconds": f"{seconds:.1f}",
        "tokens": found.tokens,
    }


def claims(rows: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """What the project promises of these rows, and whether they hold it."""
    by = {tuple(row[name] for name in KEY[:4]): float(row["perplexity"]) for row in rows if row["windows"] == str(WINDOWS)}
    at = {(pipeline, setting): value for (pipeline, setting, group, draw), value in by.items() if (group, draw) == ("", "0")}
    found, base = [], at.get(("float32", "float32"))
    if ("rtn", "W4A4") in at and ("rtn", "T=2, 10 %") in at:
        gain = 1 - at["rtn", "T=2, 10 %"] / at["rtn", "W4A4"]
        found.append((f"rtn, W4A4: T=2 lowers perplexity by {gain:.1%} (at least 25 %)", gain >= 0.25))
    four = {key: value / base for key, value in at.items() if base and key[1] in W4A4_CLASS}
    eight = {key: value / base for key, value in at.items() if base and key[1] == "W4A8"}
    for name, ratios, limit in (("W4A4-class", four, 2.0), ("W4A8", eight, 1.35)):
        if ratios:
            best = min(ratios, key=ratios.get)
            text = f"best {name}: {' / '.join(best)} is {ratios[best]:.2f} of float32 (at most {limit})"
            found.append((text, ratios[best] <= limit))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="rows are appended; those it has are not measured again")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", choices=("table", "draws", "groups", "best", "all"), default="all")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="evaluation windows of 512 tokens, 0: the whole text")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--check", action="store_true", help="say of each promise whether these rows keep it")
    args = parser.parse_args()
    path = wikitext2_path()
    text = path.read_text(encoding="utf-8") if path else topics_text(1)
    model, tokenizer = load_causal_lm(smollm2_path())
    done = {tuple(row[name] for name in KEY) for row in read_rows(args.csv)}
    wanted = (*args.pipelines, "float32"), (*args.settings, "float32")
    todo = [c for c in cells(args.only) if c.pipeline in wanted[0] and c.setting in wanted[1]]
    todo = [c for c in todo if c.key(args.windows) not in done]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "calibration_tokens": args.calibration_tokens, "window": WINDOW, "threads": torch.get_num_threads(),
        "text": "wikitext2-raw-test" if path else "pydoc topics", "isa": ranvier._C.isa(), "torch": torch.__version__,
        "commit": commit.stdout.strip(), "command": "python " + " ".join(sys.argv),
    }  # fmt: skip
    rows = read_rows(args.csv)
    for cell in tqdm(todo, desc="cells", unit="cell"):
        row = about | measure(cell, model, tokenizer, text, args.windows, args.calibration_tokens)
        base = [float(r["perplexity"]) for r in (*rows, row) if r["pipeline"] == "float32" and r["windows"] == row["windows"]]
        row["ratio"] = f"{float(row['perplexity']) / base[0]:.4f}"
        append_row(args.csv, row)
        rows.append({key: str(value) for key, value in row.items()})
        tqdm.write(f"{cell.pipeline:14} {cell.setting:26} draw {cell.draw}  {row['perplexity']:>12}  x{row['ratio']}")
    if args.plot:
        plot_quality(rows, args.plot, list(SETTINGS), str(WINDOWS))
    held = claims(rows) if args.check else []
    for claim, kept in held:
        print(f"{'holds' if kept else 'FAILS'}  {claim}")
    return 0 if all(kept for _, kept in held) else 1


if __name__ == "__main__":
    sys.exit(main())
