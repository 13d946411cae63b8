"""The benchmark for a GPU, as far as it runs without one: its value checks on the CPU, its refusal, its claims."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from compiled import ROOT

from ranvier.ops._declare import OPS


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line on stderr."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_value_checks_pass_on_the_cpu_and_see_an_error(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks run on the CPU kernels, and raise for a single wrong value or a NaN too many."""
    monkeypatch.setattr(gpu, "FORMATS", gpu.FORMATS[:2])
    monkeypatch.setattr(gpu, "CHECKED_LAYERS", gpu.CHECKED_LAYERS[1::2])
    monkeypatch.setattr(gpu, "CHECKED_TOKENS", (1, 8))
    monkeypatch.setattr(gpu, "CHECKED_TERNARY", gpu.CHECKED_TERNARY[:2])
    monkeypatch.setattr(gpu, "CHECKED_CACHES", gpu.CHECKED_CACHES[:1])
    cpu = torch.device("cpu")
    monkeypatch.setattr(gpu, "CHECKED_ORDERS", gpu.CHECKED_ORDERS[:2])
    assert list(gpu.check_values(cpu, "cpu").values()) == [24, 16, 8, 2, 3, 2, 8]
    right = torch.ones(4)
    for wrong in (torch.tensor([1.0, 1.0, 1.0, 1.1]), torch.tensor([1.0, float("nan"), 1.0, 1.0])):
        with pytest.raises(gpu.WrongValuesError, match="1 of 4 values"):
            gpu._same("x", wrong, right, 0.05)


def test_every_op_with_a_kernel_is_checked(gpu: ModuleType) -> None:
    """The checks name all ops that have a Triton backend, each once."""
    named = [name for ops in gpu.CHECKS.values() for name in ops]
    assert sorted(named) == sorted(name for name, op in OPS.items() if "triton" in op.implementations)


def test_candidates_compute_the_same_layer(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed, made on CPU tensors: each call of each candidate is near x W^T, and a peer that cannot run says why."""
    weight, x = torch.randn(64, 256).bfloat16() / 16, torch.randn(3, 256).bfloat16()
    monkeypatch.delitem(gpu.PEERS, "torchao int8 compiled")  # a compiler's run takes seconds
    peers, absent = gpu._peers(weight, x, lambda size: 2)
    ours = [gpu._ours(weight, x, lambda size: 2, group) for group in (None, 128)]
    truth = x.double() @ weight.double().T
    for candidate in (*ours, *peers):
        assert len(candidate.calls) == 2 and candidate.bytes > 64 * 256 / 2
        for call in candidate.calls:
            assert float((call().double() - truth).abs().max()) < 0.25 * float(truth.abs().max())
    assert {c.provider for c in peers} | set(absent) == {"torch bf16", *gpu.PEERS}
    assert all(why.startswith("absent: ") for why in absent.values())


def test_claims_read_the_rows(gpu: ModuleType) -> None:
    """One line for one token and one for 2048, each against its own limit."""
    row = {name: 0 for name in gpu.Row.__dataclass_fields__}
    row |= {"provider": "ranvier", "shape": "o", "gbs": 70.0, "copy_gbs": 100.0, "tops": 50.0, "int8_tops": 100.0}
    rows = [gpu.Row(**{**row, "m": m}) for m in (1, 8, 2048)]
    assert [line.split(":")[0] for line in gpu.claims(rows)] == ["reached", "missed"]
