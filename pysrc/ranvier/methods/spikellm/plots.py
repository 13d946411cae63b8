"""Pictures of a spiking conversion; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INK, SPIKING, PLAIN = "#22223b", "#c1121f", "#3a6ea5"
LABEL_PIXELS = 16


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ranvier[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_matplotlib() -> None:
    """Raises ImportError, naming the extra, where matplotlib is missing: call it before long work that ends in a picture."""
    _pyplot()


def perplexity_against_bytes(rows: Sequence[dict], path: Path, title: str) -> Path:
    """One point a setting: megabytes of linear weights to the right, perplexity (log) upwards.

    rows: dicts with name, perplexity, weight_bytes, spiking.
    """
    pyplot = _pyplot()
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(8.5, 5.2), layout="constrained")
    middle = (max(row["weight_bytes"] for row in rows) * min(row["weight_bytes"] for row in rows)) ** 0.5
    for row in rows:
        x, y = row["weight_bytes"] / 1e6, row["perplexity"]
        axes.scatter(x, y, s=64, color=SPIKING if row["spiking"] else PLAIN, edgecolor="white", zorder=3)
    # Settings of one size stand in one column; a label moves up until it no longer covers the one below it.
    placed: list[tuple[bool, float]] = []
    axes.set(xscale="log", yscale="log", xlabel="linear weights (MB)", ylabel="perplexity", title=title)
    axes.margins(x=0.25, y=0.12)
    figure.draw_without_rendering()
    for row in sorted(rows, key=lambda row: row["perplexity"]):
        at, right = (row["weight_bytes"] / 1e6, row["perplexity"]), row["weight_bytes"] < middle
        height = float(axes.transData.transform(at)[1])
        below = [y for side, y in placed if side == right and height - y < LABEL_PIXELS]
        label = max([height, *(y + LABEL_PIXELS for y in below)])
        placed.append((right, label))
        axes.annotate(
            f"{row['name']}  {row['perplexity']:,.1f}", at, (10 if right else -10, (label - height) * 72 / figure.dpi),
            textcoords="offset points", ha="left" if right else "right", va="center", fontsize=9, color=INK,
        )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter("")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.grid(True, which="both", alpha=0.2)
    named = ((SPIKING, "spiking"), (PLAIN, "not spiking"))
    handles = [pyplot.Line2D([], [], marker="o", ls="", color=c, label=t) for c, t in named]
    axes.legend(handles=handles, loc="upper right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def spike_raster(counts: Tensor, salient: Tensor, path: Path, title: str, channels: int = 160) -> Path:
    """Spikes of one layer: channels upwards, tokens with their time steps to the right, darker for more spikes a step.

    counts: int [tokens, steps, K], the spikes each channel fires in each step; salient: bool [K], drawn in red at the side.
    """
    pyplot = _pyplot()
    counts, salient = counts.cpu(), salient.cpu()
    tokens, steps, total = counts.shape
    shown = min(channels, total)
    # Salient channels first, so that their second and later steps can be seen.
    order = torch.argsort(~salient, stable=True)[:shown]
    image = counts[..., order].reshape(tokens * steps, shown).T.numpy()
    figure, axes = pyplot.subplots(figsize=(10, 5.6), layout="constrained")
    drawn = axes.imshow(image, aspect="auto", cmap="Greys", interpolation="nearest", extent=(0, tokens, shown, 0))
    marked = int(salient[order].sum())
    axes.axhline(marked, color=SPIKING, lw=1)
    box = {"boxstyle": "square,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85}
    for text, color, offset in (
        (f"{marked} salient channels: {steps} steps a token", SPIKING, 9),
        ("other channels: one step a token", INK, -9),
    ):
        axes.annotate(
            text, (0.3, marked), (0, offset), textcoords="offset points", color=color, fontsize=9, va="center", bbox=box
        )
    axes.set(xlabel="token (each divided into its time steps)", ylabel=f"channel ({shown} of {total})", title=title)
    figure.colorbar(drawn, ax=axes, label="spikes in the step")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
