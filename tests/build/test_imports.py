"""Imports point one way, optional packages come late, and no assert guards against a caller's mistake."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiled import ROOT

OPTIONAL = {"transformers", "numba", "matplotlib", "gguf", "triton", "huggingface_hub"}
ANYTHING = {"*"}
# What a layer may import besides the standard library and itself: packages, then modules of ranvier.
MAY_IMPORT = {
    "kernels": ({"triton"}, set()),
    "reference": ({"torch"}, set()),
    "config": (set(), set()),
    "backend": ({"torch"}, {"_C"}),
    "ops": ({"torch", "numpy", "numba"}, {"reference", "_C", "backend", "config", "kernels"}),
    # _C: a module that keeps its plan calls the compiled entry itself.
    "nn": ({"torch"}, {"ops", "reference", "config", "_C"}),
    "methods": ({"torch", "numpy", "tqdm", "matplotlib"}, {"nn", "ops", "reference", "config"}),
    "integrations": (ANYTHING, ANYTHING),
    "cli": (ANYTHING, ANYTHING),
    "__main__": (set(), {"cli"}),
    # The names of integrations and methods are loaded when asked for; only type checkers see them at the top.
    "__init__": ({"torch"}, {"_C", "backend", "config"}),
}
FILES = sorted([*(ROOT / "pysrc/ranvier").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MODULES = {path.stem if path.is_file() else path.name for path in (ROOT / "pysrc/ranvier").iterdir()} | {"_C", "kernels"}


def layer_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    first = path.relative_to(ROOT / "pysrc/ranvier").parts[0]
    return first.removesuffix(".py")


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST, late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node that runs, and whether only a call runs it."""
    for child in ast.iter_child_nodes(node):
        if not for_type_checkers(child):
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield child, inside
            yield from walk(child, inside)


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """The dotted names that a source imports, and whether late; a name from ranvier itself is a module where there is one."""
    for node, late in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            if node.module == "ranvier":
                yield from ((f"ranvier.{a.name}" if a.name in MODULES else "ranvier", late) for a in node.names)
            else:
                yield node.module, late
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((name.value, late) for name in node.args[:1] if isinstance(name, ast.Constant))


def wrong_imports(source: str, layer: str) -> list[str]:
    """What a file of this layer may not import."""
    packages, modules = MAY_IMPORT[layer]
    wrong = []
    for name, late in imports(source):
        top, *rest = name.split(".")
        if top == "ranvier":
            allowed = modules == ANYTHING or (bool(rest) and rest[0] in modules | {layer})
        else:
            allowed = top in sys.stdlib_module_names or packages == ANYTHING or top in packages
        if not allowed or (layer != "kernels" and top in OPTIONAL and not late):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    """A file imports what its layer may, and optional packages only inside functions."""
    assert layer_of(path) in MAY_IMPORT, "a new layer: say in MAY_IMPORT what it may import"
    assert not wrong_imports(path.read_text(), layer_of(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_in_the_library(path: Path) -> None:
    """A caller's mistake is a ValueError or TypeError; assert is gone under python -O."""
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("kernels", "import torch"),
        ("kernels", "from ranvier import ops"),
        ("reference", "import numpy"),
        ("reference", "from ranvier.ops import spike_encode"),
        ("reference", "from ranvier import _C"),
        ("ops", "from ranvier.nn import SpikingLinear"),
        ("ops", "import numba"),
        ("ops", "def f():\n    import transformers"),
        ("ops", "import ranvier"),
        ("nn", "from ranvier.methods import spikellm"),
        ("nn", "def f():\n    from ranvier.cli import main"),
        ("methods", "def f():\n    from ranvier.integrations.transformers import load_causal_lm"),
        ("methods", "def f():\n    return import_module('ranvier.integrations.folder')"),
        ("methods", "try:\n    import matplotlib\nexcept ImportError:\n    matplotlib = None"),
        ("integrations", "class A:\n    import transformers"),
        ("cli", "from huggingface_hub import snapshot_download"),
        ("config", "import torch"),
        ("backend", "from ranvier.ops import spike_encode"),
        ("__init__", "from ranvier.integrations.folder import load"),
    ],
)
def test_a_wrong_import_is_seen(layer: str, source: str) -> None:
    """The walk sees each of these; it is not green for want of looking."""
    assert wrong_imports(source, layer)


def test_type_checkers_may_see_more() -> None:
    """What only a type checker reads points nowhere at run time."""
    assert not wrong_imports("if TYPE_CHECKING:\n    from ranvier.integrations.folder import load", "__init__")
