"""weight_only_linear: digits are the formula's, the product is a float product's within a derived bound, on every level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spiking import CHANNELS, DTYPES, ROUNDING, generator, layouts, random_tokens, same, special_tokens
from torch import Tensor

from ranvier import _C
from ranvier.ops import PackedWeight, SpikeFormat, digit_format, pack_weight, unpack_weight, weight_only_linear
from ranvier.reference.weight_only_linear import TOP, digit_count, radix_digits

pytestmark = pytest.mark.usefixtures("poisoned")
UNIT = 2.0**-24
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def packed(channels: int, out: int, group: int | None = None, seed: int = 1) -> tuple[PackedWeight, SpikeFormat]:
    form = digit_format(channels, group)
    return pack_weight(torch.randn(out, channels, generator=generator(seed)), None, form), form


def bound(x: Tensor, weight: Tensor, groups: int, bias: Tensor | None) -> Tensor:
    """How far y can be from the float64 truth, [M, N].

    A digit's step s is off by one rounding (u), and x^ = s c by half a step: s / 2 + u |x| a channel. Then every digit's float
    sum over the groups (2 u a group: the integer meets float, the fused sum) and scale (u), the sum of digits and the bias
    (3 u), of magnitudes that add up to at most 1.01 |x^| |W| where the digits' signs agree and three times that where not.
    """
    step = x.float().abs().amax(-1, keepdim=True).double() / TOP[digit_count(x.dtype)]
    size = (x.double().abs() + step) @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    return (step / 2 * 1.0001) * weight.double().abs().sum(-1) + 3 * UNIT * (2 * groups + 6) * size + 1e-37


@dtypes
@pytest.mark.parametrize("digits", (1, 2, 3))
@given(channels=st.sampled_from(CHANNELS), seed=st.integers(0, 2**31))
def test_digits_add_up_to_the_number(dtype: torch.dtype, digits: int, channels: int, seed: int) -> None:
    """s sum_p 256^p d_p is x to half a step, and the largest magnitude takes the largest number."""
    x = random_tokens(5, channels, dtype, generator(seed)).float()
    codes, step = radix_digits(x, digits)
    assert codes.dtype == torch.int8 and codes.shape == (5, digits, channels)
    number = sum(codes[:, p].double() * 256**p for p in range(digits))
    assert (number.abs() <= TOP[digits]).all()
    # The division by the rounded step may end half a unit below the top, and round down.
    assert (number.abs().amax(-1) >= TOP[digits] - 1).all()
    assert ((number * step.double() - x.double()).abs() <= step.double() * (0.5 + TOP[digits] * 2 * UNIT)).all()


@dtypes
@pytest.mark.parametrize("group", (None, 32))
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (37, 21), (64, 32), (129, 65), (576, 40)], ids=str)
def test_values(isa: str, dtype: torch.dtype, group: int | None, shape: tuple[int, int]) -> None:
    """y = x W^^T + b within the bound, for more tokens than are held at a time."""
    channels, out = shape
    weight, form = packed(channels, out, group)
    x = random_tokens(131, channels, dtype, generator(2))
    x = torch.cat([x, special_tokens(channels, dtype).clamp(-1e30, 1e30) if dtype != torch.float16 else x[:2]])
    bias = torch.randn(out, generator=generator(3)).to(dtype)
    y = weight_only_linear(x, weight, form, out, bias)
    dense = unpack_weight(weight, None, form, out)
    truth = x.double() @ dense.double().T + bias.double()
    allowed = bound(x, dense, sum(form.groups), bias)
    allowed = allowed + (truth.abs() + allowed) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)
    inside = truth.abs() < torch.finfo(dtype).max
    assert y.dtype == dtype and ((y.double() - truth).abs() <= allowed)[inside].all()


@dtypes
def test_levels_and_threads_give_equal_bits(dtype: torch.dtype, threads: None) -> None:
    """Every instruction-set level and thread count writes the same bits; each token those it gets alone."""
    weight, form = packed(97, 70, None)
    x, results, before = random_tokens(300, 97, dtype, generator()), [], _C.isa()
    try:
        for level in _C.isa_levels()[: _C.isa_levels().index(_C.detected_isa()) + 1]:
            _C.set_isa(level)
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(weight_only_linear(x, weight, form, 70))
    finally:
        _C.set_isa(before)
    assert all(same(results[0], y) for y in results[1:])
    assert same(results[0][7:8], weight_only_linear(x[7:8], weight, form, 70))


@dtypes
def test_layouts(dtype: torch.dtype) -> None:
    """Strided, offset, expanded and read-only inputs give what contiguous ones give."""
    weight, form = packed(33, 20)
    x = random_tokens(6, 33, dtype, generator())
    for name, view in layouts(x):
        expected = weight_only_linear(view.clone(memory_format=torch.contiguous_format), weight, form, 20)
        assert same(weight_only_linear(view, weight, form, 20), expected), name
    bias, wide = torch.randn(20, 2, dtype=dtype)[:, 0], [torch.stack([t, t], -1)[..., 0] for t in weight[:3]]
    given = weight._replace(packed=wide[0], scale=wide[1], zero=wide[2])
    expected = weight_only_linear(x, weight, form, 20, bias.contiguous())
    assert not wide[0].is_contiguous() and same(weight_only_linear(x, given, form, 20, bias), expected)


def test_not_finite_touches_its_own_token(isa: str) -> None:
    """A token with NaN or Inf is NaN throughout, the others are what they were; no token and no output are fine."""
    weight, form = packed(40, 9)
    x = torch.randn(5, 40, generator=generator())
    clean = weight_only_linear(x, weight, form, 9)
    x[1, 3], x[3, 39] = float("nan"), -float("inf")
    y = weight_only_linear(x, weight, form, 9)
    assert y[[1, 3]].isnan().all() and same(y[[0, 2, 4]], clean[[0, 2, 4]])
    assert weight_only_linear(x[:0], weight, form, 9).shape == (0, 9)


def test_zero_token_gives_exactly_the_bias() -> None:
    """Zeros and subnormals give the bias."""
    weight, form = packed(24, 9)
    bias = torch.randn(9, generator=generator(4))
    x = torch.zeros(2, 24)
    x[1] = 1e-44
    assert torch.equal(weight_only_linear(x, weight, form, 9, bias), bias.expand(2, 9))


@dtypes
def test_gradient_is_the_float_products(dtype: torch.dtype) -> None:
    """dx = dy W^, db = sum dy, each in x's dtype."""
    weight, form = packed(24, 9)
    x = torch.randn(4, 24, generator=generator()).to(dtype).requires_grad_()
    bias = torch.randn(9).to(dtype).requires_grad_()
    grad = torch.randn(4, 9, generator=generator(6)).to(dtype)
    weight_only_linear(x, weight, form, 9, bias).backward(grad)
    assert torch.equal(x.grad, grad @ unpack_weight(weight, None, form, 9).to(dtype)) and torch.equal(bias.grad, grad.sum(0))


@pytest.mark.parametrize("learned", ["x", "bias"])
def test_gradient_of_one_alone(learned: str) -> None:
    """A frozen input or a frozen bias has no part in the other's gradient."""
    weight, form = packed(24, 9)
    given = {"x": torch.randn(4, 24, requires_grad=learned == "x"), "bias": torch.randn(9, requires_grad=learned == "bias")}
    weight_only_linear(given["x"], weight, form, 9, given["bias"]).sum().backward()
    expected = {"x": unpack_weight(weight, None, form, 9).sum(0).expand(4, 24), "bias": torch.full((9,), 4.0)}
    # Sums of nine numbers of some tenths.
    torch.testing.assert_close(given[learned].grad, expected[learned], rtol=1e-5, atol=1e-6)
    assert all(t.grad is None for name, t in given.items() if name != learned)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(x=a["x"].double()), TypeError, "x is torch.float64; pass float32"),
        (lambda a: a.update(x=a["x"][:, :20]), ValueError, "x has 20 channels .* takes 24"),
        (lambda a: a.update(x=torch.tensor(1.0)), ValueError, "no dimensions"),
        (lambda a: a.update(bias=torch.zeros(8)), ValueError, r"bias has shape \[8\]; it must be \[9\]"),
        (lambda a: a.update(out_features=40), ValueError, "weight_packed has shape"),
        (
            lambda a: a.update(weight=a["weight"]._replace(scale=a["weight"].scale.half())),
            TypeError,
            "weight_scale is torch.float16",
        ),
    ],
)
def test_refused(change: object, error: type, message: str) -> None:
    """A mistake says what came and what is allowed."""
    weight, form = packed(24, 9)
    given = {"x": torch.zeros(2, 24), "weight": weight, "form": form, "out_features": 9, "bias": None}
    change(given)
    with pytest.raises(error, match=message):
        weight_only_linear(**given)
