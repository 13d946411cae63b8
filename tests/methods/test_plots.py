"""Pictures of a conversion: real files with something on them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ranvier.methods.spikellm.plots import (
    INK,
    PLAIN,
    SPIKING,
    operations,
    perplexity_against_bytes,
    salient_map,
    speeds,
    spike_raster,
)

NAMES = ("float32", "bfloat16", "W4A16", "W4A8", "W4A4", "T=2", "T=4", "separate")


def rows(scale: float = 1.0) -> list[dict]:
    sizes = (425e6, 212e6, 56e6, 56e6, 56e6, 56e6, 56e6, 56e6)
    values = (22.0, 22.1, 29.5, 30.1, 900.0, 310.0, 290.0, 41.0)
    return [
        {"name": name, "weight_bytes": size * scale, "perplexity": value, "spiking": i > 4}
        for i, (name, size, value) in enumerate(zip(NAMES, sizes, values, strict=True))
    ]


def picture(path: Path) -> np.ndarray:
    """A png's pixels, uint8 [height, width, 3]."""
    image = pytest.importorskip("PIL.Image", reason="reading a picture needs pillow, which matplotlib brings")
    with image.open(path) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened.convert("RGB"))


def near(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where the pixels are this colour, but for antialiasing."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels.astype(int) - wanted) <= 6).all(-1)


def counts(tokens: int = 6, steps: int = 2, channels: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    salient = torch.zeros(channels, dtype=torch.bool)
    salient[3::10] = True
    spikes = torch.zeros(tokens, steps, channels, dtype=torch.int32)
    spikes[:, 0] = torch.arange(channels, dtype=torch.int32) % 16
    spikes[:, 1:, salient] = 15
    return spikes, salient


@pytest.mark.parametrize("scale", [1.0, 1e-4, 30.0], ids=["demo", "tiny", "large"])
def test_perplexity_against_bytes(tmp_path: Path, scale: float) -> None:
    """A png of the promised size with a marker for every setting, in two colours, spread over the axes at any size."""
    path = tmp_path / "perplexity.png"
    assert perplexity_against_bytes(rows(scale), path, "title") == path
    pixels = picture(path)
    assert pixels.shape == (780, 1275, 3)
    spiking, plain, ink = (near(pixels, colour) for colour in (SPIKING, PLAIN, INK))
    # A marker is some 17 pixels wide: 150 or more of its colour, and one stands in the legend. Those that do not spike are
    # apart, those that spike may cover each other in part.
    assert plain.sum() > 4 * 150 and spiking.sum() > 3 * 150 and ink.sum() > 500
    # Points of 425 and of 56 MB are far apart: markers reach over more than half of the axes.
    columns = np.flatnonzero(plain[200:].sum(0) >= 8)
    assert columns.max() - columns.min() > 1275 / 3


def test_labels_of_one_column_do_not_cover_each_other(tmp_path: Path) -> None:
    """Equal points have labels one above the other: more ink than where only one could be read."""
    same = [{"name": "setting", "weight_bytes": 56e6, "perplexity": 30.0, "spiking": True} for _ in range(4)]
    wide = {"name": "float", "weight_bytes": 425e6, "perplexity": 22.0, "spiking": False}
    ink = [
        int(near(picture(perplexity_against_bytes([wide, *same[:n]], tmp_path / f"{n}.png", "")), INK).sum()) for n in (1, 4)
    ]
    label = (ink[0] - int(near(picture(perplexity_against_bytes([wide], tmp_path / "0.png", "")), INK).sum())) or 1
    # Three further labels of about the first one's ink.
    assert ink[1] - ink[0] > 2.5 * label > 0


@pytest.mark.parametrize("channels", [200, 40], ids=["cut", "all"])
def test_spike_raster(tmp_path: Path, channels: int) -> None:
    """A png of the promised size, darker where more fires, with the red line that parts salient channels."""
    path = tmp_path / "raster.png"
    spikes, salient = counts(channels=channels)
    assert spike_raster(spikes, salient, path, "title") == path
    pixels = picture(path)
    assert pixels.shape == (840, 1500, 3)
    assert near(pixels, SPIKING).any(1).max() and near(pixels, SPIKING).sum(1).max() > 1000  # across the axes
    grey = pixels[(pixels.max(-1) - pixels.min(-1)) < 8]
    assert len(np.unique(grey[:, 0])) >= 16  # a shade for each of 0 to 15 spikes
    # More spikes are darker: the same raster firing less is lighter in the axes.
    less = picture(spike_raster(torch.where(spikes == 15, 15, spikes // 4), salient, tmp_path / "less.png", "title"))
    assert less[100:700, 200:1100].mean() > pixels[100:700, 200:1100].mean() + 5


def test_salient_channels_come_first(tmp_path: Path) -> None:
    """Where only salient channels fire, all is black above the red line and white below it."""
    spikes, salient = counts()
    pixels = picture(spike_raster(torch.where(salient, 15, 0).int().expand_as(spikes), salient, tmp_path / "a.png", ""))
    line = int(near(pixels, SPIKING).sum(1).argmax())
    inside = pixels[:, 700:1200]  # right of the words, left of the frame
    assert line > 100 and (inside[50 : line - 4] < 10).all() and (inside[line + 4 : 740] > 245).all()


def test_blank_raster_differs(tmp_path: Path) -> None:
    """A layer that fires nothing is drawn too, and is not the picture of one that fires."""
    spikes, salient = counts()
    one, other = (spike_raster(s, salient, tmp_path / f"{i}.png", "") for i, s in enumerate((spikes, spikes * 0)))
    assert (picture(one) != picture(other)).mean() > 0.05


def test_pictures_leave_no_figure_open(tmp_path: Path) -> None:
    """Every figure is closed after it is written."""
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    perplexity_against_bytes(rows(), tmp_path / "a.png", "")
    spike_raster(*counts(), tmp_path / "b.png", "")
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("draw", ["perplexity", "raster"])
def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, draw: str) -> None:
    """Without matplotlib the error says what to install, and nothing is written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'ranvier\[plot\]'"):
        if draw == "raster":
            spike_raster(*counts(), tmp_path / "a.png", "")
        else:
            perplexity_against_bytes(rows(), tmp_path / "a.png", "")
    assert not list(tmp_path.iterdir())


def changed(draw, key: str, tmp_path: Path) -> np.ndarray:
    """For every column of pixels whether it moves when one number of a row does."""
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second", "accumulates_u", "accumulates_c", "ace")
    given = [{"name": name, "spiking": name == "b", **dict.fromkeys(keys, 3e9)} for name in ("a", "b")]
    before = picture(draw(given, tmp_path / "before.png", ""))
    given[1][key] = 1e9
    return (picture(draw(given, tmp_path / "after.png", "")) != before).any((0, 2))


@pytest.mark.parametrize(
    ("draw", "key", "place", "of"),
    [
        (speeds, "prefill_tokens_per_second", 0, 2), (speeds, "decode_tokens_per_second", 1, 2),
        (operations, "accumulates_u", 0, 3), (operations, "accumulates_c", 1, 3), (operations, "ace", 2, 3),
    ],
)  # fmt: skip
def test_each_panel_draws_its_own_number(tmp_path: Path, draw, key: str, place: int, of: int) -> None:
    """One number moves the bars of one panel."""
    moved = changed(draw, key, tmp_path)
    parts = np.array_split(moved, of)
    assert [bool(part.any()) for part in parts] == [i == place for i in range(of)]


def test_settings_without_operations_are_not_drawn(tmp_path: Path) -> None:
    """A float model has none: the picture is the one without it; a setting that fires nothing at all keeps its bar."""
    row = {"name": "a", "spiking": True, "accumulates_u": 3e9, "accumulates_c": 2e9, "ace": 1e9}
    none = {"name": "b", "spiking": False, "accumulates_u": None, "accumulates_c": None, "ace": None}
    one, other = (picture(operations(rows, tmp_path / "x.png", "")) for rows in ([row], [none, row]))
    assert np.array_equal(one, other)
    silent = {**none, "accumulates_u": 0.0, "accumulates_c": 0.0, "ace": 0.0}
    assert picture(operations([silent, row], tmp_path / "y.png", "")).shape[0] > one.shape[0]


def test_tokens_go_from_left_to_right_with_their_steps(tmp_path: Path) -> None:
    """Where the first of six tokens alone fires, in both of its steps, the first sixth of the axes is dark."""
    spikes, salient = counts()
    spikes[1:], spikes[0, :, salient] = 0, 15
    pixels = picture(spike_raster(torch.where(salient, spikes, 0), salient, tmp_path / "a.png", ""))
    line = int(near(pixels, SPIKING).sum(1).argmax())
    across = np.flatnonzero(near(pixels[line : line + 1], SPIKING)[0])
    left, width = across.min(), across.max() - across.min()
    # Far above the words beside the line; the frame is left out.
    dark = np.flatnonzero((pixels[line - 45 : line - 35, left + 6 : left + width - 6].max(-1) < 100).all(0))
    assert width / 9 < dark.max() < width / 6


def test_salient_map_shows_shares(tmp_path: Path) -> None:
    """Masks of any width are drawn alike: all salient is dark, none is light, the first half is dark to the left."""
    half = torch.arange(1920) < 960
    masks = {"few": torch.ones(192).bool(), "many": torch.ones(1920).bool(), "none": torch.zeros(1920).bool(), "half": half}
    pixels = picture(salient_map(masks, tmp_path / "a.png", ""))
    dark = near(pixels, "#67000d")  # the ends of matplotlib's "Reds"
    light = near(pixels, "#fff5f0")
    top, bottom = (np.flatnonzero((dark | light).sum(1) > 800)[i] for i in (0, -1))
    rows = [int(top + (bottom - top) * (i + 0.5) / 4) for i in range(4)]
    axes = np.flatnonzero(dark[rows[0]])[: int(dark[rows[0]].sum())]
    left, right = axes.min() + 20, axes.min() + int((light[rows[2]]).sum()) - 20
    assert dark[rows[0], left:right].all() and dark[rows[1], left:right].all() and light[rows[2], left:right].all()
    middle = (left + right) // 2
    assert dark[rows[3], left : middle - 20].all() and light[rows[3], middle + 20 : right].all()
