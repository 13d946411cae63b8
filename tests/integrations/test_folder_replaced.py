"""ranvier.save replaces a folder whole or not at all."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import MANIFEST, TENSORS, Block, content, same, spiking_block, state
from tiny_lm import spiking_llama, tiny_tokenizer

import ranvier
from ranvier.integrations import _staging, folder

pytest.importorskip("transformers")


class Tokenizer:
    """A tokenizer whose saving does what the test wants."""

    def __init__(self, action) -> None:
        self.action = action

    def save_pretrained(self, path) -> None:
        (Path(path) / "tokenizer.json").write_text("{}")
        self.action()


def fail(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["tensors", "tokenizer", "sync", "swap"])
def test_failed_save_leaves_the_old_folder(copied, monkeypatch, where, error):
    before, tokenizer = content(copied), None
    if where == "tensors":
        monkeypatch.setattr(folder, "save_file", lambda *_args, **_kwargs: fail(error)())
    elif where == "tokenizer":
        tokenizer = Tokenizer(fail(error))
    elif where == "sync":
        monkeypatch.setattr(_staging.os, "fsync", lambda _: fail(error)())
    else:
        monkeypatch.setattr(_staging, "_exchange", lambda *_: fail(error)())
    with pytest.raises(type(error)):
        ranvier.save(spiking_llama(tied=True), copied, tokenizer)
    assert content(copied) == before
    assert [item.name for item in copied.parent.iterdir()] == [copied.name]


def test_failed_first_save_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space"):
        ranvier.save(spiking_llama(), tmp_path / "new", Tokenizer(fail(OSError(errno.ENOSPC, "No space left"))))
    assert not any(tmp_path.iterdir())


def test_killed_save_leaves_the_old_folder(copied):
    before = content(copied)
    script = (
        "import os, signal, sys, torch, ranvier\n"
        "class Killer:\n"
        "    def save_pretrained(self, path):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "layer = ranvier.nn.SpikingLinear.from_linear(torch.nn.Linear(8, 8))\n"
        "ranvier.save(torch.nn.Sequential(layer), sys.argv[1], Killer())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, copied], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert content(copied) == before
    ranvier.load(copied)


@pytest.mark.parametrize("exchange", [True, False])
def test_save_over_a_folder_keeps_foreign_files(copied, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_staging, "_exchange", lambda *_: False)
    (copied / "notes.txt").write_text("mine")
    (copied / "runs").mkdir()
    (copied / "runs" / "one.csv").write_text("1")
    model = spiking_block()
    ranvier.save(model, copied, Tokenizer(lambda: None))
    # The files of the old model go with it, the rest stays, and nothing is left beside the folder.
    assert set(content(copied)) == {MANIFEST, TENSORS, "tokenizer.json", "notes.txt", "runs/one.csv"}
    assert (copied / "notes.txt").read_text() == "mine"
    assert [item.name for item in copied.parent.iterdir()] == [copied.name]
    assert torch.equal(ranvier.load(copied, Block()).first.weight_packed, model.first.weight_packed)


def test_second_rename_that_fails_puts_the_old_folder_back(copied, monkeypatch):
    monkeypatch.setattr(_staging, "_exchange", lambda *_: False)
    before, real = content(copied), os.rename

    def rename(source, target):
        if Path(target) == copied and not str(source).endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(_staging.os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        ranvier.save(spiking_llama(), copied)
    assert content(copied) == before
    assert [item.name for item in copied.parent.iterdir()] == [copied.name]


def test_exchange_of_the_system_swaps_folders(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not _staging._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange two folders")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()


def test_save_takes_new_empty_and_linked_folders(tmp_path):
    model = spiking_block()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("a/b/new", "empty", "link", "a/b/new"):
        ranvier.save(model, tmp_path / name)
        ranvier.load(tmp_path / name, Block())
    assert (tmp_path / "link").is_symlink()
    # Readable for whom the umask lets read.
    assert (tmp_path / "empty" / TENSORS).stat().st_mode == (tmp_path / "empty" / MANIFEST).stat().st_mode


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(FileExistsError, match=r"not empty and has no ranvier\.json"):
        ranvier.save(spiking_block(), tmp_path)
    with pytest.raises(NotADirectoryError, match="this is a file"):
        ranvier.save(spiking_block(), tmp_path / "thesis.tex")
    assert content(tmp_path) == {"thesis.tex": b"ten years"}


@pytest.mark.parametrize("place", ["/proc/ranvier-test/model", "file/model"])
def test_place_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="model"):
        ranvier.save(spiking_block(), tmp_path / place)
    with pytest.raises(OSError, match="model"):
        folder.check_folder(tmp_path / place)


def test_saving_does_not_change_the_model(tmp_path):
    model = spiking_llama(tied=True)
    before, config = state(model), copy.deepcopy(model.config.to_dict())
    ranvier.save(model, tmp_path / "model", tiny_tokenizer())
    assert same(state(model), before) and model.config.to_dict() == config
    assert (tmp_path / "model" / "tokenizer.json").is_file()
