"""Hadamard: a fixed orthogonal transform of the channels, and a linear layer behind one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ranvier.ops._args import DTYPES
from ranvier.ops._declare import needs_dispatcher
from ranvier.ops.hadamard import cpu, hadamard, order_fault
from ranvier.reference import hadamard as reference
from ranvier.reference.hadamard import hadamard_order


class Hadamard(nn.Module):
    """y = (x * signs) (I (x) H_n) / sqrt(n), or with ``transpose`` its inverse: y = (x (I (x) H_n^T) / sqrt(n)) * signs.

    x [..., features] float32, bfloat16 or float16, y alike. It has no parameters; signs, a vector of +-1, is a buffer.
    QuaRot, arXiv 2404.00456.
    """

    signs: Tensor | None

    def __init__(
        self, features: int, order: int | None = None, signs: Tensor | None = None, *, transpose: bool = False
    ) -> None:
        """order: n, a divisor of features; None takes the largest one there is. signs: [features], None for no signs.

        Raises ValueError for features below 1, an order without a matrix or that does not divide features, other signs.
        """
        super().__init__()
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"Hadamard: features is {features!r}; pass a whole number of at least 1")
        order = hadamard_order(features) if order is None else order
        fault = order_fault(order) or (f"order {order} does not divide features {features}" if features % order else None)
        if fault is not None:
            raise ValueError(f"Hadamard: {fault}")
        self.features, self.order, self.transpose = features, order, transpose
        if signs is not None:
            signs = torch.as_tensor(signs).to(torch.float32)
            if tuple(signs.shape) != (features,) or not bool((signs.abs() == 1).all()):
                raise ValueError(f"Hadamard: signs has shape {list(signs.shape)}; pass a vector of {features} times 1 or -1")
        self.register_buffer("signs", signs)

    def forward(self, input: Tensor) -> Tensor:
        """[..., features] -> [..., features]. Raises ValueError for another width, TypeError for other dtypes."""
        if input.ndim == 0 or input.shape[-1] != self.features:
            raise ValueError(f"Hadamard: x has shape {list(input.shape)}; its last dimension must be {self.features}")
        if self._buffers["signs"] is None:
            # Checked above and when the module was made: the op would look again, which costs more than a token's transform.
            known = input.is_cpu and input.dtype in DTYPES and input.layout is torch.strided
            if known and not needs_dispatcher(input):
                return cpu(input, self.order, self.transpose)
            return hadamard(input, self.order, transpose=self.transpose)
        signs = self.signs.to(input.dtype)
        if self.transpose:
            return hadamard(input, self.order, transpose=True) * signs
        return hadamard(input * signs, self.order)

    def extra_repr(self) -> str:
        parts = [f"{self.features}", *([f"order={self.order}"] if self.order != self.features else [])]
        return ", ".join(parts + (["signs"] if self.signs is not None else []) + (["transpose"] if self.transpose else []))


def _empty_like(linear: nn.Linear) -> nn.Linear:
    """A layer of this shape and kind whose values are still to come: none are drawn."""
    weight = linear.weight
    options = {"bias": linear.bias is not None, "device": weight.device, "dtype": weight.dtype}
    return nn.utils.skip_init(nn.Linear, linear.in_features, linear.out_features, **options)


class HadamardLinear(nn.Module):
    """y = linear(hadamard(x)), in place of a linear layer whose weight was rotated along its input channels.

    The two are submodules, so that whatever looks for ``nn.Linear`` layers finds the one inside and can replace it.
    """

    def __init__(self, hadamard: Hadamard, linear: nn.Module) -> None:
        super().__init__()
        self.hadamard = hadamard
        self.linear = linear

    @classmethod
    def from_linear(cls, linear: nn.Linear, order: int | None = None) -> HadamardLinear:
        """The layer behind a transform that its weight takes back: W' = W (I (x) H_n) / sqrt(n), in float64.

        The given layer stays as it is. Raises TypeError for another kind of layer, ValueError as :class:`Hadamard`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"HadamardLinear.from_linear: got {type(linear).__name__}; pass a torch.nn.Linear")
        turn = Hadamard(linear.in_features, order)
        rotated = _empty_like(linear)
        with torch.no_grad():
            rotated.weight.copy_(reference.hadamard(linear.weight.double(), turn.order))
            if linear.bias is not None:
                rotated.bias.copy_(linear.bias)
        return cls(turn, rotated).train(linear.training)

    def without_transform(self, linear: nn.Linear) -> nn.Linear:
        """One layer that does what the transform and ``linear``, in its place inside, do: W = W' (I (x) H_n)^T / sqrt(n)."""
        turn, plain = self.hadamard, _empty_like(linear)
        with torch.no_grad():
            weight = reference.hadamard(linear.weight.double(), turn.order, not turn.transpose)
            plain.weight.copy_(weight if turn.signs is None else weight * turn.signs.double())
            if linear.bias is not None:
                plain.bias.copy_(linear.bias)
        return plain.train(linear.training)

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return self.hadamard.features

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return self.linear.out_features

    def forward(self, input: Tensor) -> Any:
        """[..., in_features] -> [..., out_features]."""
        return self.linear(self.hadamard(input))
