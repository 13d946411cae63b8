"""What is shipped: the source archive builds a wheel that has all it needs, nothing else, and runs by itself."""

from __future__ import annotations

import email
import importlib
import json
import re
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
from compiled import ROOT, need_tools, run

import ranvier

# Runs one layer of the package found first on the path and says where it was found; the checkout is not on it.
LAYER = """
import importlib.metadata, sys
sys.path[:0] = sys.argv[1:]
import torch, ranvier, ranvier.kernels
from ranvier import SpikeConfig, _C
from ranvier.nn import SpikingLinear
layer = SpikingLinear.from_linear(torch.nn.Linear(96, 40), SpikeConfig(), torch.arange(96) % 10 == 0)
with torch.no_grad():
    y = layer(torch.randn(5, 96))
assert y.shape == (5, 40) and y.isfinite().all()
found = (ranvier.__file__, _C.__file__, *ranvier.kernels.__path__)
print(ranvier.__version__, importlib.metadata.version("ranvier"), *found)
"""


class Shipped(NamedTuple):
    sdist: Path
    wheel: Path

    def names(self) -> set[str]:
        """The files of the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def metadata(self) -> email.message.Message:
        """The wheel's METADATA."""
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """The source archive and the wheel built from it, as pip would, by what is installed here and without the network."""
    need_tools("cmake", "ninja")
    for module in ("build", "scikit_build_core", "pybind11"):
        pytest.importorskip(module, reason=f"{module} is needed to build a wheel and is not installed here")
    out, cmake = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("cmake")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, f"-Cbuild-dir={cmake}", ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Shipped(sdist, wheel)


@pytest.mark.slow
def test_sdist_has_the_sources(shipped: Shipped) -> None:
    """The archive has what a build and its tests read, and nothing that was built or downloaded."""
    with tarfile.open(shipped.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = ["CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "csrc/bindings.cpp", "pysrc/ranvier/__init__.py"]
    wanted += [str(p.relative_to(ROOT)) for folder in ("csrc", "kernels", "tests") for p in (ROOT / folder).rglob("*.[cph]*")]
    assert not [name for name in wanted if name not in names and "__pycache__" not in name]
    unwanted = re.compile(r"\.(so|o|a|pyc|gguf|safetensors)$|^(build|dist|\.venv|demo-output)/")
    assert not [name for name in names if unwanted.search(name)]


@pytest.mark.slow
def test_wheel_has_the_library_and_nothing_else(shipped: Shipped) -> None:
    """Every module, the compiled one, the kernels folder, py.typed and the licence; no C++ source, test or benchmark."""
    names = shipped.names()
    package = {str(p.relative_to(ROOT / "pysrc")) for p in (ROOT / "pysrc/ranvier").rglob("*.py")} | {"ranvier/py.typed"}
    kernels = {f"ranvier/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    compiled = {name for name in names if re.fullmatch(r"ranvier/_C\.[\w-]+\.so", name)}
    info = {name for name in names if re.match(r"ranvier-[\w.]+\.dist-info/", name)}
    assert len(compiled) == 1 and kernels and [name for name in info if name.endswith("licenses/LICENSE")]
    assert names - info - compiled == package | kernels


@pytest.mark.slow
def test_metadata(shipped: Shipped) -> None:
    """Name, version, licence, extras, and the least versions that are required at run time."""
    found = shipped.metadata()
    assert found["Name"] == "ranvier" and found["Version"] == ranvier.__version__
    assert found["License-Expression"] == "Apache-2.0" and found["Requires-Python"] == ">=3.10"
    required = {line for line in found.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"torch>=2.10", "numpy", "numba", "safetensors", "tqdm"}
    assert set(found.get_all("Provides-Extra")) == {"models", "eval", "plot", "demo", "test", "lint", "bench", "bench-peers"}


@pytest.mark.slow
def test_installed_wheel_runs_by_itself(shipped: Shipped, tmp_path: Path) -> None:
    """Installed into an empty folder and started elsewhere, it imports from there, runs a layer and has its command."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, shipped.wheel)
    # Without site no .pth file is read, so an editable install of the checkout cannot answer instead.
    packages = Path(numpy.__file__).parents[1]
    out = run(sys.executable, "-I", "-S", "-c", LAYER, target, packages, cwd=elsewhere).split()
    assert out[:2] == [ranvier.__version__] * 2 and len(out) == 5
    assert all(Path(path).is_relative_to(target / "ranvier") for path in out[2:])
    assert (target / "bin/ranvier").is_file()


def test_version_is_said_once() -> None:
    """The version of the module, of the metadata, of pyproject.toml and the CHANGELOG's first entry are one."""
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert ranvier.__version__ == metadata.version("ranvier") == declared == first


def test_editable_install_is_the_checkout() -> None:
    """An editable install runs the files of the checkout, kernels/ included."""
    origin = json.loads(metadata.distribution("ranvier").read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        pytest.skip(f"ranvier is not installed editable here but from {origin.get('url', 'an index')}")
    assert Path(ranvier.__file__) == ROOT / "pysrc/ranvier/__init__.py"
    assert ROOT / "kernels" in map(Path, importlib.import_module("ranvier.kernels").__path__)
