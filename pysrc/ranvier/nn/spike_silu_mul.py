"""SpikingGatedMLP: down(silu(gate(x)) * up(x)) of three spiking layers in one call."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ranvier import _C
from ranvier.nn.spike_linear import SpikingLinear
from ranvier.ops._args import DTYPES
from ranvier.ops._declare import needs_dispatcher

LINEARS = ("gate_proj", "up_proj", "down_proj")


class SpikingGatedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)).

    x [..., K] float32, bfloat16 or float16. The eager call on the CPU is one of C++: gate and up from one encoding, their
    product encoded row by row, down. With gradients, under a compiler, on other devices, with hooks on a layer, or once a
    layer is no SpikingLinear any more, the layers are called one by one. Results differ from those by the exponential, whose
    order of operations is fixed (:mod:`ranvier.ops.spike_silu_mul`).
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module | None = None) -> None:
        """Takes over the layers. act_fn: a module or function that is SiLU."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]. Raises like the layers."""
        layers = [self._modules[name] for name in LINEARS]
        if not self._can_run(layers, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        gate, _, down = layers
        descriptions = [layer._description() for layer in layers]
        dtype, shape, channels = DTYPES[x.dtype], x.shape, gate.in_features
        tokens = x.numel() // channels
        hidden, y = x.new_empty(2, tokens, gate.out_features), x.new_empty(*shape[:-1], down.out_features)
        group, encoding, address = gate.group, None, x.data_ptr()
        if group is not None and not x.is_inference():
            encoding = group.encoding(descriptions[0], gate._buffers["salient_mask"], x, tokens, gate)
        _C.spike_gated_mlp(
            *descriptions, address, 0 if encoding is None else encoding.data_ptr(), dtype, tokens,
            hidden.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y

    def _can_run(self, layers: list, x: Tensor) -> bool:
        gate, up, down = layers
        if not type(gate) is type(up) is type(down) is SpikingLinear:
            return False
        biases = [layer._parameters["bias"] for layer in layers]
        if needs_dispatcher(x, *biases) or not x.is_cpu or hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return False
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return False
        shape = x.shape
        return (
            x.dtype in DTYPES
            and bool(shape)
            and shape[-1] == gate.in_features == up.in_features
            and gate.out_features == up.out_features == down.in_features
            and gate._buffers["salient_mask"] is up._buffers["salient_mask"]
            and (gate.config is up.config or gate.config == up.config)
            and x.is_contiguous()
            and not x.is_neg()
        )
