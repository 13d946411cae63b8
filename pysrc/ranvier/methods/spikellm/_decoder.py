"""What a decoder-only language model consists of, found by the names its family gives the parts, and checked."""

from __future__ import annotations

from torch import nn

from ranvier.methods.spikellm._fold import check_weight
from ranvier.nn.hadamard import HadamardLinear

FAMILIES = "Llama, Mistral, Qwen2, Qwen3, Gemma and OPT"


def _linear(where: str, parent: nn.Module, name: str) -> nn.Linear:
    layer = getattr(parent, name, None)
    if isinstance(layer, HadamardLinear):
        raise ValueError(f"rotate_: {where}.{name} already has a rotation before it; rotate a model once")
    if type(layer) is not nn.Linear:
        got = "missing" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(f"rotate_: {where}.{name} is {got}; it must be an nn.Linear (rotate before converting)")
    check_weight(f"rotate_: {where}.{name}", layer)
    return layer


def _child(where: str, parent: nn.Module, name: str) -> nn.Module:
    child = getattr(parent, name, None)
    if child is None:
        raise ValueError(
            f"rotate_: {where} ({type(parent).__name__}) has no {name}; blocks with input_layernorm, self_attn,"
            f" post_attention_layernorm and mlp can be rotated, and OPT's: {FAMILIES}"
        )
    return child


def _is_opt(block: nn.Module) -> bool:
    return hasattr(block, "self_attn_layer_norm") and hasattr(block, "fc1")


def down_place(block: nn.Module, where: str) -> tuple[nn.Module, str]:
    """The module that holds the block's last linear layer, and that layer's name in it."""
    return (block, "fc2") if _is_opt(block) else (_child(where, block, "mlp"), "down_proj")


class Block:
    """The parts of one decoder block.

    norms: before attention and before the mlp. gates: what reads the second norm and goes through the activation; up:
    what is multiplied with that, None in OPT. down: the last layer, ``down_name`` in ``holder``.
    """

    def __init__(self, block: nn.Module, where: str) -> None:
        self.where = f"rotate_: {where}"
        opt = _is_opt(block)
        if opt and not getattr(block, "do_layer_norm_before", True):
            raise ValueError(
                f"{self.where} has its norms after attention and mlp, on the residual stream itself; not supported"
            )
        names = ("self_attn_layer_norm", "final_layer_norm") if opt else ("input_layernorm", "post_attention_layernorm")
        self.norms = [_child(where, block, name) for name in names]
        self.attention = _child(where, block, "self_attn")
        self.q, self.k, self.v, self.o = (
            _linear(f"{where}.self_attn", self.attention, name)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj" if opt else "o_proj")
        )
        self.holder, self.down_name = down_place(block, where)
        inside = where if opt else f"{where}.mlp"
        self.gates = [_linear(inside, self.holder, "fc1" if opt else "gate_proj")]
        self.up = None if opt else _linear(inside, self.holder, "up_proj")
        self.down = _linear(inside, self.holder, self.down_name)
        linears = [self.q, self.k, self.v, self.o, *self.gates, self.down, *([] if self.up is None else [self.up])]
        known = {id(p) for m in (*self.norms, *linears) for p in m.parameters()}
        # Norms of queries and keys within attention come after what is rotated.
        known |= {id(p) for name in ("q_norm", "k_norm") for p in getattr(self.attention, name, nn.Identity()).parameters()}
        for name, parameter in block.named_parameters():
            if id(parameter) not in known:
                raise ValueError(f"{self.where}.{name} has no known place in a rotated block; this family is not supported")

    def head_width(self) -> int:
        """Channels of one head of v and o. Raises ValueError where attention does not say."""
        width = getattr(self.attention, "head_dim", None)
        if not isinstance(width, int) or self.v.out_features % width or self.o.in_features % width:
            raise ValueError(f"{self.where}.self_attn has head_dim {width!r}; pass heads=False for attention without")
        return width

    def check_width(self, width: int) -> None:
        """Raises ValueError for a block whose stream has another width."""
        for linear, size in ((self.q, self.q.in_features), (self.o, self.o.out_features), (self.down, self.down.out_features)):
            if size != width:
                raise ValueError(f"{self.where} has a {tuple(linear.weight.shape)} weight; the rotation has {width}")


class Decoder:
    """Embeddings (of tokens first), blocks, final norm and head of a causal language model."""

    def __init__(self, model: nn.Module) -> None:
        where = f"rotate_: {type(model).__name__}"
        inner = getattr(model, "model", None)
        inner = getattr(inner, "decoder", inner)
        self.head: nn.Module | None = getattr(model, "lm_head", None)
        if inner is None or self.head is None:
            raise ValueError(f"{where} has no {'lm_head' if self.head is None else 'model'}; rotated can be {FAMILIES}")
        positions = getattr(inner, "embed_positions", None)
        self.norm: nn.Module = getattr(inner, "norm" if positions is None else "final_layer_norm", None)
        self.layers = getattr(inner, "layers", None)
        tokens = getattr(inner, "embed_tokens", None)
        for name, part in (("embed_tokens", tokens), ("layers", self.layers), ("final norm", self.norm)):
            if part is None or (name == "layers" and not len(part)):
                raise ValueError(f"{where} has no {name} where a decoder has one; rotated can be {FAMILIES}")
        self.embeddings = [tokens] if positions is None else [tokens, positions]
        self.keeps_mean = any(isinstance(module, nn.LayerNorm) for module in inner.modules())
        known = {id(p) for m in (*self.embeddings, self.layers, self.norm, self.head) for p in m.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in known:
                raise ValueError(f"{where}: {name} has no known place in a rotated model; this family is not supported")

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.embeddings[0].weight.shape[1]
