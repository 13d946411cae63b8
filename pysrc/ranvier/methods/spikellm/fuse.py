"""Fusing a converted model: norms and gated MLPs that encode what they give, found by what they compute, not by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ranvier.methods.spikellm.blocks import check_module, replace_modules
from ranvier.nn.spike_linear import SpikingLinear
from ranvier.nn.spike_rms_norm import SpikingRMSNorm
from ranvier.nn.spike_silu_mul import LINEARS, SpikingGatedMLP
from ranvier.reference.spike_rms_norm import WEIGHTINGS, rms_norm

FOREIGN = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse_` did: names of norms and of MLPs it replaced, and names with the reason why one was left."""

    norms: list[str] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [f"{len(self.norms)} norms and {len(self.mlps)} MLPs fused, {len(self.left)} left as they are"]
        return "\n".join(rows + [f"  {name}: {reason}" for name, reason in self.left.items()])


def fuse_(model: nn.Module) -> FuseReport:
    """Replace, in place, the RMSNorms and the SiLU-gated MLPs of a converted model by modules that encode in the same pass.

    A module is replaced where it has the parts of one and, on random input, gives what the formula gives; so any
    architecture may come, and what is not recognised stays and is reported. Names in the state dict, parameters and layers
    stay the same objects. Outputs differ from the unfused model's by the rounding of a sum and of an exponential, which now
    and then moves a code by one; where a gradient is needed the plain formulas run, so training has the unfused model's bits,
    forward and backward (straight through the codes). Calling it again changes nothing. :func:`unfuse_` and ``unspike_`` put
    the old modules back.

    Raises ValueError for a model without spiking layers. If anything fails the model is as it was.
    """
    check_module("fuse_", model)
    if not any(isinstance(module, SpikingLinear) for module in model.modules()):
        raise ValueError(f"fuse_: {type(model).__name__} has no spiking layer; convert it with spike_ first")
    report, replacements = FuseReport(), {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if module is model or isinstance(module, (SpikingRMSNorm, SpikingGatedMLP)):
                continue
            new, reason = _fused(module)
            if new is not None:
                replacements[id(module)] = new
                (report.norms if isinstance(new, SpikingRMSNorm) else report.mlps).append(name)
            elif reason:
                report.left[name] = reason
    replace_modules(model, replacements)
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Put back the modules that :func:`fuse_` replaced, with the parameters and layers the model has now; returns it.

    A model in which nothing is fused stays as it is.
    """
    check_module("unfuse_", model)
    replace_modules(model, {id(module): _original(module) for module in _fused_modules(model)})
    return model


def _fused_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (SpikingRMSNorm, SpikingGatedMLP)) and "_original" in module.__dict__:
            yield module


def _original(module: nn.Module) -> nn.Module:
    (original,) = module._original
    original._parameters.update(module._parameters)
    for name in original._modules:
        original._modules[name] = module._modules[name]
    return original.train(module.training)


def _fused(module: nn.Module) -> tuple[nn.Module | None, str]:
    """The module's replacement, or None and the reason, which is empty where there is nothing to say."""
    make = _fused_norm if _looks_like_norm(module) else _fused_mlp if _looks_like_mlp(module) else None
    if make is None:
        return None, ""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__:
        return None, "it has hooks or a forward of its own"
    new = make(module)
    if isinstance(new, str):
        return None, new
    # In a tuple, so that it is no submodule: names in the state dict stay those of the model.
    new._original = (module,)
    return new.train(module.training), ""


def _looks_like_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    alone = [n for n, p in module._parameters.items() if p is not None] == ["weight"]
    return alone and not module._buffers and not module._modules and weight.ndim == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in EPSILONS if isinstance(getattr(module, name, None), float)]
    return found[0] if found else None


def _fused_norm(norm: nn.Module) -> SpikingRMSNorm | str:
    weighting = _weighting(norm)
    if weighting is None:
        return "it has the parts of an RMSNorm and computes something else"
    return SpikingRMSNorm(norm.weight, _epsilon(norm), weighting)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _weighting(norm: nn.Module) -> str | None:
    """The formula that gives the module's values in bfloat16, where the places of its casts show, and in float32."""
    twin = copy.deepcopy(norm).cpu()
    channels = norm.weight.shape[0]
    # Small rows too, for which eps matters.
    x = _random(8, channels) * torch.exp2(torch.arange(-12.0, 4.0, 2.0)).view(8, 1)
    twin.weight.data = _random(channels) + 0.5
    given = [(x, twin.float()), (x.bfloat16(), copy.deepcopy(twin).bfloat16())]
    try:
        expected = [module(rows) for rows, module in given]
    except FOREIGN:  # a forward that wants other arguments is no norm
        return None
    found = []
    for weighting in WEIGHTINGS:
        values = [rms_norm(rows, module.weight, _epsilon(norm), weighting) for rows, module in given]
        if all(_agree(a, b) for a, b in zip(values, expected, strict=True)):
            found.append((values[1] != expected[1]).sum().item())
        else:
            found.append(None)
    agreeing = [(count, weighting) for count, weighting in zip(found, WEIGHTINGS, strict=True) if count is not None]
    return min(agreeing)[1] if agreeing else None


def _agree(value: Tensor, expected: object) -> bool:
    """Equal but for the rounding of a sum: a few units in float32; in bfloat16 hardly ever another number."""
    if not isinstance(expected, Tensor) or expected.shape != value.shape or expected.dtype != value.dtype:
        return False
    if value.dtype == torch.bfloat16:
        return (value != expected).float().mean().item() < 0.01
    return torch.allclose(value, expected, rtol=1e-5, atol=1e-7)


def _looks_like_mlp(module: nn.Module) -> bool:
    return all(isinstance(module._modules.get(name), SpikingLinear) for name in LINEARS)


def _fused_mlp(mlp: nn.Module) -> SpikingGatedMLP | str:
    act = getattr(mlp, "act_fn", None)
    if set(mlp._modules) - {"act_fn"} != set(LINEARS) or any(p is not None for p in mlp._parameters.values()) or mlp._buffers:
        return "it has gate_proj, up_proj and down_proj, and more"
    if not callable(act):
        return "it has no act_fn"
    gate = mlp.gate_proj
    new = SpikingGatedMLP(gate, mlp.up_proj, mlp.down_proj, act)
    x = _random(2, gate.in_features).to(gate.weight_packed.device, gate.dtype)
    try:
        hidden = gate(x)
        same = torch.equal(act(hidden), nn.functional.silu(hidden))
        same = same and torch.equal(mlp(x), mlp.down_proj(act(hidden) * mlp.up_proj(x)))
    except FOREIGN:  # a forward that wants other arguments is no gated MLP
        same = False
    if not same:
        return "it has the parts of a SiLU-gated MLP and computes something else"
    if gate.salient_mask is not mlp.up_proj.salient_mask or gate.format != mlp.up_proj.format:
        return "its gate_proj and up_proj do not share their mask"
    extra = {k: v for k, v in vars(mlp).items() if k not in vars(new) and not k.startswith("_")}
    new.__dict__.update(extra)
    return new
