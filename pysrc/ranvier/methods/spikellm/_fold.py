"""Changes to a model that are worked out first and made at the end, and the linear algebra of folding."""

from __future__ import annotations

import copy
from typing import Any

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


def turned_rows(weight: Tensor, signs: Tensor, order: int) -> Tensor:
    """W diag(signs) (I (x) H) / sqrt(n) over the last dimension: float64."""
    signs = signs.to(weight.device)
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, CHUNK // weight.shape[-1])
    done = [reference.hadamard(piece.double() * signs, order) for piece in rows.split(step)]
    return torch.cat(done).reshape(weight.shape)


def turned_columns(weight: Tensor, signs: Tensor, order: int) -> Tensor:
    """The same over the first dimension."""
    return turned_rows(weight.movedim(0, -1), signs, order).movedim(-1, 0)


def check_weight(where: str, module: nn.Module) -> None:
    """Raises ValueError for parameters without values or with NaN or Inf."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{where}: its {name} is on the meta device; load the model first")
        if not parameter.is_floating_point() or not bool(parameter.isfinite().all()):
            raise ValueError(f"{where}: its {name} is {parameter.dtype} with NaN, Inf or no fractions; repair the model first")


def norm_gain(norm: nn.Module, where: str, edits: Edits) -> Tensor:
    """g of y = g x / rms(x): float64, after planning that the norm has none; found by what the norm does.

    Raises ValueError for a norm that does anything else.
    """
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
            return gain
    raise ValueError(f"{where}: {type(norm).__name__} is no RMSNorm with a gain w or 1 + w; its gain cannot be folded")
