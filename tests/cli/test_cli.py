"""The command line: what each command prints and leaves, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from folders import content, small_disk
from tiny_lm import TEXT, logits, tiny_llama, tiny_tokenizer

import ranvier
from ranvier import _C, cli
from ranvier.cli import COMMANDS, _options, main
from ranvier.methods.spikellm.evaluate import perplexity
from ranvier.ops._declare import OPS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a transformers model "plain", its text "text.txt" and, made by the command, "spiking"."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(path / "plain")
    tiny_tokenizer().save_pretrained(path / "plain")
    (path / "text.txt").write_text(TEXT)
    options = ["--steps", "4", "--salient", "0.25", "--group-size", "32", "--skip", "lm_head", "down_proj"]
    calibration = ["--calibration", str(path / "text.txt"), "--calibration-tokens", "64"]
    assert main(["spike", str(path / "plain"), str(path / "spiking"), *options, *calibration]) == 0
    return path


def mistake(capsys, *argv: object) -> str:
    """The one line that a mistake gives."""
    assert main([str(arg) for arg in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("ranvier:")] or lines
    assert len(lines) == 1 and lines[0].startswith("ranvier: error: ") and "Traceback" not in lines[0]
    return lines[0]


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_prints_json_of_what_is_here(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["ranvier"] == ranvier.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["isa"] == _C.isa() and found["cpu"]["detected_isa"] in found["cpu"]["isa_levels"]
    assert found["threads"] == {"count": torch.get_num_threads(), "torch_pool": ranvier.connect_threads()}
    assert found["ops"].keys() == OPS.keys()
    for name, row in found["ops"].items():
        assert row.keys() == {"cpu", "triton", "reference"} and row["reference"] is None
        for backend, reason in row.items():
            missing = backend not in OPS[name].implementations
            assert not missing or reason == f"this op has no {backend} kernel"


def test_info_prints_the_matrix_with_reasons(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in OPS:
        row = next(line.split() for line in text.splitlines() if line.startswith(name + " "))
        assert row[1] == "runs" and row[3] == "runs"
    if not torch.cuda.is_available():
        assert "spike_linear, triton: " in text
    assert ranvier.__version__ in text and _C.isa() in text


def test_info_is_quick_and_honours_the_isa_cap():
    script = (
        "import sys; from ranvier.cli import main; status = main(['info']);"
        "heavy = [m for m in ('transformers', 'triton', 'numba', 'tqdm.notebook', 'matplotlib') if m in sys.modules];"
        "print('heavy', heavy); sys.exit(status)"
    )
    here = {**os.environ, "RANVIER_ISA": "scalar"}
    done = subprocess.run([sys.executable, "-c", script], env=here, capture_output=True, text=True, check=True)
    assert "heavy []" in done.stdout
    assert "isa       scalar" in done.stdout and "RANVIER_ISA=scalar" in done.stdout


# --- spike, eval, generate --------------------------------------------------------------------------------------------


def test_spike_writes_what_its_options_say(models):
    loaded = ranvier.load(models / "spiking")
    layers = [m for m in loaded.modules() if isinstance(m, ranvier.nn.SpikingLinear)]
    config = ranvier.SpikeConfig(steps=4, salient=0.25, group_size=32, skip=("lm_head", "down_proj"))
    assert len(layers) == 2 * 6 and all(layer.config == config for layer in layers)
    assert all(layer.salient_count == 16 for layer in layers)
    assert type(loaded.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert not torch.equal(logits(loaded), logits(tiny_llama()))


def test_spike_reports_and_calibrates_on_its_own_text(models, capsys):
    assert main(["spike", str(models / "plain"), str(models / "again"), "--calibration-tokens", "40"]) == 0
    text = capsys.readouterr().out
    assert "model.layers.1.mlp.gate_proj" in text and f"wrote {models / 'again'}" in text


@pytest.mark.parametrize("name", ["plain", "spiking"])
def test_eval_prints_the_perplexity(models, capsys, name):
    arguments = ["eval", str(models / name), "--text", str(models / "text.txt"), "--window", "40", "--max-windows", "5"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny_llama() if name == "plain" else ranvier.load(models / "spiking")
    wanted = perplexity(model, tiny_tokenizer(), TEXT, 40, 5, progress=False)
    assert found["perplexity"] == wanted.value and (found["windows"], found["tokens"]) == (5, 5 * 39)
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"perplexity {wanted.value:.3f} (5 windows of 40 tokens, 195 predicted")


def test_generate_prints_prompt_and_continuation(models, capsys):
    assert main(["generate", str(models / "spiking"), "--prompt", "the node of", "--max-new-tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the node of") and len(text.split()) <= 6


# --- spikellm ---------------------------------------------------------------------------------------------------------


def test_spikellm_has_the_whole_method(models, capsys, tmp_path):
    """quantize writes what spike writes, eval and generate are the commands of that name, report writes its page."""
    options = ["--steps", "4", "--salient", "0.25", "--calibration", str(models / "text.txt"), "--calibration-tokens", "64"]
    for command in (["spike"], ["spikellm", "quantize"]):
        assert main([*command, str(models / "plain"), str(tmp_path / command[-1]), *options]) == 0
    one, other = (ranvier.load(tmp_path / name).state_dict() for name in ("spike", "quantize"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    for command in (
        ["eval", "MODEL", "--text", str(models / "text.txt"), "--window", "40"],
        ["generate", "MODEL", "--prompt", "a"],
    ):
        found = [str(tmp_path / "spike") if word == "MODEL" else word for word in command]
        printed = []
        for prefix in ([], ["spikellm"]):
            assert main([*prefix, *found]) == 0
            printed.append(capsys.readouterr().out.split(" s)")[0].rsplit(",", 1)[0])
        assert printed[0] == printed[1]
    report = ["report", str(tmp_path / "spike"), str(tmp_path / "page"), "--text", str(models / "text.txt")]
    assert main(["spikellm", *report, "--windows", "1", "--window", "40"]) == 0
    assert f"wrote {tmp_path / 'page' / 'report.html'}" in capsys.readouterr().out


def test_weight_only_from_the_command(models, tmp_path):
    assert main(["spikellm", "quantize", str(models / "plain"), str(tmp_path / "out"), "--act-bits", "none"]) == 0
    layers = [m for m in ranvier.load(tmp_path / "out").modules() if isinstance(m, ranvier.nn.SpikingLinear)]
    assert layers and all(layer.config.act_bits is None for layer in layers)


def test_spikellm_mistakes_are_one_line(models, capsys, tmp_path):
    assert "ACTION" in mistake(capsys, "spikellm")
    assert "neither a whole number nor 'none'" in mistake(capsys, "spikellm", "quantize", "m", "o", "--act-bits", "few")
    assert "invalid choice: 'awq'" in mistake(capsys, "spikellm", "quantize", "m", "o", "--pipeline", "awq")
    assert "SpikeConfig.act_clip is 2.0" in mistake(capsys, "spikellm", "quantize", "m", "o", "--act-clip", 2)
    (tmp_path / "file").touch()
    assert "file" in mistake(capsys, "spikellm", "report", models / "plain", tmp_path / "file", "--text", models / "text.txt")


@pytest.fixture(scope="module")
def bad(models, tmp_path_factory):
    """A folder whose tokenizer is of another model, and a spiking one of another format version."""
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("bad")
    config = tiny_llama().config
    config.vocab_size = 9
    LlamaForCausalLM(config).save_pretrained(path / "tokenizer")
    tiny_tokenizer().save_pretrained(path / "tokenizer")
    shutil.copytree(models / "spiking", path / "version")
    manifest = path / "version" / "ranvier.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    shutil.copytree(models / "plain", path / "architecture")
    (path / "architecture" / "config.json").write_text('{"model_type": "unheard_of", "architectures": ["UnheardOfLM"]}')
    shutil.copytree(models / "plain", path / "truncated")
    weights = path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (path / "short.txt").write_text("the node")
    return path


@pytest.mark.parametrize("action", ["quantize", "eval", "generate", "report"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("tokenizer", "does not match the model: it has 14 tokens, and the embedding 9 rows"),
        ("version", "format_version 9; this ranvier reads 1 and 2: update ranvier"),
        ("architecture", "unheard_of"),
        ("truncated", "cannot read"),
    ],
)
def test_spikellm_refuses_bad_models_in_one_line(models, bad, capsys, tmp_path, action, fault, says):
    text = models / "text.txt"
    options = {
        "quantize": [tmp_path / "out", "--calibration", text],
        "eval": ["--text", text],
        "generate": ["--prompt", "the"],
        "report": [tmp_path / "out", "--text", text],
    }
    assert says in mistake(capsys, "spikellm", action, bad / fault, *options[action])
    assert not (tmp_path / "out" / "ranvier.json").exists() and not (tmp_path / "out" / "report.html").exists()


def test_spikellm_refuses_a_text_shorter_than_a_window(models, bad, capsys, tmp_path):
    for words in (["eval", models / "spiking"], ["report", models / "plain", tmp_path / "page"]):
        assert "2 tokens, not one window of 512" in mistake(capsys, "spikellm", *words, "--text", bad / "short.txt")


def test_spikellm_full_disk_is_one_line_and_loses_nothing(models, capsys, tmp_path):
    out, page = tmp_path / "out", tmp_path / "page"
    shutil.copytree(models / "spiking", out)
    before = content(out)
    report = ["report", models / "spiking", page, "--text", models / "text.txt", "--windows", 1, "--window", 40]
    for size in (500, 20000):
        for words, place in ((["quantize", models / "plain", out], out), (report, page)):
            with small_disk(size):
                line = mistake(capsys, "spikellm", *words)
            assert f"{place}: the folder cannot be written: " in line and "File too large" in line
        assert content(out) == before and not content(page)


def test_spikellm_notes_what_it_does_not_know(capsys, tmp_path):
    """An architecture of no tested family is converted generically, with a note of what was not fused."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path / "neox")
    tiny_tokenizer().save_pretrained(tmp_path / "neox")
    assert main(["spikellm", "quantize", str(tmp_path / "neox"), str(tmp_path / "out"), "--calibration-tokens", "40"]) == 0
    printed = capsys.readouterr().out
    assert "note: GPTNeoXForCausalLM (gpt_neox) is of no family" in printed and "nothing was fused" in printed


def test_every_option_of_a_conversion_reaches_its_field():
    """Each alone changes the field of its name and no other; of the float tensors the dtype is that asked for."""
    parser = argparse.ArgumentParser()
    _options.add_config(parser)
    default = ranvier.SpikeConfig()
    for words, field, value in (
        ("--pipeline gptq", "pipeline", "gptq"), ("--rotate", "rotate", True), ("--weight-bits 2", "weight_bits", 2),
        ("--act-bits none", "act_bits", None), ("--act-bits 3", "act_bits", 3), ("--act-clip 0.5", "act_clip", 0.5),
        ("--steps 3", "steps", 3), ("--salient 0.2", "salient", 0.2), ("--saliency absolute", "saliency", "absolute"),
        ("--span separate", "span", "separate"), ("--grid compat", "grid", "compat"), ("--group-size 64", "group_size", 64),
        ("--skip a b", "skip", ("a", "b")), ("--head-bits 8", "head_bits", 8),
    ):  # fmt: skip
        config = _options.config_of(parser.parse_args(words.split()))
        assert config == ranvier.SpikeConfig(**{field: value}) and config != default, words
    ternary = _options.config_of(parser.parse_args(["--weight-bits", "2", "--weight-grid", "ternary"]))
    assert ternary == ranvier.SpikeConfig(weight_bits=2, weight_grid="ternary")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_tensors_have_the_dtype_asked_for(models, dtype):
    model, _ = _options.load_model(argparse.Namespace(model=str(models / "plain"), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_wrong_options_are_one_line(capsys):
    assert "invalid choice: 'fly'" in mistake(capsys, "fly")
    assert "COMMAND" in mistake(capsys)
    assert "--text" in mistake(capsys, "eval", "model")
    none = ["--max-new-tokens", 0]
    assert "'0' is not a whole number of 1 or more" in mistake(capsys, "generate", "model", "--prompt", "x", *none)
    assert "--group-size" in mistake(capsys, "spike", "model", "out", "--group-size", 7)
    assert "SpikeConfig.act_bits is 9" in mistake(capsys, "spike", "model", "out", "--act-bits", 9)
    assert "SpikeConfig.salient is 1.5" in mistake(capsys, "spike", "model", "out", "--salient", 1.5)


def test_missing_files_are_one_line(models, capsys, tmp_path):
    assert "there is no file or folder" in mistake(capsys, "generate", tmp_path / "none", "--prompt", "x")
    text = tmp_path / "none.txt"
    assert f"{text}: No such file" in mistake(capsys, "eval", models / "plain", "--text", text)
    assert f"{text}: No such file" in mistake(capsys, "spike", models / "plain", tmp_path / "o", "--calibration", text)
    assert not (tmp_path / "o").exists()


def test_unreadable_input_is_one_line(models, capsys, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in mistake(capsys, "eval", models / "plain", "--text", tmp_path / "binary")
    (tmp_path / "short").write_text("the node")
    assert "2 tokens" in mistake(capsys, "eval", models / "plain", "--text", tmp_path / "short")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf" in mistake(capsys, "generate", tmp_path / "model.gguf", "--prompt", "x")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "ranvier.json").write_text("{")
    assert "ranvier.json is damaged" in mistake(capsys, "generate", broken, "--prompt", "x")
    assert "prompt is empty" in mistake(capsys, "generate", models / "plain", "--prompt", "")
    skip = ["--skip", "lm_head", "down_proj"]
    assert "nothing to convert" in mistake(capsys, "spike", models / "spiking", tmp_path / "o", *skip)


@pytest.mark.parametrize("place", ["/proc/ranvier-test", "file/model", "file", "full"])
def test_output_that_cannot_be_written_is_one_line_and_found_at_once(monkeypatch, capsys, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    monkeypatch.setattr("ranvier.cli.spike.load_model", lambda _: pytest.fail("the model was loaded first"))
    assert place in mistake(capsys, "spike", "model", tmp_path / place)


def test_a_method_that_does_not_exist_is_found_before_the_model_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("ranvier.cli.spike.load_model", lambda _: pytest.fail("the model was loaded first"))
    options = ["--pipeline", "omniquant", "--weight-bits", 2]
    assert "trains 4-bit weights" in mistake(capsys, "spike", "model", tmp_path / "o", *options)


def test_traceback_is_there_for_those_who_ask(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "generate", str(tmp_path / "none"), "--prompt", "x"])


def test_defects_are_not_dressed_up_as_mistakes(monkeypatch):
    def broken(_):
        raise AssertionError

    monkeypatch.setattr(COMMANDS["info"], "run", broken)
    with pytest.raises(AssertionError):
        main(["info"])


def test_interrupt_gives_130(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["info"], "run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err.strip() == "ranvier: interrupted"


def test_control_c_ends_the_process_with_130(tmp_path):
    text = tmp_path / "text"
    os.mkfifo(text)
    code = "import sys; from ranvier.cli import main; sys.exit(main(sys.argv[1:]))"
    start = [sys.executable, "-c", code, "eval", "model", "--text", str(text)]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as process:
        writer = _open_when_read(text, process)  # from here on the command waits for text that does not come
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        os.close(writer)
    assert process.returncode == 130 and err.strip() == "ranvier: interrupted"


def _open_when_read(pipe: Path, process: subprocess.Popen) -> int:
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody has opened the other end yet
            time.sleep(0.05)
    pytest.fail(f"the command ended: {process.stderr.read()}")


def test_every_command_has_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("info", "demo", "spike", "eval", "generate"))
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert "usage: ranvier " + name in capsys.readouterr().out
    assert main(["--version"]) == 0 and cli.USER_ERROR == 2
