"""What tests of conversions share: one thread, and a count of encodings."""

from __future__ import annotations

import pytest
import torch

from ranvier import _C


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """The models are tiny: further threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each encoding that a group makes: the C++ call runs as ever."""
    calls, real = [], _C.spike_encode_panels

    def counted(*arguments: object) -> None:
        calls.append(1)
        real(*arguments)

    monkeypatch.setattr(_C, "spike_encode_panels", counted)
    return calls
