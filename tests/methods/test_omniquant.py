"""OmniQuant: simulated layers are the real ones, gradients are right, transforms change nothing, the result is never worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_block import CONFIGS, Frozen, Setup, llama_setup, outlier_llama
from tiny_lm import token_batch
from torch import Tensor, nn

import ranvier
from ranvier.methods.spikellm import omniquant
from ranvier.methods.spikellm.equivalent import Pair, initial_scales, storable, transformed
from ranvier.methods.spikellm.fake_quant import fake_input
from ranvier.methods.spikellm.omniquant import OmniquantOptions, SimulatedBlock, fit_block, omniquant_block
from ranvier.methods.spikellm.saliency import SaliencyObserver
from ranvier.reference.spike_linear import quantize_weight


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the module's options for one test."""
    return lambda **fields: monkeypatch.setattr(omniquant, "OPTIONS", OmniquantOptions(**fields))


def test_gradient_of_a_block() -> None:
    """d loss / d (log s, g, b) through norms, attention and MLP: central differences in float64 with frozen rounding.

    Their error is step^2 times the third derivative, and eps / step of the loss: 1e-5 of the largest slope holds both.
    """
    model = outlier_llama().double()
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):  # transformers' own computes in float32
            norm = nn.RMSNorm(64, eps=1e-6, dtype=torch.float64)
            norm.load_state_dict(getattr(layer, name).state_dict())
            setattr(layer, name, norm)
    setup = Setup(model, model.model.layers[0], [token_batch(6)], ranvier.SpikeConfig())
    pairs = fit_block(setup.simulated(), setup.inputs, setup.targets, 0, options=OmniquantOptions(epochs=0)).pairs
    assert len(pairs) == 4
    point = [torch.randn(pair.channels, dtype=torch.float64) * 0.1 for pair in pairs]
    shapes = {name: linear.out_features for name, linear in setup.linears.items()}
    point += [torch.randn(n, 1, dtype=torch.float64) + 1 for n in shapes.values() for _ in range(2)]

    def loss(block: SimulatedBlock, point: list[Tensor]) -> Tensor:
        ends = iter(point[len(pairs) :])
        clip = {name: (next(ends), next(ends)) for name in shapes}
        tensors = block.weights(block.changed(pairs, [t.exp() for t in point[: len(pairs)]]), clip)
        with block.watched():
            return (block.run(setup.inputs[0], tensors) - setup.targets[0]).square().sum()

    frozen = Frozen()
    surrogate = setup.simulated(through=frozen)
    learned = [t.clone().requires_grad_() for t in point]
    grads = torch.autograd.grad(loss(setup.simulated(), learned), learned)
    loss(surrogate, point)
    step = 1e-5
    for i, grad in enumerate(grads):
        direction = torch.randn_like(grad)
        ends = [float(loss(surrogate, [t + sign * step * direction if j == i else t for j, t in enumerate(point)]))
                for sign in (1, -1) if frozen.restart()]  # fmt: skip
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-5, abs=1e-5 * float(grad.abs().max())), i


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "weight-only"])
def test_packed_layers_compute_what_was_simulated(name: str, options: Any) -> None:
    """A packed layer of the result holds W^ bit for bit, reads x^, and the block's output is the simulated one.

    Outputs differ by the order of float32 sums: K = 96 terms of |x^| |W^| summed, 96 eps of that.
    """
    options(epochs=12, let_lr=0.01, lwc_lr=0.1)
    setup = llama_setup(**CONFIGS[name])
    simulated = setup.simulated()
    fit = fit_block(simulated, setup.inputs, setup.targets, 5)
    assert fit.best.scales is not None and fit.loss < 0.9 * fit.rtn_loss, "this set-up is to learn something"
    tensors = simulated.weights(simulated.changed(fit.pairs, fit.best.scales), fit.best.clip)
    result = setup.quantize(seed=5)
    real = setup.deploy(result)
    for layer_name, quantized in result.items():
        layer = real.get_submodule(layer_name)
        assert torch.equal(layer.dequantized_weight(), tensors[f"{layer_name}.weight"])
        assert quantized.scale.shape[1] == sum(layer.format.groups) and quantized.q.dtype == quantized.zero.dtype == torch.uint8
        x = torch.randn(7, layer.in_features)
        faked = fake_input(x, setup.masks[layer_name], layer.format)
        bound = 2 * 96 * 2.0**-24 * (faked.abs() @ layer.dequantized_weight().abs().T) + 1e-6
        difference = (layer(x) - nn.functional.linear(faked, tensors[f"{layer_name}.weight"], layer.bias)).abs()
        assert bool((difference <= bound).all())
    for item in setup.inputs:
        with torch.no_grad(), simulated.watched():
            expected = simulated.run(item, tensors)
        torch.testing.assert_close(setup.output(real, item), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def random_scales(pairs: list, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.exp(torch.randn(pair.channels, generator=generator)) for pair in pairs]


def tiny(family: str) -> nn.Module:
    """A model of two blocks whose norms and biases are far from ones and zeros."""
    import transformers as t

    torch.manual_seed(11)
    sizes = {"vocab_size": 14, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "intermediate_size": 48}
    ends = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    made = {
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**sizes, **heads, **ends)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**sizes, **heads, head_dim=16, **ends)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**sizes, **heads, head_dim=16, **ends)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**sizes, **heads, head_dim=16, **ends)),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, **ends)),
        "opt-post": lambda: t.OPTForCausalLM(
            t.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False, **ends)
        ),
    }[family]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.5)
    return made.eval()


FAMILIES = {
    "mistral": {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"},
    "qwen3": {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"},
    "gemma": {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"},
    "gemma2": {"input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"},
    "opt": {"self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"},
    # The norms of a post-norm block are read by the residual too, and must be left alone.
    "opt-post": {"self_attn.v_proj", "fc1"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_each_family(family: str) -> None:
    """Norms (w x, 1 + w, with a bias), v before o with repeated heads, up before down or ReLU's two; no pair that is wrong.

    The transform changes nothing but roundings: scales spread by e^3, so 1e-4 of the largest value is ample and a wrong
    pair is off by its whole size.
    """
    model = tiny(family)
    layers = model.model.decoder.layers if "opt" in family else model.model.layers
    setup = Setup(model, layers[0], [token_batch(9)], ranvier.SpikeConfig())
    pairs = fit_block(setup.simulated(), setup.inputs, setup.targets, 0, options=OmniquantOptions(epochs=0)).pairs
    assert {pair.source for pair in pairs} == FAMILIES[family]
    simulated = setup.simulated()
    changed = simulated.changed(pairs, random_scales(pairs))
    with torch.no_grad(), simulated.watched():
        output = simulated.run(setup.inputs[0], changed, quantizing=False)
    size = float(setup.targets[0].abs().max())
    torch.testing.assert_close(output, setup.targets[0], rtol=0, atol=1e-4 * size)


def test_pairs_hold_for_every_input_channel_of_grouped_queries() -> None:
    """Two query heads of 16 read one value head, so o's channel 20 is v's channel 4 and its channel 40 v's 24."""
    setup = llama_setup(1)
    pairs = fit_block(setup.simulated(), setup.inputs, setup.targets, 0, options=OmniquantOptions(epochs=0)).pairs
    (pair,) = [pair for pair in pairs if pair.source == "self_attn.v_proj"]
    assert pair.readers == ("self_attn.o_proj",) and pair.channels == 32
    assert [int(pair.index[k]) for k in (4, 20, 40, 56)] == [4, 4, 24, 24]


class Branching(nn.Module):
    """A norm whose output is also added to the result, and a layer whose output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        normed = self.norm(x)
        made = torch.relu(self.first(normed))
        return (self.second(made) + normed + 0.1 * made,)


def test_a_channel_that_something_else_reads_is_not_scaled() -> None:
    """Both candidates of the block look right to the layers and are wrong to its output."""
    block = Branching()
    x = torch.randn(1, 5, 8)
    linears, masks = {"a": block.first, "b": block.second}, dict.fromkeys("ab", torch.zeros(8, dtype=torch.bool))
    simulated = SimulatedBlock(block, linears, [["a"], ["b"]], masks, ranvier.SpikeConfig())
    assert fit_block(simulated, [(x, {})], [block(x)[0]], 0).pairs == []


def test_masks_stay_masks() -> None:
    """A folded transform leaves the saliency of every layer with a linear layer before it as it was."""
    # spec spikellm O9
    setup = llama_setup(1)
    pairs = fit_block(setup.simulated(), setup.inputs, setup.targets, 0, options=OmniquantOptions(epochs=0)).pairs
    changed = setup.simulated().changed(pairs, random_scales(pairs))

    def scores() -> dict[str, Tensor]:
        with torch.no_grad(), SaliencyObserver(setup.linears) as observer:
            setup.block(setup.inputs[0][0], **setup.inputs[0][1])
        return {names[0]: observer.scores(names) for names in observer.groups()}

    before = scores()
    with torch.no_grad():
        for name, value in changed.items():
            setup.block.get_parameter(name).copy_(value)
    after = scores()
    # v's own scores weigh its rows by 1 / s^2, so the group of q, k and v is the one that a scaled v changes.
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-4 * float(before[name].abs().max()))


def state(block: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", CONFIGS)
def test_better_than_rounding_to_nearest(name: str, options: Any) -> None:
    """What is handed out has the loss that was found, by far less than rounding to nearest; the folded block is the old one."""
    options(epochs=3)
    setup = llama_setup(**CONFIGS[name])
    fit = fit_block(setup.simulated(), setup.inputs, setup.targets, 1)
    assert fit.loss < 0.8 * fit.rtn_loss and fit.loss <= min(fit.let_loss, fit.start_loss)
    result = setup.quantize(seed=1)
    for item, target in zip(setup.inputs, setup.targets, strict=True):
        torch.testing.assert_close(setup.output(setup.block, item), target, rtol=0, atol=1e-4 * float(target.abs().max()))
    simulated = setup.simulated()
    tensors = {}
    for layer, (q, scale, zero) in result.items():
        groups = simulated.layouts[layer].groups
        tensors[f"{layer}.weight"] = scale[:, groups] * (q.float() - zero[:, groups].float())
    losses = []
    with torch.no_grad(), simulated.watched():
        for item, target in zip(setup.inputs, setup.targets, strict=True):
            error = (simulated.run(item, tensors) - target).square().mean(-1) / target.square().mean(-1)
            losses.append(float(error.mean()))
    # The same function in another order of float32 operations; a code on the edge of rounding may fall to the other side.
    assert sum(losses) / len(losses) == pytest.approx(fit.loss, rel=0.02)


def test_training_lowers_the_loss() -> None:
    """Steps of the optimizer gain on the start, with the transform alone, with clipping alone and with both."""
    setup = llama_setup(4)
    both = {"epochs": 8, "let_lr": 5e-3, "lwc_lr": 0.05, "clip_start": 4.0}
    for fields in ({"lwc": False}, {"let": False}, {}):
        fit = fit_block(setup.simulated(), setup.inputs, setup.targets, 1, options=OmniquantOptions(**both, **fields))
        assert fit.loss < 0.98 * min(fit.start_loss, fit.rtn_loss), fields
        assert bool(fit.pairs) == fields.get("let", True) and bool(fit.best.clip) == fields.get("lwc", True)


def test_a_search_that_gains_nothing_ends_as_rounding_to_nearest(options: Any) -> None:
    """Rates that destroy the block and bad starts lose to the fallback: its codes, and nothing folded."""
    options(epochs=2, let_lr=50.0, lwc_lr=50.0, alphas=(-8.0,), clip_start=-3.0)
    setup = llama_setup()
    before = state(setup.block)
    result = setup.quantize()
    assert same(before, state(setup.block))
    for name, linear in setup.linears.items():
        q, scale, zero = quantize_weight(linear.weight.detach(), (linear.in_features,), None)
        assert (
            torch.equal(result[name].q, q) and torch.equal(result[name].scale, scale) and torch.equal(result[name].zero, zero)
        )


def test_one_seed_one_result(options: Any) -> None:
    """The seed decides the order of the inputs, and with it every bit."""
    options(epochs=1, let_lr=0.02)
    results = []
    for seed in (3, 3, 4):
        setup = llama_setup(5)
        results.append((setup.quantize(seed=seed), state(setup.block)))
    same_codes = [
        all(torch.equal(x, y) for name in a[0] for x, y in zip(a[0][name], b[0][name], strict=True)) and same(a[1], b[1])
        for a, b in ((results[0], results[1]), (results[0], results[2]))
    ]
    assert same_codes == [True, False]


def test_settings_and_modes_of_the_block_survive(options: Any) -> None:
    """No gradients, no hooks and no changed training modes are left behind; progress is told of every epoch."""
    options(epochs=2)
    setup, told = llama_setup(), []
    setup.block.train()
    setup.block.mlp.eval()
    with torch.inference_mode():  # a caller's mode must not matter
        setup.quantize(progress=lambda *args: told.append(args))
    assert [args[:2] for args in told] == [(1, 2), (2, 2)] and all(0 < args[2] < 1 for args in told)
    assert setup.block.training and not setup.block.mlp.training
    assert all(p.grad is None and p.requires_grad for p in setup.block.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in setup.block.modules())


def test_a_half_precision_block(options: Any) -> None:
    """Folding a norm in bfloat16 loses nothing, as the scales are those its new weight stands for.

    Codes come from float32 products: the deployed float32 copy of the folded block gives the simulated output.
    """
    options(epochs=1)
    model = outlier_llama().to(torch.bfloat16)
    setup = Setup(model, model.model.layers[0], [token_batch(16)], ranvier.SpikeConfig())
    simulated = setup.simulated()
    fit = fit_block(simulated, setup.inputs, setup.targets, 0)
    assert fit.best.scales is not None
    setup.quantize()
    for pair, s in zip(fit.pairs, fit.best.scales, strict=True):
        if "norm" in pair.source:
            folded = setup.block.get_submodule(pair.source).weight.float()
            torch.testing.assert_close(folded * s, simulated.tensors[f"{pair.source}.weight"], rtol=2.0**-22, atol=0)


def test_failure_leaves_the_block_as_it_was(options: Any) -> None:
    """NaN in inputs, in targets, or an error raised in the middle: no weight, mode or hook has changed."""
    options(epochs=2)
    setup = llama_setup()
    before = state(setup.block)
    bad = [t.clone() for t in setup.targets]
    bad[1][0, 3, 5] = float("nan")
    rest = (setup.config, 0)
    with pytest.raises(ValueError, match="targets or weights have NaN or Inf"):
        omniquant_block(setup.block, setup.linears, setup.groups, setup.masks, setup.inputs, bad, *rest)
    x, kwargs = setup.inputs[0]
    inputs = [(torch.where(x == x.max(), float("inf"), x), kwargs), setup.inputs[1]]
    with pytest.raises(ValueError, match="NaN or Inf"):
        omniquant_block(setup.block, setup.linears, setup.groups, setup.masks, inputs, setup.targets, *rest)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.quantize(progress=stop)
    assert same(before, state(setup.block))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in setup.block.modules())


def test_what_does_not_belong_together_is_refused() -> None:
    """Each mistake is named."""
    setup = llama_setup()
    good = {
        "block": setup.block, "linears": setup.linears, "groups": setup.groups, "masks": setup.masks,
        "inputs": setup.inputs, "targets": setup.targets, "config": setup.config, "seed": 0,
    }  # fmt: skip
    name = "mlp.down_proj"
    short = {**setup.masks, name: setup.masks[name][:-1]}
    cases = [
        ({"config": ranvier.SpikeConfig(weight_bits=2, steps=1)}, "weight_bits is 2"),
        ({"linears": {}}, "no linear layer"),
        ({"targets": setup.targets[:1]}, "2 inputs and 1 targets"),
        ({"inputs": [], "targets": []}, "0 inputs"),
        ({"masks": {}}, "is missing; pass bool"),
        ({"masks": short}, r"mask of mlp.down_proj is torch.bool \[95\]; pass bool \[96\]"),
        ({"linears": {**setup.linears, "other": nn.Linear(4, 4)}}, "other is no layer of this block"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            omniquant_block(**{**good, **change})


class Experts(nn.Module):
    """Two experts of which the inputs reach one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.used, self.idle = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.used(self.norm(x))


def test_a_layer_that_no_input_reaches_is_rounded_to_nearest(options: Any) -> None:
    """It has nothing to learn from."""
    options(epochs=2)
    block, x = Experts(), torch.randn(1, 6, 32)
    linears, mask = {"used": block.used, "idle": block.idle}, torch.zeros(32, dtype=torch.bool)
    masks = dict.fromkeys(linears, mask)
    config = ranvier.SpikeConfig(salient=0.0)
    with torch.no_grad():
        target = block(x)
    result = omniquant_block(block, linears, [["used"], ["idle"]], masks, [(x, {})], [target], config, 0)
    q, scale, _ = quantize_weight(block.idle.weight.detach(), (32,), None)
    assert torch.equal(result["idle"].q, q) and torch.equal(result["idle"].scale, scale)


def test_transforms_of_one_weight_add_up() -> None:
    """A weight that one pair reads and another makes is scaled by both, in whatever order the pairs come."""
    tensors = {
        "v.weight": torch.randn(4, 6),
        "v.bias": torch.randn(4),
        "norm.weight": torch.randn(6),
        "o.weight": torch.randn(3, 4),
    }
    pairs = [Pair("norm", ("v",), torch.arange(6), 6, 1.0), Pair("v", ("o",), torch.arange(4), 4, 0.0)]
    scales = [2.0 ** torch.randint(-2, 3, (pair.channels,)) for pair in pairs]
    expected = {
        "norm.weight": (tensors["norm.weight"] + 1) / scales[0] - 1,
        "v.weight": tensors["v.weight"] * scales[0] / scales[1][:, None],
        "v.bias": tensors["v.bias"] / scales[1],
        "o.weight": tensors["o.weight"] * scales[1],
    }
    for turn in (1, -1):  # powers of two: exact
        found = transformed(tensors, pairs[::turn], scales[::turn])
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_starting_scales() -> None:
    """act_max^alpha / w_max^(1 - alpha), both the largest of all the readers' channels of one source; mean log 0."""
    index = torch.tensor([0, 1, 2, 0, 1, 2])
    tensors = {"a.weight": torch.randn(5, 6), "b.weight": torch.randn(3, 6)}
    peaks = torch.rand(6) + 0.1
    s = initial_scales(Pair("v", ("a", "b"), index, 3, 0.0), tensors, peaks, 0.75)
    w_max = torch.cat(list(tensors.values())).abs().amax(0)
    act, weight = (peak.view(2, 3).amax(0) for peak in (peaks, w_max))
    expected = act**0.75 / weight**0.25
    torch.testing.assert_close(s, expected / expected.log().mean().exp(), rtol=1e-5, atol=0)  # a few roundings of logarithms


def test_scales_of_a_norm_stay_where_no_stored_weight_gives_one() -> None:
    """A gain of 0 stays 0 whatever its scale, one that would vanish in its dtype keeps the scale; others move by a rounding."""
    tensors, s = {"norm.weight": torch.tensor([0.0, 1e-7, 1.0])}, torch.tensor([1.5, 1e4, 1.01])
    (found,) = storable(tensors, {"norm.weight": torch.float16}, [Pair("norm", (), torch.arange(3), 3, 0.0)], [s])
    assert found[0] == 1.5 and found[1] == 1e4
    assert found[2] != s[2] and abs(found[2] / s[2] - 1) <= 2.0**-11 and (1 / found[2]).half().float() == 1 / found[2]


def test_a_token_of_nothing_does_not_count_without_bound(options: Any) -> None:
    """Where the block gives 0 for a token its error has no size of its own to be divided by."""
    options(epochs=1)
    block, x = Experts(), torch.randn(1, 6, 32)
    linears, mask = {"used": block.used, "idle": block.idle}, torch.zeros(32, dtype=torch.bool)
    config = ranvier.SpikeConfig(salient=0.0)
    with torch.no_grad():
        target = block(x)
    target[0, 2] = 0.0
    simulated = SimulatedBlock(block, linears, [["used"], ["idle"]], dict.fromkeys(linears, mask), config)
    fit = fit_block(simulated, [(x, {})], [target], 0, options=OmniquantOptions(epochs=1))
    assert 0 < fit.loss <= fit.rtn_loss < float("inf")
