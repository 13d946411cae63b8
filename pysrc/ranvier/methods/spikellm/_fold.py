"""Changes to a model that are worked out first and made at the end, and the linear algebra of folding."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ranvier.reference import hadamard as reference

CHUNK = 1 << 22  # values transformed at once: the transform's temporaries stay small beside a weight


class Edits:
    """Assignments to modules' tables that are made together, and can be undone."""

    def __init__(self) -> None:
        self._planned: list[tuple[dict[str, Any], str, Any]] = []
        self._done: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, table: dict[str, Any], key: str, value: Any) -> Edits:
        self._planned.append((table, key, value))
        return self

    def weight(self, module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Edits:
        """New parameters in the dtype of the old ones; without a bias that one stays."""
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                old = getattr(module, name)
                new = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
                self.put(module._parameters, name, new)
        return self

    def extend(self, other: Edits) -> None:
        self._planned += other._planned

    def apply(self) -> None:
        """All of them, or none when one fails."""
        try:
            for table, key, value in self._planned:
                self._done.append((table, key, table[key]))
                table[key] = value
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        for table, key, old in reversed(self._done):
            table[key] = old
        self._done.clear()


def turned_rows(weight: Tensor, signs: Tensor, order: int, transpose: bool = False) -> Tensor:
    """W diag(signs) (I (x) H) / sqrt(n) over the last dimension, H^T where ``transpose``: float64."""
    signs = signs.to(weight.device)
    pieces = weight.reshape(-1, weight.shape[-1]).split(max(1, CHUNK // weight.shape[-1]))
    done = [reference.hadamard(piece.double() * signs, order, transpose) for piece in pieces]
    return torch.cat(done).reshape(weight.shape)


def check_weight(where: str, module: nn.Module) -> None:
    """Raises ValueError for parameters without values or with NaN or Inf."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{where}: its {name} is on the meta device; load the model first")
        if not parameter.is_floating_point() or not bool(parameter.isfinite().all()):
            raise ValueError(f"{where}: its {name} is {parameter.dtype} with NaN, Inf or no fractions; repair the model first")


class Norm(NamedTuple):
    """What a norm does after dividing: y = gain n + shift, float64; shift None for none."""

    gain: Tensor
    shift: Tensor | None

    def into(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the layer that reads n itself: W diag(gain), b + W shift."""
        weight, bias = linear.weight.double(), None if linear.bias is None else linear.bias.double()
        if self.shift is not None:
            if bias is None:
                raise ValueError("rotate_: a linear layer without a bias reads a norm with one; it cannot be folded")
            bias = bias + weight @ self.shift
        return weight * self.gain, bias


def fold_norm(norm: nn.Module, where: str, edits: Edits, keeps_mean: bool) -> Norm:
    """Gain and shift of a norm, after planning that it has none; RMSNorm is known by what it does, LayerNorm by its type.

    Raises ValueError for a norm that does anything else, and for LayerNorm under a rotation that does not keep the mean.
    """
    if type(norm) is nn.LayerNorm:
        if not keeps_mean:
            raise ValueError(f"{where}: LayerNorm subtracts the mean of the channels; it needs Rotation(..., keeps_mean=True)")
        check_weight(where, norm)
        size = norm.normalized_shape[0]
        gain, shift = (None if p is None else p.double() for p in (norm.weight, norm.bias))
        if gain is not None:
            edits.weight(norm, torch.ones_like(gain), None if shift is None else torch.zeros_like(shift))
        shift = None if shift is None or not bool(shift.any()) else shift
        return Norm(torch.ones(size, dtype=torch.float64) if gain is None else gain, shift)
    parameters = dict(norm.named_parameters())
    weight = parameters.get("weight")
    if set(parameters) != {"weight"} or weight.ndim != 1:
        raise ValueError(f"{where}: {type(norm).__name__} has {sorted(parameters)}; only RMSNorm with a gain can be folded")
    check_weight(where, norm)
    x = 1e3 * torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(weight.device)  # large, so that epsilon counts for nothing
    y = copy.deepcopy(norm).float()(x.float()).double()
    plain = x / x.square().mean(-1, keepdim=True).sqrt()
    for offset in (0.0, 1.0):  # Gemma stores g - 1
        gain = weight.double() + offset
        # Two roundings of float32, and its sum of squares.
        if float((y - gain * plain).abs().max()) <= 1e-5 * float((gain * plain).abs().max()) + 1e-12:
            edits.weight(norm, torch.full_like(gain, 1.0 - offset))
            return Norm(gain, None)
    raise ValueError(f"{where}: {type(norm).__name__} is no RMSNorm with a gain w or 1 + w; its gain cannot be folded")
