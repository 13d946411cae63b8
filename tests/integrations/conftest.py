"""A saved model to read, and a copy of it to damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import content
from tiny_lm import spiking_llama

import ranvier


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder to be read only."""
    path = tmp_path_factory.mktemp("saved") / "model"
    ranvier.save(spiking_llama(tied=False), path)
    return path


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A folder to be damaged."""
    path = tmp_path / "model"
    path.mkdir()
    for name, data in content(saved).items():
        (path / name).write_bytes(data)
    return path
