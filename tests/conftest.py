"""Fixtures of every test: one seed, the instruction-set sweep, poisoned allocations, few and repeatable examples."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from spiking import LEVELS

from ranvier import _C

settings.register_profile(
    "ranvier",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("ranvier")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240707)
    np.random.seed(20240707)
    random.seed(20240707)


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction-set level that this processor has, restored afterwards."""
    before = _C.isa()
    assert _C.set_isa(request.param) == request.param
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty and its kin return NaN or the largest integer, so an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch's thread count back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
