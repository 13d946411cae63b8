"""Launch tables: what is shipped is well formed, what is malformed is refused with its place, the closest entry is chosen."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from ranvier.ops import _triton
from ranvier.ops._triton import check_table, configs_folder, configuration, launch_table

CPU = torch.device("cpu")
ENTRY = {"when": {"m": 8}, "use": {"tile": 32, "num_warps": 4, "num_stages": 3}}
LAST = {"when": {}, "use": {"tile": 64, "num_warps": 8, "num_stages": 3}}
GOOD = {"default": {"gemv": [ENTRY, LAST]}, "sm_90": {"gemv": [LAST]}}


def test_shipped_tables_are_well_formed() -> None:
    """Every file of the folder passes its check and belongs to a kernel file."""
    paths = sorted(configs_folder().glob("*.json"))
    assert len(paths) >= 2
    for path in paths:
        assert "default" in launch_table(path.stem) and (configs_folder().parent / f"{path.stem}.py").is_file()


def broken(change: str) -> object:
    table = copy.deepcopy(GOOD)
    entries = table["default"]["gemv"]
    match change:
        case "list":
            return [table]
        case "no default":
            del table["default"]
        case "no kernels":
            table["sm_90"] = {}
        case "unknown kernel":
            table["sm_90"]["other"] = [LAST]
        case "no entries":
            entries.clear()
        case "third key":
            entries[0]["why"] = 1
        case "text":
            entries[0]["use"]["tile"] = "32"
        case "zero":
            entries[0]["use"]["tile"] = 0
        case "truth":
            entries[0]["use"]["tile"] = True
        case "three":
            entries[0]["use"]["tile"] = 3
        case "missing size":
            del entries[1]["use"]["tile"]
        case "no warps":
            entries[0]["use"].pop("num_warps"), entries[1]["use"].pop("num_warps")
        case "bounded last":
            entries[1]["when"] = {"m": 9}
        case "free first":
            entries[0]["when"] = {}
    return table  # fmt: skip


@pytest.mark.parametrize(
    "change",
    ["list", "no default", "no kernels", "unknown kernel", "no entries", "third key", "text", "zero", "truth", "three",
     "missing size", "no warps", "bounded last", "free first"],
)  # fmt: skip
def test_malformed_tables_are_refused(change: str) -> None:
    """Each mistake raises ValueError that begins with the file's name."""
    assert check_table("x.json", GOOD) is GOOD
    with pytest.raises(ValueError, match=r"^x\.json: "):
        check_table("x.json", broken(change))


def test_the_first_entry_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's own table comes before the default; bounds are upper bounds, inclusive; an unknown size is refused."""
    (tmp_path / "some.json").write_text(json.dumps(GOOD))
    (tmp_path / "odd.json").write_text(json.dumps({"default": {"gemv": [{**ENTRY, "when": {"q": 1}}, LAST]}}))
    monkeypatch.setattr(_triton, "configs_folder", lambda: tmp_path)
    launch_table.cache_clear()
    assert configuration("some", "gemv", CPU, m=8) == ({"tile": 32}, {"num_warps": 4, "num_stages": 3})
    assert configuration("some", "gemv", CPU, m=9)[0] == {"tile": 64}
    monkeypatch.setattr(_triton, "device_names", lambda device: ("NVIDIA H200", "sm_90", "default"))
    assert configuration("some", "gemv", CPU, m=8)[0] == {"tile": 64}
    with pytest.raises(ValueError, match="there is no size q"):
        configuration("odd", "gemv", CPU, m=8)
    launch_table.cache_clear()
