"""The house is in order: one stem in all its places, kernels that hide nobody's package, short files, oracles named."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiled import ROOT, run

import ranvier
import ranvier.ops  # declares every op
from ranvier.ops._declare import OPS

PLACES = ("reference", "csrc", "kernels", "ops", "nn", "tests", "benchmarks")
# Ops without a place share the stem of the family they belong to.
STEMS = {name: op.places for name, op in OPS.items() if op.places}

# What lies among the ops' files and is no op's, each with its reason. Names with a leading underscore are private helpers.
OTHERS = {
    "csrc/core": "instruction sets, threads and conversions, shared by all ops",
    "csrc/machine": "the limits that benchmarks measure kernels by; not an op",
    "csrc/tests": "the C++ tests",
    "kernels/configs": "launch tables of the Triton kernels",
    "benchmarks/gpu.py": "every Triton kernel on one GPU",
    "kernels/README.md": "what the folder is for",
    "tests/ops/test_dispatch.py": "the mechanism of ops/_declare.py, by all ops",
    "tests/nn/test_spike_group.py": "layers that share one encoding: a class of nn/spike_linear.py",
    "tests/nn/test_spike_quantized.py": "a further way to make a module of nn/spike_linear.py",
    "pysrc/ranvier/nn/int8_linear.py": "a further module over ops/spike_linear.py: 8-bit weights as two 4-bit planes",
    "tests/nn/test_int8_linear.py": "its tests",
    "benchmarks/smollm2.py": "a whole model",
    "benchmarks/stories.py": "weight-only error of the pipelines on a model whose weights are float32",
    "benchmarks/spikellm.py": "the method: what its pipelines and settings cost in perplexity",
    "benchmarks/stream_memory.py": "the memory of a streamed conversion",
    "benchmarks/peers": "what a user would pick instead",
    "benchmarks/results": "measured results worth keeping",
    "benchmarks/README.md": "how figures are made",
}
ORACLES = set(range(1, 23))


def expected(stem: str, places: tuple[str, ...]) -> Iterator[str]:
    """The files of an op that has these places."""
    for place in places:
        if place == "csrc":
            yield from (f"csrc/{stem}/{stem}.h", f"csrc/{stem}/{stem}_scalar.cpp", f"csrc/tests/{stem}_test.cpp")
        elif place == "tests":
            yield f"tests/ops/test_{stem}.py"
            if "nn" in places:
                yield f"tests/nn/test_{stem}.py"
        else:
            yield f"{place}/{stem}.py" if place in ("kernels", "benchmarks") else f"pysrc/ranvier/{place}/{stem}.py"


def strays(root: Path, stems: dict[str, tuple[str, ...]]) -> list[str]:
    """Files and folders among the ops' that belong to no op or to one that does not declare this place."""
    folders = {
        "csrc": "csrc", "kernels": "kernels", "benchmarks": "benchmarks", "tests/ops": "tests", "tests/nn": "nn",
        **{f"pysrc/ranvier/{place}": place for place in ("reference", "ops", "nn")},
    }  # fmt: skip
    found = []
    for folder, place in folders.items():
        for path in sorted((root / folder).iterdir()):
            name, stem = f"{folder}/{path.name}", path.stem.removeprefix("test_")
            if name in OTHERS or path.name.startswith(("_", ".")) or name == "csrc/bindings.cpp":
                continue
            if place not in stems.get(stem, ()) or (place == "csrc") != path.is_dir():
                found.append(name)
    return found


@pytest.mark.parametrize("name", sorted(OPS))
def test_declared_places_exist(name: str) -> None:
    """Every place that an op declares has its file, and a csrc folder at least one fast path."""
    places = OPS[name].places
    assert set(places) <= set(PLACES) and len(set(places)) == len(places)
    missing = [path for path in expected(name, places) if not (ROOT / path).is_file()]
    assert not missing, f"{name} declares {places}; there is no {', '.join(missing)}"
    if "csrc" in places:
        assert list((ROOT / "csrc" / name).glob(f"{name}_avx*.cpp"))
    if not places:
        assert any(name.startswith(f"{stem}_") for stem in STEMS), f"{name} has no place and shares no op's stem"
    else:
        assert {"reference", "ops", "tests"} <= set(places)
        shared = OPS[name].kernels_of
        assert not shared or ("kernels" in STEMS[shared] and "kernels" not in places)
        assert ("kernels" in places or bool(shared)) == ("triton" in OPS[name].implementations)


def test_no_undeclared_place_exists() -> None:
    """No file lies among the ops' whose op does not declare it or is none."""
    found = strays(ROOT, STEMS)
    assert not found, f"declare these places, or say in OTHERS what they are: {', '.join(found)}"


def test_every_exception_is_still_needed() -> None:
    """The list of exceptions names what exists, but for the folders that measuring fills."""
    later = {"kernels/configs", "benchmarks/results"}
    assert not [name for name in OTHERS if name not in later and not (ROOT / name).exists()]


def test_a_stray_file_is_seen(tmp_path: Path) -> None:
    """The walk finds an op's undeclared file, a file of no op and a loose C++ source."""
    for folder in ("csrc/known", "kernels", "benchmarks", "tests/ops", "tests/nn", *(f"pysrc/ranvier/{p}" for p in PLACES)):
        (tmp_path / folder).mkdir(parents=True)
    stray = ["csrc/loose.cpp", "kernels/known.py", "benchmarks/new.py", "pysrc/ranvier/nn/known.py", "tests/ops/test_new.py"]
    for name in (*stray, "pysrc/ranvier/ops/known.py", "tests/ops/test_known.py", "pysrc/ranvier/ops/_private.py"):
        (tmp_path / name).touch()
    assert sorted(strays(tmp_path, {"known": ("csrc", "ops", "tests")})) == sorted(stray)


# --- kernels/ ---------------------------------------------------------------------------------------------------------


def test_kernels_is_a_namespace_of_ranvier() -> None:
    """kernels/ has no __init__.py and is imported as ranvier.kernels."""
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    kernels = importlib.import_module("ranvier.kernels")
    assert getattr(kernels, "__file__", None) is None
    for path in (ROOT / "kernels").glob("*.py"):
        importlib.import_module(f"ranvier.kernels.{path.stem}")


def test_checkout_hides_no_package_called_kernels(tmp_path: Path) -> None:
    """Python started in the checkout imports the installed package of that name, not our folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("NAME = 'the hub package'")
    code = "import kernels, ranvier.kernels; print(kernels.NAME, kernels.__file__); assert kernels is not ranvier.kernels"
    out = run(sys.executable, "-c", code, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert out.strip() == f"the hub package {tmp_path / 'kernels' / '__init__.py'}"


# --- text -------------------------------------------------------------------------------------------------------------


def public_names() -> Iterator[tuple[str, object]]:
    """Everything that a module of the library exports by __all__, and the public methods of the library's classes."""
    modules = ["ranvier", *(m.name for m in pkgutil.walk_packages(ranvier.__path__, "ranvier.") if "kernels" not in m.name)]
    for module in map(importlib.import_module, (m for m in modules if m.startswith("ranvier"))):
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            yield f"{module.__name__}.{name}", thing
            if inspect.isclass(thing) and thing.__module__.startswith("ranvier"):
                methods = {k: v for k, v in vars(thing).items() if not k.startswith("_")}
                for key, value in methods.items():
                    if inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod):
                        yield f"{module.__name__}.{name}.{key}", getattr(thing, key)


def has_docstring(thing: object) -> bool:
    """A docstring somebody wrote: not the signature that dataclass and NamedTuple put in its place."""
    text = inspect.getdoc(thing) or ""
    return bool(text) and not (inspect.isclass(thing) and text.startswith(f"{thing.__name__}("))


def test_exported_names_have_docstrings() -> None:
    """Every module, function, class and method that is exported says what it is."""
    names = dict(public_names())
    assert {"ranvier.SpikeConfig", "ranvier.nn.SpikingLinear.from_linear", "ranvier.ops.spike_linear"} <= names.keys()
    assert not [name for name, thing in names.items() if not has_docstring(thing)]


def test_files_are_short() -> None:
    """No file has 500 lines: a longer one has two subjects."""
    sources = [p for folder in ("pysrc", "kernels", "csrc", "tests", "benchmarks") for p in (ROOT / folder).rglob("*")]
    sources = [p for p in sources if p.suffix in (".py", ".cpp", ".h")]
    assert len(sources) > 50
    assert not [str(p.relative_to(ROOT)) for p in sources if len(p.read_text().splitlines()) >= 500]


def test_every_oracle_is_named_by_a_test() -> None:
    """Each oracle of the method that is due is named by a test that proves it."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    named = {int(n) for line in re.findall(r"# spec spikellm((?:[ ,]+O\d+)+)", text) for n in re.findall(r"\d+", line)}
    assert not ORACLES - named, f"no test names oracle {sorted(ORACLES - named)}"
