"""What the tests of spike_encode, spike_linear and SpikingLinear share: formats, tokens, layouts, exact comparisons, bounds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier import _C, SpikeConfig
from ranvier.nn import SpikingLinear
from ranvier.ops import PackedWeight, SpikeFormat
from ranvier.ops.spike_linear import _by_block, _by_output, pack_codes, unpack_codes
from ranvier.reference.spike_encode import SpikeCodes, group_sums
from ranvier.reference.spike_linear import group_index, integer_products

LEVELS = _C.isa_levels()[: _C.isa_levels().index(_C.detected_isa()) + 1]  # what this processor has
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One below, at and above the widths that kernels step by (4, 8, 16, 32, 64, 128), and primes.
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129, 131, 257)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half the spacing of the output type


def codes_fit(act_bits: int, steps: int, span: str, grid: str) -> bool:
    if grid == "compat" and (act_bits == 8 or steps & (steps - 1)):
        return False
    if span == "separate" or act_bits == 8:
        return steps <= 2  # such codes take one step, whatever is asked
    return ((steps << act_bits) - 1 if grid == "compat" else steps * (2**act_bits - 1)) <= 127


RULES = [
    {"act_bits": bits, "steps": steps, "span": span, "grid": grid}
    for span in ("shared", "separate")
    for grid in ("consistent", "compat")
    for bits in range(1, 9)
    for steps in (1, 2, 3, 4, 8, 127)
    if codes_fit(bits, steps, span, grid)
]
# The formats the paper and its comparison use, and the extremes of the range of codes.
MAIN_RULES = [
    {"act_bits": 4, "steps": 2, "span": "shared", "grid": "consistent"},
    {"act_bits": 4, "steps": 4, "span": "shared", "grid": "consistent"},
    {"act_bits": 4, "steps": 1, "span": "shared", "grid": "consistent"},
    {"act_bits": 4, "steps": 2, "span": "shared", "grid": "compat"},
    {"act_bits": 4, "steps": 4, "span": "shared", "grid": "compat"},
    {"act_bits": 4, "steps": 1, "span": "separate", "grid": "consistent"},
    {"act_bits": 4, "steps": 1, "span": "separate", "grid": "compat"},
    {"act_bits": 8, "steps": 1, "span": "shared", "grid": "consistent"},
]


def rule_id(rule: dict) -> str:
    return f"{rule['span']}-{rule['grid']}-A{rule['act_bits']}-T{rule['steps']}"


def format_of(mask: Tensor, rule: dict, group_size: int | None = None) -> SpikeFormat:
    return SpikeFormat(mask.numel(), int(mask.sum()), **rule, group_size=group_size or 0)


def random_mask(channels: int, share: float, generator: torch.Generator) -> Tensor:
    """About `share` of the channels; all of them for 1."""
    return torch.rand(channels, generator=generator) < share


def special_tokens(channels: int, dtype: torch.dtype) -> Tensor:
    """Tokens where quantizers go wrong: [13, K]."""
    top, one_hot = torch.finfo(dtype).max, torch.zeros(channels)
    one_hot[channels // 2] = -3.5
    alternating = torch.ones(channels)
    alternating[::2] = -1.0
    tokens = [
        torch.zeros(channels),
        torch.full((channels,), -0.0),
        torch.full((channels,), 7.25),
        torch.full((channels,), -7.25),
        one_hot,
        torch.linspace(10, 11, channels),  # far from zero: centred codes need a range that includes it
        torch.linspace(-1, 1, channels),
        torch.arange(channels).float() - channels // 2,
        alternating * torch.finfo(dtype).tiny / 4,  # subnormal
        alternating * 1e-5,  # about the smallest scale
        (alternating * 1e30).clamp(-top, top),
        alternating * top,
        torch.arange(channels).float() % 31 / 2 - 7.5,  # halves: ties of both signs
    ]
    return torch.stack(tokens).to(dtype)


def random_tokens(tokens: int, channels: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Gaussian tokens of very different sizes, some with a few large channels."""
    x = torch.randn(tokens, channels, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, (tokens, 1), generator=generator).float())
    x[::3] *= 1 + 40 * (torch.rand(x[::3].shape, generator=generator) < 0.05)
    largest = torch.finfo(dtype).max / 2
    return x.clamp(-largest, largest).to(dtype)


@st.composite
def encodings(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict, int | None]:
    """x [M, K], mask [K], rule, group size: any format over sizes with tails."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels, tokens = draw(st.sampled_from(CHANNELS)), draw(st.integers(0, 9))
    dtype, rule = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(RULES))
    rule = {**rule, "act_clip": draw(st.sampled_from((1.0, 0.9, 0.3)))}
    mask = random_mask(channels, draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))), generator)
    x = random_tokens(tokens, channels, dtype, generator)
    if draw(st.booleans()):
        x = torch.cat([x, special_tokens(channels, dtype)])
    return x, mask, rule, draw(st.sampled_from((None, 4, 32, 64, 128)))


def bits(t: Tensor) -> Tensor:
    """The bits of t as integers, every NaN alike."""
    if not t.is_floating_point():
        return t
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.where(t.isnan(), torch.full((), float("nan"), dtype=t.dtype), t).contiguous().view(integer)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bits; NaN where the other has NaN. A zero's sign counts."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_codes(got: SpikeCodes, expected: SpikeCodes) -> None:
    for name in SpikeCodes._fields:
        assert same(getattr(got, name), getattr(expected, name)), name


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers (for the expanded one: the first token's) in memory a kernel may not expect. x [M, K], M >= 2."""
    tokens, channels = x.shape
    wide = torch.full((2 * tokens, channels + 7), float("nan"), dtype=x.dtype)
    wide[::2, 3 : 3 + channels] = x
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    flat[1:] = x.flatten()
    raw = bytearray(1) + bytearray(x.contiguous().view(torch.uint8).numpy().tobytes())
    yield "transposed", x.t().contiguous().t()
    yield "sliced", wide[::2, 3 : 3 + channels]
    yield "offset", flat[1:].view(tokens, channels)
    yield "expanded", x[:1].expand(tokens, channels)
    yield "expanded-channels", x[:, :1].expand(tokens, channels)
    yield "odd-address", torch.frombuffer(raw, dtype=x.dtype, offset=1).view(tokens, channels)
    yield "permuted", x.view(1, tokens, channels).permute(1, 0, 2)
    if x.dtype != torch.bfloat16:
        array = np.array(x.numpy())
        array.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield "read-only", torch.from_numpy(array)


def bound_of(form: SpikeFormat) -> list[int]:
    """The largest magnitude of each range's codes."""
    top = 2**form.act_bits - 1
    if form.act_bits == 8:
        return [127] * len(form.lengths)
    salient = form.salient_count == form.channels
    if form.span == "separate":
        return [top, 127] if len(form.lengths) == 2 else [127 if salient else top]
    if form.grid == "consistent":
        return [form.steps * top]
    fine = (form.steps << form.act_bits) - 1
    return [top, fine] if len(form.lengths) == 2 else [fine if salient else top]


def integer_codes(form: SpikeFormat, tokens: int, extreme: int | None, g: torch.Generator) -> SpikeCodes:
    """Codes of scale one: random up to their bound, or all at the bound times `extreme` (-1 or 1)."""
    parts = []
    for length, top in zip(form.lengths, bound_of(form), strict=True):
        low = 0 if form.grid == "compat" and top != 127 else -top
        draw = torch.randint(low, top + 1, (tokens, length), generator=g)
        parts.append(draw if extreme is None else torch.full((tokens, length), max(low, extreme * top)))
    codes = torch.cat(parts, -1).to(torch.int8)
    zero = torch.zeros((tokens, len(form.lengths)), dtype=torch.int32)
    if form.grid == "compat":
        zero = torch.randint(-40, 41, zero.shape, generator=g, dtype=torch.int32)
    sums = group_sums(codes, form.lengths, form.group_size or None)
    return SpikeCodes(codes, torch.ones(zero.shape), sums, zero)


def exact_product(encoded: SpikeCodes, q: Tensor, zero: Tensor, form: SpikeFormat) -> Tensor:
    """sum_g sum_k (c - z_x) (q - z_w) in int64."""
    groups, ranges = group_index(form.lengths, form.group_size or None)
    centred = encoded.codes.long() - encoded.zero.long()[:, ranges[groups]]
    return centred @ (q.long() - zero.long()[:, groups]).T


def integer_weight(q: Tensor, zero: Tensor, form: SpikeFormat) -> PackedWeight:
    """Weights of scale one: the product of codes of scale one is then the integer itself. q [N, K] in the codes' order."""
    groups, _ = group_index(form.lengths, form.group_size or None)
    signed = q.to(torch.int32) - zero.to(torch.int32)[:, groups]
    total = torch.zeros(zero.shape, dtype=torch.int32).index_add_(1, groups, signed)
    return PackedWeight(
        pack_codes(q, form.lengths),
        _by_block(torch.ones(zero.shape)),
        _by_block(zero),
        _by_block(total) if form.grid == "compat" else None,
    )


def tables(weight: PackedWeight, form: SpikeFormat, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """q uint8 [N, K], scale [N, G], zero [N, G]: the arguments of the reference."""
    return unpack_codes(weight.packed, form.lengths, out), _by_output(weight.scale, out), _by_output(weight.zero, out)


def epilogue_bound(encoded: SpikeCodes, weight: PackedWeight, form: SpikeFormat, out: int, bias: Tensor | None) -> Tensor:
    """How far y of the compiled epilogue can be from the float64 truth, [M, N].

    With u = 2^-24 a group's sum v = acc - z_x S meets acc to float (u |acc|, none below 2^24) and the fused z_x S (u |v|),
    its fused sum into the range's (u |partial sum|), and each range the fused product with s_x (u |partial sum|).
    Second-order terms are below a percent. Underflow adds at most 2^-149 a step.
    """
    q, scale, zero = tables(weight, form, out)
    groups, ranges = group_index(form.lengths, form.group_size or None)
    count, unit = len(ranges), 2.0**-24
    acc = integer_products(encoded.codes, q, zero, groups, count).double()
    signed = q.double() - zero.double()[:, groups]
    total = torch.stack([signed[:, groups == g].sum(-1) for g in range(count)], -1)
    v = acc - encoded.zero[..., ranges].unsqueeze(-2).double() * total
    factor = encoded.scale[..., ranges].unsqueeze(-2).double() * scale.double()
    largest = (factor * v).abs().sum(-1) + (0 if bias is None else bias.double().abs())
    inner = (factor * (acc.abs() + v.abs())).sum(-1)
    return 1.01 * unit * (inner + (count + len(form.lengths)) * largest) + 4 * count * 2.0**-149


# What the tests of the module are made of: one layer of K inputs and N outputs, its mask, its tokens.
K, N = 96, 40
CONFIGS = [
    SpikeConfig(act_bits=r["act_bits"], steps=r["steps"], span=r["span"], grid=r["grid"], group_size=group)
    for r in MAIN_RULES
    for group in (None, 32)
]


def config_id(config: SpikeConfig) -> str:
    return f"{config.span}-{config.grid}-A{config.act_bits}-T{config.steps}-g{config.group_size}"


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 1) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias=bias).to(dtype)


def mask(seed: int = 2, count: int = 11) -> Tensor:
    chosen = torch.zeros(K, dtype=torch.bool)
    chosen[torch.randperm(K, generator=generator(seed))[:count]] = True
    return chosen


def spiking(config: SpikeConfig | None = None, seed: int = 1, dtype: torch.dtype = torch.float32) -> SpikingLinear:
    return SpikingLinear.from_linear(linear(dtype, seed=seed), config or CONFIGS[0], mask())


def tokens(count: int = 7, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(count, K, generator=generator(seed)).to(dtype)
