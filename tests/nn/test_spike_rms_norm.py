"""SpikingRMSNorm: a norm by itself, and one encoding for the layers that read it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spiking import CONFIGS, DTYPES, K, generator, same, spiking, tokens
from torch import Tensor, nn

from ranvier import _C
from ranvier.nn import SpikeGroup, SpikingLinear, SpikingRMSNorm
from ranvier.ops import spike_rms_norm
from ranvier.reference.spike_rms_norm import WEIGHTINGS, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")


def norm_of(weighting: str = "after_cast", dtype: torch.dtype = torch.float32) -> SpikingRMSNorm:
    return SpikingRMSNorm(nn.Parameter((torch.randn(K, generator=generator(4)) + 0.5).to(dtype)), 1e-5, weighting)


def grouped(config=CONFIGS[0]) -> tuple[SpikingLinear, SpikingLinear]:
    layers, group = (spiking(config), spiking(config, seed=5)), SpikeGroup()
    for layer in layers:
        layer.group, layer.salient_mask = group, group.share(layer.salient_mask)
    return layers


class Counter:
    """Counts calls of C++ entries, which run as ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.calls = dict.fromkeys(names, 0)
        for name in names:
            monkeypatch.setattr(_C, name, self._counting(name, getattr(_C, name)))

    def _counting(self, name: str, real: object) -> object:
        def counted(*arguments: object) -> object:
            self.calls[name] += 1
            return real(*arguments)

        return counted

    def take(self) -> dict[str, int]:
        taken, self.calls = self.calls, dict.fromkeys(self.calls, 0)
        return taken


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_readers_find_the_codes(isa: str, config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call finds the readers; then norm and encoding are one call, and every result has the bits it had."""
    norm, layers = norm_of(), grouped(config)
    alone = copy.deepcopy(layers)
    counter = Counter(monkeypatch, "rms_norm", "spike_rms_norm_panels", "spike_encode_panels")
    for expected in ((1, 0, 1), (0, 1, 0), (0, 1, 0)):
        x = tokens(5)
        y = norm(x)
        results = [layer(y) for layer in layers]
        assert tuple(counter.take().values()) == expected
        assert same(y, spike_rms_norm(x, norm.weight, norm.eps)[0])
        for layer, result in zip(alone, results, strict=True):
            layer.group = None
            assert same(result, layer(y.clone()))


@torch.no_grad()
def test_a_changed_output_is_encoded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes belong to the very tensor as the norm left it: written to, viewed or copied, it is encoded anew."""
    norm, layers = norm_of(), grouped()
    [layer(norm(tokens())) for layer in layers]
    counter = Counter(monkeypatch, "spike_encode_panels")
    for change, encodings in [
        (lambda y: y, 0),
        (lambda y: y.mul_(2), 1),
        (lambda y: y.clone(), 1),
        (lambda y: y.view(-1, K), 1),
    ]:
        y = change(norm(tokens()))
        got, alone = layers[0](y), copy.deepcopy(layers[0])
        assert counter.take() == {"spike_encode_panels": encodings}
        alone.group = None
        assert same(got, alone(y))


@torch.no_grad()
def test_reader_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is given another mask, loses its group, or dies: results stay right and the norm goes on."""
    norm, layers = norm_of(), list(grouped())
    layers[0](norm(tokens()))
    layers[0].salient_mask.copy_(torch.roll(layers[0].salient_mask, 3))
    alone = copy.deepcopy(layers[0])
    alone.group = None
    assert same(layers[0](y := norm(tokens())), alone(y))
    layers[0].group = None
    assert same(layers[0](y := norm(tokens())), alone(y))
    del layers
    expected = spike_rms_norm(tokens(), norm.weight, norm.eps)[0]
    assert same(norm(tokens()), expected)
    later = grouped()
    later[0](norm(tokens()))
    counter = Counter(monkeypatch, "spike_encode_panels")
    later[1](norm(tokens()))
    assert counter.take() == {"spike_encode_panels": 0}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_where_it_must_be(weighting: str, dtype: torch.dtype) -> None:
    """With gradients, another type of weight, float64, under a compiler: the formula's own bits, gradients included."""
    norm, x = norm_of(weighting, dtype), tokens(4, dtype).requires_grad_()
    y = norm(x)
    assert same(y, rms_norm(x, norm.weight, norm.eps, weighting))
    grads = torch.autograd.grad(y.sum(), (x, norm.weight))
    twin = rms_norm(x, norm.weight, norm.eps, weighting)
    assert all(same(a, b) for a, b in zip(grads, torch.autograd.grad(twin.sum(), (x, norm.weight)), strict=True))
    with torch.no_grad():
        other = tokens(4, torch.bfloat16 if dtype == torch.float32 else torch.float32)
        assert same(norm(other), rms_norm(other, norm.weight, norm.eps, weighting))
        torch._dynamo.reset()
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        assert same(compiled(x), rms_norm(x, norm.weight, norm.eps, weighting))
        torch.testing.assert_close(norm(x), y)


@torch.no_grad()
def test_copies_and_casts() -> None:
    """deepcopy, pickle, a state dict and casts keep the norm; a copy finds its own readers."""
    model = nn.Sequential(norm_of(), *grouped()[:1])
    x = tokens()
    model(x)
    expected = model(x)
    assert list(norm_of().state_dict()) == ["weight"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0]._reader is None and same(twin(x), expected) and twin[0]._reader() is twin[1]
        assert same(twin(x), expected)
    half = model.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_inference_mode_and_odd_inputs() -> None:
    """Inference tensors, strided and empty ones; a wrong width raises as torch does; a wrong weighting is named."""
    norm, layers = norm_of(), grouped()
    with torch.inference_mode():
        y = [layers[0](norm(tokens())) for _ in range(3)]
        assert all(same(a, y[0]) for a in y)
    with torch.no_grad():
        wide: Tensor = torch.randn(K, 6, generator=generator()).t()
        assert same(norm(wide), norm(wide.contiguous()))
        assert norm(torch.zeros(0, K)).shape == (0, K)
        with pytest.raises(RuntimeError, match="size"):
            norm(torch.zeros(2, K + 1))
    with pytest.raises(ValueError, match="weighting is 'late'"):
        SpikingRMSNorm(nn.Parameter(torch.ones(3)), 1e-5, "late")
    with pytest.raises(TypeError, match="weight is a Tensor; pass a torch"):
        SpikingRMSNorm(torch.ones(3), 1e-5)
