"""The C++ tests under ASAN and UBSAN and without any named instruction set, and one result under every cap of the level."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compiled import ROOT, build, find, need_tools, python, run

from ranvier import _C

HASH = """
import hashlib, torch
from ranvier import SpikeConfig, _C
from ranvier.nn import SpikingLinear
torch.manual_seed(7)
digest = hashlib.sha256()
for config in (SpikeConfig(), SpikeConfig(grid="compat", steps=4, group_size=32), SpikeConfig(span="separate", act_bits=8)):
    layer = SpikingLinear.from_linear(torch.nn.Linear(160, 72), config, torch.arange(160) % 9 == 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.no_grad():
            y = layer(torch.randn(33, 160).to(dtype))
        digest.update(y.view(torch.uint8).numpy().tobytes())
print(_C.isa(), digest.hexdigest())
"""


LEVEL = """
#include <cstdio>
#include "core/isa.h"
int main() { std::fputs(ranvier::isa_name(ranvier::detected_isa()), stdout); }
"""


def cpp_tests(program: Path) -> str:
    """Runs the C++ tests; returns what they printed when none failed and no sanitizer spoke."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    start = time.perf_counter()
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=environment, timeout=300)
    print(f"ran {program.name} in {time.perf_counter() - start:.0f} s")  # noqa: T201
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "ERROR" not in done.stderr and "runtime error" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith(" tests, 0 failures") and not done.stdout.endswith("\n0 tests, 0 failures\n")
    return done.stdout


def test_cpp_tests_under_sanitizers(sanitized: Path) -> None:
    """Every C++ test passes with no read or write out of bounds, no leak and no undefined behaviour."""
    symbols = subprocess.run(["nm", sanitized], capture_output=True, text=True, check=False).stdout
    assert not symbols or ("__asan_init" in symbols and "__ubsan_handle" in symbols), "the sanitizers are not in this build"
    assert "ok spike_linear_levels_equal_scalar" in cpp_tests(sanitized)


def test_cpp_tests_without_instruction_sets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """RANVIER_PORTABLE builds what another processor gets: scalar kernels alone, and the C++ tests pass."""
    need_tools("cmake")
    folder = build(tmp_path_factory.mktemp("portable"), "-DRANVIER_TESTS=ON", "-DRANVIER_PORTABLE=ON", target="ranvier_tests")
    assert "ok spike_linear_is_exact_in_integers" in cpp_tests(folder / "ranvier_tests")
    objects = {path.name for path in folder.rglob("*.o")}
    assert "spike_linear_scalar.cpp.o" in objects and not [name for name in objects if "_avx" in name]
    (folder / "level.cpp").write_text(LEVEL)
    compiler = find("c++") or find("g++")
    library = folder / "libranvier_core.a"
    run(compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", folder / "level.cpp", library, "-pthread", "-o", folder / "level")
    assert run(folder / "level") == "scalar"


@pytest.fixture(scope="module")
def widest() -> str:
    """The result's hash without a cap."""
    return python(HASH).split()[1]


@pytest.mark.parametrize("level", _C.isa_levels())
def test_every_cap_gives_one_result(level: str, widest: str) -> None:
    """RANVIER_ISA lowers the level to what it says or what the processor has, and no bit of the output changes."""
    isa, digest = python(HASH, RANVIER_ISA=level).split()
    levels = _C.isa_levels()
    assert isa == levels[min(levels.index(level), levels.index(_C.detected_isa()))] and digest == widest


@pytest.mark.parametrize("value", ["nonsense", "", "AVX2", "avx"])
def test_no_such_level(value: str) -> None:
    """A RANVIER_ISA that names no level stops the import with what came and what is allowed."""
    environment = {**os.environ, "RANVIER_ISA": value}
    command = [sys.executable, "-c", "import ranvier"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last == f"ValueError: RANVIER_ISA is {value!r}; allowed are {', '.join(_C.isa_levels())}"
