"""The files of a streamed conversion: the tensors of its source, and the work folder that an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ranvier.integrations._manifest import CONFIG
from ranvier.integrations._staging import naming

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROGRESS = "progress.json"


class Shards:
    """The tensors of a transformers folder, read one at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.folder, self.dtype = folder, dtype
        if not (folder / CONFIG).is_file():
            raise ValueError(f"convert_folder: {folder} has no {CONFIG}; pass a transformers folder with safetensors")
        try:
            if (folder / INDEX).is_file():
                files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            elif (folder / SINGLE).is_file():
                with safe_open(folder / SINGLE, framework="pt") as file:
                    files = dict.fromkeys(file.keys(), SINGLE)
            else:
                raise ValueError(f"neither {SINGLE} nor {INDEX} is there")
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            raise ValueError(f"convert_folder: {folder} holds no readable safetensors: {error}") from error
        self.files: dict[str, str] = dict(files)

    def read(self, name: str) -> Tensor:
        """One tensor, copied out of its shard, in the wanted dtype."""
        try:
            with safe_open(self.folder / self.files[name], framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"convert_folder: {self.folder / self.files[name]} cannot be read: {error}") from error
        wanted = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(wanted, copy=True)


class Work:
    """The work folder: what is done, block files, hidden states. progress.json is replaced as the last step of each block."""

    def __init__(self, folder: Path, key: str, resume: bool) -> None:
        self.folder, self.state = folder, {"key": key, "blocks": []}
        path = folder / PROGRESS
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = {}
            if resume and found.get("key") == key:
                self.state = found
                return
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """A record for each block that is done."""
        return self.state["blocks"]

    def _write(self) -> None:
        stage = self.folder / f"{PROGRESS}.new"
        with stage.open("w", encoding="utf-8") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, self.folder / PROGRESS)

    def block_path(self, index: int) -> Path:
        """Where the tensors of a converted block lie."""
        return self.folder / f"block-{index:05}.safetensors"

    def _streams_path(self, count: int) -> Path:
        return self.folder / f"hidden-{count:05}.safetensors"

    def streams(self) -> dict[str, Tensor]:
        """The hidden states behind the blocks that are done."""
        return load_file(self._streams_path(len(self.blocks)))

    def add(self, record: dict[str, Any], tensors: dict[str, Tensor], streams: dict[str, Tensor]) -> None:
        """Another block is done. Raises OSError naming the folder where it cannot be written."""
        with naming(self.folder):
            self._add(record, tensors, streams)

    def _add(self, record: dict[str, Any], tensors: dict[str, Tensor], streams: dict[str, Tensor]) -> None:
        index = len(self.blocks)
        for path, content in ((self.block_path(index), tensors), (self._streams_path(index + 1), streams)):
            stage = path.with_suffix(".new")
            save_file(content, stage)
            with stage.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(stage, path)
        self.state = {**self.state, "blocks": [*self.blocks, record]}
        self._write()
        self._streams_path(index).unlink(missing_ok=True)

    def remove(self) -> None:
        """Everything is in the target."""
        shutil.rmtree(self.folder, ignore_errors=True)
