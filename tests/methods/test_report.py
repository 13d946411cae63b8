"""The report: one page, its pictures and its numbers, all of one run, or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_lm import TEXT, tiny_llama, tiny_tokenizer, token_batch

import ranvier
from ranvier.methods.spikellm import report as module
from ranvier.methods.spikellm.evaluate import perplexity
from ranvier.methods.spikellm.report import report_settings, write_report

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
PICTURES = {"perplexity.png", "speed.png", "operations.png", "salient.png", "raster.png"}


def write(model, out: Path, **options) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given = {"name": "a <tiny> model", "text_name": "words", "windows": 2, "window": 64}
        return write_report(model, tiny_tokenizer(), out, TEXT, [token_batch(32, seed=1)], **given, **options)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write(tiny_llama(), tmp_path_factory.mktemp("report") / "new")


def test_page_shows_every_setting_and_picture(page: Path) -> None:
    """A row a setting, an image a picture that lies beside it, text escaped, no file more."""
    from matplotlib.image import imread

    text = page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "report.json", *PICTURES}
    assert set(re.findall(r'<img src="([^"]+)"', text)) == PICTURES
    rows = json.loads((page.parent / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [s.name for s in report_settings(tiny_llama(), ["rtn"], False)]
    assert len(re.findall(r"<tr class=", text)) == len(rows) == 8 and "a &lt;tiny&gt; model" in text and "<tiny>" not in text
    for name in PICTURES:
        assert imread(page.parent / name)[..., :3].std() > 0.02  # a blank page has no spread


def test_numbers_are_those_of_the_models(page: Path) -> None:
    """Perplexity, ratio and counts of two rows are those measured here; weight-only and float rows count no spikes."""
    rows = {row["name"]: row for row in json.loads((page.parent / "report.json").read_text())["rows"]}
    base = perplexity(tiny_llama(), tiny_tokenizer(), TEXT, 64, 2, progress=False).value
    assert rows["float32"]["perplexity"] == base and rows["float32"]["ratio"] == 1
    model = tiny_llama()
    ranvier.spike_(model, ranvier.SpikeConfig(), [token_batch(32, seed=1)])
    value = perplexity(model, tiny_tokenizer(), TEXT, 64, 2, progress=False).value
    row = rows["spiking T=2, 10 %"]
    assert row["perplexity"] == value and row["ratio"] == value / base
    assert [name for name in rows if rows[name]["ace"] is None] == ["float32", "bfloat16", "W4A16"]
    # Bits of a weight times bits of a code: 4 x 4, of a salient channel 4 x 5.
    assert 16 < row["ace"] / row["macs"] < 20 and rows["W4A8"]["ace"] == 32 * rows["W4A8"]["macs"]


def test_converted_model_is_one_row(tmp_path: Path) -> None:
    """A model that is spiking already is shown as it is, without a comparison."""
    model = tiny_llama()
    ranvier.spike_(model, ranvier.SpikeConfig(), [token_batch(32, seed=1)])
    page = write(model, tmp_path)
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["name"] == "as converted" and row["ratio"] is None and row["spikes_c"] > 0 and row["spiking"]
    layers = [m for m in model.modules() if isinstance(m, ranvier.nn.SpikingLinear)]
    held = {id(t): t.numel() * t.element_size() for layer in layers for n, t in layer.named_buffers()}
    assert row["weight_bytes"] == sum(held.values()) > 0
    assert row["perplexity"] == perplexity(model, tiny_tokenizer(), TEXT, 64, 2, progress=False).value
    assert set(re.findall(r'<img src="([^"]+)"', page.read_text())) == PICTURES - {"perplexity.png"}


@pytest.mark.parametrize("fields", [{"weight_bits": 2, "act_bits": None, "steps": 2}, {"act_bits": None}, {"rotate": True}])
def test_every_kind_of_converted_model_has_a_page(fields: dict, tmp_path: Path) -> None:
    """Weight-only models fire nothing and have no raster; 2-bit ones still show their salient channels."""
    model = tiny_llama(dtype=torch.bfloat16)
    ranvier.spike_(model, ranvier.SpikeConfig(**fields), [token_batch(32, seed=1)])
    shown = set(re.findall(r'<img src="([^"]+)"', write(model, tmp_path).read_text()))
    assert ("raster.png" in shown) == ("operations.png" in shown) == ("act_bits" not in fields)
    assert ("salient.png" in shown) == (fields != {"act_bits": None})
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["perplexity"] == perplexity(model, tiny_tokenizer(), TEXT, 64, 2, progress=False).value


def test_failure_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    """A run that dies while it draws replaces no file and leaves none of its own."""
    (tmp_path / "report.html").write_text("old")

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module.plots, "salient_map", broken)
    with pytest.raises(OSError, match="no space left"):
        write(tiny_llama(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"] and (tmp_path / "report.html").read_text() == "old"


def test_settings_of_pipelines_and_rotation() -> None:
    """Every pipeline brings its three settings, rotated ones too where asked, each named apart."""
    names = [s.name for s in report_settings(tiny_llama(), ["rtn", "gptq"], True)]
    assert len(names) == len(set(names)) == 5 + 4 * 3 and "gptq rotated: spiking T=4, 5 %" in names


def test_cells_are_the_rows_numbers(page: Path) -> None:
    """Every cell is its own column's number, in the unit that the column names; a dash where there is none."""
    rows = json.loads((page.parent / "report.json").read_text())["rows"]
    text = page.read_text()
    heads = re.findall(r"<th>([^<]*)</th>", text)[1:]
    numbers = {
        "perplexity": ("perplexity", 1), "x float32": ("ratio", 1), "weights, MB": ("weight_bytes", 1e6),
        "prefill, tok/s": ("prefill_tokens_per_second", 1), "decode, tok/s": ("decode_tokens_per_second", 1),
        "zero codes c": ("zero_fraction_c", 0.01),
    }  # fmt: skip
    # What the tiny model counts rounds to nothing in these units: of them only whether there is a number is told.
    small = {"spikes/token u, M": "spikes_u", "MAC/token, G": "macs", "ACE/token, G": "ace"}
    for row, line in zip(rows, re.findall(r"<tr class=.*?</tr>", text), strict=True):
        cells = dict(zip(heads, re.findall(r"<td>([^<]*)</td>", line), strict=True))
        for head, (key, unit) in numbers.items():
            if row[key] is None:
                assert cells[head] == "-"
            else:  # the last digit shown is half a unit off at most
                assert float(cells[head].strip("%").replace(",", "")) == pytest.approx(row[key] / unit, abs=0.5, rel=0.2)
        for head, key in small.items():
            assert (cells[head] == "-") == (row[key] is None)


def test_spikes_and_operations_have_the_columns_of_their_code() -> None:
    """u and c do not change places, millions and billions neither."""
    row = {"spikes_u": 1e6, "spikes_c": 2e6, "accumulates_u": 3e9, "accumulates_c": 4e9, "macs": 5e9, "ace": 6e9}
    given = {"name": "n", "note": "<&>", "spiking": True, "perplexity": 7.0, "zero_fraction_c": 0.08, **row}
    text = module._page({"model": "m"}, [given], [])
    cells = re.findall(r"<td>([^<]*)</td>", text)
    assert cells == ["7.00", "-", "-", "-", "-", "1.00", "2.00", "3.00", "4.00", "8%", "5.000", "6.00"]
    assert 'title="&lt;&amp;&gt;"' in text
