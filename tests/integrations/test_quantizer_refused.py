"""What transformers' ways in and out of a spiking model refuse, and that nothing is lost by it."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from folders import content, small_disk
from safetensors.torch import load_file, save_file
from tiny_lm import TEXT, logits, spiking_llama, tiny_llama, tiny_tokenizer

import ranvier
from ranvier.integrations import transformers as lm
from ranvier.integrations._conversion import check_calibration
from ranvier.methods.spikellm.evaluate import perplexity

pytest.importorskip("transformers")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _registered():
    lm.register()


def from_pretrained(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A spiking model of save_pretrained and a plain one, to be read only."""
    path = tmp_path_factory.mktemp("whole")
    lm.save_pretrained(spiking_llama(), path / "model", tiny_tokenizer())
    tiny_llama().save_pretrained(path / "plain")
    tiny_tokenizer().save_pretrained(path / "plain")
    return path


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """The spiking model, to be damaged."""
    return Path(shutil.copytree(whole / "model", tmp_path / "model"))


@pytest.fixture
def plain(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole / "plain", tmp_path / "plain"))


def edit(folder: Path, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))


# --- damaged folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=9), r"format_version 9; this ranvier reads 1.*: update ranvier"),
        (lambda q: q.pop("format_version"), r"format_version None"),
        (lambda q: q.pop("groups"), r"is damaged: no entry 'groups'"),
        (lambda q: q["configs"][0].update(act_bits=9), r"is damaged: SpikeConfig\.act_bits is 9"),
        (lambda q: q["layers"][0].update(config=3), r"refers to config 3 of 1"),
        (lambda q: q["layers"][0].update(name="model.nowhere"), r"'groups' names"),
        (lambda q: q["layers"][3].update(name="model.nowhere"), r"model\.nowhere is spiking, but \w+ has no such layer"),
        (lambda q: q["layers"][3].update(name="model.norm"), r"has a LlamaRMSNorm there"),
        (lambda q: q["layers"][3].update(in_features=32), r"o_proj is 32 -> 64; in LlamaForCausalLM it is 64 -> 64"),
        (lambda q: q["layers"][3].update(out_features=32), r"o_proj is 64 -> 32; in LlamaForCausalLM it is 64 -> 64"),
        (lambda q: q["layers"][3].update(salient_count=0), r"o_proj\.salient_mask marks 7 channels, config\.json says 0"),
        (lambda q: q["layers"][3].update(bias=None), r"o_proj has a bias"),
    ],
)
def test_changed_description_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        ranvier.load(folder)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_packed"), rf"lacks {Q}\.weight_packed"),
        (lambda t: t.pop(f"{Q}.bias"), rf"lacks {Q}\.bias"),
        (lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].half()}), r"weight_scale is F16 .*describes F32"),
        (lambda t: t.update({f"{Q}.weight_zero": t[f"{Q}.weight_zero"][:1].clone()}), r"weight_zero is U8 \[1, "),
        (lambda t: t[f"{Q}.salient_mask"].zero_(), rf"{Q}\.salient_mask marks 0 channels, config\.json says 7"),
    ],
)
def test_changed_tensors_are_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_missing_plain_weights_are_refused(folder):
    """transformers goes on with random ones."""
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    for way in (ranvier.load, lm.load_causal_lm):
        with pytest.raises(ValueError, match=r"files lack model\.norm\.weight"):
            way(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_truncated_and_unreadable_files_are_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for fault in ("truncated", "unreadable"):
        if fault == "unreadable":
            path.unlink()
            path.symlink_to(path)  # permissions do not stop root
        with pytest.raises(ValueError, match=f"(cannot read .*{folder.name})|(holds neither)"):
            lm.load_causal_lm(folder)


# --- conversion -------------------------------------------------------------------------------------------------------


def test_calibration_text_that_cannot_be_used(plain, tmp_path):
    def convert(path):
        return from_pretrained(plain, quantization_config=ranvier.SpikeConfig(calibration=str(path)))

    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):  # before the weights are read, too
        check_calibration(ranvier.SpikeConfig(), str(tmp_path / "nowhere"))
    (tmp_path / "bytes").write_bytes(b"the \xff node")
    with pytest.raises(ValueError, match=r"bytes is not UTF-8 text: .* at byte 4"):
        convert(tmp_path / "bytes")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="the text has no tokens"):
        convert(tmp_path / "empty")
    (tmp_path / "text").write_text(TEXT)
    (plain / "tokenizer.json").unlink()
    (plain / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no readable tokenizer .*; pass batches of ids"):
        convert(tmp_path / "text")


def test_description_of_one_model_does_not_convert_another(plain, folder):
    stored = from_pretrained(folder).config.quantization_config
    with pytest.raises(ValueError, match=r"pass a ranvier\.SpikeConfig"):
        from_pretrained(plain, quantization_config=stored)


def test_model_that_is_spiking_stays_as_its_folder_says(folder):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = from_pretrained(folder, quantization_config=ranvier.SpikeConfig(salient=0.5, calibration=[]))
    assert torch.equal(logits(model), logits(spiking_llama()))


def test_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of", "architectures": ["NeverLM"]}))
    with pytest.raises(ValueError, match="never_heard_of"):
        lm.load_causal_lm(tmp_path)


# --- tokenizers that do not match -------------------------------------------------------------------------------------


class Shifted:
    """A tokenizer of a larger vocabulary."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text, **_):
        ids = [30 + i for i in tiny_tokenizer()(text)["input_ids"]]
        return {"input_ids": torch.tensor([ids]) if _.get("return_tensors") else ids}


def test_ids_that_the_embedding_does_not_have():
    message = r"tokenizer does not match the model: it gives the id 43, and the embedding has 14 rows"
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), Shifted(), TEXT, window=16)
    with pytest.raises(ValueError, match=message):
        lm.generate(tiny_llama(), Shifted(), TEXT)


def test_folder_with_another_models_tokenizer(tmp_path, plain):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(plain)
    with pytest.raises(ValueError, match=r"does not match the model: it has 14 tokens, and the embedding 9 rows"):
        lm.load_causal_lm(plain)
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(ValueError, match=r"gives the id 13, and the embedding has 9 rows"):
        from_pretrained(plain, quantization_config=ranvier.SpikeConfig(calibration=tmp_path / "text"))
    ranvier.spike_(model, ranvier.SpikeConfig(salient=0.0))
    ranvier.save(model, tmp_path / "own", tiny_tokenizer())
    with pytest.raises(ValueError, match="14 tokens, and the embedding 9 rows"):
        lm.load_causal_lm(tmp_path / "own")


def test_text_shorter_than_a_window(plain):
    with pytest.raises(ValueError, match=r"the text has 3 tokens, not one window of 512"):
        perplexity(*lm.load_causal_lm(plain), "the node leap")


# --- a disk that fills ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 20000])
@pytest.mark.parametrize("save", [ranvier.save, lm.save_pretrained], ids=["own", "transformers"])
def test_full_disk_loses_nothing(tmp_path, save, size):
    save(spiking_llama(), tmp_path / "model", tiny_tokenizer())
    (tmp_path / "model" / "notes").write_text("mine")
    before = content(tmp_path)
    other = spiking_llama(salient=0.5)
    with small_disk(size), pytest.raises(OSError, match=r"cannot be written: .*File too large.*model"):
        save(other, tmp_path / "model", tiny_tokenizer())
    assert content(tmp_path) == before
    save(other, tmp_path / "model", tiny_tokenizer())
    assert torch.equal(logits(ranvier.load(tmp_path / "model")), logits(other))
    assert (tmp_path / "model" / "notes").read_text() == "mine"


def test_shards_of_an_older_save_go(tmp_path):
    lm.save_pretrained(spiking_llama(), tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*"))) > 2
    lm.save_pretrained(spiking_llama(), tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_folder_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(FileExistsError, match=r"not empty and has no config\.json"):
        lm.save_pretrained(spiking_llama(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"letter"}


# --- the hub ----------------------------------------------------------------------------------------------------------


class Gate(http.server.BaseHTTPRequestHandler):
    """A hub of which one model exists and is gated: its files want a login."""

    def answer(self, with_body: bool) -> None:
        if self.path.startswith("/api/models/some/model") and "/tree/" not in self.path:
            self.send_response(200)
            body = json.dumps({"id": "some/model", "sha": "0" * 40, "gated": "manual", "siblings": []}).encode()
        else:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to model some/model is restricted.")
            body = b"{}"
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(True)

    def do_HEAD(self) -> None:
        self.answer(False)

    def log_message(self, *_args) -> None:
        pass


def test_gated_model_is_named(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    surroundings = {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    run = [sys.executable, "-m", "ranvier", "generate", "some/model", "--prompt", "the"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=surroundings, cwd=tmp_path)
    server.shutdown()
    assert done.returncode == 2 and "gated" in done.stderr.lower() and "some/model" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
