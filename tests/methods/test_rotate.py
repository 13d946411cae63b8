"""rotate_: the same logits from rotated weights, in every family that can be rotated, all or nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ranvier import SpikeConfig, spike_
from ranvier.methods.spikellm.rotate import (
    Rotation,
    place_transforms,
    rotate_,
    rotate_block,
    rotate_embedding,
    rotate_head,
    rotated,
    rotation_of,
    untie,
)
from ranvier.nn import HadamardLinear, SpikingLinear
from ranvier.reference.hadamard import hadamard_matrix

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
SIZES = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 48}),
    "gemma": ("Gemma", {"head_dim": 16, "tie_word_embeddings": True}),
}


def family_model(name: str, dtype: torch.dtype = torch.float32, **sizes):
    """A tiny model whose norms have gains, whose biases are not zero and whose stream has outliers."""
    family, options = FAMILIES[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options, **sizes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.get_input_embeddings().weight[:, 5] *= 20
    return model.to(dtype)


@torch.no_grad()
def logits(model, length: int = 24) -> torch.Tensor:
    return model(torch.arange(length)[None] * 7 % VOCABULARY).logits.double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: (t, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def unchanged(model: nn.Module, before: dict) -> bool:
    now = dict([*model.named_parameters(), *model.named_buffers()])
    return now.keys() == before.keys() and all(
        now[n] is t and torch.equal(t.nan_to_num(7.0), copied.nan_to_num(7.0)) for n, (t, copied) in before.items()
    )


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_stay(name: str, online: bool, heads: bool) -> None:
    """In float64 but for the transform's float32 the rotated model is the model.

    Weights are rounded once (2^-24 each, 9 weights and 4 norms in a row) and activations in float32 on both sides: some
    60 roundings of 2^-24 that add like a random walk over sums; a wrong sign or gain is of order one.
    """
    model = family_model(name)
    before, tied = logits(model), model.lm_head.weight is model.get_input_embeddings().weight
    report = rotate_(model, seed=5, online=online, heads=heads)
    assert relative(logits(model), before) < 64 * 2.0**-24 * 4 and report.logit_error < 64 * 2.0**-24 * 4
    assert (report.width, report.order, report.untied) == (48, 48, tied)
    assert report.online_order == (96 if online else None)
    assert len([m for m in model.modules() if isinstance(m, HadamardLinear)]) == (2 if online else 0)
    assert model.lm_head.weight is not model.get_input_embeddings().weight and model.config.tie_word_embeddings is False
    inside = ("q_norm.weight", "k_norm.weight")
    gains = [p for n, p in model.named_parameters() if n.endswith("norm.weight") and not n.endswith(inside)]
    assert len(gains) == 5 and all(torch.equal(g, torch.full_like(g, 0.0 if name == "gemma" else 1.0)) for g in gains)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    """A 16-bit model stays in its type; its logits move by its own rounding: 9 weights and as many activations in a row."""
    model = family_model("llama", dtype)
    before = logits(model)
    rotate_(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert relative(logits(model), before) < 8 * torch.finfo(dtype).eps


def test_rotation_is_orthogonal_and_drawn_by_seed_and_stream() -> None:
    """Q Q^T = I; Q = diag(signs) H; the same draw for the same seed, another one for another seed or stream."""
    rotation = Rotation(72, 11, 3)
    q = rotation.inputs(torch.eye(72))
    assert (q @ q.T - torch.eye(72)).abs().max() < 1e-14
    assert (q - rotation.signs[:, None] * hadamard_matrix(72) / 72**0.5).abs().max() < 1e-15
    assert (rotation.outputs(torch.eye(72)) - q.T).abs().max() < 1e-15
    assert torch.equal(Rotation(72, 11, 3).signs, rotation.signs) and rotation.signs.abs().eq(1).all()
    assert not torch.equal(Rotation(72, 12, 3).signs, rotation.signs)
    assert not torch.equal(Rotation(72, 11, 4).signs, rotation.signs)
    assert Rotation(16, 2**64 - 1).signs.tolist() == Rotation(16, 2**64 - 1).signs.tolist()
    # Pinned: a converted model must come out the same everywhere and later.
    assert "".join("+" if s > 0 else "-" for s in Rotation(16).signs) == "+++--+--++-+-+--"


def test_the_mean_is_kept_where_layer_norm_needs_it() -> None:
    """Q maps (1, ..., 1) to itself, is orthogonal, depends on the seed and has no large entry, also in blocks."""
    for width in (48, 64, 72, 100):
        rotation = Rotation(width, 2, keeps_mean=True)
        q = rotation.inputs(torch.eye(width))
        assert (q @ q.T - torch.eye(width)).abs().max() < 1e-14 and (q.sum(1) - 1).abs().max() < 1e-14
        assert (rotation.outputs(torch.eye(width)) - q.T).abs().max() < 1e-15
        # Entries are sums of n random signs over n: five sigma.
        assert q.abs().max() < 5 / rotation.order**0.5
        assert not torch.allclose(q, Rotation(width, 3, keeps_mean=True).inputs(torch.eye(width)))
    block = family_model("opt").model.decoder.layers[0]
    with pytest.raises(ValueError, match="keeps_mean=True"):
        rotate_block(block, Rotation(48))


def test_seeds_give_other_weights_of_the_same_function() -> None:
    first, second, again = (family_model("llama") for _ in range(3))
    for model, seed in ((first, 0), (second, 1), (again, 0)):
        rotate_(model, seed)
    weights = [m.model.layers[1].mlp.down_proj.linear.weight for m in (first, second, again)]
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1])
    assert relative(logits(second), logits(first)) < 1e-5


def test_blocks_are_turned_by_signs_of_their_own() -> None:
    """Two blocks of the same weights have other values in their heads and before down_proj afterwards."""
    model = family_model("llama")
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    rotate_(model)
    first, second = (dict(layer.named_parameters()) for layer in model.model.layers)
    assert torch.equal(first["self_attn.q_proj.weight"], second["self_attn.q_proj.weight"])
    for name in ("self_attn.v_proj.weight", "mlp.up_proj.weight"):
        assert not torch.equal(first[name], second[name])


def test_outliers_are_spread() -> None:
    """The stream of a model with one channel 20 times as large as the rest is even after the rotation."""
    model, peaks = family_model("llama"), []
    hook = lambda _m, _a, output: peaks.append(float(output.abs().amax() / output.square().mean().sqrt()))  # noqa: E731
    model.model.embed_tokens.register_forward_hook(hook)
    logits(model)
    rotate_(model)
    del peaks[1:]
    logits(model)
    assert peaks[1] < 0.6 * peaks[0]


def test_a_width_without_a_matrix_is_turned_in_blocks() -> None:
    """hidden 92 = 23 blocks of 4, ffn 100 = 5 blocks of 20: exact as well."""
    model = family_model("llama", hidden_size=92, intermediate_size=100, num_attention_heads=2, num_key_value_heads=1)
    before = logits(model)
    report = rotate_(model)
    assert (report.order, report.online_order, report.head_order) == (4, 20, 2)
    assert relative(logits(model), before) < 64 * 2.0**-24 * 4


def test_block_by_block_is_the_whole() -> None:
    """rotate_embedding, rotate_block and rotate_head, one after the other, give rotate_'s weights bit for bit."""
    whole, parts = family_model("llama"), family_model("llama")
    rotate_(whole, 9)
    rotation = rotation_of(parts, 9)
    assert rotation == Rotation(48, 9) and untie(parts)
    rotate_embedding(parts.model.embed_tokens, rotation)
    for index, block in enumerate(parts.model.layers):
        rotate_block(block, rotation, index)
    rotate_head(parts.model.norm, parts.lm_head, rotation)
    wanted, got = whole.state_dict(), parts.state_dict()
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in wanted)
    assert not parts.config.tie_word_embeddings and not untie(parts)


def test_copies_and_generation() -> None:
    """deepcopy and pickle give the same logits; generate runs; tie_weights does not tie again."""
    model = family_model("llama")
    rotate_(model)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False).shape[1] <= 6


def test_without_online_it_is_a_plain_model(tmp_path) -> None:
    """Folded only, the model saves and loads by transformers itself."""
    model = family_model("llama")
    rotate_(model, online=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_converts_afterwards(name: str) -> None:
    """spike_ finds every linear layer, also the one behind the transform, and W4A8 stays near the float model."""
    model = family_model(name)
    before = logits(model)
    rotate_(model)
    report = spike_(model, SpikeConfig(act_bits=8, steps=1, salient=0.0))
    assert len(report.layers) == 14 and "model.layers.0.mlp.down_proj.linear" in [layer.name for layer in report.layers]
    assert isinstance(model.model.layers[0].mlp.down_proj.linear, SpikingLinear)
    assert relative(logits(model), before) < 0.5


# --- refused ----------------------------------------------------------------------------------------------------------


def opt(**fields):
    return family_model("opt", **fields)


def dead_channel():
    """A final norm with a bias on a channel whose gain is 0: nothing the head could multiply."""
    model = opt()
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight[3] = 0
        model.model.decoder.final_layer_norm.bias[3] = 1
    return model


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=16))


def spiking():
    model = family_model("llama")
    spike_(model, SpikeConfig(steps=1, salient=0.0))
    return model


def twice():
    model = family_model("llama")
    rotate_(model)
    return model


def with_nan():
    model = family_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    return model


def meta():
    return family_model("llama").to("meta")


def adapted():
    model = family_model("llama")
    model.model.layers[1].self_attn.extra = nn.Linear(48, 48)
    return model


def scaled_by_channel():
    """A family that scales its stream channel by channel, which nothing in its structure shows."""
    model = family_model("llama")
    model.model.layers[0].register_forward_hook(lambda _m, _a, output: output * torch.linspace(1, 2, 48))
    return model


def undefined():
    """A model that gives NaN, before and after."""
    model = family_model("llama")
    model.model.layers[0].register_forward_hook(lambda _m, _a, output: output * float("nan"))
    return model


class MeanNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, (48,), self.weight)


def other_norm():
    model = family_model("llama")
    model.model.norm = MeanNorm()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: opt(do_layer_norm_before=False), "no final norm|norms after"),
        (lambda: opt(word_embed_proj_dim=24), "project_out|project_in"),
        (lambda: opt(enable_bias=False), "without a bias"),
        (dead_channel, "gain is 0"),
        (gemma2, "pre_feedforward_layernorm|post_feedforward_layernorm"),
        (spiking, "SpikingLinear"),
        (twice, "block 0.mlp.down_proj already has a rotation"),
        (with_nan, "block 1.mlp.up_proj.*NaN"),
        (meta, "meta device"),
        (adapted, "extra.weight"),
        (scaled_by_channel, "logits of LlamaForCausalLM changed"),
        (undefined, "logits of LlamaForCausalLM changed by nan"),
        (other_norm, "MeanNorm is no RMSNorm"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "has no"),
        (
            lambda: family_model("llama", hidden_size=45, num_attention_heads=3, num_key_value_heads=1, head_dim=16),
            "45 channels",
        ),
    ],
)
def test_refused_models_stay_as_they_were(make, message: str) -> None:
    """The reason is said, and nothing has moved: the very same tensors with the very same values."""
    model = make()
    before, tied = state(model), getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    with pytest.raises(ValueError, match=message):
        rotate_(model)
    if model.__class__ is not nn.Sequential and not any(p.is_meta for p in model.parameters()):
        assert unchanged(model, before)
    assert getattr(getattr(model, "config", None), "tie_word_embeddings", None) == tied


def test_an_interruption_changes_nothing(monkeypatch) -> None:
    """Stopped while the last block is worked out, and stopped while the logits are compared."""
    from ranvier.methods.spikellm import rotate

    for name in ("_fold_head", "_probe"):
        model = family_model("llama")
        before, calls = state(model), []
        original = getattr(rotate, name)

        def stop(*args, original=original, name=name, calls=calls):
            calls.append(name)
            if name == "_fold_head" or len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(rotate, name, stop)
            with pytest.raises(KeyboardInterrupt):
                rotate_(model)
        assert unchanged(model, before) and model.config.tie_word_embeddings


def test_what_fails_afterwards_undoes_it() -> None:
    """rotated() gives the old parameters back when its body raises, and leaves the rotated ones when it does not."""
    model = family_model("llama")
    before, expected = state(model), logits(model)
    with pytest.raises(ValueError, match="salient"), rotated(model, 3):
        spike_(model, SpikeConfig(salient=0.1))  # without calibration
    assert unchanged(model, before) and model.config.tie_word_embeddings and torch.equal(logits(model), expected)
    with rotated(model, 3) as report:
        assert report.untied
    assert isinstance(model.model.layers[0].mlp.down_proj, HadamardLinear) and not model.config.tie_word_embeddings


def test_placed_transforms_take_a_rotated_state() -> None:
    """A model that was just built, with the transforms placed, loads the state of a rotated one: equal logits."""
    model, fresh = family_model("llama"), family_model("llama", hidden_size=48)
    rotate_(model, 8)
    place_transforms(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model)) and not fresh.config.tie_word_embeddings
    empty = family_model("llama").to("meta")
    place_transforms(empty)
    assert isinstance(empty.model.layers[1].mlp.down_proj, HadamardLinear)
    with pytest.raises(ValueError, match="pass a plain model"):
        place_transforms(fresh)


@pytest.mark.parametrize("arguments", [(0,), (-8,), (True,), (8, -1), (8, 2**64), (8, 1.5), (8, 0, "a"), (7,)])
def test_bad_rotations(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="Rotation: "):
        Rotation(*arguments)


def test_parts_that_do_not_fit() -> None:
    model = family_model("llama-untied")
    with pytest.raises(ValueError, match="width 64"):
        rotate_embedding(model.model.embed_tokens, Rotation(64))
    with pytest.raises(ValueError, match="64 inputs"):
        rotate_head(model.model.norm, model.lm_head, Rotation(64))
    with pytest.raises(ValueError, match="the rotation has 64"):
        rotate_block(model.model.layers[0], Rotation(64))
    with pytest.raises(ValueError, match="head_dim"):
        model.model.layers[0].self_attn.head_dim = None
        rotate_block(model.model.layers[0], Rotation(48))
