"""Optimal Brain Spiking: which input channels of a linear layer get further time steps.

First-order activation saliency, signed, of channel j over M tokens:

    S_j = 1/M sum_t x_tj (W^T W x_t)_j = 1/M sum_i (X^T X)_ji (W^T W)_ji

The scores of layers that read the same tensor add up, because stacking their weights adds their W^T W. SpikeLLM,
arXiv 2407.04752, section 3.3; the released code's threshold. Where the weights spike, their own second-order saliency
decides: :func:`weight_saliency`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ranvier.methods.spikellm._square import all_finite, cholesky_into, reverse_
from ranvier.methods.spikellm.blocks import Positions


def salient_channels(channels: int, share: float) -> int:
    """How many of K channels are salient where no scores tie: K - int((1 - share) K)."""
    # Rounded first: (1 - 0.8) * 10 is a little under 2 in floats.
    return channels - int(round((1 - share) * channels, 6))


def salient_mask(scores: Tensor, share: float, *, absolute: bool = False) -> Tensor:
    """The channels whose score is above the int((1 - share) K)-th smallest: bool [K].

    scores: float [K], signed as the released code takes them; absolute: by their magnitudes. share: 0 marks none, 1 all.
    Ties with the threshold are left out, so they only shrink the set.
    Raises ValueError for scores that are not finite.
    """
    channels = scores.shape[0]
    if not bool(scores.isfinite().all()):
        raise ValueError("salient_mask: the saliency scores have NaN or Inf; the calibration inputs or weights are not finite")
    scores = scores.abs() if absolute else scores
    if share == 0:
        return torch.zeros(channels, dtype=torch.bool, device=scores.device)
    low = channels - salient_channels(channels, share)
    if low == 0:
        return torch.ones(channels, dtype=torch.bool, device=scores.device)
    return scores > scores.kthvalue(low).values


def gram_is_cheaper(tokens: int, out_features: int, in_features: int) -> bool:
    """Whether 2 M K^2 + 2 N K^2 (closed form) beats 4 M K N (token by token) operations."""
    m, n, k = tokens, out_features, in_features
    return 2 * m * k * k + 2 * n * k * k < 4 * m * k * n


def first_order_saliency(x: Tensor, weight: Tensor, gram: Tensor | None = None) -> Tensor:
    """sum_t x_t o (W^T W x_t), not yet divided by the tokens: float32 [K]. x [M, K], weight [N, K].

    gram: X^T X where it is at hand. The closed form is used where it needs fewer operations.
    """
    x, weight = x.float(), weight.float()
    if gram is not None or gram_is_cheaper(x.shape[0], *weight.shape):
        gram = x.T @ x if gram is None else gram
        return (gram * (weight.T @ weight)).sum(1)
    return (x * ((x @ weight.T) @ weight)).sum(0)


def weight_saliency(weight: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """Second-order saliency of each input channel's weights: sum_n w_nj^2 / [chol(H^-1)]_jj^2, float64 [K].

    What removing a column costs once the columns before it are settled, the others making up for it as well as they can.
    weight [N, K], hessian [K, K] symmetric (a multiple of X^T X), damp: share of the mean of H's diagonal that is added to
    it. A channel that never fires (H_jj = 0) scores 0. Raises ValueError for other shapes, a damp below 0, what is not
    finite, and an H that is not positive definite even so. SpikeLLM, arXiv 2407.04752, section 3.4.
    """
    channels = weight.shape[-1]
    if weight.ndim != 2 or tuple(hessian.shape) != (channels, channels):
        got = f"weight {list(weight.shape)} and hessian {list(hessian.shape)}"
        raise ValueError(f"weight_saliency: got {got}; pass [N, K] and [K, K]")
    if not damp >= 0:
        raise ValueError(f"weight_saliency: damp is {damp}; allowed are shares from 0 upwards")
    weight, damped = weight.double(), hessian.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    if not (all_finite(weight) and all_finite(damped)):
        raise ValueError("weight_saliency: the weight or the hessian has NaN or Inf; the calibration inputs are not finite")
    diagonal = damped.diagonal()
    silent = diagonal == 0
    diagonal.add_(damp * diagonal.mean() + silent.double())
    # H = R R^T with R upper triangular makes chol(H^-1) = R^-T, whose diagonal is 1 / R_jj: no inverse is needed.
    lower = torch.empty_like(damped).T
    if not cholesky_into(reverse_(damped), lower):
        raise ValueError(f"weight_saliency: the hessian is not positive definite with damp = {damp}; raise damp")
    scores = weight.square().sum(0) * lower.diagonal().flip(0).square()
    return torch.where(silent, 0.0, scores)


@dataclass
class _Reader:
    """One linear layer under observation."""

    name: str
    module: nn.Linear
    scores: Tensor
    tokens: int = 0
    calls: int = 0
    # For every call the first layer, with the same parent, that was given the very same tensor.
    leaders: set[str] = field(default_factory=set)


class SaliencyObserver:
    """Adds up saliency while a model runs, and sees which layers read the same tensor.

    Use as a context manager round the calibration passes; nothing but one score a channel is kept of them. positions: which
    of a batch's positions count, as whoever runs it says; None: all.
    """

    def __init__(self, layers: dict[str, nn.Linear], score: bool = True, positions: Positions | None = None) -> None:
        self.readers = {
            name: _Reader(name, layer, torch.zeros(layer.in_features, device=layer.weight.device))
            for name, layer in layers.items()
        }
        self.sequence: list[str] = []  # layers in the order of their first calls
        self._score, self._positions, self._handles = score, positions or Positions(), []
        self._seen: tuple | None = None

    def __enter__(self) -> SaliencyObserver:
        for reader in self.readers.values():
            hook = reader.module.register_forward_pre_hook(
                lambda _, args, kwargs, r=reader: self._observe(r, args, kwargs), with_kwargs=True
            )
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], None

    def _observe(self, reader: _Reader, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        leader, gram = self._leader(reader, x)
        reader.leaders.add(leader)
        if reader.calls == 0:
            self.sequence.append(reader.name)
        reader.calls += 1
        flat = self._positions.rows(x.detach())
        reader.tokens += flat.shape[0]
        if not self._score or flat.shape[0] == 0:
            return
        if gram is None and gram_is_cheaper(flat.shape[0], *reader.module.weight.shape):
            gram = flat.float().T @ flat.float()
            self._seen = (*self._seen[:3], gram)
        reader.scores += first_order_saliency(flat, reader.module.weight.detach(), gram)

    def _leader(self, reader: _Reader, x: Tensor) -> tuple[str, Tensor | None]:
        version = None if x.is_inference() else x._version
        seen = self._seen
        if seen is not None and seen[0]() is x and seen[1] == version and _parent(seen[2]) == _parent(reader.name):
            return seen[2], seen[3]
        self._seen = (weakref.ref(x), version, reader.name, None)
        return reader.name, None

    def groups(self) -> list[list[str]]:
        """Layers that read the same tensor as another in every single call, in the model's order; each with K in common."""
        followers: dict[str, list[str]] = {}
        for name, reader in self.readers.items():
            if len(reader.leaders) == 1:
                followers.setdefault(next(iter(reader.leaders)), []).append(name)
        calls = {name: reader.calls for name, reader in self.readers.items()}
        return [[n for n in names if calls[n] == calls[lead]] for lead, names in followers.items() if lead in names]

    def scores(self, names: list[str]) -> Tensor:
        """The mean saliency of layers that share a mask: the sum of theirs, per token."""
        total = torch.stack([self.readers[name].scores for name in names]).sum(0)
        return total / max(self.readers[names[0]].tokens, 1)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
