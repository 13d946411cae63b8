"""What the ops' Triton backends share: a launch ready to run, and the tables of shapes of their kernels.

A table, kernels/configs/<op>.json, says for a device's name (else its architecture, else "default") and a kernel, in order:
{"when": {"m": 8, "n": 4096}, "use": {"tile": 64, ..., "num_warps": 4, "num_stages": 3}}. The first entry none of whose bounds
is passed is used; the last has no bounds. Nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: kernels/<stem>.py's kernel, its grid, its arguments by name, warps and stages.

    Contraction is off: a fused multiply-add is written where it is meant, as on the CPU.
    """

    stem: str
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Queues it on the current stream of its tensors' device."""
        if 0 in self.grid:
            return
        kernel = getattr(importlib.import_module(f"ranvier.kernels.{self.stem}"), self.kernel)
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[self.grid](**self.arguments, **self.options, enable_fp_fusion=False)


def run(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch.run()


def dot_instruction(device: torch.device) -> str:
    """Which four-channel dot product a kernel writes: "cuda", "hip", or "" for plain arithmetic."""
    if device.type != "cuda":
        return ""
    return "hip" if torch.version.hip else "cuda"


def aligned(tensor: Tensor | None, size: int = 16) -> Tensor | None:
    """Contiguous, at an address that is a multiple of ``size``."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % size == 0 else tensor.clone()


@lru_cache
def device_names(device: torch.device) -> tuple[str, ...]:
    """The keys of a launch table that a device may have, the closest first."""
    if device.type != "cuda":
        return ("default",)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.name, properties.gcnArchName.split(":")[0], "default"
    return properties.name, f"sm_{properties.major}{properties.minor}", "default"


def configs_folder() -> Path:
    """Where the launch tables lie."""
    spec = importlib.util.find_spec("ranvier.kernels")
    places = [Path(p) / "configs" for p in (spec.submodule_search_locations or ())] if spec else []
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"ranvier has no launch tables; looked in {', '.join(map(str, places)) or 'no folder'}; reinstall it"
    )


@lru_cache
def launch_table(stem: str) -> dict:
    """The table of an op's kernels. Raises ValueError, naming the place, for one that is malformed."""
    path = configs_folder() / f"{stem}.json"
    return check_table(path.name, json.loads(path.read_text()))


def check_table(name: str, table: Any) -> dict:
    """The table itself. Raises ValueError that names the entry for anything that :func:`configuration` could stumble on."""
    if not isinstance(table, dict) or "default" not in table:
        raise ValueError(f'{name}: a launch table maps device names to kernels and has a "default"')
    for device, kernels in table.items():
        if not isinstance(kernels, dict) or not kernels:
            raise ValueError(f"{name}: {device}: expected kernels and their entries")
        if extra := kernels.keys() - table["default"].keys():
            raise ValueError(f'{name}: {device}: kernel {sorted(extra)[0]} is not in "default"')
        for kernel, entries in kernels.items():
            _check_entries(f"{name}: {device}: {kernel}", entries, table["default"][kernel])
    return table


def _check_entries(where: str, entries: Any, default: Any) -> None:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}: expected a list of entries")
    for index, entry in enumerate(entries):
        at = f"{where}[{index}]"
        if not isinstance(entry, dict) or entry.keys() != {"when", "use"}:
            raise ValueError(f'{at}: an entry has "when" and "use" and nothing else')
        when, use = entry["when"], entry["use"]
        for part in (when, use):
            if not isinstance(part, dict) or not all(type(v) is int and v > 0 for v in part.values()):
                raise ValueError(f"{at}: {part!r} must map names to positive whole numbers")
        if use.keys() != default[0]["use"].keys() or not use.keys() >= set(OPTIONS):
            raise ValueError(f'{at}: "use" names {sorted(use)}; every entry names {sorted(default[0]["use"])}')
        if any(v & (v - 1) for k, v in use.items() if k != "num_stages"):
            raise ValueError(f"{at}: {use} has a size that is no power of two")
        if bool(when) == (index == len(entries) - 1):
            raise ValueError(f"{at}: the last entry, and no other, has no bounds")


def configuration(stem: str, kernel: str, device: torch.device, **sizes: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constants, options) of a kernel for these sizes on this device.

    Raises ValueError for a table that is malformed or bounds a size that the op does not have.
    """
    table = launch_table(stem)
    entries = next(table[name][kernel] for name in device_names(device) if kernel in table.get(name, ()))
    for entry in entries:
        if unknown := entry["when"].keys() - sizes.keys():
            raise ValueError(f"{stem}.json: {kernel}: there is no size {sorted(unknown)[0]}; the sizes are {sorted(sizes)}")
        if all(sizes[name] <= bound for name, bound in entry["when"].items()):
            use = dict(entry["use"])
            return use, {name: use.pop(name) for name in OPTIONS}
    raise ValueError(f"{stem}.json: {kernel}: no entry for {sizes}")
