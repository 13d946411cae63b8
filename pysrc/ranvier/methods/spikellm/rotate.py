"""A randomized Hadamard rotation folded into a decoder's weights: the same function, activations without outliers.

RMSNorm without a gain commutes with an orthogonal Q, LayerNorm without gain and bias with one that keeps the mean. So the
residual stream can be carried as x Q: what writes to it (embedding, o_proj, down_proj) is multiplied by Q, what reads it
(q, k, v, gate, up, lm_head) takes Q back, after the norm's gain was folded into it. Likewise within a head, where v is only
read by o_proj, and before down_proj, where the transform has to run online because silu(gate) * up stands between.

    Q = diag(signs) H / sqrt(n),  H = I (x) H_n;    H diag(signs) H^T / n where the mean is kept

The latter with H's first column and the first of the signs 1, so that Q maps (1, ..., 1) to itself.

QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024, for the norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ranvier.methods.spikellm._decoder import Block, Decoder, down_place
from ranvier.methods.spikellm._fold import Edits, check_weight, fold_norm, turned_rows
from ranvier.methods.spikellm.evaluate import evaluating
from ranvier.nn.hadamard import Hadamard, HadamardLinear
from ranvier.reference import hadamard as reference
from ranvier.reference.hadamard import hadamard_order

PROBE_TOKENS = 16


@dataclass(frozen=True)
class Rotation:
    """Q on ``width`` channels, drawn by (seed, stream), of the largest order n there is for it.

    Q = diag(signs) (I (x) H_n) / sqrt(n); with keeps_mean, which LayerNorm needs, H D H^T / n.
    Raises ValueError for a width that has no rotation (an odd one without a Hadamard matrix of any divisor but 1).
    """

    width: int
    seed: int = 0
    stream: int = 0
    keeps_mean: bool = False

    def __post_init__(self) -> None:
        for name in ("seed", "stream"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
                raise ValueError(f"Rotation: {name} is {value!r}; pass a whole number from 0 to 2**64 - 1")
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"Rotation: width is {self.width!r}; pass a whole number of at least 1")
        if self.order == 1 and self.width > 1:
            raise ValueError(f"Rotation: {self.width} channels cannot be rotated: no divisor has a Hadamard matrix")

    @property
    def order(self) -> int:
        """n; smaller than the width where that has no Hadamard matrix, and Q is then block-diagonal."""
        return hadamard_order(self.width)

    @cached_property
    def signs(self) -> Tensor:
        """+-1: float64 [width], bits of Philox keyed by seed and stream."""
        key = np.array([self.seed, self.stream], dtype=np.uint64)
        bits = np.random.Philox(key=key).random_raw(self.width) >> np.uint64(63)
        return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))

    def inputs(self, weight: Tensor) -> Tensor:
        """W Q for a layer that reads rotated channels: [..., width] -> float64."""
        if not self.keeps_mean:
            return turned_rows(weight, self.signs, self.order)
        column = reference.hadamard(torch.eye(self.order, dtype=torch.float64)[:1], self.order, True).sign().flatten()
        ones, draw = column.repeat(self.width // self.order), self.signs.clone()
        draw[:: self.order] = 1.0  # what the first column of each block, the mean, is multiplied by
        return turned_rows(turned_rows(weight, ones, self.order), draw, self.order, transpose=True) * ones.to(weight.device)

    def outputs(self, weight: Tensor) -> Tensor:
        """Q^T W for a layer that writes them: [width, ...], or a bias [width] -> float64."""
        return self.inputs(weight.movedim(0, -1)).movedim(-1, 0)


@dataclass(frozen=True)
class RotationReport:
    """What :func:`rotate_` did. logit_error: ||rotated - before|| / ||before|| of the logits of a short probe."""

    seed: int
    width: int
    order: int
    blocks: int
    head_order: int | None
    online_width: int | None
    online_order: int | None
    untied: bool
    logit_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain json values."""
        return asdict(self)

    def __str__(self) -> str:
        head = "no rotation in heads" if self.head_order is None else f"heads of order {self.head_order}"
        inner = "none online" if self.online_order is None else f"{self.online_order} of {self.online_width} online"
        stream = f"residual stream of {self.width} in order {self.order}"
        untied = ", lm_head untied" if self.untied else ""
        return f"{self.blocks} blocks, {stream}, {head}, {inner}{untied}, logits within {self.logit_error:.1e}"


def _fold_block(parts: Block, rotation: Rotation, index: int, online: bool, heads: bool) -> Edits:
    """New weights of one block; nothing of it is changed yet."""
    parts.check_width(rotation.width)
    edits = Edits()
    norms = [fold_norm(norm, parts.where, edits, rotation.keeps_mean) for norm in parts.norms]
    for linear, norm in ((parts.q, norms[0]), (parts.k, norms[0]), *((linear, norms[1]) for linear in parts.gates)):
        weight, bias = norm.into(linear)
        edits.weight(linear, rotation.inputs(weight), bias)
    value, bias = norms[0].into(parts.v)
    value, back = rotation.inputs(value), parts.o.weight.double()
    if heads:
        head = Rotation(parts.head_width(), rotation.seed, 2 * index + 1)
        value = head.inputs(value.T.unflatten(-1, (-1, head.width))).flatten(-2).T
        back = head.inputs(back.unflatten(-1, (-1, head.width))).flatten(-2)
        bias = None if bias is None else head.inputs(bias.unflatten(-1, (-1, head.width))).flatten()
    edits.weight(parts.v, value, bias)
    edits.weight(parts.o, rotation.outputs(back), None if parts.o.bias is None else rotation.outputs(parts.o.bias))
    down, inner = parts.down.weight.double(), Rotation(parts.down.in_features, rotation.seed, 2 * index + 2)
    signs = torch.ones(inner.width, dtype=torch.float64, device=down.device)
    if online:
        # The signs of the product silu(gate) * up are up's; nothing carries those of an activation alone.
        signs = inner.signs.to(signs) if parts.up is not None else signs
        down = turned_rows(down, signs, inner.order)
        wrapped = HadamardLinear(Hadamard(inner.width, inner.order), parts.down).train(parts.down.training)
        edits.put(parts.holder._modules, parts.down_name, wrapped)
    if parts.up is not None:
        weight, bias = norms[1].into(parts.up)
        edits.weight(parts.up, rotation.inputs(weight) * signs[:, None], None if bias is None else bias * signs)
    return edits.weight(
        parts.down, rotation.outputs(down), None if parts.down.bias is None else rotation.outputs(parts.down.bias)
    )


def _fold_embedding(embedding: nn.Module, rotation: Rotation) -> Edits:
    if not isinstance(embedding, nn.Embedding) or embedding.weight.shape[1] != rotation.width:
        got = f"{type(embedding).__name__} of {list(getattr(getattr(embedding, 'weight', None), 'shape', []))}"
        raise ValueError(f"rotate_: the embedding is {got}; pass an nn.Embedding of width {rotation.width}")
    check_weight("rotate_: the embedding", embedding)
    return Edits().weight(embedding, rotation.inputs(embedding.weight))


def _fold_head(norm: nn.Module, head: nn.Module, rotation: Rotation) -> Edits:
    if type(head) is not nn.Linear or head.in_features != rotation.width:
        raise ValueError(f"rotate_: lm_head is {head}; it must be an nn.Linear with {rotation.width} inputs")
    check_weight("rotate_: lm_head", head)
    edits = Edits()
    folded = fold_norm(norm, "the final norm", edits, rotation.keeps_mean)
    if folded.shift is not None:  # stays with the norm, as what the head's weight turns into W shift: it has no bias
        if not bool(((folded.gain != 0) | (folded.shift == 0)).all()):
            raise ValueError("rotate_: the final norm has a bias where its gain is 0; such a channel cannot be folded")
        offset = torch.where(folded.shift == 0, 0.0, folded.shift / folded.gain)
        edits.weight(norm, torch.ones_like(folded.gain), rotation.inputs(offset))
    return edits.weight(head, rotation.inputs(head.weight.double() * folded.gain))


def rotation_of(model: nn.Module, seed: int = 0) -> Rotation:
    """The rotation of this model's residual stream that :func:`rotate_` takes. Raises ValueError as it does."""
    decoder = Decoder(model)
    return Rotation(decoder.width, seed, keeps_mean=decoder.keeps_mean)


@torch.no_grad()
def rotate_embedding(embedding: nn.Embedding, rotation: Rotation) -> None:
    """E' = E Q, in place. A head tied to it keeps the old weight: it is then tied no more, see :func:`untie`."""
    _fold_embedding(embedding, rotation).apply()


@torch.no_grad()
def rotate_block(block: nn.Module, rotation: Rotation, index: int = 0, *, online: bool = True, heads: bool = True) -> None:
    """One decoder block, in place, all or nothing: it then reads and writes the stream x Q.

    index: the block's number, by which its own signs are drawn. online: put a Hadamard transform before down_proj.
    heads: rotate each head of v and o. Blocks can be rotated one by one; :func:`rotate_embedding` and :func:`rotate_head`
    complete them. Raises ValueError for a block of another structure, one with LayerNorm under a rotation that does not keep
    the mean, meta or not finite weights.
    """
    _fold_block(Block(block, f"block {index}"), rotation, index, online, heads).apply()


@torch.no_grad()
def rotate_head(norm: nn.Module, head: nn.Linear, rotation: Rotation) -> None:
    """The final norm's gain and Q into lm_head, in place."""
    _fold_head(norm, head, rotation).apply()


def _untie(model: nn.Module, edits: Edits) -> bool:
    """Whether the head was tied; the configuration then says that it is not, or loading would tie it again."""
    decoder = Decoder(model)
    tied = decoder.head.weight is decoder.embeddings[0].weight
    config = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else None
    for holder in {id(c): c for c in (config, inner) if getattr(c, "tie_word_embeddings", False)}.values():
        edits.put(vars(holder), "tie_word_embeddings", False)
    keys = vars(model).get("all_tied_weights_keys")
    if isinstance(keys, dict):
        edits.put(vars(model), "all_tied_weights_keys", {})
    return tied


@torch.no_grad()
def rotate_outside(model: nn.Module, rotation: Rotation) -> bool:
    """What is not in blocks, in place, all or nothing: embeddings, final norm and lm_head, which is untied.

    The blocks may be on the meta device; :func:`rotate_block` does them one by one. Returns whether lm_head was tied.
    Raises ValueError as :func:`rotate_`.
    """
    decoder, edits = Decoder(model), Edits()
    for embedding in decoder.embeddings:
        edits.extend(_fold_embedding(embedding, rotation))
    edits.extend(_fold_head(decoder.norm, decoder.head, rotation))
    tied = _untie(model, edits)
    edits.apply()
    return tied


def untie(model: nn.Module) -> bool:
    """Give lm_head a weight of its own and say so in the configuration; returns whether it was tied."""
    edits = Edits()
    tied = _untie(model, edits)
    if tied:
        edits.put(model.lm_head._parameters, "weight", nn.Parameter(model.lm_head.weight.detach().clone()))
    edits.apply()
    return tied


def probe_tokens(model: nn.Module) -> Tensor:
    """A few token ids of this model's vocabulary: int64 [1, 16]."""
    head, vocabulary = model.lm_head.weight, Decoder(model).embeddings[0].weight.shape[0]
    return (torch.arange(PROBE_TOKENS, device=head.device) * 7919 % vocabulary)[None]


def _probe(model: nn.Module) -> Tensor:
    with evaluating(model):
        output = model(probe_tokens(model))
    return (output if isinstance(output, Tensor) else output.logits).double()


def check_rotated(before: Tensor, after: Tensor, rotation: Rotation, where: str) -> None:
    """Raises ValueError unless hidden states [..., width] of a rotated model are x Q of those before, to sqrt(eps)."""
    truth, allowed = rotation.inputs(before.double()), torch.finfo(before.dtype).eps ** 0.5
    error = float((after.double() - truth).norm() / truth.norm().clamp_min(1e-30))
    if not error <= allowed:
        raise ValueError(
            f"rotate_: the hidden states behind {where} changed by {error:.2e} (allowed {allowed:.1e}): it works on them in a"
            " way that is not known here"
        )


def _folded(decoder: Decoder, rotation: Rotation, online: bool, heads: bool) -> Iterator[Edits]:
    blocks = [Block(block, f"block {index}") for index, block in enumerate(decoder.layers)]
    for embedding in decoder.embeddings:
        yield _fold_embedding(embedding, rotation)
    for index, parts in enumerate(tqdm(blocks, desc="rotating", unit="block", leave=False, delay=2)):
        yield _fold_block(parts, rotation, index, online, heads)
    yield _fold_head(decoder.norm, decoder.head, rotation)


@torch.no_grad()
def _rotate(model: nn.Module, seed: int, online: bool, heads: bool) -> tuple[RotationReport, Edits]:
    decoder = Decoder(model)
    rotation = rotation_of(model, seed)
    edits = Edits()
    for part in _folded(decoder, rotation, online, heads):
        edits.extend(part)
    tied = _untie(model, edits)
    first = Block(decoder.layers[0], "block 0")
    head_order = hadamard_order(first.head_width()) if heads else None
    inner = (first.down.in_features, hadamard_order(first.down.in_features)) if online else (None, None)
    allowed = torch.finfo(decoder.head.weight.dtype).eps ** 0.5
    before = _probe(model)
    edits.apply()
    try:
        error = float((_probe(model) - before).norm() / before.norm().clamp_min(1e-30))
        if not error <= allowed:
            raise ValueError(
                f"rotate_: the logits of {type(model).__name__} changed by {error:.2e} (allowed {allowed:.1e}): it connects"
                " its blocks in a way that is not known here; it is as it was"
            )
    except BaseException:
        edits.undo()
        raise
    return RotationReport(seed, rotation.width, rotation.order, len(decoder.layers), head_order, *inner, tied, error), edits


def rotate_(model: nn.Module, seed: int = 0, *, online: bool = True, heads: bool = True) -> RotationReport:
    """Fold a randomized Hadamard rotation into a decoder-only language model, in place; its logits stay.

    Each weight is computed in float64 and rounded once. The norms' gains go into the layers after them, lm_head gets a
    weight of its own. online: a fast Hadamard transform runs before each down_proj, which becomes a
    :class:`ranvier.nn.HadamardLinear`. heads: v_proj and o_proj are rotated within each head.

    All or nothing, at the cost of holding both models for a moment: at the end the logits of a few tokens are compared
    with those before, and a difference above sqrt(eps) of the weights' dtype undoes it all.

    Llama, Mistral, Qwen2, Qwen3, Gemma and OPT, and what is built like them. Raises ValueError for a model of another
    structure, rotated before, converted already, with meta or not finite weights, or whose logits changed; the model is
    then as it was.
    """
    return _rotate(model, seed, online, heads)[0]


@contextmanager
def rotated(model: nn.Module, seed: int = 0, *, online: bool = True, heads: bool = True) -> Iterator[RotationReport]:
    """:func:`rotate_` around what may fail: when the body raises, the very parameters from before are back."""
    report, edits = _rotate(model, seed, online, heads)
    try:
        yield report
    except BaseException:
        edits.undo()
        raise


def _place(block: nn.Module, index: int, edits: Edits) -> None:
    holder, name = down_place(block, f"block {index}")
    down = getattr(holder, name, None)
    if not isinstance(down, nn.Module) or isinstance(down, HadamardLinear):
        raise ValueError(f"place_transforms: block {index} has {type(down).__name__} for {name}; pass a plain model")
    edits.put(holder._modules, name, HadamardLinear(Hadamard(down.in_features), down).train(down.training))


def place_transform(block: nn.Module, index: int) -> None:
    """Put the transform where :func:`rotate_block` puts it, weights as they are. Raises ValueError as it does."""
    edits = Edits()
    _place(block, index, edits)
    edits.apply()


def place_transforms(model: nn.Module) -> None:
    """Put the transforms where :func:`rotate_` puts them and untie lm_head, weights as they are (meta ones too).

    For loading a rotated model's state into a model that was just built. Raises ValueError as :func:`rotate_`.
    """
    edits = Edits()
    for index, block in enumerate(Decoder(model).layers):
        _place(block, index, edits)
    if _untie(model, edits):
        edits.put(model.lm_head._parameters, "weight", nn.Parameter(model.lm_head.weight.detach().clone()))
    edits.apply()
