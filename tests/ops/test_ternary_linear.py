"""ternary_linear: exact integers on every level, additions alone give them too, float results inside a derived bound."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking import CHANNELS, DTYPES, LEVELS, ROUNDING, generator, layouts, random_mask, random_tokens, same, special_tokens
from stories import Stories
from torch import Tensor

import ranvier
from ranvier import _C
from ranvier.methods.spikellm.saliency import salient_mask, weight_saliency
from ranvier.ops import (
    PackedWeight,
    TernaryFormat,
    dequantize_ternary,
    pack_ternary,
    spike_encode,
    ternary_format,
    ternary_linear,
    ternary_linear_dynamic,
    unpack_ternary,
)
from ranvier.reference import ternary_linear as reference

pytestmark = pytest.mark.usefixtures("poisoned")
shares = pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
OUTPUTS = (1, 5, 16, 31, 32, 33, 64, 67)
ACT_BITS = (1, 2, 4, 7, 8)


def random_weight(mask: Tensor, out: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q up to 3 (ordinary) and 15 (salient), scales, zero points up to 15."""
    q = torch.randint(0, 16, (out, mask.numel()), generator=g, dtype=torch.uint8)
    scale = torch.rand(out, 2, generator=g) + 0.1
    return torch.where(mask, q, q % 4), scale, torch.randint(0, 16, (out, 2), generator=g, dtype=torch.uint8)


def packed(mask: Tensor, out: int, g: torch.Generator, act_bits: int = 8) -> tuple[PackedWeight, TernaryFormat]:
    form = ternary_format(mask.numel(), int(mask.sum()), act_bits)
    return pack_ternary(*random_weight(mask, out, g), mask, form), form


def layer(share: float, channels: int, out: int) -> tuple[PackedWeight, TernaryFormat, Tensor, Tensor]:
    mask = random_mask(channels, share, generator(5))
    return *packed(mask, out, generator(6)), torch.randn(out, generator=generator(7)), mask


@settings(max_examples=40)
@given(
    channels=st.sampled_from(CHANNELS),
    tokens=st.integers(0, 27),
    out=st.sampled_from(OUTPUTS),
    share=st.sampled_from((0.0, 0.2, 0.5, 1.0)),
    extreme=st.sampled_from((None, None, -128, 127)),
    seed=st.integers(0, 2**31),
)
def test_integers_are_exact(
    isa: str, channels: int, tokens: int, out: int, share: float, extreme: int | None, seed: int
) -> None:
    """With every scale one the output is sum_k c (q - z), for any int8 code, below 2^24 exact in float32."""
    g = generator(seed)
    mask = random_mask(channels, share, g)
    q, _, zero = random_weight(mask, out, g)
    codes = torch.randint(-128, 128, (tokens, channels), generator=g).to(torch.int8)
    if extreme is not None:
        codes[:], zero[:] = extreme, 0
        q = torch.where(mask, 15, 3).to(torch.uint8).expand(out, channels)
    expected = codes.long() @ (q.long() - zero.long()[:, mask.long()]).T
    weight = pack_ternary(q, torch.ones(out, 2), zero, mask, ternary_format(channels, int(mask.sum())))
    got = ternary_linear(codes, torch.ones(tokens, 1), weight, out, salient_mask=mask)
    assert got.dtype == torch.float32 and torch.equal(got.long(), expected) and torch.equal(got, got.round())


@pytest.mark.parametrize("sign", [-128, 127])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 12])
def test_int16_window(isa: str, sign: int, tokens: int) -> None:
    """All-max codes and weights about the AVX2 windows, 43 ordinary blocks of four and 8 salient ones."""
    assert 43 * 2 * 3 * 127 <= 32767 < 44 * 2 * 3 * 127 and 8 * 2 * 15 * 128 <= 32767 and 42 * 2 * 3 * 128 <= 32767
    for blocks in (7, 8, 9, 17, 41, 42, 43, 44, 86, 88):
        for share in (0.0, 1.0):
            mask = torch.full((4 * blocks + 1,), bool(share))
            q = torch.full((33, mask.numel()), 15 if share else 3, dtype=torch.uint8)
            zero, scale = torch.zeros(33, 2, dtype=torch.uint8), torch.ones(33, 2)
            weight = pack_ternary(q, scale, zero, mask, ternary_format(mask.numel(), int(mask.sum())))
            codes = torch.full((tokens, mask.numel()), sign, dtype=torch.int8)
            got = ternary_linear(codes, torch.ones(tokens, 1), weight, 33, salient_mask=mask)
            assert torch.equal(got, torch.full((tokens, 33), float(sign * int(q[0].long().sum()))))


@shares
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_additions_alone_give_the_product(isa: str, share: float, steps: int) -> None:
    """Output = (sum of the +1 columns) - (sum of the -1 columns), step by step; packing loses nothing.  # spec spikellm O20"""
    mask = random_mask(61, share, generator(2))
    weight = torch.randn(35, 61, generator=generator(3)) * torch.where(mask, 4.0, 1.0)
    q, _, zero = reference.quantize_ternary(weight, mask, steps, "shared")
    form = ternary_format(61, int(mask.sum()))
    stored = pack_ternary(q, torch.ones(35, 2), zero, mask, form)
    again, _, _ = unpack_ternary(stored, mask, form, 35)
    assert torch.equal(again, q)
    codes = torch.randint(-127, 128, (6, 61), generator=generator(4)).to(torch.int8)
    counts = again.long() - zero.long()[:, mask.long()]
    assert counts.abs().max() <= steps
    added = reference.add_only(codes, counts, steps)
    got = ternary_linear(codes, torch.ones(6, 1), stored, 35, salient_mask=mask)
    assert torch.equal(got.long(), added)
    spikes = reference.weight_spikes(counts, steps)
    assert set(spikes.unique().tolist()) <= {-1, 0, 1} and torch.equal(spikes.long().sum(0), counts)
    # An ordinary channel spikes at most once.
    assert not bool(spikes[1:, :, ~mask].any())


def bound_of(codes: Tensor, scale: Tensor, weight: tuple, bias: Tensor | None, mask: Tensor) -> Tensor:
    """How far y of the compiled epilogue can be from the float64 truth, [M, N].

    With u = 2^-24 each range converts its integer sum (u |sum|), multiplies by s_w (u) and adds s_x times it to y in one
    fused operation (u |partial sum|). Second-order terms are below a percent; underflow adds at most 2^-149 a step.
    """
    q, weight_scale, zero = weight
    columns = mask.long()
    signed = q.double() - zero.double()[:, columns]
    terms = [
        scale.double() * weight_scale[:, r].double() * (codes[:, columns == r].double() @ signed[:, columns == r].T).abs()
        for r in (0, 1)
    ]
    size = terms[0] + terms[1] + (0 if bias is None else bias.double().abs())
    return 1.01 * 2.0**-24 * (2 * (terms[0] + terms[1]) + 2 * size) + 8 * 2.0**-149


@settings(max_examples=40)
@given(
    act_bits=st.sampled_from(ACT_BITS),
    channels=st.sampled_from(CHANNELS),
    tokens=st.integers(0, 27),
    out=st.sampled_from(OUTPUTS),
    share=st.sampled_from((0.0, 0.2, 1.0)),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from((None, *DTYPES)),
    seed=st.integers(0, 2**31),
)
def test_levels_agree_and_float64_confirms(
    act_bits: int, channels: int, tokens: int, out: int, share: float,
    dtype: torch.dtype, bias_dtype: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    """Every level gives the scalar level's bits, in every output type; those lie within the bound of the float64 formula."""
    g = generator(seed)
    mask = random_mask(channels, share, g)
    weight, form = packed(mask, out, g, act_bits)
    bias = None if bias_dtype is None else torch.randn(out, generator=g).to(bias_dtype)
    x = torch.randn(tokens, channels, generator=g).to(dtype)
    before, results = _C.isa(), []
    for level in LEVELS:
        _C.set_isa(level)
        results.append(ternary_linear_dynamic(x, weight, form, out, bias, mask))
    _C.set_isa(before)
    assert all(same(y, results[0]) for y in results)
    encoded = spike_encode(x, act_bits=act_bits, steps=1, backend="reference")
    codes = ternary_linear(encoded.codes, encoded.scale, weight, out, bias, mask, dtype=dtype)
    assert same(codes, results[0])
    unpacked = unpack_ternary(weight, mask, form, out)
    truth = reference.ternary_linear(encoded.codes, encoded.scale, *unpacked, bias, mask)
    bound = bound_of(encoded.codes, encoded.scale, unpacked, bias, mask)
    # The last rounding, to the output type: half its spacing, 2^-25 where float16 is subnormal.
    bound = bound + (truth.abs() + bound) * ROUNDING[dtype] + (2.0**-25 if dtype == torch.float16 else 0)
    assert results[0].dtype == dtype and ((results[0].double() - truth).abs() <= bound).all()


@shares
@dtypes
def test_rows_do_not_know_each_other(isa: str, share: float, dtype: torch.dtype) -> None:
    """Row m of a batch has the bits of the row alone.  # spec spikellm O17"""
    weight, form, bias, mask = layer(share, 70, 37)
    x = random_tokens(26, 70, dtype, generator())
    alone = torch.cat([ternary_linear_dynamic(x[m : m + 1], weight, form, 37, bias, mask) for m in range(26)])
    for tokens in (2, 3, 4, 5, 11, 12, 13, 25, 26):
        assert same(ternary_linear_dynamic(x[:tokens], weight, form, 37, bias, mask), alone[:tokens])


def test_channel_order_does_not_matter(isa: str) -> None:
    """Permuting K of x, W and the mask together leaves every bit of y.  # spec spikellm O7"""
    mask, g = random_mask(131, 0.2, generator(5)), generator(6)
    q, scale, zero = random_weight(mask, 40, g)
    form, x, order = ternary_format(131, int(mask.sum())), torch.randn(9, 131, generator=g), torch.randperm(131, generator=g)
    plain = ternary_linear_dynamic(x, pack_ternary(q, scale, zero, mask, form), form, 40, None, mask)
    moved = pack_ternary(q[:, order], scale, zero, mask[order], form)
    assert same(ternary_linear_dynamic(x[:, order], moved, form, 40, None, mask[order]), plain)


@shares
@dtypes
def test_special_tokens(share: float, dtype: torch.dtype) -> None:
    """Subnormal, huge and constant tokens have equal bits on all levels, zero ones the bias; NaN and Inf stay in their row."""
    weight, form, bias, mask = layer(share, 67, 37)
    x = torch.cat([special_tokens(67, dtype), random_tokens(3, 67, dtype, generator())])
    spoiled = x.clone()
    spoiled[14, 66], spoiled[15, 0] = float("nan"), float("-inf")
    before, results = _C.isa(), []
    for level in LEVELS:
        _C.set_isa(level)
        results.append((ternary_linear_dynamic(x, weight, form, 37, bias, mask),
                        ternary_linear_dynamic(spoiled, weight, form, 37, bias, mask)))  # fmt: skip
    _C.set_isa(before)
    assert all(same(y, results[0][0]) and same(z, results[0][1]) for y, z in results)
    y, z = results[0]
    assert same(y[0], bias.to(dtype)) and same(z[:14], y[:14]) and z[14:].isnan().all()


@shares
def test_layouts(isa: str, share: float) -> None:
    """Strided, offset, expanded, oddly addressed and read-only tokens and codes; strided weights; inputs unchanged."""
    weight, form, bias, mask = layer(share, 33, 37)
    strided = PackedWeight(*(None if t is None else torch.stack([t, t], -1)[..., 0] for t in weight))
    strided_bias, strided_mask = torch.stack([bias, bias], 1)[:, 1], torch.stack([mask, mask], 1)[:, 1]
    for name, x in layouts(random_tokens(6, 33, torch.float32, generator())):
        before = x.clone()
        expected = ternary_linear_dynamic(before.contiguous(), weight, form, 37, bias, mask)
        assert same(ternary_linear_dynamic(x, strided, form, 37, strided_bias, strided_mask), expected), name
        assert same(x, before), name
    encoded = spike_encode(random_tokens(6, 33, torch.float32, generator()), act_bits=8, steps=1)
    expected = ternary_linear(encoded.codes, encoded.scale, weight, 37, bias, mask)
    codes, scale = (torch.stack([t, t], -1)[..., 0] for t in encoded[:2])
    assert same(ternary_linear(codes, scale, strided, 37, strided_bias, strided_mask), expected)


def test_threads_and_repeats(isa: str, threads: None) -> None:
    """One thread, two threads and repeats give the same bits, with few outputs and with few tokens."""
    for tokens, out in ((70, 40), (2, 1500)):
        weight, form, bias, mask = layer(0.2, 515, out)
        x = random_tokens(tokens, 515, torch.float32, generator())
        torch.set_num_threads(1)
        single = ternary_linear_dynamic(x, weight, form, out, bias, mask)
        torch.set_num_threads(2)
        for _ in range(30 if isa != "scalar" else 2):
            assert same(ternary_linear_dynamic(x, weight, form, out, bias, mask), single)


@given(out=st.integers(1, 70), low=st.integers(0, 70), salient=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_packing_round_trips(out: int, low: int, salient: int, seed: int) -> None:
    """unpack_ternary inverts pack_ternary; the filled-up channels and outputs are zero; 2 and 4 bits a weight are stored."""
    if low + salient == 0:
        return
    g = generator(seed)
    mask = torch.arange(low + salient)[torch.randperm(low + salient, generator=g)] < salient
    q, scale, zero = random_weight(mask, out, g)
    form = ternary_format(low + salient, salient)
    stored = pack_ternary(q, scale, zero, mask, form)
    assert stored.packed.shape == (-(-out // 32), -(-low // 8) + -(-salient // 4), 64)
    got = unpack_ternary(stored, mask, form, out)
    assert torch.equal(got[0], q)
    for column, used in ((0, low), (1, salient)):
        if used:
            assert same(got[1][:, column], scale[:, column]) and same(got[2][:, column], zero[:, column])
    bits = sum(int((stored.packed >> shift & 1).long().sum()) for shift in range(8))
    assert bits == sum(int((q >> shift & 1).long().sum()) for shift in range(4))


# --- quantizers -------------------------------------------------------------------------------------------------------


def heavy_tailed(rows: int, channels: int) -> Tensor:
    """Student t with 4 degrees of freedom, columns of log-normal sizes."""
    weight = torch.distributions.StudentT(4.0).sample((rows, channels))
    return weight * torch.exp(0.5 * torch.randn(channels))


@pytest.mark.parametrize("span", ["shared", "separate"])
@pytest.mark.parametrize(("grid", "steps"), [("consistent", 1), ("consistent", 2), ("consistent", 5), ("compat", 4)])
def test_uniform_grid(span: str, grid: str, steps: int) -> None:
    """Codes within 0..3 and 0..3 T, s_0 = T s_1 where ranges are shared, errors of half a step (one at a moved end)."""
    weight, mask = heavy_tailed(40, 128), random_mask(128, 0.25, generator(2))
    weight[3], weight[4] = 0.0, 2.5
    q, scale, zero = reference.quantize_uniform(weight, mask, steps, span, grid)
    top = 4 * steps - 1 if grid == "compat" else 3 * steps
    assert int(q[:, ~mask].max()) <= 3 and int(q[:, mask].max()) == top <= 15
    if span == "shared" and grid == "consistent":
        assert same(scale[:, 0], steps * scale[:, 1])
    error = (reference.dequantize_weight(q, scale, zero, mask) - weight).abs()
    step = scale[:, mask.long()]
    assert (error <= 1.001 * step).all() and (error <= 0.501 * step).float().mean() > 0.9
    assert error[3].max() == 0 and error[4].max() <= 2.0**-21 * 2.5


@pytest.mark.parametrize("span", ["shared", "separate"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ternary_step_is_nearly_the_best(span: str, steps: int) -> None:
    """The squared error is within 3 % of the best of 400 steps, on average, 40 % at worst; zero rows stay zero."""
    weight, mask = heavy_tailed(24, 160), random_mask(160, 0.2, generator(2))
    weight[5] = 0.0
    q, scale, zero = reference.quantize_ternary(weight, mask, steps, span)
    assert int(q[:, ~mask].max()) == 2 and steps + 1 <= int(q[:, mask].max()) <= 2 * steps
    assert zero.tolist() == [[1, steps]] * 24
    decoded = reference.dequantize_weight(q, scale, zero, mask)
    assert not bool(decoded[5].any())
    kinds = (~mask, mask) if span == "separate" else (torch.ones_like(mask),)
    for kind in kinds:
        part, tops = weight[:, kind], torch.where(mask, float(steps), 1.0)[kind]
        candidates = torch.linspace(0.015, 6.0, 400)[:, None] * part.abs().mean(-1).clamp(min=1e-9)
        errors = [(part - s[:, None] * reference.ternary_counts(part, s, tops)).square().sum(-1) for s in candidates]
        found = (part - decoded[:, kind]).square().sum(-1)
        best = torch.stack(errors).amin(0)
        share = (found / best)[best > 0]
        assert len(share) == 23 and share.mean() <= 1.03 and share.max() <= 1.4


def test_no_channel_or_every_channel_salient() -> None:
    """Steps without a salient channel change nothing; with all of them salient the grid is the finer one."""
    weight, none, every = heavy_tailed(16, 64), torch.zeros(64, dtype=torch.bool), torch.ones(64, dtype=torch.bool)
    for grid in ("uniform", "ternary"):
        rule = {"weight_grid": grid, "span": "shared", "grid": "consistent"}
        decoded = {}
        for steps, mask in ((1, none), (4, none), (4, every)):
            q, scale, zero = reference.quantize_weight(weight, mask, steps=steps, **rule)
            decoded[steps, mask is every] = reference.dequantize_weight(q, scale, zero, mask)
        torch.testing.assert_close(decoded[1, False], decoded[4, False], rtol=1e-6, atol=1e-6)
        fine, coarse = ((decoded[key] - weight).square().sum() for key in ((4, True), (4, False)))
        assert fine < 0.5 * coarse


def output_error(weight: Tensor, approximation: Tensor, x: Tensor) -> float:
    """|X (W - W^)^T| / |X W^T|."""
    return float((x @ (weight - approximation).T).norm() / (x @ weight.T).norm())


def errors_at_equal_steps(weight: Tensor, x: Tensor, steps: tuple[int, ...]) -> list[float]:
    """Output errors of partial binarization with 5 % of the columns in 8 bits, then of ternary weights with as many steps."""
    scores = weight_saliency(weight, x.T @ x)
    kept = salient_mask(scores, 0.05)
    budget = reference.equal_steps(float(kept.float().mean()), 8)
    found = [output_error(weight, reference.binarize_partially(weight, kept), x)]
    for count in steps:
        mask = torch.zeros_like(kept)
        mask[scores.topk(math.floor((budget - 1) / (count - 1) * weight.shape[1])).indices] = True
        assert reference.equal_steps(float(mask.float().mean()), count) <= budget + 1e-9
        quantized = reference.quantize_ternary(weight, mask, count, "shared")
        found.append(output_error(weight, reference.dequantize_weight(*quantized, mask), x))
    return found


def test_ternary_beats_partial_binarization_on_heavy_tails() -> None:
    """At equal steps, 1.4 a weight, ternary spikes on salient columns err less than 8 bits on fewer of them."""
    weight, x = heavy_tailed(128, 256), torch.randn(512, 256) * torch.exp(0.7 * torch.randn(256))
    binary, *ternary = errors_at_equal_steps(weight, x, (2, 4, 7))
    assert max(ternary) < binary


def test_ternary_beats_partial_binarization_on_a_trained_model() -> None:
    """The same on every linear layer of a trained Llama and the inputs it sees: on average below 0.85 of the error."""
    errors = torch.tensor([errors_at_equal_steps(weight, x, (2, 4, 7)) for weight, x in Stories().linear_inputs()])
    assert len(errors) == 35
    assert (errors[:, 1:].mean(0) < 0.85 * errors[:, 0].mean()).all()


# --- refusals ---------------------------------------------------------------------------------------------------------

W, FORM, BIAS, MASK = layer(0.3, 16, 5)
X, N = torch.zeros(2, 16), 5


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (TypeError, "float64", (X.double(), W, FORM, N, BIAS, MASK)),
        (ValueError, "15 channels", (torch.zeros(2, 15), W, FORM, N, BIAS, MASK)),
        (ValueError, r"bias has shape \[4\]", (X, W, FORM, N, BIAS[:4], MASK)),
        (TypeError, "weight_scale", (X, W._replace(scale=W.scale.half()), FORM, N, BIAS, MASK)),
        (TypeError, "weight_packed", (X, W._replace(packed=W.packed.view(torch.int8)), FORM, N, BIAS, MASK)),
        (ValueError, "weight_zero", (X, W._replace(zero=W.zero[..., :31]), FORM, N, BIAS, MASK)),
        (ValueError, "weight_packed", (X, W, FORM, 33, None, MASK)),
        (ValueError, "weight_packed", (X, W, ternary_format(16, 0), N, BIAS, MASK)),
        (TypeError, "salient_mask", (X, W, FORM, N, BIAS, MASK.float())),
        (ValueError, "salient_mask", (X, W, FORM, N, BIAS, None)),
        (ValueError, "1 to 8 bits", (X, W, dataclasses.replace(FORM, act_bits=9), N, BIAS, MASK)),
    ],
)
def test_bad_input(error: type, says: str, arguments: tuple) -> None:
    """Tensors that do not belong together have an error that says what came and what is allowed."""
    with pytest.raises(error, match=says):
        ternary_linear_dynamic(*arguments)


def test_clipped_activations_equal_the_reference() -> None:
    """act_clip reaches the codes of both; other values than without it."""
    x, form = torch.randn(3, 16), dataclasses.replace(FORM, act_clip=0.5)
    mine, theirs = (ternary_linear_dynamic(x, W, form, N, BIAS, MASK, backend=backend) for backend in (None, "reference"))
    # 16 products of an exact integer sum: a few roundings of values of some units.
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert (mine - ternary_linear_dynamic(x, W, FORM, N, BIAS, MASK)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    """dx = dy W^ in x's type."""
    x, dy = torch.randn(3, 16).to(dtype).requires_grad_(), torch.randn(3, N).to(dtype)
    ternary_linear_dynamic(x, W, FORM, N, BIAS, MASK).backward(dy)
    assert torch.equal(x.grad, dy @ dequantize_ternary(W, MASK, FORM, N).to(dtype))


def test_bad_codes() -> None:
    """Codes, scales, masks and output types that do not fit are refused by name."""
    codes, scale = torch.zeros(2, 16, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(TypeError, match="codes"):
        ternary_linear(X, scale, W, N, BIAS, MASK)
    with pytest.raises(ValueError, match="scale"):
        ternary_linear(codes, scale[:1], W, N, BIAS, MASK)
    with pytest.raises(ValueError, match="weight_packed has shape"):
        ternary_linear(codes, scale, W._replace(packed=W.packed[:, :-1]), N, BIAS, MASK)
    with pytest.raises(ValueError, match="scale is on meta"):
        ternary_linear(codes, scale.to("meta"), W, N, BIAS, MASK)
    with pytest.raises(TypeError, match="float64"):
        ternary_linear(codes, scale, W, N, BIAS, MASK, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not mark as many channels"):
        ternary_linear(codes, scale, W, N, BIAS, torch.ones_like(MASK), salient_count=int(MASK.sum()))
    with pytest.raises(ranvier.BackendError, match="backend 'triton' cannot run"):
        ternary_linear(codes, scale, W, N, BIAS, MASK, backend="triton")


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("q of an ordinary channel is 4", lambda q, s, z: (q.clone().fill_(4), s, z)),
        ("q of a salient channel is 16", lambda q, s, z: (torch.where(MASK, 16, q).to(torch.uint8), s, z)),
        ("zero of an ordinary channel is 16", lambda q, s, z: (q, s, z + 16)),
        (r"scale has shape \[5, 1\]", lambda q, s, z: (q, s[:, :1], z)),
        (r"zero has shape \[5, 1\]", lambda q, s, z: (q, s, z[:, :1])),
        ("scale has NaN or Inf", lambda q, s, z: (q, s / 0, z)),
        (r"q has shape \[5, 15\]", lambda q, s, z: (q[:, :15], s, z)),
    ],
)
def test_bad_weights(says: str, change) -> None:
    """Codes and zero points that 2 or 4 bits do not hold are not packed."""
    given_weight = (torch.zeros(5, 16, dtype=torch.uint8), torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=says):
        pack_ternary(*change(*given_weight), MASK, FORM)


def test_formats_of_other_rules_are_refused() -> None:
    """Activations of 2-bit weights take one step in one range: another format says what to use."""
    for change in ({"steps": 2}, {"span": "separate"}, {"grid": "compat"}, {"group_size": 32}):
        with pytest.raises(ValueError, match="ternary_format"):
            dataclasses.replace(FORM, **change).check("ternary_linear")
    assert dequantize_ternary(W, MASK, FORM, N).shape == (5, 16)
