"""weight_only_linear on the kernels of spike_linear, by the interpreter."""

from __future__ import annotations

import pytest
import torch
from spiking import generator
from triton_tools import interpreted

from ranvier.ops import digit_format, pack_weight
from ranvier.ops.spike_linear import unpack_weight
from ranvier.ops.weight_only_linear import triton
from ranvier.reference.weight_only_linear import TOP, digit_count

N, K = 70, 90


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 0), (torch.float32, 32), (torch.float16, 0)])
def test_products_are_the_float64_ones(dtype: torch.dtype, group: int) -> None:
    """One token and several, with a bias; a token that is not finite gives NaN and touches no other.

    Half a step of each activation, with u = 2^-24 some 8 u of the sum of all terms (three digits, their groups' partial sums,
    the bias), and half a unit of the result's type.
    """
    form = digit_format(K, group)
    g = generator(1)
    weight = pack_weight(torch.randn(N, K, generator=g), None, form)
    bias = torch.randn(N, generator=g)
    value = unpack_weight(weight, None, form, N).double()
    for tokens in (1, 7):
        x = torch.randn(tokens, K, generator=g).to(dtype)
        x[1:2, 3] = float("nan")
        with interpreted():
            y = triton(x, *weight[:3], bias, N, group)
        keep = torch.arange(tokens) != 1
        assert y.dtype == dtype and bool(y[~keep].isnan().all())
        wide = x[keep].double()
        truth, size = bias.double() + wide @ value.T, bias.double().abs() + wide.abs() @ value.T.abs()
        half_step = wide.abs().amax(1, keepdim=True) / TOP[digit_count(dtype)] / 2 * value.abs().sum(1)
        bound = half_step + 8 * 2.0**-24 * size + (0 if dtype == torch.float32 else 2.0**-11) * truth.abs()
        assert bool(((y[keep].double() - truth).abs() <= 1.001 * bound).all())


def test_no_tokens_give_no_outputs() -> None:
    """[0, K] -> [0, N], whatever lies in front."""
    weight = pack_weight(torch.randn(N, K, generator=generator(1)), None, digit_format(K))
    with interpreted():
        assert triton(torch.empty(2, 0, K), *weight[:3], None, N, 0).shape == (2, 0, N)
