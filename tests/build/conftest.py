"""One build of each kind for all tests that look at it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from compiled import build, need_tools, need_x86


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as they are shipped: the folder of their object files."""
    need_x86()
    need_tools("cmake", "objdump", "nm")
    folder = build(tmp_path_factory.mktemp("core"), "-DRANVIER_TESTS=ON", target="ranvier_core")
    return folder / "CMakeFiles/ranvier_core.dir/csrc"


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer; -O1 builds and runs them soonest."""
    need_tools("cmake")
    options = ("-DRANVIER_TESTS=ON", "-DRANVIER_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g")
    start = time.perf_counter()
    folder = build(tmp_path_factory.mktemp("sanitized"), *options, target="ranvier_tests")
    print(f"built the sanitized tests in {time.perf_counter() - start:.0f} s")  # noqa: T201
    return folder / "ranvier_tests"
