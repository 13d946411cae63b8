"""convert_folder: the bytes of the in-memory conversion, also after a kill; what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import content, small_disk
from tiny_lm import TEXT, WORDS, logits, tiny_llama, tiny_tokenizer, token_batch
from torch import Tensor

import ranvier
from ranvier import SpikeConfig
from ranvier.integrations.stream import convert_folder

CONFIGS = {
    "rtn": SpikeConfig(),
    "gptq": SpikeConfig(pipeline="gptq", span="separate", group_size=32),
    "weight-only": SpikeConfig(pipeline="gptq", act_bits=None),
    "head": SpikeConfig(skip=()),
    "head + gptq": SpikeConfig(pipeline="gptq", rotate=True, skip=()),
    "rotate": SpikeConfig(rotate=True),
    "rotate + gptq": SpikeConfig(pipeline="gptq", rotate=True, skip=("lm_head", "up_proj")),
}


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """The models are tiny: further threads would only wait for each other."""
    torch.set_num_threads(1)


def batches() -> list[Any]:
    """Of three lengths, and one that is padded."""
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[:, :9] = 0
    padded = {"input_ids": token_batch(24, seed=4), "attention_mask": mask}
    return [token_batch(32, seed=1), token_batch(7, seed=2), token_batch(64, seed=3), padded]


def work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.ranvier-work"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as transformers writes it, in several shards."""
    tiny_llama().save_pretrained(tmp_path / "source", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def in_memory(source: Path, target: Path, config: SpikeConfig, dtype: torch.dtype | None = None, seed: int = 0) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto").eval()
    ranvier.spike_(model, config, batches(), seed=seed)
    ranvier.save(model, target, tiny_tokenizer())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bytes_as_in_memory(tmp_path: Path, source: Path, name: str) -> None:
    """Every file equals that of load, spike_, save; the report too; no work folder is left."""
    assert len(list(source.glob("*.safetensors"))) > 2
    report = convert_folder(source, tmp_path / "streamed", CONFIGS[name], batches(), tokenizer=tiny_tokenizer())
    in_memory(source, tmp_path / "whole", CONFIGS[name])
    assert content(tmp_path / "streamed") == content(tmp_path / "whole")
    assert not work_of(tmp_path / "streamed").exists()
    again = tiny_llama()
    assert report.to_dict() == ranvier.spike_(again, CONFIGS[name], batches()).to_dict()
    assert torch.equal(logits(ranvier.load(tmp_path / "streamed")), logits(again))


def test_untied_and_in_another_dtype(tmp_path: Path) -> None:
    """A head of its own, and a source in float32 converted in bfloat16."""
    tiny_llama(tied=False).save_pretrained(tmp_path / "source")
    config = SpikeConfig(pipeline="gptq")
    convert_folder(tmp_path / "source", tmp_path / "one", config, batches(), tokenizer=tiny_tokenizer(), dtype=torch.bfloat16)
    in_memory(tmp_path / "source", tmp_path / "other", config, torch.bfloat16)
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_rotated_with_layer_norms_and_positions(tmp_path: Path) -> None:
    """OPT: a rotation that keeps the mean, two embeddings, biases, a head that was tied."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(4)
    sizes = {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 96, "num_hidden_layers": 2, "vocab_size": len(WORDS)}
    OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).save_pretrained(tmp_path / "source")
    config = SpikeConfig(rotate=True)
    convert_folder(tmp_path / "source", tmp_path / "one", config, batches(), tokenizer=tiny_tokenizer(), seed=3)
    in_memory(tmp_path / "source", tmp_path / "other", config, seed=3)
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_a_rotation_that_changes_a_block_is_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that does more with the stream than its parts say gives other hidden states; nothing is written."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    real = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, hidden_states, **more: real(self, hidden_states, **more).abs()
    )
    with pytest.raises(ValueError, match="hidden states behind block 0 changed"):
        convert_folder(source, tmp_path / "target", SpikeConfig(rotate=True), batches())
    assert not (tmp_path / "target").exists()


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_stream import deep_batches
from ranvier import SpikeConfig
from ranvier.integrations.stream import convert_folder
convert_folder(sys.argv[2], sys.argv[3], SpikeConfig(pipeline="gptq", rotate=sys.argv[4] == "rotate"), deep_batches())
"""


def deep_batches() -> list[Tensor]:
    return [token_batch(128, seed=s) for s in range(8)]


def deep_source(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "vocab_size": 14}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rotate", [False, True])
def test_killed_in_the_middle_it_resumes_to_the_same_bytes(tmp_path: Path, rotate: bool) -> None:
    """SIGKILL after two blocks: the target is not there; the next run keeps those blocks and ends with the same bytes."""
    config = SpikeConfig(pipeline="gptq", rotate=rotate)
    source, target = deep_source(tmp_path / "source"), tmp_path / "target"
    progress = work_of(target) / "progress.json"
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(source), str(target), "rotate" if rotate else ""]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"})
    try:
        while process.poll() is None and (not progress.is_file() or len(json.loads(progress.read_text())["blocks"]) < 2):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not target.exists()
    done = len(json.loads(progress.read_text())["blocks"])
    assert 2 <= done < 8
    first = work_of(target) / "block-00000.safetensors"
    stamp = first.stat().st_mtime_ns
    kept: list[int] = []
    real = ranvier.integrations.folder.save

    def save(*arguments: object) -> None:
        kept.append(first.stat().st_mtime_ns)
        real(*arguments)

    ranvier.integrations.folder.save = save
    try:
        convert_folder(source, target, config, deep_batches())
    finally:
        ranvier.integrations.folder.save = real
    assert kept == [stamp]
    convert_folder(source, tmp_path / "straight", config, deep_batches())
    assert content(target) == content(tmp_path / "straight")


def test_omniquant_interrupted_between_blocks_is_what_it_is_in_memory(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its targets, the stream without quantization, are taken up too; the seed reaches the order of the steps."""
    from ranvier.integrations import stream

    config, real = SpikeConfig(pipeline="omniquant"), stream.Work.add

    def add(self: object, *arguments: object) -> None:
        real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(stream.Work, "add", add)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(source, tmp_path / "one", config, batches(), tokenizer=tiny_tokenizer(), seed=3)
    monkeypatch.undo()
    convert_folder(source, tmp_path / "one", config, batches(), tokenizer=tiny_tokenizer(), seed=3)
    in_memory(source, tmp_path / "other", config, seed=3)
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_a_folder_of_another_kind_is_left_before_anything_is_read(tmp_path: Path) -> None:
    """Nothing of the user's is replaced, and the source does not even have to be there."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.tex").touch()
    with pytest.raises((ValueError, OSError), match="target"):
        convert_folder(tmp_path / "nowhere", tmp_path / "target", SpikeConfig(), batches())
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "thesis.tex"]


def test_work_of_something_else_is_not_taken_over(tmp_path: Path, source: Path) -> None:
    """Another config, calibration, seed or source, a damaged record, or resume=False begins anew."""
    from ranvier.integrations import stream

    keys = {
        stream._key(source, config, given, seed, None)
        for config, given, seed in (
            (SpikeConfig(), batches(), 0),
            (SpikeConfig(steps=4), batches(), 0),
            (SpikeConfig(), batches()[:2], 0),
            (SpikeConfig(), batches(), 1),
        )
    }
    shard = next(iter(sorted(source.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert len(keys | {stream._key(source, SpikeConfig(), batches(), 0, None)}) == 5
    folder = tmp_path / "work"
    stream.Work(folder, "one", True).add({"layers": [], "tokens": 1}, {"a": torch.ones(1)}, {"hidden.0": torch.ones(1)})
    assert len(stream.Work(folder, "one", True).blocks) == 1
    assert not stream.Work(folder, "two", True).blocks
    assert not stream.Work(folder, "two", False).blocks and not folder.joinpath("block-00000.safetensors").exists()
    stream.Work(folder, "two", True).add({"layers": [], "tokens": 1}, {"a": torch.ones(1)}, {"hidden.0": torch.ones(1)})
    work = stream.Work(folder, "two", True)
    work.add({"layers": [], "tokens": 1}, {"a": torch.ones(1)}, {"hidden.0": torch.ones(1)})
    assert len(list(folder.glob("hidden-*"))) == 1 and len(list(folder.glob("block-*"))) == 2  # one set of states is kept
    assert not stream.Work(folder, "two", False).blocks
    (folder / "progress.json").write_text("{")
    assert not stream.Work(folder, "two", True).blocks


def test_refused(tmp_path: Path, source: Path) -> None:
    """What cannot be streamed is named; nothing appears at the target."""
    target = tmp_path / "target"
    (tmp_path / "empty").mkdir()
    cases = [
        ((tmp_path / "empty", SpikeConfig(), batches()), "has no config.json"),
        ((source, SpikeConfig(pipeline="omniquant", skip=()), batches()), "lm_head lies in no block"),
        ((source, SpikeConfig(), None), "pass calibration batches"),
        ((source, SpikeConfig(), []), "calibration set is empty"),
        ((source, SpikeConfig(group_size=128), batches()), "not a multiple of group_size"),
    ]
    for (folder, config, given), words in cases:
        with pytest.raises(ValueError, match=words):
            convert_folder(folder, target, config, given)
    described = (source / "config.json").read_text()
    (source / "config.json").write_text(described.replace('"intermediate_size": 96', '"intermediate_size": 128'))
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight is \[\d+, \d+\], the model's \[\d+, \d+\]"):
        convert_folder(source, target, SpikeConfig(), batches())
    (source / "config.json").write_text(described)
    shard = sorted(source.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="safetensors"):
        convert_folder(source, target, SpikeConfig(), batches())
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="no readable safetensors"):
        convert_folder(source, target, SpikeConfig(), batches())
    assert not target.exists()
    with pytest.raises(TypeError, match="pass an iterable"):
        convert_folder(source, target, SpikeConfig(), TEXT)


@pytest.mark.parametrize("size", [2000, 20000])
def test_full_disk_loses_nothing(tmp_path: Path, source: Path, size: int) -> None:
    """While blocks are written or at the end: an OSError that names the folder; what is there stays, what was done is kept."""
    batches, target = [token_batch(32, seed=1)], tmp_path / "out"
    convert_folder(source, target, SpikeConfig(steps=4), batches)
    before = content(target)
    with small_disk(size), pytest.raises(OSError, match=r"the folder cannot be written: File too large.*out"):
        convert_folder(source, target, SpikeConfig(), batches)
    assert content(target) == before
    convert_folder(source, target, SpikeConfig(), batches)
    wanted = tmp_path / "wanted"
    convert_folder(source, wanted, SpikeConfig(), batches)
    assert content(target) == content(wanted)


def test_text_of_the_config_is_cut_by_the_sources_tokenizer(tmp_path: Path, source: Path) -> None:
    """config.calibration may be the path of a text; the layers keep a config without it."""
    (tmp_path / "text.txt").write_text(TEXT)
    config = SpikeConfig(pipeline="gptq", calibration=tmp_path / "text.txt")
    convert_folder(source, tmp_path / "one", config, tokenizer=tiny_tokenizer())
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
    convert_folder(source, tmp_path / "other", SpikeConfig(pipeline="gptq"), ids.split(512, 1), tokenizer=tiny_tokenizer())
    assert content(tmp_path / "one") == content(tmp_path / "other")
    assert ranvier.load(tmp_path / "one").model.layers[0].mlp.up_proj.config.calibration is None
