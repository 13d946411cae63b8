"""Rows to a table on the terminal, to CSV, to json, to a plot."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable

COLUMNS = (
    "op", "level", "provider", "N", "K", "M", "dtype", "metric", "value", "unit", "p20", "p80", "ratio_to_ours",
    "gops", "gbs", "ns_per_token", "ms_per_call", "limit_fraction", "bound", "peak_gops", "read_gbs", "per_token_step",
    "bytes", "copies", "rounds", "tries", "other_load", "zero_fraction", "spikes", "accumulates", "note",
    "threads", "isa", "cpu", "commit", "dirty", "torch", "ranvier",
    "python", "date", "mode", "command",
)  # fmt: skip
QUIET = 0.1  # cores
_SHOWN = {
    "level": "{:<6}", "metric": "{:<20}", "provider": "{:<41}", "dtype": "{:<8}",
    "N": "{:>5}", "K": "{:>5}", "M": "{:>3}", "value": "{:>9.1f}", "unit": "{:<8}", "p20": "{:>9.1f}",
    "p80": "{:>9.1f}",
    "ratio_to_ours": "{:>6.2f}", "gops": "{:>6.1f}", "gbs": "{:>5.1f}", "limit_fraction": "{:>5.2f}", "bound": "{:<7}",
}  # fmt: skip
_HEADS = {"ratio_to_ours": "x ours", "limit_fraction": "limit", "value": "median"}


def _line(row: dict, columns: list[str]) -> str:
    cells = []
    for key in columns:
        value, form = row.get(key), _SHOWN[key]
        cells.append(" " * _width(key) if value is None else form.format(value))
    return "  ".join(cells).rstrip()


def _width(key: str) -> int:
    return int(_SHOWN[key][3:-1].split(".")[0])


def print_table(rows: list[dict]) -> None:
    """What a reader wants first: the columns in which this run's rows have something to say. All are in the CSV."""
    timed = [row for row in rows if row["metric"] != "absent"]
    values = {key: {row.get(key) for row in timed} for key in _SHOWN}
    columns = [k for k in _SHOWN if values[k] != {None} and (k not in ("level", "metric") or len(values[k]) > 1)]
    print("  ".join(f"{_HEADS.get(key, key):{_SHOWN[key][2]}{_width(key)}}" for key in columns))
    for row in timed:
        print(_line(row, columns))
    for row in rows:
        if row["metric"] == "absent":
            print(f"{row['provider']}: {row['note']}")
    if not was_quiet(rows):
        busy = max(row.get("other_load") or 0.0 for row in timed)
        print(f"The machine was not quiet: other processes kept {busy:.1f} cores busy; do not keep these figures.")


def was_quiet(rows: list[dict]) -> bool:
    """Whether other processes left the cores alone while the rows were measured."""
    return all((row.get("other_load") or 0.0) <= QUIET for row in rows)


def write(rows: list[dict], options: argparse.Namespace, plot: Callable[[list[dict], str], object]) -> None:
    """The files that were asked for."""
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="raise")
            writer.writeheader()
            writer.writerows({k: _rounded(v) for k, v in row.items()} for row in rows)
    if options.plot:
        plot(rows, str(options.plot))
    for path in filter(None, (options.json, options.csv, options.plot)):
        print(f"wrote {path}", file=sys.stderr)


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value
