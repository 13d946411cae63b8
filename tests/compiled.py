"""Builds of the C++ sources for the tests that look at them: in a temporary folder, by the project's own CMakeLists."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# cmake and ninja may have been installed beside this Python, which need not be on the path.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def find(tool: str) -> str | None:
    return shutil.which(tool, path=PATH)


def need_tools(*tools: str) -> None:
    missing = [tool for tool in tools if find(tool) is None]
    if find("c++") is None and find("g++") is None:
        missing.append("a C++ compiler")
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")


def need_x86() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the kernels of named instruction sets are x86-64's; this is {platform.machine()}")


def run(*command: str | Path, **options: object) -> str:
    options.setdefault("env", {**os.environ, "PATH": PATH})
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def python(code: str, **environment: str) -> str:
    """Runs a program by a fresh interpreter with these variables; two minutes, then it counts as hung."""
    return run(sys.executable, "-c", code, env={**os.environ, **environment}, timeout=120)


def configure(folder: Path, *options: str) -> list[dict[str, str]]:
    """The compile commands of this configuration, one a source: file, command, output."""
    generator = ["-G", "Ninja"] if find("ninja") else []
    run("cmake", "-S", ROOT, "-B", folder, *generator, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options)
    return json.loads((folder / "compile_commands.json").read_text())


def build(folder: Path, *options: str, target: str) -> Path:
    configure(folder, *options)
    run("cmake", "--build", folder, "--target", target, "--parallel", "2")
    return folder
