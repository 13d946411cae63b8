"""spike_ and unspike_ that fail: what is said, and that the model is exactly as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import state
from spiking import same
from tiny_lm import spiking_llama, tiny_llama, token_batch
from torch import Tensor, nn

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm import fuse_, unfuse_
from ranvier.nn import SpikingLinear


def batches() -> list[Tensor]:
    return [token_batch(32, seed=1), token_batch(7, seed=2)]


def halfway() -> Iterator[Tensor]:
    yield token_batch(9)
    raise OSError("the disk is gone")


def hooks(model: nn.Module) -> list[dict]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [dict(getattr(module, kind)) for module in model.modules() for kind in kinds]


class Untouched:
    """Everything of a model that a conversion might change; ``check`` compares."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before, self.hooks = model, state(model), hooks(model)

    def check(self) -> None:
        after = state(self.model)
        assert after["modules"] == self.before["modules"] and hooks(self.model) == self.hooks
        assert after["values"].keys() == self.before["values"].keys()
        for name, (*facts, value) in after["values"].items():
            *known, old = self.before["values"][name]
            assert facts == known and (value.is_meta or same(value, old)), name
        assert torch.is_grad_enabled()


class Partial(nn.Module):
    """A layer that only long inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.long, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.long(x) if x.shape[0] > 5 else x


def spoiled(value: float) -> nn.Module:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    return model


def moody() -> nn.Module:
    """Some modules train, some do not."""
    model = tiny_llama().train()
    model.model.layers[0].eval()
    return model


LAST = r"model\.layers\.1\.mlp\.down_proj"
FIRST = r"model\.layers\.0\.self_attn\.q_proj"
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict, Any, Any, str | None]] = {
    "nan": (lambda: spoiled(float("nan")), {}, batches, ValueError, rf"spike_: {LAST}: the weight has NaN or Inf"),
    "inf": (lambda: spoiled(float("inf")), {}, batches, ValueError, rf"spike_: {LAST}: the weight has NaN or Inf"),
    "group size": (tiny_llama, {"group_size": 128}, batches, ValueError, rf"spike_: {FIRST}: K = 64 .*group_size = 128"),
    "later group size": (tiny_llama, {"group_size": 64}, batches, ValueError, r"layers\.0\.mlp\.down_proj: K = 96 is not"),
    "meta": (lambda: tiny_llama().to("meta"), {"salient": 0}, lambda: None, ValueError, rf"{FIRST}: .*meta device"),
    "float64": (lambda: tiny_llama().double(), {}, batches, ValueError, rf"{FIRST}: the weight is torch\.float64"),
    "none": (moody, {}, lambda: None, ValueError, r"salient = 0\.1 needs calibration batches"),
    "empty": (moody, {}, lambda: [], ValueError, "calibration set is empty"),
    "empty, salient 0": (moody, {"salient": 0}, lambda: iter(()), ValueError, "calibration set is empty"),
    "raises halfway": (moody, {}, halfway, OSError, "the disk is gone"),
    "list of lists": (moody, {}, lambda: [token_batch(3), [[1, 2]]], TypeError, "calibration yields list"),
    "strings": (moody, {}, lambda: ["text"], TypeError, "calibration yields str"),
    "one tensor": (moody, {}, lambda: token_batch(9), TypeError, "calibration is Tensor; pass an iterable of batches"),
    "one string": (moody, {}, lambda: "text", TypeError, "calibration is str; pass an iterable"),
    "one dict": (moody, {}, lambda: {"input_ids": token_batch(9)}, TypeError, "calibration is dict; pass an iterable"),
    "no iterable": (moody, {}, lambda: 3, TypeError, "calibration is int; pass an iterable"),
    "a path": (moody, {}, lambda: Path("text"), TypeError, r"calibration is PosixPath; .*SpikeConfig\(calibration=\.\.\.\)"),
    "a path, gptq": (moody, {"pipeline": "gptq"}, lambda: Path("text"), TypeError, "calibration is PosixPath"),
    "unknown keyword": (moody, {}, lambda: [{"ids": token_batch(9)}], (TypeError, ValueError), None),
    "bad ids": (moody, {}, lambda: [token_batch(9), torch.tensor([[99]])], ValueError, "gives the id 99, and the embedding"),
    "negative ids": (moody, {}, lambda: [{"input_ids": torch.tensor([[-1]])}], ValueError, "gives the id -1, and the"),
    "bad ids, gptq": (moody, {"pipeline": "gptq"}, lambda: [torch.tensor([[99]])], ValueError, "gives the id 99"),
    "no ids": (moody, {}, lambda: [token_batch(9).float()], TypeError, r"are token ids, .* and one is torch\.float32"),
    "one row": (moody, {}, lambda: [token_batch(9)[0]], ValueError, r"whole numbers \[B, L\], .* one has shape \[9\]"),
    "empty row": (moody, {}, lambda: [token_batch(0)], ValueError, r"at least one, and one has shape \[1, 0\]"),
    "unreached": (Partial, {}, lambda: [torch.randn(9, 8)], ValueError, "never reached never;"),
    "two unreached": (Partial, {}, lambda: [torch.randn(2, 8)], ValueError, "never reached long and 1 more;"),
    "no tokens": (Partial, {}, lambda: [torch.randn(0, 8)], ValueError, "never reached always and 2 more;"),
    "nan input": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)),
        {},
        lambda: [torch.full((3, 8), float("nan"))],
        ValueError,
        "spike_: 0: salient_mask: the saliency scores have NaN or Inf",
    ),
    "no linear": (lambda: nn.Sequential(nn.ReLU()), {}, batches, ValueError, r"Sequential has no nn\.Linear layer; there is"),
    "all skipped": (
        lambda: nn.Sequential(nn.Linear(8, 8)), {"skip": ("head", "0")}, batches, ValueError, "layer outside head, 0; there",
    ),
    "one linear": (lambda: nn.Linear(8, 8), {}, batches, ValueError, r"itself one nn\.Linear.*SpikingLinear\.from_linear"),
    "twice": (spiking_llama, {}, batches, ValueError, r"has no nn\.Linear layer outside lm_head; there is nothing to convert"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_untouched(case: str) -> None:
    """Each mistake is named, with its layer; modules, tensors, modes, flags and hooks are those of before."""
    make, fields, calibration, error, says = REFUSED[case]
    model = make()
    before = Untouched(model)
    with pytest.raises(error, match=says):
        ranvier.spike_(model, SpikeConfig(**fields), calibration())
    before.check()


@pytest.mark.parametrize("config", [{}, {"steps": 2}, "rtn"], ids=repr)
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match=rf"spike_: config is {type(config).__name__}; pass a ranvier\.SpikeConfig"):
        ranvier.spike_(tiny_llama(), config, batches())


@pytest.mark.parametrize("call", [ranvier.spike_, ranvier.unspike_, fuse_, unfuse_, lambda m: ranvier.save(m, "nowhere")])
@pytest.mark.parametrize("given", [None, [nn.Linear(2, 2)]], ids=["None", "list"])
def test_what_is_no_module_is_refused(call: Callable, given: Any) -> None:
    with pytest.raises(TypeError, match=rf": got {type(given).__name__}; pass a torch\.nn\.Module"):
        call(given)


@pytest.mark.parametrize("config", [{}, {"steps": 4}], ids=repr)
def test_a_layer_of_no_config_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match=r"from_linear: config is dict; pass a ranvier\.SpikeConfig"):
        SpikingLinear.from_linear(nn.Linear(64, 32), config)


def test_calibration_is_not_consumed_by_a_refusal() -> None:
    """What is wrong with the model is found before a single batch is read."""
    given = iter(batches())
    with pytest.raises(ValueError, match="NaN or Inf"):
        ranvier.spike_(spoiled(float("nan")), SpikeConfig(), given)
    assert len(list(given)) == 2


def test_interrupted_calibration() -> None:
    """Control-C in a forward of the calibration leaves no hook and every mode as it was."""
    model, seen = moody(), []

    def stop(*_: object) -> None:
        seen.append(model.training)
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    before = Untouched(model)
    with pytest.raises(KeyboardInterrupt):
        ranvier.spike_(model, SpikeConfig(), batches())
    before.check()
    assert seen == [False] and model.training
    handle.remove()


class Stubborn(dict):
    """Children of a module; the second change of one is interrupted."""

    changes = 0

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self.changes += 1
        if self.changes == 2:
            raise KeyboardInterrupt
        super().__setitem__(name, module)


@pytest.mark.parametrize("back", [False, True], ids=["spike_", "unspike_"])
def test_interrupted_swap_is_undone(back: bool) -> None:
    """Of the replacement itself nothing is left when it is interrupted in the middle, in either direction."""
    model = spiking_llama() if back else tiny_llama()
    mlp = model.model.layers[1].mlp
    before = Untouched(model)
    mlp._modules = Stubborn(mlp._modules)
    with pytest.raises(KeyboardInterrupt):
        ranvier.unspike_(model) if back else ranvier.spike_(model, SpikeConfig(), batches())
    assert mlp._modules.changes > 2
    before.check()


def test_calibration_runs_without_gradients_in_eval_mode() -> None:
    """No graph is built, dropout is off, and the mode of before returns."""
    seen = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.layer = nn.Dropout(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.drop.training, torch.is_grad_enabled()))
            return self.layer(self.drop(x))

    model = Watched().train()
    ranvier.spike_(model, SpikeConfig(), [torch.randn(4, 8)] * 2)
    assert seen == [(False, False, False)] * 2 and model.training and model.drop.training and model.layer.training


def test_unspike_refuses_what_is_not_spiking() -> None:
    """Nothing spiking: said, and untouched."""
    model = tiny_llama()
    before = Untouched(model)
    with pytest.raises(ValueError, match="unspike_: LlamaForCausalLM has no spiking layer; there is nothing to undo"):
        ranvier.unspike_(model)
    before.check()


def test_failed_unspike_is_untouched() -> None:
    """A layer whose tables do not fit stops unspike_ before anything is replaced."""
    model = spiking_llama()
    layer = model.model.layers[1].mlp.down_proj
    layer.weight_scale = layer.weight_scale[:1].clone()
    before = Untouched(model)
    with pytest.raises(RuntimeError, match="must match"):
        ranvier.unspike_(model)
    before.check()
    assert isinstance(model.model.layers[0].mlp.up_proj, SpikingLinear)


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import torch, ranvier
from torch import nn

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

def model(count, width):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))

with torch.no_grad():
    small = model(2, 64)
    ranvier.spike_(small, calibration=[torch.randn(3, 64)])  # everything is imported and every pool made
    large = model(COUNT, WIDTH)
    before = kilobytes("VmRSS")
    report = ranvier.spike_(large, calibration=[torch.randn(8, WIDTH)])
print(before * 1024, kilobytes("VmHWM") * 1024, kilobytes("VmRSS") * 1024, report.bytes_before, report.bytes_after)
"""


def test_peak_memory_is_the_packed_layers_and_little_more() -> None:
    """During spike_ the process grows by the packed layers and one layer's working space, not by copies of the weights."""
    count, width = 48, 1024
    script = PEAK.replace("COUNT", str(count)).replace("WIDTH", str(width))
    # glibc gives freed blocks of 64 KiB and more back at once, so resident memory is what is held.
    here = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=here, capture_output=True, text=True, check=True)
    before, peak, after, floats, packed = map(int, done.stdout.split())
    layer = 4 * width * width
    assert floats == count * layer and packed < floats / 7
    # Working space: the weight's codes as they are computed, the dequantized weight, their difference and its square; ten
    # float copies of a layer are ample, and a fifth of the model.
    assert peak - before < packed + 10 * layer < floats / 2
    # At the end the float weights are gone.
    assert after - before < packed - floats / 2
