"""Hadamard and HadamardLinear as modules: values, state, copies, casts, gradients, compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spiking import generator, same
from torch import nn

from ranvier import SpikeConfig
from ranvier.methods.spikellm import spike_
from ranvier.methods.spikellm.convert import find_linears
from ranvier.nn import Hadamard, HadamardLinear, SpikingLinear
from ranvier.ops import hadamard


def signs(n: int) -> torch.Tensor:
    return torch.randint(0, 2, (n,), generator=generator(3)).float() * 2 - 1


def test_inverse_undoes_it() -> None:
    """With signs and in blocks: x -> (x s) H, and its transpose back."""
    s, x = signs(72), torch.randn(4, 72, generator=generator())
    turn, back = Hadamard(72, 36, s), Hadamard(72, 36, s, transpose=True)
    assert same(turn(x), hadamard(x * s, 36))
    assert torch.allclose(back(turn(x)), x, atol=1e-5)
    assert not list(turn.parameters()) and not list(Hadamard(72).buffers())
    assert same(Hadamard(72)(x), hadamard(x)) and same(Hadamard(72, transpose=True)(x), hadamard(x, transpose=True))
    assert (Hadamard(100).order, Hadamard(576).order) == (20, 576)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_copies_and_casts(dtype: torch.dtype) -> None:
    """deepcopy, pickle and a state dict carry signs and order; .to casts them exactly."""
    x = torch.randn(4, 48, generator=generator()).to(dtype)
    turn = Hadamard(48, 24, signs(48)).to(dtype)
    y = turn(x)
    assert y.dtype == dtype
    for other in (copy.deepcopy(turn), pickle.loads(pickle.dumps(turn))):
        assert same(other(x), y)
    fresh = Hadamard(48, 24, torch.ones(48)).to(dtype)
    fresh.load_state_dict(turn.state_dict())
    assert same(fresh(x), y)
    assert "48, order=24, signs" in repr(turn)


def test_gradient_and_compile() -> None:
    """Gradients go through the transform and signs; compiled in one graph it gives eager's bits."""
    turn = Hadamard(48, signs=signs(48))
    x = torch.randn(4, 48, generator=generator(), requires_grad=True)
    dy = torch.randn(4, 48, generator=generator(1))
    (dx,) = torch.autograd.grad(turn(x), x, dy)
    assert same(dx, hadamard(dy, transpose=True) * turn.signs)
    torch._dynamo.reset()
    assert same(torch.compile(turn, fullgraph=True, backend="aot_eager")(x.detach()), turn(x.detach()))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_behind_a_transform_is_the_linear(bias: bool) -> None:
    """W H (H^T x) = W x: the weight takes the transform back, up to the rounding of two float32 sums."""
    linear = nn.Linear(36, 20, bias)
    before = linear.weight.detach().clone()
    layer = HadamardLinear.from_linear(linear)
    x = torch.randn(5, 36, generator=generator())
    # 36-term sums of products of about 1 / 6 each, rounded to 2^-24 of their magnitude, in two places.
    assert torch.allclose(layer(x), linear(x), atol=1e-5)
    assert (layer.in_features, layer.out_features) == (36, 20)
    assert same(linear.weight.detach(), before) and not torch.allclose(layer.linear.weight, before)


def test_the_linear_inside_is_found_and_replaced() -> None:
    """find_linears names it, spike_ converts it, the transform stays in front."""
    model = nn.Sequential(HadamardLinear.from_linear(nn.Linear(64, 32)))
    assert list(find_linears(model)[0]) == ["0.linear"]
    x, float_output = torch.randn(8, 64, generator=generator()), None
    float_output = model(x)
    spike_(model, SpikeConfig(act_bits=8, steps=1, salient=0.0))
    assert isinstance(model[0].linear, SpikingLinear) and isinstance(model[0].hadamard, Hadamard)
    assert (model(x) - float_output).norm() < 0.2 * float_output.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "features is 0"),
        ((True,), "features is True"),
        ((64, 48), "does not divide"),
        ((64, 3), "order 3"),
        ((64, None, torch.ones(63)), "signs has shape"),
        ((64, None, torch.zeros(64)), "1 or -1"),
    ],
)
def test_bad_modules(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hadamard(*arguments)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"\[3, 63\]"):
        Hadamard(64)(torch.zeros(3, 63))
    with pytest.raises(TypeError, match="float64"):
        Hadamard(64)(torch.zeros(3, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="Identity"):
        HadamardLinear.from_linear(nn.Identity())
