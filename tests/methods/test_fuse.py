"""fuse_: a converted model's norms and gated MLPs in one pass each, and everything else about the model as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spiking import same
from tiny_lm import logits, spiking_llama, tiny_llama, token_batch
from torch import nn

import ranvier
from ranvier.methods.spikellm import fuse_, unfuse_, unspike_
from ranvier.nn import SpikingGatedMLP, SpikingLinear, SpikingRMSNorm
from ranvier.ops import spike_silu_mul
from ranvier.ops.spike_rms_norm import spike_rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16)


def with_our_floats(model: nn.Module) -> nn.Module:
    """The unfused model whose norms and products are the ops' float outputs: what the fused one must equal."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: spike_rms_norm(x, m.weight, m.variance_epsilon)[0]
        if type(module).__name__.endswith("MLP"):
            module.forward = lambda x, m=module: m.down_proj(spike_silu_mul(m.gate_proj(x), m.up_proj(x))[0])
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fields", [{}, {"span": "separate", "act_clip": 0.9}, {"grid": "compat"}], ids=str)
def test_logits_are_the_unfused_models(isa: str, dtype: torch.dtype, fields: dict) -> None:
    """Bit for bit those of the layers one by one, given the same float norms and products; decoding too."""
    model = spiking_llama(dtype=dtype, **fields)
    expected = with_our_floats(copy.deepcopy(model))
    report = fuse_(model)
    assert len(report.norms) == 5 and len(report.mlps) == 2 and not report.left
    for length in (12, 1, 12):
        assert same(logits(model, length), logits(expected, length))
    ids = token_batch(5)
    with torch.no_grad():
        ours, theirs = (m.generate(ids, max_new_tokens=9, do_sample=False) for m in (model, expected))
    assert torch.equal(ours, theirs)


def test_linked_after_one_forward() -> None:
    """After one call every norm but the last, which feeds lm_head, knows its readers, and no group encodes by itself."""
    model = spiking_llama()
    fuse_(model)
    logits(model)
    readers = {name: m._reader and m._reader() for name, m in model.named_modules() if isinstance(m, SpikingRMSNorm)}
    assert readers.pop("model.norm") is None
    for name, reader in readers.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        assert reader is (layer.self_attn.q_proj if name.endswith("input_layernorm") else layer.mlp.gate_proj)


def test_names_undo_and_again() -> None:
    """State dict and parameters stay, a second call changes nothing, unfuse_ and unspike_ bring the old modules back."""
    model = spiking_llama()
    names, before, parameters = list(model.state_dict()), logits(model), [id(p) for p in model.parameters()]
    kinds = {name: type(module) for name, module in model.named_modules()}
    fuse_(model)
    assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == parameters
    assert model.model.layers[0].mlp.intermediate_size == 96
    again = fuse_(model)
    assert not (again.norms or again.mlps or again.left)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight * 2)
    unfuse_(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert same(logits(model), 2 * before)
    fuse_(model)
    plain = unspike_(model)
    kinds = {type(module) for module in plain.modules()}
    assert not kinds & {SpikingLinear, SpikingRMSNorm, SpikingGatedMLP}


def test_copies_casts_and_states() -> None:
    """deepcopy, pickle, load_state_dict and a cast of a fused model give what the fused model gives."""
    model = spiking_llama()
    fuse_(model)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(logits(twin), expected) and same(logits(twin), expected)
        assert same(logits(unfuse_(twin)), logits(unfuse_(copy.deepcopy(model))))
    other = spiking_llama()
    fuse_(other)
    other.load_state_dict(model.state_dict())
    assert same(logits(other), expected)
    bare = unfuse_(copy.deepcopy(model)).bfloat16()
    fuse_(bare)
    assert same(logits(model.bfloat16()), logits(bare))


def test_compiles_as_plain_ops() -> None:
    """torch.compile takes the fused model in one graph and gives the unfused model's values."""
    model = spiking_llama()
    unfused = copy.deepcopy(model)
    fuse_(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ids = token_batch(12)
        assert same(compiled(ids, use_cache=False).logits, unfused(ids, use_cache=False).logits)


def test_saved_and_loaded(tmp_path) -> None:
    """A fused model is saved as any other; loaded and fused again it gives the same logits."""
    model = spiking_llama()
    fuse_(model)
    expected = logits(model)
    ranvier.save(model, tmp_path / "model")
    loaded = ranvier.load(tmp_path / "model")
    fuse_(loaded)
    assert same(logits(loaded), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_is_the_unfused_models(dtype: torch.dtype) -> None:
    """Where a gradient is needed the plain formulas run: output and gradients, straight through, have the unfused bits."""
    results = []
    for fused in (False, True):
        model = spiking_llama(dtype=dtype)
        if fused:
            fuse_(model)
        out = model(token_batch()).logits
        out.float().square().sum().backward()
        results.append({"out": out.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    plain, fused = results
    assert plain.keys() == fused.keys() and all(same(plain[n], fused[n]) for n in plain)
    assert all(g.abs().max() > 0 for n, g in fused.items() if not n.endswith("k_proj.bias"))  # softmax does not see that one


def norms(kind: str) -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return {"llama": LlamaRMSNorm(64, eps=1e-5), "gemma": GemmaRMSNorm(64), "torch": nn.RMSNorm(64, eps=1e-6)}[kind]


@pytest.mark.parametrize(("kind", "weighting"), [("llama", "after_cast"), ("gemma", "one_plus"), ("torch", "before_cast")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kinds_of_norm(kind: str, weighting: str, dtype: torch.dtype) -> None:
    """The formula is told by what the module computes; its values are the module's within one rounding."""
    model = spiking_llama(dtype=dtype)
    norm = norms(kind).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(-1, 2)
    model.model.norm = norm
    fuse_(model)
    assert model.model.norm.weighting == weighting
    x = torch.randn(5, 64).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(model.model.norm(x), norm(x), rtol=2e-6 if dtype == torch.float32 else 2.0**-7, atol=1e-6)


class Odd(nn.Module):
    """The parts of an RMSNorm, the values of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


def test_what_is_not_recognised_stays() -> None:
    """Another norm, another activation, an MLP with more inside, a module with hooks: left, and named with a reason."""
    model = spiking_llama()
    first, second = model.model.layers
    model.model.norm = Odd()
    first.mlp.act_fn = nn.GELU()
    second.mlp.dropout = nn.Dropout(0.5)
    second.input_layernorm.register_forward_hook(lambda module, args, y: None)
    expected = [model.model.norm, first.mlp, second.mlp, second.input_layernorm]
    report = fuse_(model)
    assert [model.model.norm, first.mlp, second.mlp, second.input_layernorm] == expected
    assert set(report.left) == {
        "model.norm", "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.input_layernorm",
    }  # fmt: skip
    assert "something else" in report.left["model.norm"] and "model.norm: " in str(report)
    assert len(report.norms) == 3 and not report.mlps
    with pytest.raises(ValueError, match="no spiking layer"):
        fuse_(tiny_llama())


def another_forward(mlp: nn.Module) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(2 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    mlp.__class__ = type("Doubled", (type(mlp),), {"forward": forward})


def another_mask(mlp: nn.Module) -> None:
    mlp.up_proj.group = None
    mlp.up_proj.salient_mask = mlp.up_proj.salient_mask.roll(1)


def another_format(mlp: nn.Module) -> None:
    linear, config = nn.Linear(64, 96, bias=False), ranvier.SpikeConfig(act_bits=3)
    mlp.up_proj = SpikingLinear.from_linear(linear, config, mlp.gate_proj.salient_mask)
    mlp.up_proj.salient_mask = mlp.gate_proj.salient_mask


@pytest.mark.parametrize(
    ("change", "reason"),
    [(another_forward, "something else"), (another_mask, "do not share"), (another_format, "do not share")],
)
def test_one_difference_is_enough_to_leave_an_mlp(change, reason: str) -> None:
    """Another product of the same parts, or an up_proj that reads other codes than gate_proj: the values stay."""
    model = spiking_llama()
    change(model.model.layers[0].mlp)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 64)
    expected = mlp(x)
    report = fuse_(model)
    assert model.model.layers[0].mlp is mlp and reason in report.left["model.layers.0.mlp"] and len(report.mlps) == 1
    assert same(mlp(x), expected)


def test_an_mlp_that_holds_more_than_its_layers_stays() -> None:
    """A buffer or parameter of its own would vanish from the state dict."""
    model = spiking_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    first.register_buffer("calls", torch.zeros(1))
    second.gain = nn.Parameter(torch.ones(1))
    names = list(model.state_dict())
    report = fuse_(model)
    assert list(model.state_dict()) == names and not report.mlps
    assert all("and more" in report.left[f"model.layers.{i}.mlp"] for i in (0, 1))


class Narrow(Odd):
    """An RMSNorm that rounds to float16 on the way: with bfloat16 some numbers in a hundred differ, with float32 none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        scaled = scaled if x.dtype == torch.float32 else scaled.half()
        return (scaled * self.weight.to(scaled.dtype)).to(x.dtype)


def test_a_norm_of_other_roundings_stays() -> None:
    """In float32 it is an RMSNorm; in bfloat16 it rounds where no formula here rounds."""
    model = spiking_llama()
    model.model.norm = Narrow()
    assert "something else" in fuse_(model).left["model.norm"]
