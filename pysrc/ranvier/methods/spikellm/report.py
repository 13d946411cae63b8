"""A page on what a conversion does to a model: perplexity, speed, salient channels, spikes, operations."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranvier.methods.spikellm import plots
from ranvier.methods.spikellm.compare import Setting, compare, plain_settings, spiking_settings
from ranvier.methods.spikellm.measure import layer_raster, spiking_layers

RASTER_TOKENS = 24
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22223b; max-width: 1080px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; width: 100% } td, th { padding: .25em .6em; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 2px solid #22223b }
tr.spiking td:first-child { color: #c1121f }
tbody tr:nth-child(even) { background: #f4f4f6 } img { max-width: 100% } figure { margin: 1.5em 0 } figcaption { color: #666 }
"""
# Column, key of the row, what it is divided by, format.
COLUMNS = (
    ("perplexity", "perplexity", 1, ",.2f"),
    ("x float32", "ratio", 1, ".2f"),
    ("weights, MB", "weight_bytes", 1e6, ",.1f"),
    ("prefill, tok/s", "prefill_tokens_per_second", 1, ",.0f"),
    ("decode, tok/s", "decode_tokens_per_second", 1, ",.1f"),
    ("spikes/token u, M", "spikes_u", 1e6, ",.2f"),
    ("c, M", "spikes_c", 1e6, ",.2f"),
    ("accumulates/token u, G", "accumulates_u", 1e9, ",.2f"),
    ("c, G", "accumulates_c", 1e9, ",.2f"),
    ("zero codes c", "zero_fraction_c", 1, ".0%"),
    ("MAC/token, G", "macs", 1e9, ",.3f"),
    ("ACE/token, G", "ace", 1e9, ",.2f"),
)


def report_settings(model: nn.Module, pipelines: Iterable[str], rotate: bool) -> list[Setting]:
    """The float model and plain quantization, then the spiking settings of every pipeline, rotated too where asked.

    A model that is converted already is one setting: itself.
    """
    if spiking_layers(model):
        return [Setting("as converted")]
    found = plain_settings()
    for pipeline in pipelines:
        for turned in (False, True) if rotate else (False,):
            prefix = "" if (pipeline, turned) == ("rtn", False) else f"{pipeline}{' rotated' if turned else ''}: "
            found += [Setting(prefix + s.name, s.config, s.note) for s in spiking_settings(pipeline=pipeline, rotate=turned)]
    return found


def _cell(row: dict[str, Any], key: str, unit: float, form: str) -> str:
    value = row.get(key)
    return "<td>-</td>" if value is None else f"<td>{value / unit:{form}}</td>"


def _page(about: dict[str, Any], rows: Sequence[dict[str, Any]], pictures: Sequence[tuple[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, *_ in COLUMNS)
    lines = [
        f'<tr class="{"spiking" if row["spiking"] else "plain"}"><td title="{html.escape(row["note"])}">'
        f"{html.escape(row['name'])}</td>{''.join(_cell(row, *column[1:]) for column in COLUMNS)}</tr>"
        for row in rows
    ]
    figures = "".join(
        f'<figure><img src="{name}" alt="{html.escape(text)}"><figcaption>{html.escape(text)}</figcaption></figure>'
        for name, text in pictures
    )
    facts = ", ".join(f"{html.escape(key)}: {html.escape(str(value))}" for key, value in about.items())
    title = f"SpikeLLM: {html.escape(str(about['model']))}"
    notes = (
        "u counts the spikes of the unsigned code, as the paper does; c the signed spikes of the centred code that is"
        " multiplied. A MAC of the integer product costs the same whatever the number of steps. ACE: bits of the weight times"
        " bits of the activation, summed over all multiply-accumulates."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{facts}</p><table><thead><tr><th>setting</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table><p>{notes}</p>{figures}</body></html>\n"
    )


def _draw(
    folder: Path, rows: Sequence[dict], name: str, text_name: str, kept: nn.Module | None, ids: Tensor
) -> list[tuple[str, str]]:
    """Writes the pictures that these rows and the first spiking model allow; (file, caption) of each."""
    drawn = []

    def add(file: str, text: str) -> Path:
        drawn.append((file, text))
        return folder / file

    if len(rows) > 1:
        title = f"{name}: perplexity on {text_name}"
        plots.perplexity_against_bytes(rows, add("perplexity.png", "Perplexity against bytes of linear weights"), title)
    plots.speeds(
        rows, add("speed.png", "Tokens a second, prefill of a window with all its logits and decode"), f"{name}: speed"
    )
    if any(row["ace"] is not None for row in rows):
        plots.operations(rows, add("operations.png", "Operations a token of all converted layers"), f"{name}: operations")
    if kept is None:
        return drawn
    layers = spiking_layers(kept)
    # Layers of one group share their mask: it is shown once, under the first one's name.
    first = {id(layer.group or layer): n for n, layer in reversed(layers.items())}
    masks = {n: layers[n].salient_mask for n in layers if n in set(first.values()) and layers[n].salient_count}
    if masks:
        shown = f"{name}: {len(masks)} masks of salient channels"
        plots.salient_map(masks, add("salient.png", "Where the salient channels of each layer lie"), shown)
    firing = [n for n in masks or layers if layers[n].config.act_bits is not None]
    if not firing:
        return drawn
    chosen = firing[len(firing) // 2]
    counts = layer_raster(kept, layers[chosen], ids[:, :RASTER_TOKENS])
    place = add("raster.png", f"Spikes into {chosen} while the model reads {RASTER_TOKENS} tokens")
    plots.spike_raster(counts, layers[chosen].salient_mask, place, f"spikes into {chosen}")
    return drawn


def write_report(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    text: str,
    calibration: list[Any],
    *,
    name: str,
    text_name: str,
    pipelines: Iterable[str] = ("rtn",),
    rotate: bool = False,
    windows: int | None = None,
    window: int = 512,
) -> Path:
    """Measure every setting and write report.html, report.json and the pictures into ``out``; returns the page's path.

    The files appear together when all is measured: an interruption leaves what was there before. ``model`` stays as it is.
    Raises ImportError without matplotlib, and what :func:`ranvier.spike_` and ``perplexity`` raise.
    """
    plots.check_matplotlib()
    kept: dict[str, nn.Module] = {}

    def see(setting: Setting, variant: nn.Module) -> None:
        layers = spiking_layers(variant)
        if layers and not kept and any(layer.salient_count for layer in layers.values()):
            kept["model"] = variant

    settings = report_settings(model, pipelines, rotate)
    rows = list(compare(model, tokenizer, settings, text, calibration, windows, window, see=see))
    base = rows[0]["perplexity"] if rows[0]["name"] == "float32" else None
    rows = [{**row, "ratio": None if base is None else row["perplexity"] / base} for row in rows]
    ids = torch.tensor([tokenizer(text[: 40 * window], verbose=False)["input_ids"][:window]])
    about = {
        "model": name, "text": text_name, "windows": rows[0]["windows"], "tokens a window": window,
        "calibration tokens": sum(int(batch.numel()) for batch in calibration), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ranvier-report-", dir=out) as folder:
        stage = Path(folder)
        pictures = _draw(stage, rows, name, text_name, kept.get("model"), ids)
        (stage / "report.html").write_text(_page(about, rows, pictures), encoding="utf-8")
        (stage / "report.json").write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
        for file in stage.iterdir():
            os.replace(file, out / file.name)
    return out / "report.html"
