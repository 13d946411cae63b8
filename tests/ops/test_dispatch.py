"""Every declared op as torch sees it: opcheck, the short way and the dispatcher's, compile, autocast, functorch, gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from spiking import DTYPES, MAIN_RULES, format_of, generator, random_mask, rule_id, same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ranvier
from ranvier.ops import (
    KVFormat,
    digit_format,
    kv_encode,
    pack_weight,
    spike_encode,
    spike_linear,
    spike_linear_dynamic,
    unpack_weight,
)
from ranvier.ops._declare import OPS, needs_dispatcher
from ranvier.reference.spike_encode import spike_decode

pytestmark = pytest.mark.usefixtures("poisoned")
main_rules = pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
K, N, M = 37, 21, 5


def layer_arguments(rule: dict, bias: Tensor | None, group_size: int = 0) -> tuple:
    """Everything after x in the schema of spike_linear_dynamic."""
    mask = random_mask(K, 0.3, generator(2))
    form = format_of(mask, rule, group_size)
    weight = pack_weight(torch.randn(N, K, generator=generator(3)), mask, form)
    options = (form.act_bits, form.steps, form.span, form.grid, form.group_size)
    return *weight, mask, bias, N, form.salient_count, *options


def tokens(dtype: torch.dtype = torch.float32, *, grad: bool = False) -> Tensor:
    return torch.randn(M, K, generator=generator(4)).to(dtype).requires_grad_(grad)


def bias_of(dtype: torch.dtype = torch.float32, *, grad: bool = False) -> Tensor:
    return torch.randn(N, generator=generator(5)).to(dtype).requires_grad_(grad)


def ternary_layer(share: float) -> ranvier.nn.TernaryLinear:
    source = torch.nn.Linear(K, N)
    source.weight.data = torch.randn(N, K, generator=generator(3))
    return ranvier.nn.TernaryLinear.from_linear(source, None, random_mask(K, share, generator(2)))


def samples(name: str) -> list[tuple]:
    """Arguments in the schema's order; a new op needs its own line here."""
    rules = [(rule, group) for rule in MAIN_RULES for group in (0, 32)]
    if name == "spike_encode":
        mask = random_mask(K, 0.3, generator(2))
        return [
            (tokens(dtype), mask, int(mask.sum()), *rule.values(), group)
            for (rule, group), dtype in zip(rules, itertools.cycle(DTYPES))
        ] + [(tokens(), None, 0, 4, 2, "shared", "consistent", 0)]
    if name == "spike_linear_dynamic":
        return [
            (tokens(dtype, grad=grad), *layer_arguments(rule, bias_of(dtype, grad=grad) if grad else None, group))
            for (rule, group), dtype, grad in zip(rules, itertools.cycle(DTYPES), itertools.cycle((True, True, False)))
        ]
    if name == "spike_linear":
        found = []
        for rule, group in rules:
            arguments = layer_arguments(rule, bias_of(), group)
            encoded = spike_encode(tokens(), arguments[4], **rule, group_size=group)
            found.append((*encoded, *arguments, DTYPES[group % 3]))
        return found
    if name in ("ternary_linear", "ternary_linear_dynamic"):
        found = []
        for share, dtype, grad in ((0.3, DTYPES[0], True), (0.0, DTYPES[1], True), (1.0, DTYPES[2], False)):
            layer = ternary_layer(share)
            count, mask = layer.salient_count, layer.salient_mask if share else None
            arguments = (*layer.packed_weight[:3], mask, bias_of(dtype, grad=grad and name != "ternary_linear"), N, count)
            if name == "ternary_linear":
                encoded = spike_encode(tokens(dtype), act_bits=8, steps=1)
                found.append((encoded.codes, encoded.scale, *arguments, dtype))
            else:
                found += [(tokens(dtype, grad=grad), *arguments, act_bits) for act_bits in (8, 0)]
        return found
    if name in ("spike_rms_norm", "spike_silu_mul"):
        mask = random_mask(K, 0.3, generator(2))
        own = (torch.rand(K), 1e-5, "one_plus") if name == "spike_rms_norm" else (torch.rand(M, K),)
        return [
            (tokens(dtype), *own, mask, int(mask.sum()), *rule.values(), group, 0.9)
            for (rule, group), dtype in zip(rules, itertools.cycle(DTYPES))
        ]
    if name == "spike_events":
        codes = torch.randint(-15, 16, (M, K), generator=generator(), dtype=torch.int32)
        columns = torch.randint(-15, 16, (K, N), generator=generator(), dtype=torch.int16)
        return [(codes, columns, torch.arange(K) // 20, 2, *rule) for rule in (("gif", 15), ("ternary", 1), ("naf", 1))]
    if name == "weight_only_linear":
        found = []
        for group, dtype, grad in ((0, torch.float32, True), (32, torch.bfloat16, False), (0, torch.float16, False)):
            packed, scale, zero, _ = pack_weight(torch.randn(N, K, generator=generator(3)), None, digit_format(K, group))
            found.append((tokens(dtype, grad=grad), packed, scale, zero, bias_of(dtype, grad=grad), N, group))
        return found
    if name == "hadamard":
        shapes = ((3, 64), (2, 3, 36), (4, 12))
        return [
            (
                torch.randn(shape, generator=generator()).to(dtype).requires_grad_(grad),
                shape[-1] // 2 if grad else shape[-1],
                grad,
            )
            for shape, dtype, grad in zip(shapes, DTYPES, (True, False, False), strict=True)
        ]
    if name == "flash_attention":
        sizes = ((1, 4, 7, 24), (1, 2, 9, 24), (1, 2, 9, 24))
        return [
            (*(torch.randn(s, generator=generator(i)).to(dtype).requires_grad_(grad) for i, s in enumerate(sizes)), grad, 0.2)
            for dtype, grad in zip(DTYPES, (True, False, False), strict=True)
        ]
    if name.startswith("kv_attention"):
        return kv_samples(name)
    raise NotImplementedError(f"no samples for the op {name}: add them, so that opcheck sees it")


def kv_samples(name: str) -> list[tuple]:
    """Tokens that already lie in the cache, so that appending them again changes nothing."""
    found = []
    for dtype in DTYPES:
        keys = torch.randn(2, 2, 5, K, generator=generator(6)).to(dtype)
        chosen, form, at = torch.arange(K).repeat(2, 1) < 3, KVFormat(K, 3, 3), torch.tensor([0, 7])
        cache = form.empty(2, 2, 1)
        kv_encode(keys, keys, cache, chosen, chosen, at, form=form)
        if name == "kv_attention_encode":
            found.append((keys, keys, cache, chosen, chosen, at, 3, 3))
        else:
            query, mask = torch.randn(2, 4, 3, K, generator=generator(7)).to(dtype), torch.randn(2, 1, 3, 12)
            found += [(query, cache, chosen, chosen, at + 5, s, m, 3, 3, 0.2) for s, m in ((None, None), (at, mask))]
    return found


def as_tuple(result: Tensor | tuple) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fake tensors and AOT tracing with dynamic shapes agree with the eager op."""
    for arguments in samples(name):
        torch.library.opcheck(OPS[name].overload, arguments)


@pytest.mark.parametrize("name", OPS)
def test_short_way_is_the_dispatcher_way(name: str) -> None:
    """Called eagerly, through the dispatcher or by the backend's name, an op gives the same bits; inputs stay as they are."""
    for arguments in samples(name):
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        with torch.no_grad():
            assert not needs_dispatcher(*[a for a in arguments if isinstance(a, Tensor)])
            short = as_tuple(OPS[name](*arguments))
            ways = [OPS[name].overload(*arguments), OPS[name](*arguments, backend="cpu")]
        for way in ways:
            assert all(same(a, b) for a, b in zip(as_tuple(way), short, strict=True))
        assert all(same(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("name", OPS)
def test_reference_backend_has_the_same_outputs(name: str) -> None:
    """backend="reference" returns the same types and shapes, and equal integers."""
    for arguments in samples(name):
        with torch.no_grad():
            mine, formula = as_tuple(OPS[name](*arguments)), as_tuple(OPS[name](*arguments, backend="reference"))
        for a, b in zip(mine, formula, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert a.is_floating_point() or torch.equal(a, b)


def test_what_needs_the_dispatcher() -> None:
    """Gradients, modes, subclasses, autocast and functorch take the op; plain tensors and parameters do not."""
    plain, wanted = torch.zeros(2), torch.zeros(2, requires_grad=True)

    class Subclass(Tensor):
        pass

    assert not needs_dispatcher(plain, None)
    assert needs_dispatcher(wanted)
    assert needs_dispatcher(plain.as_subclass(Subclass))
    with torch.no_grad():
        assert not needs_dispatcher(wanted, torch.nn.Parameter(plain))
    with torch._subclasses.FakeTensorMode():
        assert needs_dispatcher(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert needs_dispatcher(plain)
    with torch.autograd.forward_ad.dual_level():
        assert needs_dispatcher(plain)
    seen = []
    torch.vmap(lambda x: seen.append(needs_dispatcher(x)) or x)(plain)
    assert seen == [True]


def call(rule: dict, group_size: int = 0, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    arguments = layer_arguments(rule, bias, group_size)
    return lambda x: OPS["spike_linear_dynamic"](x, *arguments)


@main_rules
def test_compile_equals_eager_without_recompiling(rule: dict) -> None:
    """fullgraph, dynamic shapes: equal bits for every length, and one graph serves them all."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    mask, run = random_mask(K, 0.3, generator(2)), call(rule, bias=bias_of())
    count = int(mask.sum())

    def both(x: Tensor) -> tuple:
        encoded = spike_encode(x, mask, **rule, salient_count=count)
        return run(x), encoded.codes, encoded.scale, encoded.code_sum, encoded.zero

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (5, 2, 3, 12, 13, 40):  # a first length of 2 would be tied to the two ranges
            x = torch.randn(length, K, generator=generator(length))
            assert all(same(a, b) for a, b in zip(compiled(x), both(x), strict=True))
    assert counter.frame_count == 1


def test_compiled_gradients_equal_eager() -> None:
    """Forward and backward through AOT autograd give eager's bits."""
    torch._dynamo.reset()
    bias = bias_of(grad=True)
    run = call(MAIN_RULES[0], bias=bias)
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x = tokens(grad=True)
        results.append((y := function(x), *torch.autograd.grad(y, (x, bias), torch.randn(M, N, generator=generator(9)))))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(dtype: torch.dtype, inside: bool) -> None:
    """Under autocast x is cast as torch's linear casts it; gradients come back in the type of x, in or out of the context."""
    run, plain = call(MAIN_RULES[0]), torch.nn.Linear(K, N, bias=False)
    x, upstream = tokens(grad=True), torch.randn(M, N, generator=generator(9)).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = run(x)
        assert y.dtype == plain(x).dtype == dtype
        if inside:
            (grad,) = torch.autograd.grad(y, x, upstream)
    if not inside:
        (grad,) = torch.autograd.grad(y, x, upstream)
    assert same(y, run(x.detach().to(dtype)))
    assert grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(run(narrow := x.detach().to(dtype).requires_grad_()), narrow, upstream)
    assert same(grad, expected.float())


def test_vmap_equals_the_batch() -> None:
    """vmap over tokens, and over no batch dimension of the weights, gives the batch's bits."""
    run, x = call(MAIN_RULES[0], bias=bias_of()), torch.randn(3, M, K, generator=generator())
    with torch.no_grad():
        assert same(torch.vmap(run)(x), run(x))
        assert same(torch.vmap(run, in_dims=1, out_dims=1)(x), run(x))


def test_functorch_gradient_says_what_is_missing() -> None:
    """torch.func.grad either gives the straight-through gradient or says why not; it never gives another number."""
    run, x = call(MAIN_RULES[0]), tokens()
    expected = torch.autograd.grad(run(leaf := tokens(grad=True)).sum(), leaf)[0]
    try:
        found = torch.func.grad(lambda t: run(t).sum())(x)
    except RuntimeError as error:
        assert "functorch" in str(error)
    else:
        assert same(found, expected)


@main_rules
@pytest.mark.parametrize("group_size", [0, 32])
def test_gradient_is_straight_through(rule: dict, group_size: int) -> None:
    """dx = dy W^ and db = sum dy: the autograd of the reference, x^ W^T + b with d x^ / d x = 1."""
    x, bias = tokens(grad=True), bias_of(grad=True)
    arguments = layer_arguments(rule, bias, group_size)
    upstream = torch.randn(M, N, generator=generator(9))
    mine = torch.autograd.grad(OPS["spike_linear_dynamic"](x, *arguments), (x, bias), upstream)
    mask, form = arguments[4], format_of(arguments[4], rule, group_size)
    dequantized = unpack_weight(ranvier.ops.PackedWeight(*arguments[:4]), mask, form, N).double()
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    formula = spike_decode(x64, mask, **rule) @ dequantized.T + bias64
    expected = torch.autograd.grad(formula, (x64, bias64), upstream.double())
    # A float32 sum of n products: gamma_n = n u / (1 - n u) of the sum of magnitudes.
    sizes = upstream.double().abs() @ dequantized.abs(), upstream.double().abs().sum(0)
    for got, truth, size, terms in zip(mine, expected, sizes, (N, M), strict=True):
        assert ((got - truth).abs() <= (terms + 1) * 2.0**-24 * size).all()


def test_only_the_wanted_gradients() -> None:
    """x alone, bias alone, neither: what does not need a gradient gets none; double backward is refused, not wrong."""
    for x_grad, bias_grad in itertools.product((False, True), repeat=2):
        x, bias = tokens(grad=x_grad), bias_of(grad=bias_grad)
        y = call(MAIN_RULES[0], bias=bias)(x)
        assert y.requires_grad == (x_grad or bias_grad)
        if y.requires_grad:
            y.sum().backward()
        assert (x.grad is not None) == x_grad and (bias.grad is not None) == bias_grad


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (0, K)])
def test_gradient_shapes(shape: tuple[int, ...]) -> None:
    """Gradients have the shapes of x and bias for any leading dimensions, and for none."""
    x, bias = torch.randn(shape, generator=generator()).requires_grad_(), bias_of(grad=True)
    call(MAIN_RULES[0], bias=bias)(x).sum().backward()
    assert x.grad.shape == shape and bias.grad.shape == (N,)
    assert torch.equal(bias.grad, torch.full((N,), float(x[..., 0].numel())))


def test_checkpoint_recomputes_the_same() -> None:
    """Under activation checkpointing output and gradients keep their bits."""
    run, results = call(MAIN_RULES[5], bias=bias_of()), []
    for function in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        x = tokens(grad=True)
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_reference_passes_gradcheck() -> None:
    """The linear part of the reference in float64: product with W^ and bias (the rounding itself has no derivative)."""
    arguments = layer_arguments(MAIN_RULES[0], None)
    form = format_of(arguments[4], MAIN_RULES[0])
    dequantized = unpack_weight(ranvier.ops.PackedWeight(*arguments[:4]), arguments[4], form, N).double()
    decoded = spike_decode(tokens().double(), arguments[4], **MAIN_RULES[0]).requires_grad_()
    bias = bias_of().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda d, b: d @ dequantized.T + b, (decoded, bias))
    x = tokens().double().requires_grad_()
    (straight,) = torch.autograd.grad(spike_decode(x, arguments[4], **MAIN_RULES[0]), x, torch.ones(M, K).double())
    assert torch.equal(straight, torch.ones(M, K).double())


def test_named_backend_never_drops_a_gradient() -> None:
    """A backend asked for by name gives the gradient or says that it cannot."""
    arguments = layer_arguments(MAIN_RULES[0], None)
    expected = torch.autograd.grad(OPS["spike_linear_dynamic"](x := tokens(grad=True), *arguments).sum(), x)[0]
    for backend in ("cpu", "reference"):
        x = tokens(grad=True)
        try:
            y = OPS["spike_linear_dynamic"](x, *arguments, backend=backend)
        except ranvier.BackendError as error:
            assert "gradient" in str(error)
        else:
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected, rtol=1e-6, atol=1e-6)


FORWARD_ONLY = [name for name, op in OPS.items() if not op.differentiable and samples(name)[0][0].is_floating_point()]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_no_gradient_is_an_error_and_not_none(name: str, compiled: bool) -> None:
    """Forward runs, a backward pass that reaches the op raises, compiled or not: at backward, not before."""
    torch._dynamo.reset()
    first, *rest = samples(name)[0]
    x = first.clone().requires_grad_()
    run = torch.compile(OPS[name].overload, fullgraph=True, backend="aot_eager") if compiled else OPS[name]
    with torch.no_grad():
        expected = as_tuple(OPS[name](first, *rest))
    outputs = as_tuple(run(x, *rest))
    assert all(same(a.detach(), b) for a, b in zip(outputs, expected, strict=True))
    recorded = [y for y in outputs if y.requires_grad]
    assert recorded
    for y in recorded:
        # Behind something that has a gradient too, which would come out as if this op were a constant.
        with pytest.raises(RuntimeError, match=f"{name}: it has no gradient; call it under"):
            (x.sum() + y.sum()).backward(retain_graph=True)
    assert x.grad is None


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_no_op_takes_a_tangent_for_a_constant(name: str) -> None:
    first, *rest = samples(name)[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(ranvier.BackendError, match=f"{name}: there is no forward-mode derivative"):
            OPS[name](dual, *rest)


def test_meta_tensors_have_the_fake_shapes() -> None:
    """Meta tensors give meta outputs of the right shapes, without touching memory."""
    mask, arguments = random_mask(K, 0.3, generator(2)), layer_arguments(MAIN_RULES[0], bias_of())
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    y = OPS["spike_linear_dynamic"].overload(tokens().to("meta"), *meta)
    assert y.is_meta and y.shape == (M, N)
    encoded = spike_encode(tokens(), mask)
    y = spike_linear(encoded, ranvier.ops.PackedWeight(*arguments[:4]), format_of(mask, MAIN_RULES[0]), N, None, mask)
    assert y.shape == (M, N)
    fake = OPS["spike_encode"].overload(tokens().to("meta"), mask.to("meta"), int(mask.sum()), *MAIN_RULES[0].values(), 0)
    for real, shaped in zip(encoded, fake, strict=True):
        assert shaped.is_meta and shaped.shape == real.shape and shaped.dtype == real.dtype


def test_errors_come_through_the_dispatcher_too() -> None:
    """The one check speaks on every way in: eager, with a gradient, compiled."""
    mask = torch.zeros(K + 1, dtype=torch.bool)
    form = format_of(mask, MAIN_RULES[0])
    weight = pack_weight(torch.randn(N, K + 1), mask, form)
    for x in (tokens(), tokens(grad=True)):
        with pytest.raises(ValueError, match=f"{K} channels"):
            spike_linear_dynamic(x, weight, form, N, None, mask)


def test_tensors_on_another_device_are_refused() -> None:
    """A weight, mask or bias elsewhere is named, on every way in: its address means nothing to the input's kernels."""
    arguments = layer_arguments(MAIN_RULES[4], bias_of())
    names = ("weight_packed", "weight_scale", "weight_zero", "weight_sum", "salient_mask", "bias")
    for at, name in enumerate(names):
        moved = [a.to("meta") if i == at else a for i, a in enumerate(arguments)]
        for x in (tokens(), tokens(grad=True)):
            with pytest.raises(ValueError, match=f"{name} is on meta and the input on cpu"):
                OPS["spike_linear_dynamic"](x, *moved)
    with pytest.raises(ValueError, match="salient_mask is on meta"):
        spike_encode(tokens(), arguments[4].to("meta"), salient_count=3)
    codes, columns = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int16)
    with pytest.raises(ValueError, match="columns is on meta"):
        OPS["spike_events"](codes, columns.to("meta"), torch.zeros(4, dtype=torch.int64), 1, "gif", 15)
    layer = ranvier.nn.SpikingLinear.from_linear(torch.nn.Linear(K, N)).to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match="is on meta and the input on cpu"):
        layer(tokens())


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_no_dense_tensor_is_refused(grad: bool) -> None:
    """Lists, arrays and sparse tensors are a TypeError that says what to pass, in the ops and in the module."""
    layer = ranvier.nn.SpikingLinear.from_linear(torch.nn.Linear(K, N))
    with torch.set_grad_enabled(grad):
        for x, says in (
            ([1.0] * K, "is a list; pass a torch.Tensor"),
            (tokens().numpy(), "is a ndarray; pass a torch.Tensor"),
            (tokens().to_sparse(), "torch.sparse_coo; pass a dense tensor"),
        ):
            for call in (layer, spike_encode, lambda x: layer(x.requires_grad_() if isinstance(x, Tensor) else x)):
                with pytest.raises(TypeError, match=says):
                    call(x)


def test_forward_mode_is_refused() -> None:
    """There is no forward-mode formula: an error, not tangents of zero."""
    run = call(MAIN_RULES[0])
    with pytest.raises((ranvier.BackendError, RuntimeError), match="forward-mode"):
        torch.func.jvp(run, (tokens(),), (torch.ones(M, K),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens(), torch.ones(M, K))
        with pytest.raises(ranvier.BackendError, match="forward-mode"):
            run(dual)
