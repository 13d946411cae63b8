"""TernaryLinear: what forward means, what survives a move, a copy or a file, what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from spiking import DTYPES, ROUNDING, K, N, generator, layouts, linear, mask, random_tokens, same, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ranvier import SpikeConfig
from ranvier.nn import SpikeGroup, SpikingLinear, TernaryLinear
from ranvier.ops import spike_encode, spike_events
from ranvier.reference import ternary_linear as reference

pytestmark = pytest.mark.usefixtures("poisoned")
CONFIGS = [
    SpikeConfig(weight_bits=2, act_bits=8, steps=2, weight_grid="ternary"),
    SpikeConfig(weight_bits=2, act_bits=8, steps=7, weight_grid="ternary", span="separate"),
    SpikeConfig(weight_bits=2, act_bits=4, steps=4, weight_grid="uniform"),
    SpikeConfig(weight_bits=2, act_bits=8, steps=2, weight_grid="uniform", grid="compat"),
    SpikeConfig(weight_bits=2, act_bits=8, steps=5, weight_grid="uniform", span="separate"),
]
configs = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.weight_grid}-T{c.steps}-A{c.act_bits}-{c.span}-{c.grid}"
)


def ternary(config: SpikeConfig = CONFIGS[0], seed: int = 1, dtype: torch.dtype = torch.float32) -> TernaryLinear:
    return TernaryLinear.from_linear(linear(dtype, seed=seed), config, mask())


@configs
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward_is_dequantized_input_times_dequantized_weight(isa: str, config: SpikeConfig, dtype: torch.dtype) -> None:
    """forward(x) = x^ W^T + b, and W^ is what the reference quantizer gives."""
    layer, x = ternary(config, dtype=dtype), random_tokens(9, K, torch.float32, generator()).clamp(-500, 500).to(dtype)
    with torch.no_grad():
        y = layer(x)
    rule = {"steps": config.steps, "weight_grid": config.weight_grid, "span": config.span, "grid": config.grid}
    source = linear(dtype).weight.detach().float()
    decoded = reference.dequantize_weight(*reference.quantize_weight(source, mask(), **rule), mask())
    assert same(layer.dequantized_weight(), decoded)
    inputs = layer.dequantized_input(x).double()
    truth, size = inputs @ decoded.double().T + layer.bias.double(), inputs.abs() @ decoded.double().abs().T
    # x^ and W^ are themselves rounded (2^-24 each), then 6 operations at most: a sum's conversion, two products, two sums.
    bound = 8 * 2.0**-24 * (size + layer.bias.double().abs())
    bound = bound + (truth.abs() + bound) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)
    assert y.dtype == dtype and ((y.double() - truth).abs() <= bound).all()


@configs
def test_eager_and_differentiated_ways_agree(isa: str, config: SpikeConfig) -> None:
    """The cached plan, the op under autograd, inference mode and a shared encoding give the same bits."""
    layer, x = ternary(config), tokens()
    with torch.no_grad():
        short = layer(x)
        grouped = copy.deepcopy(layer)
        grouped.group = SpikeGroup()
        assert same(grouped(x), short) and same(grouped(x), short)
    assert same(layer(x.clone().requires_grad_()).detach(), short)
    with torch.inference_mode():
        assert same(layer(x).clone(), short)
    assert layer(tokens(0)).shape == (0, N) and layer(tokens(1)[0]).shape == (N,)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("count", [0, 11, K])
def test_weight_only_is_the_float_product(isa: str, dtype: torch.dtype, count: int) -> None:
    """act_bits=None: y = x W^T + b of the unquantized x, as close as a product in float32; straight through for gradients."""
    config = SpikeConfig(weight_bits=2, act_bits=None, steps=2, weight_grid="ternary")
    layer, x = TernaryLinear.from_linear(linear(dtype), config, mask(count=count)), tokens(7, dtype)
    with torch.no_grad():
        y = layer(x)
    weight, bias = layer.dequantized_weight().double(), layer.bias.detach().double()
    truth, size = x.double() @ weight.T + bias, x.double().abs() @ weight.abs().T + bias.abs()
    # The digits leave half a step of max|x| / 127 (257, 65793) a channel; then a dozen float32 operations, as above.
    step = x.double().abs().amax(-1, keepdim=True) / (127 * (65793 if dtype == torch.float32 else 257))
    bound = 0.51 * step * weight.abs().sum(-1) + 16 * 2.0**-24 * size
    bound = bound + (truth.abs() + bound) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)
    assert y.dtype == dtype and ((y.double() - truth).abs() <= bound).all()
    leaf = x.clone().requires_grad_()
    assert same(layer(leaf).detach(), y)
    (grad,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    torch.testing.assert_close(grad, torch.ones(7, N).to(dtype) @ layer.dequantized_weight().to(dtype))
    assert "W2A16" in repr(layer) and same(layer.dequantized_input(x), x)


def test_layers_share_an_encoding_with_their_own_kind_only() -> None:
    """In one group two ternary layers find each other's codes; a 4-bit layer of the same mask encodes for itself."""
    layers = [ternary(), ternary(seed=5), SpikingLinear.from_linear(linear(), SpikeConfig(act_bits=8, steps=1), mask())]
    x, group = tokens(), SpikeGroup()
    with torch.no_grad():
        alone = [layer(x) for layer in layers]
        for layer in layers:
            layer.group, layer.salient_mask = group, group.share(layer.salient_mask)
        assert all(same(layer(x), y) for layer, y in zip(layers, alone, strict=True))
        encoded = group._last
        layers[0](x)
        first = group._last
        layers[1](x)
        assert group._last is first is not encoded


def test_compile_fullgraph_without_recompiling() -> None:
    """torch.compile(fullgraph=True) gives eager's bits for every length from one graph."""
    torch._dynamo.reset()
    layer, counter = ternary(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (5, 2, 13):
            assert same(compiled(tokens(length)), layer(tokens(length)))
    assert counter.frame_count == 1


def test_gradients_flow_to_x_and_bias() -> None:
    """Straight through: dx = dy W^, db = sum dy; buffers need none; autocast casts as nn.Linear does."""
    layer, x, upstream = ternary(), tokens().requires_grad_(), torch.randn(7, N, generator=generator(14))
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantized_weight(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(tokens()).dtype == torch.bfloat16


def test_layouts() -> None:
    """Any memory layout of x gives the plain copy's bits."""
    layer = ternary()
    with torch.no_grad():
        for name, x in layouts(tokens()):
            assert same(layer(x), layer(x.clone().contiguous())), name


@configs
def test_state_dict_round_trips_into_a_layer_without_mask(config: SpikeConfig) -> None:
    """A layer made without a mask takes all from the state, bit for bit.  # spec spikellm O21"""
    layer, x, file = ternary(config), tokens(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded, empty = torch.load(file, weights_only=True), TernaryLinear(K, N, config=config)
    with torch.no_grad():
        empty(x)  # a plan for the empty state exists and must go
        assert empty.load_state_dict(loaded) == ([], [])
        assert type(empty) is TernaryLinear and torch.equal(empty.salient_mask, mask()) and same(empty(x), layer(x))
    assert empty.state_dict().keys() == SpikingLinear(K, N).state_dict().keys()
    with pytest.raises(RuntimeError, match="TernaryLinear"):
        TernaryLinear(K, N, config=config).load_state_dict(SpikingLinear.from_linear(linear()).state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies(way: Callable) -> None:
    """A copy computes the same bits, shares no memory and keeps its scales through casts."""
    layer, x = ternary(), tokens()
    with torch.no_grad():
        before = layer(x)
        twin = way(layer)
        assert same(twin(x), before)
        twin.weight_scale.mul_(2)
        assert same(layer(x), before) and not same(twin(x), before)
        half = way(layer).half()
        assert same(half.weight_scale, layer.weight_scale) and half.bias.dtype == torch.float16
        assert layer.to("meta")(x.to("meta")).shape == before.shape


def test_from_quantized_takes_what_another_pipeline_made() -> None:
    """q, scale and zero in the layer's own order give the layer whose weight they stand for; no input is kept or changed."""
    source, chosen, g = linear(), mask(), generator(3)
    q = torch.randint(0, 16, (N, K), generator=g, dtype=torch.uint8)
    q = torch.where(chosen, q, q % 4)
    scale, zero = torch.rand(N, 2, generator=g), torch.randint(0, 16, (N, 2), generator=g, dtype=torch.uint8)
    layer = TernaryLinear.from_quantized(source, CONFIGS[2], chosen, q, scale, zero)
    columns = chosen.long()
    assert same(layer.dequantized_weight(), scale[:, columns] * (q.float() - zero[:, columns].float()))
    assert same(layer.bias.detach(), source.bias.detach()) and layer.config is CONFIGS[2]
    chosen.fill_(False)
    assert layer.salient_mask.sum() == 11
    every = TernaryLinear.from_quantized(source, CONFIGS[2], torch.ones(K, dtype=torch.bool), q, scale, zero)
    assert same(every.dequantized_weight(), scale[:, 1:] * (q.float() - zero[:, 1:].float()))
    plain = TernaryLinear.from_quantized(source, CONFIGS[2], None, q % 4, scale, zero)
    assert same(plain.dequantized_weight(), scale[:, :1] * ((q % 4).float() - zero[:, :1].float()))


def test_to_linear_has_the_dequantized_weight() -> None:
    """to_linear keeps weight, bias, type and flags; from_linear leaves its source as it was."""
    source = linear(torch.bfloat16).eval()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    layer = TernaryLinear.from_linear(source, None, mask())
    back = layer.to_linear()
    assert layer.config == TernaryLinear.default_config() and not back.training
    assert same(back.weight.detach(), layer.dequantized_weight().bfloat16()) and same(back.bias, source.bias)
    assert all(same(value, before[name]) for name, value in source.state_dict().items())


def test_spikes_of_its_activations_give_its_integers() -> None:
    """Run spike by spike, the layer's events sum to the integers that its product has."""
    layer, x = ternary(CONFIGS[2]), tokens()
    events = spike_events(layer, x, "gif")
    encoded = spike_encode(x, act_bits=4, steps=1)
    q, _, zero = reference.quantize_uniform(linear().weight.detach(), mask(), 4, "shared", "consistent")
    signed = q.long() - zero.long()[:, mask().long()]
    expected = [encoded.codes[:, kind].long() @ signed[:, kind].T for kind in (~mask(), mask())]
    assert torch.equal(events.output, torch.stack(expected, -1))
    # Two bits a spike of a weight: one on 85 channels, four on the 11 salient ones, each with four bits of an activation.
    assert events.ace == (85 * 2 + 11 * 8) * 4 * N and events.mac_equivalents == (85 + 11 * 4) * N


def test_repr_names_the_format() -> None:
    """What a layer is can be read off its print."""
    text = "in_features=96, out_features=40, bias=True, W2A8, weight_grid=ternary, steps=2, salient=11, span=shared"
    assert repr(ternary()) == f"TernaryLinear({text})"


def quantized(**change: object) -> tuple:
    given = {"q": torch.zeros(N, K, dtype=torch.uint8), "scale": torch.ones(N, 2), "zero": torch.ones(N, 2, dtype=torch.uint8)}
    return linear(), None, None, *(given | change).values()


def spoiled() -> nn.Linear:
    layer = linear()
    layer.weight.data[3, 4] = float("nan")
    return layer


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (TypeError, "from_linear: got ReLU", lambda: TernaryLinear.from_linear(nn.ReLU())),
        (ValueError, "TernaryLinear.from_linear: .*NaN or Inf", lambda: TernaryLinear.from_linear(spoiled())),
        (ValueError, r"bool \[96\]", lambda: TernaryLinear.from_linear(linear(), None, torch.zeros(95, dtype=torch.bool))),
        (ValueError, "weight_bits is 4", lambda: TernaryLinear.from_linear(linear(), SpikeConfig())),
        (ValueError, "weight_bits is 2", lambda: SpikingLinear.from_linear(linear(), CONFIGS[0])),
        (ValueError, "q has shape", lambda: TernaryLinear.from_quantized(*quantized(q=torch.zeros(N, 9, dtype=torch.uint8)))),
        (TypeError, "zero is a list", lambda: TernaryLinear.from_quantized(*quantized(zero=[1]))),
        (TypeError, "q is torch.float32", lambda: TernaryLinear.from_quantized(*quantized(q=torch.zeros(N, K)))),
        (ValueError, "scale has shape", lambda: TernaryLinear.from_quantized(*quantized(scale=torch.ones(N, 1)))),
        (ValueError, "NaN or Inf", lambda: TernaryLinear.from_quantized(*quantized(scale=torch.full((N, 2), torch.inf)))),
    ],
)
def test_bad_conversions(error: type, says: str, call: Callable[[], Tensor]) -> None:
    """What cannot be converted is refused with what came and what to do."""
    with pytest.raises(error, match=says):
        call()
