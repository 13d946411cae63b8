"""Int8Linear: exact products of 8-bit codes from two 4-bit planes; what survives a copy or a file; what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from spiking import DTYPES, ROUNDING, K, N, generator, layouts, linear, mask, random_tokens, same, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ranvier import SpikeConfig
from ranvier.nn import Int8Linear, SpikingLinear
from ranvier.reference.spike_linear import BYTE_TOP, Quantized, nibble_planes, quantize_weight

pytestmark = pytest.mark.usefixtures("poisoned")


def layer_of(dtype: torch.dtype = torch.float32, seed: int = 1) -> Int8Linear:
    return Int8Linear.from_linear(linear(dtype, seed=seed))


def test_planes_are_the_codes() -> None:
    """16 high + low gives back every code, and the two scales and zeros the same weight, exactly."""
    q = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scale, zero = torch.tensor([[0.5], [0.25]]), torch.tensor([[0], [201]], dtype=torch.uint8)
    planes = nibble_planes(Quantized(q, scale, zero))
    assert planes.q.shape == (2, 256) and int(planes.q.max()) == int(planes.zero.max()) + 3 == 15
    assert torch.equal(16 * planes.q[:, :128] + planes.q[:, 128:], q)
    columns = torch.arange(256) // 128
    weight = planes.scale[:, columns] * (planes.q.float() - planes.zero[:, columns].float())
    assert torch.equal(weight[:, :128] + weight[:, 128:], scale * (q.float() - zero.float()))


def test_weight_is_within_half_a_step() -> None:
    """Rounded to nearest on 256 levels of each row's range."""
    weight = linear().weight.detach()
    quantized = quantize_weight(weight, (K,), None, BYTE_TOP)
    step = (weight.amax(-1, keepdim=True).clamp(min=0) - weight.amin(-1, keepdim=True).clamp(max=0)) / 255
    torch.testing.assert_close(quantized.scale, step)
    error = (layer_of().dequantized_weight() - weight).abs()
    # An element at the end of the range can lose another half step to the rounding of the zero point.
    assert bool((error <= 1.001 * step).all()) and float((error / step).mean()) < 0.26
    assert int(quantized.q.max()) == 255 and int(quantized.q.min()) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward_is_the_product_of_8_bit_codes(isa: str, dtype: torch.dtype) -> None:
    """y = s_x s_w sum c (q - z) + b: integers exact, the epilogue within its roundings."""
    layer, x = layer_of(dtype), random_tokens(9, K, torch.float32, generator()).clamp(-500, 500).to(dtype)
    with torch.no_grad():
        y = layer(x)
    q, scale, zero = quantize_weight(linear(dtype).weight.detach().float(), (K,), None, BYTE_TOP)
    top = x.float().abs().amax(-1, keepdim=True)
    step = (top / 127).double()
    codes = torch.where(step > 0, torch.round(x.float() / (top / 127)).double(), 0.0)
    product = codes @ (q.double() - zero.double()).T
    truth = step * scale.double().T * product + layer.bias.double()
    size = step * scale.double().T * (codes.abs() @ (q.double() - zero.double()).abs().T) + layer.bias.double().abs()
    # Two terms of one conversion, two products and one sum each, then the bias.
    bound = 8 * 2.0**-24 * size
    bound = bound + (truth.abs() + bound) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)
    assert y.dtype == dtype and ((y.double() - truth).abs() <= bound).all()
    decoded = layer.dequantized_input(x).double()
    assert ((decoded - step * codes).abs() <= 2.0**-22 * step * codes.abs()).all()


def test_eager_and_differentiated_ways_agree(isa: str) -> None:
    """The cached plan, the op under autograd, inference mode, a view and a negated tensor give the same bits."""
    layer, x = layer_of(), tokens()
    with torch.no_grad():
        short = layer(x)
        for name, given in layouts(x):
            assert same(layer(given), layer(given.clone().contiguous())), name
    assert same(layer(x.clone().requires_grad_()).detach(), short)
    with torch.inference_mode():
        assert same(layer(x).clone(), short)
    assert layer(tokens(0)).shape == (0, N) and layer(tokens(1)[0]).shape == (N,)


def test_gradients_and_compile() -> None:
    """dx = dy W^, db = sum dy; one graph for every length, with eager's bits."""
    torch._dynamo.reset()
    layer, x, upstream = layer_of(), tokens().requires_grad_(), torch.randn(7, N, generator=generator(14))
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantized_weight(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), rtol=1e-5, atol=1e-5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (5, 2, 13):
            assert same(compiled(tokens(length)), layer(tokens(length)))
    assert counter.frame_count == 1


def test_copies_files_and_back() -> None:
    """Deep copies, pickles, state dicts and casts keep the bits; to_linear has the weight; half the bytes are a plane's."""
    layer, x, file = layer_of(), tokens(), io.BytesIO()
    with torch.no_grad():
        y = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert same(twin(x), y)
            twin.weight_scale.mul_(2)
            assert same(layer(x), y) and not same(twin(x), y)
        torch.save(layer.state_dict(), file)
        file.seek(0)
        empty = Int8Linear(K, N)
        empty(x)  # a plan for the empty state exists and must go
        assert empty.load_state_dict(torch.load(file, weights_only=True)) == ([], []) and same(empty(x), y)
        half = copy.deepcopy(layer).half()
        assert same(half.weight_scale, layer.weight_scale) and half(x.half()).dtype == torch.float16
        assert same(layer.to_linear().weight, layer.dequantized_weight())
        assert layer.weight_packed.numel() == 2 * -(-N // 32) * 16 * 4 * -(-K // 4)
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == y.shape
    assert "W8A8" in repr(layer) and layer.salient_count == 0


def test_from_quantized() -> None:
    """Ready codes give the layer whose weight they stand for."""
    g, source = generator(3), linear()
    q = torch.randint(0, 256, (N, K), generator=g, dtype=torch.uint8)
    scale, zero = torch.rand(N, 1, generator=g) + 0.1, torch.randint(0, 256, (N, 1), generator=g, dtype=torch.uint8)
    layer = Int8Linear.from_quantized(source, None, None, q, scale, zero)
    torch.testing.assert_close(layer.dequantized_weight(), scale * (q.float() - zero.float()), rtol=2e-7, atol=2e-5)
    with pytest.raises(ValueError, match=r"Int8Linear.from_quantized: q has shape \[1, \d+\]"):
        Int8Linear.from_quantized(source, None, None, q[:1], scale, zero)
    with pytest.raises(TypeError, match="scale"):
        Int8Linear.from_quantized(source, None, None, q, scale.double(), zero)


def test_refused() -> None:
    """Other configurations, salient channels, other widths and types."""
    with pytest.raises(ValueError, match="weight_bits is 4"):
        Int8Linear.from_linear(linear(), SpikeConfig())
    with pytest.raises(ValueError, match="weight_bits is 8"):
        SpikingLinear.from_linear(linear(), Int8Linear.default_config())
    with pytest.raises(ValueError, match="no channel is salient"):
        Int8Linear.from_linear(linear(), None, mask())
    with pytest.raises(TypeError, match=r"Linear"):
        Int8Linear.from_linear(nn.Conv1d(1, 1, 1))
    layer = layer_of()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=str(K)):
                layer(torch.zeros(2, K + 1, requires_grad=grad))
            with pytest.raises(TypeError, match="float64"):
                layer(torch.zeros(2, K, dtype=torch.float64, requires_grad=grad))
