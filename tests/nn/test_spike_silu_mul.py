"""SpikingGatedMLP: one call that gives what its layers give one by one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spiking import CONFIGS, DTYPES, generator, same
from torch import Tensor, nn

from ranvier import SpikeConfig
from ranvier.nn import SpikeGroup, SpikingGatedMLP, SpikingLinear
from ranvier.ops import spike_silu_mul

pytestmark = pytest.mark.usefixtures("poisoned")
K, N = 64, 96


def chosen(channels: int, seed: int) -> Tensor:
    return torch.randperm(channels, generator=generator(seed)) < channels // 9


def mlp_of(config: SpikeConfig = CONFIGS[0], dtype: torch.dtype = torch.float32, bias: bool = True) -> SpikingGatedMLP:
    torch.manual_seed(3)
    sizes, group = {"gate": (K, N), "up": (K, N), "down": (N, K)}, SpikeGroup()
    layers = {}
    for name, (inside, outside) in sizes.items():
        mask = chosen(inside, inside)
        layers[name] = SpikingLinear.from_linear(nn.Linear(inside, outside, bias=bias).to(dtype), config, mask)
    for name in ("gate", "up"):
        layers[name].group, layers[name].salient_mask = group, group.share(layers[name].salient_mask)
    return SpikingGatedMLP(layers["gate"], layers["up"], layers["down"])


def x_of(tokens: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, tokens, K, generator=generator(tokens)).to(dtype)


def parts(mlp: SpikingGatedMLP, x: Tensor) -> Tensor:
    """One by one, the product by the functional call."""
    product, _ = spike_silu_mul(mlp.gate_proj(x), mlp.up_proj(x))
    return mlp.down_proj(product)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_is_its_parts(isa: str, config: SpikeConfig) -> None:
    """Every format, type and number of tokens, in a group and without, bias or none: the bits of the parts."""
    for dtype in DTYPES:
        mlp = mlp_of(config, dtype, bias=dtype != torch.float16)
        for tokens in (0, 1, 7, 13):
            x = x_of(tokens, dtype)
            assert same(mlp(x), parts(mlp, x.clone()))
        with torch.inference_mode():
            x = x_of(3, dtype)
            assert same(mlp(x), parts(mlp, x))


@torch.no_grad()
def test_threads(isa: str, threads: None) -> None:
    """One thread, two and repeats give the same bits, at sizes that are shared among threads."""
    mlp, x = mlp_of(), x_of(700)
    torch.set_num_threads(1)
    y = mlp(x)
    torch.set_num_threads(2)
    assert all(same(mlp(x), y) for _ in range(10))


def test_plain_where_it_must_be() -> None:
    """Gradients, hooks, a layer that was replaced, other masks, a compiler, autocast: the layers are called one by one."""
    mlp, x = mlp_of(), x_of()

    def plain(mlp: SpikingGatedMLP, x: Tensor) -> Tensor:
        return mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    wanted = x.clone().requires_grad_()
    gradients = [torch.autograd.grad(f(wanted).sum(), wanted)[0] for f in (mlp, lambda x: plain(mlp, x))]
    assert same(*gradients) and gradients[0].abs().max() > 0
    with torch.no_grad():
        seen = []
        hook = mlp.up_proj.register_forward_hook(lambda layer, args, y: seen.append(layer))
        assert same(mlp(x), plain(mlp, x)) and seen == [mlp.up_proj] * 2
        hook.remove()
        torch._dynamo.reset()
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        assert same(compiled(x), plain(mlp, x))
        with torch.autocast("cpu", torch.bfloat16):
            assert mlp(x).dtype == torch.bfloat16
        other = copy.deepcopy(mlp)
        other.up_proj.salient_mask = chosen(K, 99)
        assert same(other(x), plain(other, x))
        other.down_proj = other.down_proj.to_linear()
        assert same(other(x), plain(other, x))
        strided = torch.randn(K, 4, generator=generator()).t()
        torch.testing.assert_close(mlp(strided), plain(mlp, strided))


@torch.no_grad()
def test_copies() -> None:
    """deepcopy and pickle give the same results and share nothing; the state dict has the layers' names."""
    mlp, x = mlp_of(), x_of()
    expected = mlp(x)
    for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert same(twin(x), expected) and twin.gate_proj.group is twin.up_proj.group is not mlp.gate_proj.group
    assert {name.split(".")[0] for name in mlp.state_dict()} == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ValueError, match="63 channels"):
        mlp(torch.zeros(2, 63))
    with pytest.raises(TypeError, match="int64"):
        mlp(torch.zeros(2, K, dtype=torch.int64))
