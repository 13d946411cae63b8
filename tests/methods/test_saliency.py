"""Saliency: its two forms, the size of the mask, and what an observer sees of a running model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from spiking import generator, same
from tiny_lm import tiny_llama, token_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ranvier
from ranvier.methods.spikellm import first_order_saliency, salient_mask
from ranvier.methods.spikellm.saliency import SaliencyObserver, gram_is_cheaper, salient_channels, weight_saliency

# M, N, K: few tokens, where token by token needs fewer operations, and many, where the closed form does.
SIZES = [(5, 40, 96), (1, 1, 1), (300, 64, 32), (256, 48, 40)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "M{}-N{}-K{}".format(*size))


def drawn(size: tuple[int, int, int], seed: int = 1) -> tuple[Tensor, Tensor]:
    m, n, k = size
    return torch.randn(m, k, generator=generator(seed)), torch.randn(n, k, generator=generator(seed + 1))


def token_by_token(x: Tensor, weight: Tensor) -> Tensor:
    """sum_t x_t o (W^T W x_t) in float64."""
    x, weight = x.double(), weight.double()
    return sum(token * (weight.T @ (weight @ token)) for token in x)


def bound(x: Tensor, weight: Tensor, unit: float = 2.0**-24) -> Tensor:
    """How far either form can be from the truth: each adds the same M N K products of four factors, in three nested sums
    of M, N and K terms, so with u the rounding unit every product meets at most M + N + K + 3 roundings."""
    (m, k), n = x.shape, weight.shape[0]
    return 1.01 * (m + n + k + 3) * unit * token_by_token(x.abs(), weight.abs())


def close(got: Tensor, x: Tensor, weight: Tensor) -> bool:
    return bool(((got.double() - token_by_token(x, weight)).abs() <= bound(x, weight)).all())


# --- the score --------------------------------------------------------------------------------------------------------


@sizes
def test_closed_form_is_the_token_by_token_form(size: tuple[int, int, int]) -> None:
    """mean_t x o (W^T W x) == rowsum(G o A) / M, in float64 and in both ways of the library.  # spec spikellm O9"""
    x, weight = drawn(size)
    wide, heavy = x.double(), weight.double()
    closed = ((wide.T @ wide) * (heavy.T @ heavy)).sum(1)
    assert ((closed - token_by_token(x, weight)).abs() <= 2 * bound(x, weight, 2.0**-53)).all()
    chosen, given = first_order_saliency(x, weight), first_order_saliency(x, weight, x.T @ x)
    assert chosen.dtype == torch.float32 and chosen.shape == (size[2],)
    assert close(chosen, x, weight) and close(given, x, weight)


@sizes
def test_stacked_weights_add_up(size: tuple[int, int, int]) -> None:
    """The scores of layers that read one input add up to those of their stacked weight.  # spec spikellm O9"""
    x, _ = drawn(size)
    weights = [drawn(size, seed)[1][: size[1] - i] for i, seed in enumerate((3, 4))]
    parts = sum(token_by_token(x, weight) for weight in weights)
    stacked = torch.cat(weights)
    assert ((token_by_token(x, stacked) - parts).abs() <= 2 * bound(x, stacked, 2.0**-53)).all()
    allowed = sum(bound(x, weight) for weight in weights) + bound(x, stacked)
    added = sum(first_order_saliency(x, weight).double() for weight in weights)
    assert ((added - first_order_saliency(x, stacked).double()).abs() <= allowed).all()


@sizes
def test_let_scaling_changes_nothing(size: tuple[int, int, int]) -> None:
    """X diag(s)^-1 with W diag(s) has the scores of X with W; with powers of two, bit for bit.  # spec spikellm O9"""
    x, weight = drawn(size)
    exact = torch.exp2(torch.randint(-6, 7, (size[2],), generator=generator(5)).float())
    scores = first_order_saliency(x / exact, weight * exact)
    # Every product keeps its value and every factor its fraction bits, so every rounding is the same.
    assert same(scores, first_order_saliency(x, weight))
    assert torch.equal(salient_mask(scores, 0.25), salient_mask(first_order_saliency(x, weight), 0.25))
    rough = 0.1 + 5 * torch.rand(size[2], generator=generator(6))
    moved = first_order_saliency(x / rough, weight * rough).double()
    # Two factors of x and two of W carry one more rounding each.
    more = 4 * 2.0**-24 * token_by_token(x.abs(), weight.abs())
    assert ((moved - token_by_token(x, weight)).abs() <= 1.01 * (bound(x, weight) + more)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_narrow_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Half-width inputs and weights are widened before anything is multiplied."""
    for size in SIZES:
        x, weight = (t.to(dtype) for t in drawn(size))
        assert close(first_order_saliency(x, weight), x, weight)


@pytest.mark.parametrize("size", [(5, 40, 96), (4, 12, 6), (300, 64, 32), (100, 10, 40), (2048, 576, 1536)])
def test_the_cheaper_form_is_taken(size: tuple[int, int, int]) -> None:
    """Operations counted while it runs: 4 M K N token by token, 2 M K^2 + 2 N K^2 closed, and always the fewer."""
    m, n, k = size
    direct, closed = 4 * m * k * n, 2 * m * k * k + 2 * n * k * k
    x, weight = drawn(size)
    with FlopCounterMode(display=False) as counter:
        first_order_saliency(x, weight)
    assert counter.get_total_flops() == min(direct, closed)
    assert gram_is_cheaper(m, n, k) == (closed < direct)
    gram = x.T @ x
    with FlopCounterMode(display=False) as counter:
        first_order_saliency(x, weight, gram)
    assert counter.get_total_flops() == 2 * n * k * k


# --- the mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "tenth", "twentieth"),
    [(4096, 410, 205), (11008, 1101, 551), (5120, 512, 256), (13824, 1383, 692), (8192, 820, 410)],
)
def test_released_counts(channels: int, tenth: int, twentieth: int) -> None:
    """K - int(p K) channels are salient for the Llama sizes, and they are the largest scores.  # spec spikellm O8"""
    scores = torch.randperm(channels, generator=generator()).float() - channels / 2
    for share, count in ((0.10, tenth), (0.05, twentieth)):
        assert salient_channels(channels, share) == count
        chosen = salient_mask(scores, share)
        assert chosen.dtype == torch.bool and int(chosen.sum()) == count
        assert torch.equal(chosen, scores >= scores.sort().values[-count])


def test_counts_do_not_depend_on_the_rounding_of_the_share() -> None:
    """For every share of whole percent the count is that of integers: 1 - 0.8 in floats is a little under 0.2."""
    for channels in (10, 64, 100, 576, 1536, 4096, 5120, 11008, 100_000):
        for percent in range(101):
            expected = channels - (100 - percent) * channels // 100
            assert salient_channels(channels, percent / 100) == expected, (channels, percent)


def test_ties_only_shrink_the_set() -> None:
    """Channels that tie with the threshold are left out, whatever else ties.  # spec spikellm O8"""
    for seed in range(20):
        scores = torch.randint(-3, 4, (97,), generator=generator(seed)).float()
        for share in (0.05, 0.1, 0.5, 0.9):
            chosen, most = salient_mask(scores, share), salient_channels(97, share)
            assert int(chosen.sum()) <= most
            threshold = scores.sort().values[97 - most - 1]
            assert torch.equal(chosen, scores > threshold)
    assert not salient_mask(torch.ones(8), 0.5).any()
    assert salient_mask(torch.tensor([1.0, 1, 1, 2]), 0.5).tolist() == [False, False, False, True]


def test_none_and_all() -> None:
    """A share of 0 marks no channel and 1 every one, even where all scores tie."""
    for scores in (torch.zeros(6), torch.arange(6.0), -torch.arange(6.0)):
        assert not salient_mask(scores, 0.0).any() and salient_mask(scores, 1.0).all()
    assert salient_channels(6, 0.0) == 0 and salient_channels(6, 1.0) == 6
    assert salient_mask(torch.arange(6.0), 1e-3).tolist() == [False] * 5 + [True]  # a share that is not 0 marks one


def test_scores_are_signed() -> None:
    """A strongly negative score is not salient: no absolute value is taken."""
    assert salient_mask(torch.tensor([-1e6, 3, -2, 1, 2, 0, -5, 2.5]), 0.25).nonzero().flatten().tolist() == [1, 7]
    # Two rows that oppose each other across channels make a real score negative.
    x, weight = torch.tensor([[1.0, 10.0]]), torch.tensor([[-1.0, 1.0]])
    assert first_order_saliency(x, weight).tolist() == [-9.0, 90.0]


def test_absolute_takes_the_large_ones_of_both_signs() -> None:
    """With absolute=True a large negative score is salient, and in the conversion config.saliency asks for it."""
    scores = torch.tensor([1.0, -5.0, 2.0, -0.5])
    assert salient_mask(scores, 0.25).tolist() == [False, False, True, False]
    assert salient_mask(scores, 0.25, absolute=True).tolist() == [False, True, False, False]
    found = []
    for saliency in ("signed", "absolute"):
        model = tiny_llama()
        ranvier.spike_(model, ranvier.SpikeConfig(saliency=saliency, salient=0.9), [token_batch(32, seed=1)])
        found.append([layer.salient_mask for layer in model.modules() if isinstance(layer, ranvier.nn.SpikingLinear)])
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    """NaN and Inf have no place in an order: refused at every share."""
    for share in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match="saliency scores have NaN or Inf"):
            salient_mask(torch.tensor([1.0, value, 2.0]), share)


# --- the observer -----------------------------------------------------------------------------------------------------


class Readers(nn.Module):
    """Layers a, b, c of 8 inputs, called as ``how`` says."""

    def __init__(self, how: Callable[[Readers, Tensor, int], None]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, n) for n in (4, 6, 3))
        self.inner = nn.ModuleDict({"d": nn.Linear(8, 5)})
        self.how, self.call = how, 0

    def forward(self, x: Tensor) -> None:
        self.how(self, x, self.call)
        self.call += 1


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def observed(model: nn.Module, inputs: list[Tensor]) -> SaliencyObserver:
    with torch.no_grad(), SaliencyObserver(linears(model)) as observer:
        for x in inputs:
            model(x)
    return observer


def inputs() -> list[Tensor]:
    return [torch.randn(shape, generator=generator(i)) for i, shape in enumerate([(2, 5, 8), (1, 1, 8), (300, 8), (0, 8)])]


def read_all(model: Readers, x: Tensor, call: int) -> None:
    model.a(x), model.b(x), model.c(x), model.inner["d"](x)


def test_layers_that_read_one_tensor_are_seen_in_a_language_model() -> None:
    """In a Llama q, k and v are one group, gate and up another, o, down and the head alone."""
    model = tiny_llama()
    found = observed(model, [token_batch(9), token_batch(4)]).groups()
    expected = []
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        expected += [[attention + name for name in ("q_proj", "k_proj", "v_proj")], [attention + "o_proj"]]
        expected += [[mlp + name for name in ("gate_proj", "up_proj")], [mlp + "down_proj"]]
    assert sorted(found) == sorted([*expected, ["lm_head"]])


def between(model: Readers, x: Tensor, call: int) -> None:
    x = x.clone()
    model.a(x)
    x[..., :1] += 1
    model.b(x), model.c(x)


def sometimes(model: Readers, x: Tensor, call: int) -> None:
    model.a(x), model.b(x if call % 2 else x.clone()), model.c(x)


def once_more(model: Readers, x: Tensor, call: int) -> None:
    model.a(x), model.b(x)
    if call == 1:
        model.b(x)


def led_twice(model: Readers, x: Tensor, call: int) -> None:
    if call:
        model.c(x)
    model.a(x), model.b(x)


def swapped(model: Readers, x: Tensor, call: int) -> None:
    for layer in (model.a, model.b) if call % 2 else (model.b, model.a):
        layer(x)


@pytest.mark.parametrize(
    ("how", "groups"),
    [
        (read_all, [["a", "b", "c"]]),
        (lambda m, x, _: (m.a(x), m.b(x.clone()), m.c(x.view(x.shape))), []),  # equal values are not the same tensor
        (between, [["b", "c"]]),
        (sometimes, []),
        (once_more, []),
        (led_twice, []),
        (swapped, []),
        (lambda m, x, _: (m.inner["d"](x), m.a(x), m.b(x)), [["a", "b"]]),  # another parent does not lead
        (lambda m, x, _: (m.a(input=x), m.b(x), m.c(input=x)), [["a", "b", "c"]]),
    ],
    ids=["same", "copies", "written", "sometimes", "once-more", "led-twice", "swapped", "parents", "keyword"],
)
def test_groups(how: Callable, groups: list[list[str]]) -> None:
    """Only layers that read the very same, unwritten tensor in every call are a group."""
    found = observed(Readers(how), inputs()[:2]).groups()
    assert [names for names in found if len(names) > 1] == groups
    names = [name for group in found for name in group]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_scores_over_several_batches(dtype: torch.dtype, keyword: bool) -> None:
    """The mean over every token of batches of different lengths, empty ones too, however the layer is called."""

    def call(model: Readers, x: Tensor, _: int) -> None:
        for layer in (model.a, model.b):
            layer(input=x) if keyword else layer(x)

    model, batches = Readers(call).to(dtype), [x.to(dtype) for x in inputs()]
    observer = observed(model, batches)
    x = torch.cat([batch.reshape(-1, 8) for batch in batches])
    assert observer.readers["a"].tokens == observer.readers["b"].tokens == x.shape[0] == 311
    assert observer.readers["c"].tokens == 0 and not observer.readers["c"].scores.any()
    for names in (["a"], ["b"], ["a", "b"]):
        weight = torch.cat([getattr(model, name).weight.detach() for name in names])
        scores = observer.scores(names)
        # One more rounding for each of the four batches, one for each layer, one for the division.
        allowed = (bound(x, weight) + 8 * 2.0**-24 * token_by_token(x.abs(), weight.abs())) / 311
        assert ((scores.double() - token_by_token(x, weight) / 311).abs() <= allowed).all(), names


def test_nothing_is_kept() -> None:
    """After the block hooks are gone and inputs are freed, also when the block fails."""
    model, x = Readers(read_all), inputs()[2]
    observer = SaliencyObserver(linears(model))
    alive = weakref.ref(x)
    with pytest.raises(RuntimeError, match="halfway"), torch.no_grad(), observer:
        model(x)
        assert all(layer._forward_pre_hooks for layer in linears(model).values())
        raise RuntimeError("halfway")
    del x
    gc.collect()
    assert alive() is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())
    before = {name: (reader.scores.clone(), reader.tokens) for name, reader in observer.readers.items()}
    model(inputs()[0])
    for name, reader in observer.readers.items():
        assert same(reader.scores, before[name][0]) and reader.tokens == before[name][1]
    held = [t for t in gc.get_referents(observer, vars(observer)) if isinstance(t, Tensor)]
    assert not held and observer._seen is None


def test_inputs_are_freed_while_observing() -> None:
    """Between two layers the observer keeps no input alive."""
    model = Readers(lambda m, x, _: m.a(x))
    with torch.no_grad(), SaliencyObserver(linears(model)):
        x = inputs()[0]
        alive = weakref.ref(x)
        model(x)
        del x
        assert alive() is None


class Products(TorchDispatchMode):
    """The shapes of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.shapes.append((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


def test_gram_matrix_is_shared() -> None:
    """Layers of a group compute X^T X once a batch; one whose own product is cheaper token by token computes none."""
    model = Readers(read_all)
    model.c = nn.Linear(8, 7)
    with Products() as products:
        observed(model, [inputs()[2], inputs()[2] + 1])
    grams = [shapes for shapes in products.shapes if shapes == ((8, 300), (300, 8))]
    # K (M + N) < 2 M N holds for b, c and d (6, 7 and 5 outputs), not for a (4): a goes token by token, b computes the
    # matrix, c reads it, and d, which has another parent, computes its own.
    assert len(grams) == 2 * 2
    with Products() as products:
        observed(Readers(lambda m, x, _: (m.c(x), m.a(x))), [inputs()[2]])
    assert not any(shapes == ((8, 300), (300, 8)) for shapes in products.shapes)


def test_without_scores_only_readers_are_seen() -> None:
    """score=False multiplies nothing, and still finds groups and counts tokens."""
    model = Readers(read_all)
    with Products() as products, torch.no_grad(), SaliencyObserver(linears(model), score=False) as observer:
        model(inputs()[2])
    assert all(left != (8, 300) and right[1] != 8 for left, right in products.shapes)
    assert ["a", "b", "c"] in observer.groups() and observer.readers["inner.d"].tokens == 300
    assert not any(reader.scores.any() for reader in observer.readers.values())


# --- second order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damp", [0.01, 0.3])
@sizes
def test_weight_saliency_is_the_dense_formula(size: tuple[int, int, int], damp: float) -> None:
    """sum_n w^2 / [chol(H^-1)]_jj^2 with the inverse and its Cholesky factor written out in float64."""
    x, weight = drawn(size)
    hessian = x.T @ x
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(size[2]).double()
    lower = torch.linalg.cholesky(torch.linalg.inv(damped))
    expected = weight.double().square().sum(0) / lower.diagonal().square()
    # Inverting loses as many digits as H's condition has: below 1e5 here, of 16.
    torch.testing.assert_close(weight_saliency(weight, hessian, damp), expected, rtol=1e-9, atol=0)


def test_weight_saliency_is_the_cost_of_removing_a_column() -> None:
    """For one channel left, or independent ones, it is the output's squared change; a silent channel costs nothing."""
    x, weight = drawn((300, 24, 8))
    x[:, 3] = 0.0
    last = (x[:, 7:] @ weight[:, 7:].T).double().square().sum()
    scores = weight_saliency(weight, x.T @ x, damp=0.0)
    torch.testing.assert_close(scores[7], last, rtol=1e-5, atol=0)
    assert scores[3] == 0 and (scores[[0, 1, 2, 4, 5, 6]] > 0).all()
    independent = torch.diag(torch.arange(1.0, 9.0))
    torch.testing.assert_close(
        weight_saliency(weight, independent, 0.0), weight.double().square().sum(0) * torch.arange(1.0, 9.0).double()
    )


@pytest.mark.parametrize(
    ("says", "weight", "hessian", "damp"),
    [
        (r"\[3, 3\]", torch.ones(2, 4), torch.eye(3), 0.01),
        ("damp is -1", torch.ones(2, 3), torch.eye(3), -1),
        ("NaN or Inf", torch.full((2, 3), torch.nan), torch.eye(3), 0.01),
        ("NaN or Inf", torch.ones(2, 3), torch.eye(3) * torch.inf, 0.01),
        ("raise damp", torch.ones(2, 3), torch.ones(3, 3) - 2 * torch.eye(3), 0.0),
        ("raise damp", torch.ones(2, 3), torch.ones(3, 3), 0.0),
    ],
)
def test_weight_saliency_refuses(says: str, weight: Tensor, hessian: Tensor, damp: float) -> None:
    """Shapes that do not belong together, a negative damp, what is not finite or not positive definite."""
    with pytest.raises(ValueError, match=says):
        weight_saliency(weight, hessian, damp)
