"""SpikingLinear: what forward means, what survives a move, a copy or a file, what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from spiking import (
    CONFIGS,
    DTYPES,
    ROUNDING,
    K,
    N,
    config_id,
    epilogue_bound,
    generator,
    layouts,
    linear,
    mask,
    random_tokens,
    same,
    spiking,
    tokens,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ranvier
from ranvier import SpikeConfig
from ranvier.nn import SpikeGroup, SpikingLinear
from ranvier.ops import spike_encode, weight_only_linear

pytestmark = pytest.mark.usefixtures("poisoned")
configs = pytest.mark.parametrize("config", CONFIGS, ids=config_id)
CLIPPED = [SpikeConfig(act_clip=0.8), SpikeConfig(act_clip=0.8, span="separate"), SpikeConfig(act_clip=0.8, grid="compat")]
some_configs = pytest.mark.parametrize("config", CONFIGS[::3], ids=config_id)


@pytest.mark.parametrize("config", [*CONFIGS, *CLIPPED], ids=config_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward_is_dequantized_input_times_dequantized_weight(isa: str, config: SpikeConfig, dtype: torch.dtype) -> None:
    """forward(x) = x^ W^T + b, within the epilogue's bound and the rounding of x^ and W^.  # spec spikellm O5"""
    layer, x = spiking(config, dtype=dtype), random_tokens(9, K, torch.float32, generator()).clamp(-500, 500).to(dtype)
    with torch.no_grad():
        y = layer(x)
    decoded, weight = layer.dequantized_input(x), layer.dequantized_weight()
    assert y.dtype == dtype and decoded.dtype == weight.dtype == torch.float32
    truth = decoded.double() @ weight.double().T + layer.bias.double()
    form = layer.format
    encoded = spike_encode(x, layer.salient_mask, **form.rule, group_size=config.group_size, backend="reference")
    bound = epilogue_bound(encoded, layer.packed_weight, form, N, layer.bias)
    bound = bound + 4 * 2.0**-24 * (decoded.double().abs() @ weight.double().abs().T)
    bound = bound + (truth.abs() + bound) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)
    assert ((y.double() - truth).abs() <= bound).all()


@configs
def test_eager_compiled_and_differentiated_ways_agree(isa: str, config: SpikeConfig) -> None:
    """The cached plan, the op under autograd and the reference backend's integers give one result."""
    layer, x = spiking(config), tokens()
    with torch.no_grad():
        short = layer(x)
    assert same(layer(x.clone().requires_grad_()).detach(), short)
    with torch.inference_mode():
        assert same(layer(x).clone(), short)
    assert layer(tokens(0)).shape == (0, N) and layer(tokens(1)[0]).shape == (N,)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=str)
def test_compile_fullgraph_without_recompiling(config: SpikeConfig) -> None:
    """torch.compile(fullgraph=True) gives eager's bits for every length from one graph."""
    torch._dynamo.reset()
    layer, counter = spiking(config), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (5, 2, 3, 12, 13, 64):
            assert same(compiled(tokens(length)), layer(tokens(length)))
    assert counter.frame_count == 1


def test_compile_with_a_group_and_gradients() -> None:
    """A compiled graph may encode per module; bits and gradients stay those of eager."""
    torch._dynamo.reset()
    first, second = spiking(), spiking(seed=5)
    first.group = second.group = SpikeGroup()
    model = lambda x: torch.cat([first(x), second(x)], -1)  # noqa: E731
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        x = tokens().requires_grad_()
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, first.bias))))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_inductor_runs_the_op() -> None:
    """The default backend keeps the op opaque: equal bits around fused pointwise code."""
    torch._dynamo.reset()
    layer = spiking()
    with torch.no_grad():
        assert same(torch.compile(layer, fullgraph=True)(tokens()), layer(tokens()))


@some_configs
def test_layouts(config: SpikeConfig) -> None:
    """Any memory layout of x gives the plain copy's bits, in a group or alone."""
    layer, grouped = spiking(config), spiking(config)
    grouped.group = SpikeGroup()
    with torch.no_grad():
        for name, x in layouts(tokens()):
            expected = layer(x.clone().contiguous())
            assert same(layer(x), expected) and same(grouped(x), expected), name


@configs
def test_state_dict_round_trips_into_a_layer_without_mask(config: SpikeConfig) -> None:
    """Masks are saved: a layer made without one takes all from the state, bit for bit.  # spec spikellm O21"""
    layer, x = spiking(config), tokens()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.keys() == state.keys() and all(same(loaded[name], state[name]) for name in state)
    empty = SpikingLinear(K, N, config=config)
    assert empty.salient_count == 0
    with torch.no_grad():
        empty(x)  # a plan for the empty state exists and must go
        assert empty.load_state_dict(loaded) == ([], [])
        assert torch.equal(empty.salient_mask, mask()) and empty.salient_count == 11
        assert same(empty(x), layer(x))
    assert all(same(value, state[name]) for name, value in layer.state_dict().items())


def test_state_of_other_sizes_is_refused() -> None:
    """A state of another K, N or grid does not load, and the layer still computes what it did."""
    layer, x = spiking(), tokens()
    with torch.no_grad():
        before = layer(x)
        for other in (
            SpikingLinear(K + 4, N, config=CONFIGS[0]),
            SpikingLinear(K, N + 32, config=CONFIGS[0]),
            SpikingLinear.from_linear(linear(), SpikeConfig(grid="compat")),
        ):
            with pytest.raises(RuntimeError, match="SpikingLinear"):
                copy.deepcopy(layer).load_state_dict(other.state_dict())
        assert same(layer(x), before)


@some_configs
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(config: SpikeConfig, way: str) -> None:
    """A copy computes the same bits, shares no memory and has no plan of the original."""
    layer, x, file = spiking(config), tokens(), io.BytesIO()
    layer.group = SpikeGroup()
    with torch.no_grad():
        before = layer(x)
        if way == "torch.save":
            torch.save(layer, file)
            file.seek(0)
        twin = {
            "deepcopy": lambda: copy.deepcopy(layer),
            "pickle": lambda: pickle.loads(pickle.dumps(layer)),
            "torch.save": lambda: torch.load(file, weights_only=False),
        }[way]()
        assert same(twin(x), before)
        twin.weight_scale.mul_(2)
        twin.bias.zero_()
        assert same(layer(x), before) and not same(twin(x), before)


@some_configs
def test_casts_keep_the_scales(config: SpikeConfig) -> None:
    """.half(), .to(bfloat16) and .double() cast the bias and keep float32 scales: the integers keep their meaning."""
    layer, x = spiking(config), tokens()
    scale = layer.weight_scale.clone()
    with torch.no_grad():
        plain = layer(x)
        for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu"), lambda m: m.float()):
            twin = cast(copy.deepcopy(layer))
            assert twin.weight_scale.dtype == torch.float32 and same(twin.weight_scale, scale)
            assert twin.bias.dtype == twin.dtype == twin.to_linear().weight.dtype
            without = twin(x) - twin.bias.float()
            assert (without - (plain - layer.bias)).abs().max() <= 2.0**-20 * (plain.abs().max() + 1)
    back = copy.deepcopy(layer).half().float()
    assert same(back.weight_scale, scale) and back.dtype == torch.float32


def test_meta_layer_runs_as_a_fake() -> None:
    """A layer on the meta device runs as a fake; it carries no address into a real call."""
    layer = spiking()
    with torch.no_grad():
        layer(tokens())
        meta = layer.to("meta")
        assert meta(tokens().to("meta")).is_meta


@some_configs
def test_to_linear_and_back(config: SpikeConfig) -> None:
    """to_linear has the dequantized weight, bias, type and flags; from_linear leaves its source as it was."""
    source = linear(torch.bfloat16).eval()
    source.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    chosen = mask()
    layer = SpikingLinear.from_linear(source, config, chosen)
    back = layer.to_linear()
    assert same(back.weight.detach(), layer.dequantized_weight().bfloat16()) and same(back.bias, source.bias)
    assert not layer.training and not back.training and not layer.bias.requires_grad and not back.bias.requires_grad
    layer.bias.data.zero_()
    layer.salient_mask.zero_()
    assert torch.equal(chosen, mask())
    assert all(same(value, before[name]) for name, value in source.state_dict().items())


def test_no_mask_means_no_salient_channel() -> None:
    """salient_mask=None equals a mask without a channel; a list of bools is a mask too."""
    x = tokens()
    with torch.no_grad():
        plain = SpikingLinear.from_linear(linear(), CONFIGS[0])
        empty = SpikingLinear.from_linear(linear(), CONFIGS[0], torch.zeros(K, dtype=torch.bool))
        listed = SpikingLinear.from_linear(linear(), CONFIGS[0], mask().tolist())
        assert plain.salient_count == 0 and same(plain(x), empty(x)) and same(listed(x), spiking()(x))


@some_configs
def test_changes_of_the_layer_are_seen(config: SpikeConfig) -> None:
    """Whatever is assigned or written between two calls, the second one uses: nothing of the first one's plan is left."""

    def other_bias(layer: SpikingLinear) -> None:
        layer.bias.data = torch.randn(N, generator=generator(8))

    def narrow_bias(layer: SpikingLinear) -> None:
        layer.bias.data = layer.bias.data.to(torch.bfloat16)

    def no_bias(layer: SpikingLinear) -> None:
        layer.bias = None

    def in_place(layer: SpikingLinear) -> None:
        layer.weight_scale.mul_(1.5)

    def new_tables(layer: SpikingLinear) -> None:
        other = spiking(config, seed=9)
        for name in ("weight_packed", "weight_scale", "weight_zero", "weight_sum"):
            setattr(layer, name, getattr(other, name))

    def new_sums(layer: SpikingLinear) -> None:
        if layer.weight_sum is not None:
            layer.weight_sum = layer.weight_sum + 3

    def loaded(layer: SpikingLinear) -> None:
        layer.load_state_dict(SpikingLinear.from_linear(linear(seed=9), config, mask(seed=10)).state_dict())

    def other_count(layer: SpikingLinear) -> None:
        layer.load_state_dict(SpikingLinear.from_linear(linear(seed=9), config, mask(seed=10, count=30)).state_dict())

    x = tokens()
    for change in (other_bias, narrow_bias, no_bias, in_place, new_tables, new_sums, loaded, other_count):
        for group in (None, SpikeGroup()):
            layer = spiking(config)
            layer.group = group
            with torch.no_grad():
                layer(x)
                change(layer)
                torch.randn(N), torch.randn(4 * N)  # reuse what was freed
                fresh = copy.deepcopy(layer)
                fresh.group = None
                assert same(layer(x), fresh(x)), change.__name__
                assert same(layer(x), layer._as_op(x)), change.__name__


def test_gradients_flow_to_x_and_bias() -> None:
    """Straight through: dx = dy W^, db = sum dy; buffers need none."""
    layer, x = spiking(), tokens().requires_grad_()
    upstream = torch.randn(7, N, generator=generator(14))
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantized_weight(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_autocast_casts_as_linear_does() -> None:
    """Under autocast a float32 input gives the output type that nn.Linear gives, and the bits of a cast input."""
    layer, source = spiking(), linear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(tokens())
        assert y.dtype == source(tokens()).dtype == torch.bfloat16
    with torch.no_grad():
        assert same(y.detach(), layer(tokens().bfloat16()))


def test_is_called_as_nn_linear_is() -> None:
    """The argument has nn.Linear's name, so that layer(input=x) goes on working after a conversion."""
    with torch.no_grad():
        assert same(spiking()(input=tokens()), spiking()(tokens()))


def test_negated_view_and_overwritten_mask() -> None:
    """A view whose sign is not in memory is read with it; a mask written over so that its count is wrong is refused."""
    for config in CONFIGS[::3]:
        layer = spiking(config)
        with torch.no_grad():
            assert same(layer(torch._neg_view(tokens())), layer(-tokens()))
    layer = spiking(SpikeConfig(span="separate"))
    with torch.no_grad():
        layer(tokens())
        layer.salient_mask.fill_(True)
        with pytest.raises(ValueError, match="does not mark as many channels"):
            layer(tokens())


def test_repr_names_the_format() -> None:
    """What a layer is can be read off its print."""
    assert repr(spiking(CONFIGS[1])) == (
        "SpikingLinear(in_features=96, out_features=40, bias=True, W4A4, steps=2, salient=11, span=shared,"
        " grid=consistent, group_size=32)"
    )


class NotLinear(nn.Module):
    weight = torch.zeros(2, 2)


def spoiled(value: float) -> nn.Linear:
    layer = linear()
    layer.weight.data[3, 4] = value
    return layer


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (TypeError, "NotLinear", lambda: (NotLinear(),)),
        (ValueError, "NaN or Inf", lambda: (spoiled(float("nan")),)),
        (ValueError, "NaN or Inf", lambda: (spoiled(float("inf")),)),
        (ValueError, "float64", lambda: (linear(torch.float64),)),
        (ValueError, "meta", lambda: (linear().to("meta"),)),
        (ValueError, r"\[0, 5\]|non-empty", lambda: (nn.Linear(5, 0),)),
        (ValueError, "group_size = 64", lambda: (linear(), SpikeConfig(group_size=64))),
        (ValueError, r"bool \[96\]", lambda: (linear(), None, torch.zeros(95, dtype=torch.bool))),
        (ValueError, r"bool \[96\]", lambda: (linear(), None, torch.zeros(96))),
        (ValueError, r"bool \[96\]", lambda: (linear(), None, [3, 7])),
    ],
)
def test_bad_conversions(error: type, says: str, arguments: Callable[[], tuple]) -> None:
    """Each layer that cannot be converted is refused with what came and what to do; the source stays."""
    with pytest.raises(error, match=says):
        SpikingLinear.from_linear(*arguments())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("error", "says", "x"),
    [
        (ValueError, "95 channels", torch.zeros(2, 95)),
        (ValueError, "no dimensions", torch.tensor(1.0)),
        (TypeError, "float64", torch.zeros(2, K, dtype=torch.float64)),
        (TypeError, "int64", torch.zeros(2, K, dtype=torch.int64)),
    ],
)
def test_bad_inputs(error: type, says: str, x: Tensor, grad: bool) -> None:
    """A wrong K or type is refused on the short way and under autograd alike."""
    with torch.set_grad_enabled(grad), pytest.raises(error, match=says):
        spiking()(x)
    if x.ndim:
        with pytest.raises((ValueError, TypeError)):
            spiking().dequantized_input(x if x.shape[-1] != K else x[:, :5])


def test_bias_of_another_size_or_type_is_refused() -> None:
    """A bias that does not belong to the layer is refused when it is used, not read past its end."""
    for bad in (torch.zeros(N - 1), torch.zeros(N, dtype=torch.float64)):
        layer = spiking()
        with torch.no_grad():
            layer(tokens())
            layer.bias.data = bad
            with pytest.raises((ValueError, TypeError), match="bias"):
                layer(tokens())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_not_finite_rows_are_alone(isa: str, dtype: torch.dtype) -> None:
    """NaN or Inf in one token: NaN in its outputs, the others keep their bits, in a group too."""
    for config in CONFIGS[::5]:
        layer, x = spiking(config), tokens(13, dtype)
        layer.group = SpikeGroup()
        with torch.no_grad():
            clean = layer(x)
            x[4, 95] = float("inf")
            y = layer(x)
            others = torch.arange(13) != 4
            assert y[4].isnan().all() and same(y[others], clean[others])
            assert layer.dequantized_input(x)[4].isnan().all()


def test_library_has_the_promised_names() -> None:
    """The names outside code calls are there."""
    assert ranvier.nn.SpikingLinear is SpikingLinear
    for name in ("SpikeConfig", "spike_", "unspike_", "save", "load", "nn", "ops"):
        assert hasattr(ranvier, name)


@pytest.mark.parametrize("group", (None, 32))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_weight_only_is_the_op_and_comes_back(group: int | None, dtype: torch.dtype) -> None:
    """act_bits=None: x is not quantized; eager, compiled, copied and reloaded layers give the op's bits."""
    config = SpikeConfig(act_bits=None, group_size=group)
    layer, x = SpikingLinear.from_linear(linear(dtype), config), tokens(dtype=dtype)
    with torch.no_grad():
        y = layer(x)
        assert same(y, weight_only_linear(x, layer.packed_weight, layer.format, N, layer.bias))
        assert layer.dequantized_input(x) is x
        torch._dynamo.reset()
        assert same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
        assert same(pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x), y)
        again = SpikingLinear(K, N, True, config, 0, dtype=dtype)
        again.load_state_dict(layer.state_dict())
        assert same(again(x), y)
    assert "weight-only" in repr(layer)
    with pytest.raises(ValueError, match="salient_mask with act_bits=None"):
        SpikingLinear.from_linear(linear(dtype), config, mask())


def test_weight_only_gradients_are_the_float_layers() -> None:
    """dx and db are those of the layer with the dequantized weight."""
    layer = SpikingLinear.from_linear(linear(), SpikeConfig(act_bits=None))
    dense, x = layer.to_linear(), tokens()
    grads = []
    for module in (layer, dense):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append((leaf.grad, module.bias.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # 2 y dy: y's rounding, some 1e-6, over a hundred terms
