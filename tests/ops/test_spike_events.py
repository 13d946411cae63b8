"""spike_events: the network's spikes sum to the merged product exactly, and their counts are what was really walked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spiking import (
    CHANNELS,
    DTYPES,
    MAIN_RULES,
    epilogue_bound,
    random_mask,
    random_tokens,
    rule_id,
    special_tokens,
    tables,
)
from torch import Tensor, nn

from ranvier import SpikeConfig
from ranvier.nn import SpikingLinear
from ranvier.ops import spike_encode, spike_events, spike_raster
from ranvier.ops.spike_events import op
from ranvier.reference import spike_events as reference
from ranvier.reference.spike_encode import quantizers, spike_levels
from ranvier.reference.spike_linear import group_index, integer_products

pytestmark = pytest.mark.usefixtures("poisoned")

ENCODINGS = tuple(reference.ENCODINGS)
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
main_rules = pytest.mark.parametrize("rule", MAIN_RULES, ids=rule_id)
LEVEL = 15  # of a gif step, 4 bits


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_layer(rule: dict, channels: int = 64, outputs: int = 37, group: int | None = None, share: float = 0.3):
    """A layer of this rule with random weights and about `share` salient channels."""
    linear = nn.Linear(channels, outputs)
    config = SpikeConfig(**rule, group_size=group)
    return SpikingLinear.from_linear(linear, config, random_mask(channels, share, generator(channels)))


def merged_product(layer: SpikingLinear, x: Tensor) -> Tensor:
    """sum_{k in g} c (q - z_w), int64 [..., N, G], from the codes of spike_encode; raw codes less their zero point."""
    form = layer.format
    groups, ranges = group_index(form.lengths, form.group_size or None)
    q, _, zero = tables(layer.packed_weight, form, layer.out_features)
    encoded = spike_encode(x, layer.salient_mask, **form.rule, backend="reference")
    centred = encoded.codes.long() - encoded.zero[..., ranges[groups]].long()
    finite = encoded.scale.isfinite().all(-1, keepdim=True)
    return integer_products(torch.where(finite, centred, 0), q, zero, groups, len(ranges))


def sparse_codes(tokens: int, channels: int, top: int, seed: int) -> Tensor:
    """Signed codes; each token has its own number of active channels: the first none, the last all of them."""
    codes = torch.randint(1, top + 1, (tokens, channels), generator=generator(seed))
    codes *= torch.randint(0, 2, codes.shape, generator=generator(seed + 1)) * 2 - 1
    active = torch.linspace(0, channels, tokens).long()
    rank = torch.rand(codes.shape, generator=generator(seed + 2)).argsort(-1).argsort(-1)
    return (codes * (rank < active[:, None])).to(torch.int32)


@every_encoding
def test_digits_sum_to_the_code(encoding: str) -> None:
    """Every code -127..127 is the sum of its weighted digits, of the kind its encoding has.  # spec spikellm O13"""
    codes = torch.arange(-127, 128)
    level = LEVEL if encoding == "gif" else 1
    digits = reference.expand(codes, encoding, level)
    places = reference.place_values(len(digits), encoding)
    assert torch.equal((places[:, None] * digits).sum(0), codes)
    assert int(digits.abs().max()) == level
    assert torch.equal(places, torch.exp2(torch.arange(len(digits))).long()) == (encoding in ("bitplane", "naf"))
    assert ((digits * codes) < 0).any() == (encoding == "naf")  # the others never fire against their code's sign
    assert torch.equal((digits != 0).sum(0), reference.spikes(codes, encoding, level))
    for top in range(1, 128):  # as many planes as the largest code needs, and no more
        assert reference.expand(torch.arange(top + 1), encoding, level)[-1].any()


def test_naf_has_no_two_adjacent_digits() -> None:
    """Which makes it the shortest: no signed binary form of a code has fewer digits.  # spec spikellm O13"""
    codes = torch.arange(-127, 128)
    digits = reference.expand(codes, "naf", 1)
    assert not (digits[1:] * digits[:-1]).any()
    # Every sum of signed powers of two up to 2^7, by the fewest terms: breadth first.
    fewest, edge, terms = {0: 0}, {0}, 0
    while edge:
        terms += 1
        edge = {v + s * 2**b for v in edge for b in range(8) for s in (1, -1)} - fewest.keys()
        edge = {v for v in edge if abs(v) <= 256}
        fewest.update(dict.fromkeys(edge, terms))
    assert (digits != 0).sum(0).tolist() == [fewest[c] for c in codes.tolist()]


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_consistent_codes_take_t_spikes_each(bits: int, steps: int) -> None:
    """s_l = T s_h, and every code 0..T (L - 1) leaves no charge after T graded spikes.  # spec spikellm O2"""
    top = 2**bits - 1
    codes = torch.arange(steps * top + 1)
    spikes = reference.expand(codes, "gif", top, steps)  # raises where charge is left
    assert spikes.shape[0] == steps and int(spikes.min()) >= 0 and int(spikes.max()) == top
    membrane = codes.clone()
    for spike in spikes:
        assert torch.equal(spike, membrane.clamp(max=top))
        membrane = membrane - spike
    assert not membrane.any()
    x, mask = torch.randn(50, 33), random_mask(33, 0.3, generator())
    low, fine = quantizers(x, mask, act_bits=bits, steps=steps, span="shared", grid="consistent")
    assert torch.equal(low.step, steps * fine.step)
    width = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
    exact = width / top  # s_l without the detour over s_h: two more roundings, 2^-24 each
    assert ((low.step - exact).abs() <= 2.0**-22 * exact).all()


def test_too_few_planes_raise() -> None:
    with pytest.raises(ValueError, match="codes reach 31, which takes 3 planes of 'gif'; 2 were given"):
        reference.expand(torch.arange(32), "gif", 15, 2)


@every_encoding
def test_sum_over_spikes_is_the_merged_product(encoding: str) -> None:
    """The integer products of the single steps or planes sum to the code's own.  # spec spikellm O1 O13"""
    codes = torch.randint(-30, 31, (7, 129), generator=generator()).to(torch.int32)
    weights = torch.randint(-15, 16, (129, 33), generator=generator(2)).to(torch.int16)
    merged = codes.long() @ weights.long()
    level = LEVEL if encoding == "gif" else 1
    digits = reference.expand(codes, encoding, level)
    places = reference.place_values(len(digits), encoding)
    assert torch.equal(sum(place * (digit @ weights.long()) for place, digit in zip(places, digits, strict=True)), merged)
    groups = torch.zeros(129, dtype=torch.int64)
    for backend in ("cpu", "reference"):
        output, spikes = op(codes, weights, groups, 1, encoding, level, backend=backend)
        assert torch.equal(output[:, 0], merged)
        assert torch.equal(spikes, (digits != 0).sum((0, 2)))


@st.composite
def networks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """codes, columns, groups, their count, level: sizes with tails, any sparsity."""
    channels, tokens, count = draw(st.sampled_from(CHANNELS)), draw(st.integers(0, 9)), draw(st.integers(1, 4))
    seed, outputs = draw(st.integers(0, 2**20)), draw(st.sampled_from((1, 2, 31, 32, 33, 97)))
    columns = torch.randint(-1905, 1906, (channels, outputs), generator=generator(seed)).to(torch.int16)
    groups = torch.randint(count, (channels,), generator=generator(seed))
    codes = sparse_codes(tokens, channels, draw(st.sampled_from((1, 15, 127))), seed)
    return codes, columns, groups, count, draw(st.sampled_from((1, 3, 15, 127)))


@every_encoding
@given(network=networks())
def test_event_driven_equals_dense(encoding: str, network: tuple) -> None:
    """Any sparsity, from no active channel to all of them, each token another number.  # spec spikellm O19"""
    codes, columns, groups, group_count, level = network
    level = level if encoding == "gif" else 1
    before = [t.clone() for t in (codes, columns, groups)]
    output, spikes = op(codes, columns, groups, group_count, encoding, level)
    for g in range(group_count):
        assert torch.equal(output[:, g], codes[:, groups == g].long() @ columns[groups == g].long())
    assert torch.equal(spikes, reference.spikes(codes, encoding, level).sum(-1))
    if len(codes) > 1:
        assert spikes[0] == 0 and spikes[-1] >= codes.shape[1]
    for now, then in zip((codes, columns, groups), before, strict=True):
        assert torch.equal(now, then)


def test_strided_inputs() -> None:
    """Transposed, sliced and expanded tensors give what their copies give."""
    codes, columns = sparse_codes(6, 34, 30, 5), torch.randint(-15, 16, (34, 9)).to(torch.int16)
    groups = torch.arange(68)[::2] % 2
    expected = op(codes, columns, groups.clone(), 2, "gif", 15)
    wide = torch.full((12, 40), 99, dtype=torch.int32)
    wide[::2, 3:37] = codes
    for given_codes in (codes.t().contiguous().t(), wide[::2, 3:37]):
        got = op(given_codes, columns.t().contiguous().t(), groups, 2, "gif", 15)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    one = op(codes[4:5].expand(6, 34), columns, groups, 2, "gif", 15)[0]
    assert torch.equal(one, expected[0][4:5].expand(6, 2, 9))


def test_opcheck() -> None:
    """Schema, fake tensor and dispatch of the op as torch tests them."""
    codes, columns = sparse_codes(3, 8, 30, 1), torch.ones(8, 5, dtype=torch.int16)
    torch.library.opcheck(op.overload, (codes, columns, torch.zeros(8, dtype=torch.int64), 1, "gif", 15))


@every_encoding
@main_rules
def test_layer_output_is_the_merged_product(rule: dict, encoding: str) -> None:
    """Every span, grid and encoding, zero points taken off, with and without weight groups.  # spec spikellm O1"""
    for group in (None, 32):
        layer = make_layer(rule, 64, 37, group)
        x = random_tokens(6, 64, torch.float32, generator(3)).view(2, 3, 64) + 0.2
        got = spike_events(layer, x, encoding)
        assert got.output.dtype == torch.int64
        assert torch.equal(got.output, merged_product(layer, x))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@main_rules
def test_empty_and_full_mask(rule: dict, dtype: torch.dtype, share: float) -> None:
    """No salient channel and nothing but salient ones, on tokens where quantizers go wrong, in every input type."""
    layer = make_layer(rule, 33, 5, share=share)
    x = special_tokens(33, dtype)
    expected = merged_product(layer, x)
    for encoding in ("gif", "naf"):
        assert torch.equal(spike_events(layer, x, encoding).output, expected)


@main_rules
def test_scaled_output_is_the_layers(rule: dict) -> None:
    """sum_g s_x s_w output + b is the layer's forward, to what the rounding of its epilogue allows (epilogue_bound)."""
    layer = make_layer(rule)
    x, form = random_tokens(5, 64, torch.float32, generator(4)), layer.format
    encoded = spike_encode(x, layer.salient_mask, **form.rule, backend="reference")
    _, scale, _ = tables(layer.packed_weight, form, 37)
    terms = encoded.scale.double()[:, None] * scale.double() * spike_events(layer, x).output.double()
    bias = layer.bias.detach()
    error = (layer(x).detach().double() - terms.sum(-1) - bias.double()).abs()
    assert (error <= epilogue_bound(encoded, layer.packed_weight, form, 37, bias)).all()


@every_encoding
@main_rules
def test_counts_are_the_spikes_walked(rule: dict, encoding: str) -> None:
    """Closed form, expansion and executor agree for u and for the centred code, token by token."""
    layer = make_layer(rule)
    x = random_tokens(4, 64, torch.float32, generator(5))
    got, counted = spike_events(layer, x, encoding), spike_events(layer, x, encoding, execute=False)
    assert counted.output is None and counted.per_token() == got.per_token()
    u, c = spike_levels(x, layer.salient_mask, **layer.format.rule)
    centred = c // reference.thresholds(layer.salient_mask, **layer.format.rule)
    level = reference.step_level(encoding, layer.format.act_bits)
    columns, groups = torch.ones(64, 1, dtype=torch.int16), torch.zeros(64, dtype=torch.int64)
    for code, counts in ((u, got.u), (centred, got.c)):
        _, walked = op(code.to(torch.int32), columns, groups, 1, encoding, level)
        assert torch.equal(counts.spikes, walked)
        assert torch.equal(counts.silent, (code == 0).sum(-1))
        assert torch.equal(counts.accumulates, 37 * walked)
        assert counts.zero_fraction == (code == 0).double().mean().item()
        if encoding in ("unary", "ternary"):
            assert torch.equal(counts.spikes, code.abs().sum(-1))


def test_gif_spikes_once_a_step() -> None:
    """On the consistent grid u fires at most once on ordinary channels, T times on salient ones, 2^n - 1 levels each."""
    layer = make_layer(MAIN_RULES[1])
    x = random_tokens(8, 64, torch.float32, generator(6))
    raster = spike_raster(layer, x)
    assert int(raster.min()) == 0 and int(raster.max()) == 15
    fired = (raster != 0).sum(1)
    assert (fired <= torch.where(layer.salient_mask, 4, 1)).all()
    assert (fired.sum(-1) == spike_events(layer, x, execute=False).u.spikes).all()


def test_centred_code_of_a_sparse_token_is_silent() -> None:
    """Channels at zero fire the zero point in u and nothing in c: only the centred code makes sparse tokens cheap."""
    layer = make_layer(MAIN_RULES[0])
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([3.0, -3.0])
    counts = spike_events(layer, x, "ternary")
    assert counts.c.silent.item() == 62 and counts.u.silent.item() == 1  # the lowest value's code is 0
    assert counts.c.spikes.item() * 10 < counts.u.spikes.item()


@pytest.mark.parametrize(
    ("rule", "salient", "ace"),
    [
        ({"steps": 1}, 0, 16.0),
        ({"steps": 2}, 100, 17.6),
        ({"steps": 4}, 50, 18.4),
        ({"steps": 4, "grid": "compat"}, 50, 18.4),
        ({"span": "separate"}, 100, 17.6),
        ({"act_bits": 8, "steps": 1}, 0, 32.0),
    ],
    ids=str,
)
def test_ace_of_the_paper(rule: dict, salient: int, ace: float) -> None:
    """W4A4 is 16 a multiply-accumulate, 10 % at T = 2 17.6, 5 % at T = 4 18.4, against 256 in float16."""
    mask = torch.arange(1000) < salient
    layer = SpikingLinear.from_linear(nn.Linear(1000, 3), SpikeConfig(**rule), mask)
    got = spike_events(layer, torch.randn(2, 1000), execute=False)
    assert got.macs == 3000 and got.ace / got.macs == pytest.approx(ace, rel=1e-12)
    assert got.mac_equivalents / got.macs == pytest.approx(ace / (4 * layer.config.act_bits), rel=1e-12)
    assert reference.FLOAT16_ACE == 256


@every_encoding
@main_rules
def test_raster_is_the_code(rule: dict, encoding: str) -> None:
    """The raster's weighted sum over time is u or the centred code, its channels in the order of x."""
    layer = make_layer(rule)
    x = random_tokens(3, 64, torch.float32, generator(7))
    raster = spike_raster(layer, x.view(3, 1, 64), encoding)
    u, c = spike_levels(x, layer.salient_mask, **layer.format.rule)
    own = c // reference.thresholds(layer.salient_mask, **layer.format.rule)
    code = u if reference.ENCODINGS[encoding] == "u" else own
    places = reference.place_values(raster.shape[-2], encoding)
    assert torch.equal((raster.squeeze(1) * places[:, None]).sum(1), code.long())
    if encoding == "gif" and rule["grid"] == "consistent" and rule["span"] == "shared":
        assert raster.shape == (3, 1, rule["steps"], 64)
        assert not raster[..., 1:, :][..., ~layer.salient_mask].any()


def test_bad_token_fires_nothing_and_touches_no_other() -> None:
    """NaN and Inf silence their own row alone; its scale is NaN, so the layer's output is."""
    layer = make_layer(MAIN_RULES[3])
    x = random_tokens(4, 64, torch.float32, generator(8))
    expected = spike_events(layer, x)
    x[1, 3], x[2, 60] = float("nan"), float("-inf")
    for got in (spike_events(layer, x), spike_events(layer, x, execute=False)):
        assert got.u.spikes[1:3].tolist() == [0, 0] and got.c.spikes[1:3].tolist() == [0, 0]
        assert torch.equal(got.u.spikes[[0, 3]], expected.u.spikes[[0, 3]])
    output = spike_events(layer, x).output
    assert not output[1:3].any() and torch.equal(output[[0, 3]], expected.output[[0, 3]])


def test_shapes() -> None:
    """One token without a batch, several leading dimensions, and no token at all."""
    layer = make_layer(MAIN_RULES[0], group=32)
    for lead in ((), (2, 3), (0,), (2, 0)):
        x = torch.randn(*lead, 64)
        got = spike_events(layer, x)
        assert got.output.shape == (*lead, 37, 2) and got.u.spikes.shape == lead == got.c.silent.shape
        assert spike_raster(layer, x).shape == (*lead, 2, 64)
    empty = spike_events(layer, torch.empty(0, 64))
    assert empty.u.zero_fraction == 0 and empty.per_token()["spikes_u"] == 0


def test_mistakes_are_named() -> None:
    """What came, what is allowed."""
    layer, x = make_layer(MAIN_RULES[0]), torch.randn(2, 64)
    for call in (spike_events, spike_raster):
        with pytest.raises(ValueError, match="encoding is 'rate'; allowed are 'unary', 'gif', 'ternary', 'bitplane'"):
            call(layer, x, "rate")
        with pytest.raises(ValueError, match="x has 63 channels in its last dimension; this layer takes 64"):
            call(layer, x[:, 1:])
        with pytest.raises(ValueError, match="no dimensions"):
            call(layer, torch.tensor(1.0))
        with pytest.raises(TypeError, match=r"x is torch\.float64; pass float32, bfloat16 or float16"):
            call(layer, x.double())
        with pytest.raises(TypeError, match=r"layer is Linear; pass a ranvier\.nn\.SpikingLinear"):
            call(nn.Linear(64, 3), x)


def test_mistakes_of_the_op_are_named() -> None:
    """The executor writes where groups point: it must refuse what is out of range."""
    codes, columns = torch.ones(2, 4, dtype=torch.int32), torch.ones(4, 3, dtype=torch.int16)
    groups = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"codes is torch\.int64; it must be torch\.int32"):
        op(codes.long(), columns, groups, 1, "gif", 15)
    with pytest.raises(ValueError, match=r"columns has shape \[3, 3\]; it must be \[4, 3\]"):
        op(codes, columns[1:], groups, 1, "gif", 15)
    with pytest.raises(ValueError, match=r"codes \[4\], columns \[4, 3\]; pass codes \[M, K\]"):
        op(codes[0], columns, groups, 1, "gif", 15)
    with pytest.raises(ValueError, match="both must be at least 1"):
        op(codes, columns, groups, 1, "gif", 0)
    with pytest.raises(ValueError, match="level is 15 with encoding 'unary'; only 'gif' has graded spikes, pass 1"):
        op(codes, columns, groups, 1, "unary", 15)
    for wrong in (-1, 1):
        with pytest.raises(ValueError, match="groups has entries outside 0 to 0"):
            op(codes, columns, groups + wrong, 1, "gif", 15)


def test_numba_is_imported_late() -> None:
    """Counting does not need it, nor does importing the ops; only execution does."""
    script = (
        "import sys, torch, ranvier; from ranvier.nn import SpikingLinear;"
        "layer = SpikingLinear.from_linear(torch.nn.Linear(8, 8));"
        "ranvier.ops.spike_events(layer, torch.ones(1, 8), execute=False);"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
