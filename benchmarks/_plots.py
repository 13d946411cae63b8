"""The plots of the benchmarks; every number in them is a row of the CSV that was written with them."""

from __future__ import annotations

import math

# Ours is blue, the machine's limit grey, every peer has a hue and a marker of its own.
_STYLE = {
    "ranvier": ("#0b4f9e", "o", 2.6),
    "ranvier avx2": ("#6aa9e9", "o", 1.6),
    "torch float32": ("#8c8c8c", "s", 1.3),
    "torch bfloat16": ("#d95f02", "s", 1.6),
    "torch._int_mm": ("#7b3294", "D", 1.6),
    "torch int4 weight-only": ("#e7298a", "v", 1.3),
    "torchao int8 dynamic": ("#a6761d", "x", 1.3),
    "torchao int8 dynamic, compiled": ("#a6761d", "+", 1.3),
    "llama.cpp Q4_0 repacked": ("#1b9e77", "^", 1.6),
    "llama.cpp Q4_K": ("#66a61e", "^", 1.3),
    "llama.cpp TQ2_0": ("#1b9e77", "^", 1.6),
}
_VARIANTS = {
    "ranvier separate": ("separate span", "#d95f02", "o"),
    "ranvier compat": ("compat grid", "#7b3294", "s"),
    "ranvier group 128": ("groups of 128", "#1b9e77", "^"),
    "ranvier W4A8": ("W4A8, no spikes", "#8c8c8c", "D"),
    "ranvier no salient channel": ("no salient channel", "#1b9e77", "^"),
    "ranvier 20 % salient": ("20 % salient", "#d95f02", "o"),
}


def _new(rows: int, columns: int, size: tuple[float, float], **options: object):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, **options)


def threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def caption(row: dict) -> str:
    """The machine and the run, for the foot of a plot."""
    state = "+dirty" if row["dirty"] else ""
    return (
        f"{row['cpu']}, {threads(row['threads'])}, {row['isa']}; ranvier {row['ranvier']} {row['commit']}{state},"
        f" torch {row['torch']}, {row['date'][:10]}, {row['mode']} run\n{row['command']}"
    )


def _shapes(rows: list[dict]) -> list[tuple[int, int]]:
    seen = dict.fromkeys((r["N"], r["K"]) for r in rows if r["metric"] == "time" and r["N"] > 64)
    large = [s for s in seen if min(s) >= 2048]
    return large or list(seen)


def _series(rows: list[dict], shape: tuple[int, int], column: str) -> dict[str, list[tuple[int, float]]]:
    """provider -> [(M, value)]; of torch._int_mm's two layouts the faster at each M."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["metric"] != "time" or (row["N"], row["K"]) != shape:
            continue
        name = row["provider"].split(",")[0] if row["provider"].startswith("torch._int_mm") else row["provider"]
        line = lines.setdefault(name, {})
        line[row["M"]] = max(row[column], line.get(row["M"], -math.inf))
    return {name: sorted(line.items()) for name, line in lines.items()}


def _tokens_axis(axis, sizes: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(m) for m in sizes])
    axis.minorticks_off()
    axis.set_xlabel("tokens M")


def _limit(rows: list[dict], shape: tuple[int, int]) -> list[tuple[int, float]]:
    """What the machine allows for our layer's operations and bytes, in GOPS."""
    ours = [r for r in rows if r["provider"] == "ranvier" and r["metric"] == "time" and (r["N"], r["K"]) == shape]
    return sorted((r["M"], r["gops"] / r["limit_fraction"]) for r in ours)


def plot_linear(
    rows: list[dict], path: str, title: str = "A spiking linear layer call: encode, integer product, epilogue"
) -> None:
    """Above: GOPS against M, a panel a shape, with the machine's limit. Below: what the variants cost."""
    shapes = _shapes(rows)
    figure, axes = _new(2, len(shapes), (4.6 * len(shapes) + 2.7, 7.2), height_ratios=(3, 1), sharex="col")
    handles: dict[str, object] = {}
    for column, shape in enumerate(shapes):
        above, below = axes[0][column], axes[1][column]
        limit = _limit(rows, shape)
        sizes = [m for m, _ in limit]
        above.fill_between(*zip(*limit, strict=True), 1e5, color="0.92", zorder=0)
        handles["limit of the machine"] = above.plot(*zip(*limit, strict=True), color="0.35", ls="--", lw=1.2)[0]
        values = [v for _, v in limit]
        for name, line in _series(rows, shape, "gops").items():
            if name in _STYLE:
                colour, marker, width = _STYLE[name]
                order = 5 if name == "ranvier" else 3
                handles[name] = above.plot(
                    *zip(*line, strict=True), color=colour, marker=marker, lw=width, ms=4.5, zorder=order
                )[0]
                values += [v for _, v in line]
        above.set_yscale("log")
        above.set_ylim(max(1.0, 0.8 * min(values)), 1.25 * max(values))
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if min(values) <= t <= 1.25 * max(values)]
        above.set_yticks(ticks, [str(t) for t in ticks])
        above.set_title(f"N x K = {shape[0]} x {shape[1]}")
        above.grid(axis="y", color="0.88", lw=0.6)
        _variant_costs(below, rows, shape, handles)
        _tokens_axis(below, sizes)
        _tokens_axis(above, sizes)
        above.set_xlabel("")
    axes[0][0].set_ylabel("GOPS (a multiply-accumulate is two)")
    axes[1][0].set_ylabel("time / plain layer")
    figure.tight_layout(rect=(0, 0.05, 1 - 2.7 / figure.get_figwidth(), 0.96))
    providers = ["limit of the machine", *(n for n in _STYLE if n in handles)]
    variants = [v[0] for v in _VARIANTS.values() if v[0] in handles]
    for axis, names in ((axes[0][-1], providers), (axes[1][-1], variants)):
        axis.legend([handles[n] for n in names], names, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _finish(figure, rows, path, title)


def plot_ternary(rows: list[dict], path: str) -> None:
    """The same of a layer with 2-bit weights."""
    plot_linear(rows, path, "A call of a layer with 2-bit weights, 5 % of its channels in 4 bits")


def _variant_costs(axis, rows: list[dict], shape: tuple[int, int], handles: dict[str, object]) -> None:
    for provider, line in _series(rows, shape, "ratio_to_ours").items():
        if provider in _VARIANTS:
            name, colour, marker = _VARIANTS[provider]
            handles[name] = axis.plot(*zip(*line, strict=True), color=colour, marker=marker, lw=1.2, ms=3.5)[0]
    axis.axhline(1.0, color="#0b4f9e", lw=1.6)
    axis.grid(axis="y", color="0.88", lw=0.6)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.85), max(high, 1.25))


def _finish(figure, rows: list[dict], path: str, title: str) -> None:
    row = next(r for r in rows if r["metric"] != "absent")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.text(0.01, 0.005, caption(row), fontsize=7, color="0.35", va="bottom")
    figure.savefig(path, dpi=130)


def plot_encode(rows: list[dict], path: str, title: str = "Encoding tokens as spike codes") -> None:
    """Time a token against M, a panel an input dtype."""
    timed = [r for r in rows if r["metric"] == "time" and r["K"] == 4096]
    dtypes = list(dict.fromkeys(r["dtype"] for r in timed))
    figure, axes = _new(1, len(dtypes), (4.2 * len(dtypes) + 2.4, 4.6), sharey=True)
    names = list(dict.fromkeys(r["provider"] for r in timed))
    colours = ["#0b4f9e", "#d95f02", "#7b3294", "#1b9e77", "#e7298a", "#6aa9e9", "#8c8c8c", "#a6761d"]
    handles = {}
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for i, name in enumerate(names):
            line = sorted((r["M"], 1e3 * r["value"] / r["M"]) for r in timed if (r["provider"], r["dtype"]) == (name, dtype))
            if line:
                style = {"color": colours[i % len(colours)], "marker": "osD^vxP*"[i % 8], "ms": 4, "lw": 1.5}
                handles[name] = axis.plot(*zip(*line, strict=True), **style)[0]
        _tokens_axis(axis, sorted({r["M"] for r in timed}))
        axis.set_yscale("log")
        axis.set_title(f"{dtype}, K = 4096")
        axis.grid(axis="y", color="0.88", lw=0.6)
    axes[0][0].set_ylabel("ns a token")
    figure.tight_layout(rect=(0, 0.08, 1 - 1.9 / figure.get_figwidth(), 0.95))
    figure.legend(list(handles.values()), list(handles), loc="center right", frameon=False)
    _finish(figure, rows, path, title)


def plot_model(rows: list[dict], path: str) -> None:
    """Bars: tokens a second, in decoding and in prefill."""
    kinds = [m for m in ("decode", "prefill, last logits") if any(r["metric"] == m for r in rows)]
    figure, axes = _new(1, len(kinds), (6.2 * len(kinds), 3.6))
    for axis, kind in zip(axes[0], kinds, strict=True):
        mine = [r for r in rows if (r["metric"], r["level"]) == (kind, "model")][::-1]
        colours = ["#0b4f9e" if r["provider"].startswith("ranvier") else "0.6" for r in mine]
        values = [r["value"] for r in mine]
        spread = [
            [v - r["p20"] for v, r in zip(values, mine, strict=True)],
            [r["p80"] - v for v, r in zip(values, mine, strict=True)],
        ]
        bars = axis.barh([r["provider"] for r in mine], values, color=colours, xerr=spread, error_kw={"ecolor": "0.3", "lw": 1})
        axis.bar_label(bars, [f"{v:.0f}" for v in values], padding=6, fontsize=8)
        axis.set_xlim(0, 1.18 * max(r["p80"] for r in mine))
        axis.set_title(f"{kind}, M = {mine[0]['M']}")
        axis.set_xlabel("tokens a second")
    figure.tight_layout(rect=(0, 0.08, 1, 0.94))
    _finish(figure, rows, path, "SmolLM2-135M through transformers, lm_head in float")


def plot_quality(rows: list[dict[str, str]], path: str, settings: list[str], windows: str) -> None:
    """Perplexity over the float32 model's, a line a pipeline over the settings; the other draws as small marks."""
    shown = [row for row in rows if row["windows"] == windows and not row["group_size"] and row["pipeline"] != "float32"]
    figure, ((axes,),) = _new(1, 1, (10, 5.5), layout="constrained")
    palette = ("#8c8c8c", "#1b9e77", "#d95f02", "#7b3294", "#0b4f9e")
    for pipeline, color in zip(dict.fromkeys(row["pipeline"] for row in shown), palette, strict=False):
        own = [row for row in shown if row["pipeline"] == pipeline]
        first = {row["setting"]: float(row["ratio"]) for row in own if row["draw"] == "0"}
        points = [(i, first[name]) for i, name in enumerate(settings) if name in first]
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=pipeline, lw=1.6, ms=5)
        others = [(settings.index(row["setting"]), float(row["ratio"])) for row in own if row["draw"] != "0"]
        if others:
            axes.plot(*zip(*others, strict=True), "_", color=color, ms=12)
    for limit, text in ((1.0, "float32"), (2.0, "twice float32")):
        axes.axhline(limit, color="#22223b", lw=0.8, ls=":")
        axes.annotate(text, (len(settings) - 0.6, limit), fontsize=7, va="bottom", ha="right")
    axes.set_yscale("log")
    axes.set_yticks((1, 1.35, 2, 5, 10, 30, 100), ("1", "1.35", "2", "5", "10", "30", "100"))
    axes.set_xticks(range(len(settings)), settings, rotation=20, ha="right")
    axes.set(ylabel="perplexity / float32's", title=f"SmolLM2-135M, WikiText-2, {windows} windows of 512 tokens")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_kv(
    rows: list[dict], path: str, op: str = "kv_attention", across: str = "cached tokens", up: str = "ms a token",
    title: str = "Decode attention over a key-value cache",
) -> None:  # fmt: skip
    """Time of an attention against its tokens, a panel a shape."""
    timed = [r for r in rows if r["metric"] == "time" and r["op"] == op]
    notes = list(dict.fromkeys(r["note"] for r in timed))
    figure, axes = _new(1, len(notes), (4.4 * len(notes), 4.4))
    names = list(dict.fromkeys(r["provider"] for r in timed))
    colours = ["#0b4f9e", "#6aa9e9", "#1b9e77", "#d95f02", "#7b3294", "#666666"]
    for axis, note in zip(axes[0], notes, strict=True):
        for i, name in enumerate(names):
            line = sorted((r["M"], r["value"] / 1e3) for r in timed if (r["provider"], r["note"]) == (name, note))
            if line:
                axis.plot(*zip(*line, strict=True), label=name, color=colours[i % 6], marker="osD^vx"[i % 6], ms=4, lw=1.5)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(note)
        axis.set_xlabel(across)
        axis.grid(color="0.88", lw=0.6)
    axes[0][0].set_ylabel(up)
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout(rect=(0, 0.06, 1, 0.95))
    _finish(figure, rows, path, title)
