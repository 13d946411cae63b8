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


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], colors: Sequence[str], form: str) -> None:
    """One horizontal bar a name, top to bottom, each with its value."""
    places = range(len(names))
    axes.barh(places, values, color=colors, height=0.65)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(values, default=1.0))
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            format(value, form), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    axes.spines[["top", "right"]].set_visible(False)


def speeds(rows: Sequence[dict], path: Path, title: str) -> Path:
    """Tokens a second of every setting: prefill to the left, decode to the right."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 1.2 + 0.34 * len(rows)), layout="constrained", sharey=True)
    names, colors = [row["name"] for row in rows], [SPIKING if row["spiking"] else PLAIN for row in rows]
    _bars(left, names, [row["prefill_tokens_per_second"] for row in rows], colors, ",.0f")
    _bars(right, names, [row["decode_tokens_per_second"] for row in rows], colors, ",.1f")
    left.set(xlabel="prefill, tokens/s")
    right.set(xlabel="decode, tokens/s")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def operations(rows: Sequence[dict], path: Path, title: str) -> Path:
    """Operations a token of every setting that has them: accumulates of both codes, multiply-accumulates, ACE."""
    pyplot = _pyplot()
    counted = [row for row in rows if row["ace"] is not None]
    names, colors = [row["name"] for row in counted], [SPIKING if row["spiking"] else PLAIN for row in counted]
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 1.4 + 0.34 * max(1, len(counted))), layout="constrained", sharey=True)
    for axes, key, label in zip(
        panels,
        ("accumulates_u", "accumulates_c", "ace"),
        ("accumulates of unsigned spikes (G)", "of centred spikes (G)", "ACE, bits x bits (G)"),
        strict=True,
    ):
        _bars(axes, names, [row[key] / 1e9 for row in counted], colors, ",.2f")
        axes.set(xlabel=label)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def salient_map(masks: dict[str, Tensor], path: Path, title: str, columns: int = 192) -> Path:
    """Where the salient channels of every mask lie: a row a mask, channels in ``columns`` bins, darker where more are salient.

    masks: bool [K] by name, K may differ.
    """
    pyplot = _pyplot()
    image = torch.zeros(len(masks), columns)
    for row, mask in enumerate(masks.values()):
        bins = torch.arange(mask.numel()) * columns // mask.numel()
        count = torch.zeros(columns).index_add_(0, bins, torch.ones(mask.numel()))
        image[row] = torch.zeros(columns).index_add_(0, bins, mask.cpu().float()) / count.clamp(min=1)
    figure, axes = pyplot.subplots(figsize=(10, min(10, 1.6 + 0.1 * len(masks))), layout="constrained")
    drawn = axes.imshow(image.numpy(), aspect="auto", cmap="Reds", interpolation="nearest", extent=(0, 100, len(masks), 0))
    names, every = list(masks), max(1, len(masks) // 30)
    axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], names[::every], fontsize=7)
    axes.set(xlabel="position of the channel (% of K)", title=title)
    figure.colorbar(drawn, ax=axes, label="share of salient channels")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
