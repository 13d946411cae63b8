"""SpikingLinear: a linear layer on spike codes and 4-bit weights, in place of ``torch.nn.Linear``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ranvier import _C
from ranvier.config import SpikeConfig
from ranvier.ops._args import DTYPES, check_channels, check_is_tensor, check_tensor, plain
from ranvier.ops._declare import needs_dispatcher
from ranvier.ops.spike_encode import SpikeFormat
from ranvier.ops.spike_linear import (
    PackedWeight,
    check_layer,
    layer_description,
    pack_quantized,
    pack_weight,
    spike_linear_dynamic,
    unpack_weight,
)
from ranvier.ops.weight_only_linear import digit_format, weight_only_linear
from ranvier.reference.spike_encode import spike_decode
from ranvier.reference.spike_linear import Quantized
from ranvier.reference.weight_only_linear import digit_count

FORMAT_BYTES = 72  # the part of a layer's description that its encoding depends on (csrc SpikeFormat)
CPU = torch.device("cpu")
WEIGHT_BUFFERS = ("weight_packed", "weight_scale", "weight_zero", "weight_sum")


_Reader = Callable[["SpikingLinear"], None]
_made: dict[int, tuple[weakref.ref, _Reader]] = {}


def when_read(x: Tensor, tell: _Reader) -> None:
    """Calls ``tell`` with the first layer whose group encodes x, if one does while x lives: so a norm finds its readers."""
    key = id(x)

    def forget(reference: weakref.ref) -> None:
        if key in _made and _made[key][0] is reference:
            del _made[key]

    _made[key] = (weakref.ref(x, forget), tell)


class _Plan(NamedTuple):
    """What an eager call needs, worked out once.

    The description for the kernel, and what it holds addresses of: the very tensors and, so that the memory outlives a
    ``.data`` assignment, their storages; of the bias, which training code does assign so, the address.
    """

    description: bytes
    packed: Tensor
    scale: Tensor
    zero: Tensor
    sum: Tensor | None
    mask: Tensor
    bias: int
    storages: tuple


def _key(plan: bytes, mask: Tensor, x: Tensor, address: int) -> tuple:
    """What codes of x depend on, beside x being the same object."""
    return plan[:FORMAT_BYTES], mask.data_ptr(), 0 if mask.is_inference() else mask._version, x._version, address


class SpikeGroup:
    """Layers that read the same tensor and have the same mask: the first of them encodes it, the others find the codes.

    The codes are kept while the tensor lives, is the same object with the same memory and was not written to (its version
    counter; a write through ``.data`` does not count as one), and format and mask are the same. They are never kept for
    inference-mode tensors, which have no version counter.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._last: tuple | None = None

    def __getstate__(self) -> dict:
        return {"mask": self.mask, "_last": None}

    def share(self, mask: Tensor) -> Tensor:
        """The group's one mask where ``mask`` equals it; else ``mask``, which then is the group's."""
        known = self.mask
        if known is None or known.device != mask.device or mask.is_meta or not torch.equal(known, mask):
            self.mask = known = mask
        return known

    def encoding(self, plan: bytes, mask: Tensor, x: Tensor, tokens: int, reader: SpikingLinear | None = None) -> Tensor:
        """The codes of contiguous x as the kernels read them: one uint8 buffer. reader: the layer that asks."""
        address = x.data_ptr()
        last = self._last
        if last is not None and last[0]() is x and last[1] == _key(plan, mask, x, address):
            return last[2]
        encoded = torch.empty(_C.spike_encoding_bytes(plan, tokens), dtype=torch.uint8)
        _C.spike_encode_panels(plan, address, x.shape[-1], DTYPES[x.dtype], tokens, encoded.data_ptr())
        self.keep(plan, mask, x, encoded)
        made = _made.get(id(x))
        if made is not None and made[0]() is x and reader is not None:
            made[1](reader)
        return encoded

    def keep(self, plan: bytes, mask: Tensor, x: Tensor, encoded: Tensor) -> None:
        """Hold the codes of x for the layers that will read it; the caller made them from this very content."""
        key, owner = _key(plan, mask, x, x.data_ptr()), weakref.ref(self)

        def forget(reference: weakref.ref) -> None:
            group = owner()
            if group is not None and group._last is not None and group._last[0] is reference:
                group._last = None

        self._last = (weakref.ref(x, forget), key, encoded)


class SpikingLinear(nn.Module):
    """y = x^ W^T + b with x^ what the spike codes of x stand for and W^ the 4-bit weight: one packed integer product.

    With ``config.act_bits=None`` x^ is x (weight-only): see :func:`ranvier.ops.weight_only_linear`.
    x [..., K] float32, bfloat16 or float16; y [..., N] in x's dtype. Weights are buffers, bias stays a parameter. Gradients
    flow straight through to x and to the bias. Made by :meth:`from_linear`; formulas in :mod:`ranvier.reference`.
    SpikeLLM, arXiv 2407.04752.
    """

    weight_bits = 4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: SpikeConfig | None = None,
        salient_count: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer of this shape, to load a state into."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config = config or self.default_config()
        if self.config.weight_bits != self.weight_bits:
            name, bits = type(self).__name__, self.config.weight_bits
            raise ValueError(
                f"{name}: config.weight_bits is {bits}; Int8Linear has 8-bit weights, SpikingLinear 4, TernaryLinear 2"
            )
        self.salient_count = salient_count
        self._clips = self.config.act_clip != 1
        self.dtype = dtype or torch.get_default_dtype()
        form = self.format
        form.check(type(self).__name__)
        rows, groups = -(-out_features // 32), sum(form.groups)
        table = {"size": (rows, groups, 32), "device": device}
        self.register_buffer("weight_packed", torch.zeros((rows, sum(form.blocks), 64), dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(**table, dtype=torch.float32))
        self.register_buffer("weight_zero", torch.zeros(**table, dtype=torch.uint8))
        total = torch.zeros(**table, dtype=torch.int32) if form.grid == "compat" else None
        self.register_buffer("weight_sum", total)
        self.register_buffer("salient_mask", torch.zeros(in_features, dtype=torch.bool, device=device))
        empty = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None
        self.register_parameter("bias", empty)
        self._plan: _Plan | None = None
        self.group: SpikeGroup | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: SpikeConfig | None = None, salient_mask: Tensor | None = None
    ) -> SpikingLinear:
        """Quantize a linear layer round to nearest. salient_mask: bool [K], None for no salient channel.

        Raises TypeError for another kind of layer, ValueError for NaN or Inf in its weight, a mask of another length, or
        a K that is not a multiple of ``config.group_size``. The given layer stays as it is.
        """
        layer = cls._shell("from_linear", linear, config, salient_mask)
        return layer._take(layer._quantize(linear.weight))

    @classmethod
    def from_quantized(
        cls,
        linear: nn.Linear,
        config: SpikeConfig | None,
        salient_mask: Tensor | None,
        q: Tensor,
        scale: Tensor,
        zero: Tensor,
    ) -> SpikingLinear:
        """A layer with ready codes: W^ = scale (q - zero), in place of ``linear``, of which the bias, dtype and mode are taken.

        q uint8 [N, K], its channels in the layer's own order; scale float32 [N, G], zero uint8 [N, G] of the format's groups,
        as :func:`ranvier.reference.spike_linear.quantize_weight` returns them: group_size channels of each range in the
        codes' order (other channels, then salient ones, both ascending), or one group a range.

        :class:`Int8Linear` takes codes up to 255 and one group.

        Raises like :meth:`from_linear`, and for tables of another shape or dtype, codes above 15 or scales not above 0.
        """
        layer = cls._shell("from_quantized", linear, config, salient_mask)
        where = f"{cls.__name__}.from_quantized"
        check_is_tensor(where, "q", q)
        check_tensor(where, "q", q, torch.uint8, tuple(linear.weight.shape))
        return layer._take(layer._pack(Quantized(q, scale, zero)))

    @staticmethod
    def default_config() -> SpikeConfig:
        """What a layer is made by where nothing is said."""
        return SpikeConfig()

    @classmethod
    def _shell(cls, way: str, linear: nn.Linear, config: SpikeConfig | None, salient_mask: Tensor | None) -> SpikingLinear:
        """The layer with mask and bias, its weight still empty."""
        where = f"{cls.__name__}.{way}"
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{where}: got {type(linear).__name__}; pass a torch.nn.Linear")
        if config is not None and not isinstance(config, SpikeConfig):
            raise TypeError(f"{where}: config is {type(config).__name__}; pass a ranvier.SpikeConfig")
        config = config or cls.default_config()
        out_features, in_features = linear.weight.shape
        check_convertible(where, linear, config)
        mask = torch.zeros(in_features, dtype=torch.bool) if salient_mask is None else torch.as_tensor(salient_mask)
        if mask.dtype != torch.bool or tuple(mask.shape) != (in_features,):
            raise ValueError(
                f"{where}: salient_mask is {mask.dtype} {list(mask.shape)};"
                f" pass bool [{in_features}], one entry per input channel"
            )
        if config.salient_share == 0 and config.act_bits is None and bool(mask.any()):
            raise ValueError(f"{where}: salient_mask with act_bits=None, where nothing spikes; leave it out")
        mask, weight = mask.to(linear.weight.device), linear.weight
        layer = cls(in_features, out_features, linear.bias is not None, config, int(mask.sum()), weight.device, weight.dtype)
        layer.salient_mask = mask.clone() if salient_mask is not None and mask is salient_mask else mask
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def _pack(self, weight: Quantized) -> PackedWeight:
        return pack_quantized(weight, self.salient_mask, self.format)

    def _quantize(self, weight: Tensor) -> PackedWeight:
        return pack_weight(weight, self.salient_mask, self.format)

    def _take(self, packed: PackedWeight) -> SpikingLinear:
        self.weight_packed, self.weight_scale, self.weight_zero, self.weight_sum = packed
        return self

    @property
    def format(self) -> SpikeFormat:
        """How this layer's tokens are encoded."""
        c = self.config
        if c.act_bits is None:
            return digit_format(self.in_features, c.group_size)
        rule = (c.act_bits, c.code_steps, c.span, c.grid, c.group_size or 0)
        # A float that a compiler reads costs it a second graph; most layers have none.
        return SpikeFormat(self.in_features, self.salient_count, *rule, c.act_clip if self._clips else 1.0)

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight's buffers, as the functional calls take them."""
        return PackedWeight(self.weight_packed, self.weight_scale, self.weight_zero, self.weight_sum)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]. Raises ValueError for another K, TypeError for other dtypes."""
        if needs_dispatcher(input, self._parameters["bias"]) or not input.is_cpu:
            return self._as_op(input)
        return self._eager(input)

    def _as_op(self, x: Tensor) -> Tensor:
        if self.config.act_bits is None:
            return weight_only_linear(x, self.packed_weight, self.format, self.out_features, self.bias)
        mask = self.salient_mask if self.salient_count else None
        return spike_linear_dynamic(x, self.packed_weight, self.format, self.out_features, self.bias, mask)

    def _eager(self, x: Tensor) -> Tensor:
        dtype, shape, channels = DTYPES.get(x.dtype), x.shape, self.in_features
        if dtype is None or not shape or shape[-1] != channels:
            self._refuse(x)
        if not x.is_contiguous() or x.is_neg():
            check_is_tensor("SpikingLinear", "x", x)
            x = plain(x)
        description = self._description()
        # Sizes one by one: unpacking a tuple costs a third of a microsecond, which a small layer feels.
        y = x.new_empty(shape[0], self.out_features) if len(shape) == 2 else x.new_empty(*shape[:-1], self.out_features)
        tokens, group = x.numel() // channels, self.group
        if self.config.act_bits is None:
            digits = digit_count(x.dtype)
            _C.weight_only_linear(description, x.data_ptr(), channels, dtype, tokens, digits, y.data_ptr(), dtype)
        elif group is None or x.is_inference():
            _C.spike_linear_dynamic(description, x.data_ptr(), channels, dtype, tokens, y.data_ptr(), dtype)
        else:
            encoded = group.encoding(description, self._buffers["salient_mask"], x, tokens, self)
            _C.spike_linear_panels(description, encoded.data_ptr(), tokens, y.data_ptr(), dtype)
        return y

    def _refuse(self, x: Tensor) -> None:
        if x.dtype not in DTYPES:
            raise TypeError(f"SpikingLinear: x is {x.dtype}; pass float32, bfloat16 or float16")
        check_channels("SpikingLinear", x, self.in_features)

    def _description(self) -> bytes:
        plan, buffers, bias = self._plan, self._buffers, self._parameters["bias"]
        if (
            plan is not None
            and buffers["weight_packed"] is plan.packed
            and buffers["weight_scale"] is plan.scale
            and buffers["weight_zero"] is plan.zero
            and buffers["weight_sum"] is plan.sum
            and buffers["salient_mask"] is plan.mask
            and (plan.bias == 0 if bias is None else bias.data_ptr() == plan.bias)
        ):
            return plan.description
        return self._make_plan().description

    def _kernel_mask(self) -> Tensor:
        """The mask that the format's channels go by."""
        return self.salient_mask

    def _make_plan(self) -> _Plan:
        form, weight, bias, mask = self.format, self.packed_weight, self.bias, self._kernel_mask()
        check_layer("SpikingLinear", CPU, weight, mask, bias, form, self.out_features)
        held = [t for t in (*weight, mask, bias) if t is not None]
        if not all(t.is_contiguous() for t in held):
            raise ValueError("SpikingLinear: its buffers and bias must be contiguous; assign contiguous tensors")
        description = layer_description(weight, mask, bias, form, self.out_features)
        storages, address = tuple(t.untyped_storage() for t in held), 0 if bias is None else bias.data_ptr()
        self._plan = _Plan(description, *weight, self.salient_mask, address, storages)
        return self._plan

    def dequantized_weight(self) -> Tensor:
        """W^ = s_w (q - z_w): float32 [N, K], channels in the order of x."""
        return unpack_weight(self.packed_weight, self.salient_mask, self.format, self.out_features)

    def dequantized_input(self, x: Tensor) -> Tensor:
        """x^, what the codes of x stand for: [..., K], float32 (float64 for float64); x itself with ``act_bits=None``."""
        check_channels("SpikingLinear", x, self.in_features)
        if self.config.act_bits is None:
            return x
        return spike_decode(x, self.salient_mask, **self.format.rule)

    def to_linear(self) -> nn.Linear:
        """A ``torch.nn.Linear`` with the dequantized weight, in the dtype this layer was made from."""
        options = {"bias": self.bias is not None, "device": self.weight_packed.device, "dtype": self.dtype}
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, **options)
        with torch.no_grad():
            linear.weight.copy_(self.dequantized_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        c = self.config
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"W{c.weight_bits}A{c.act_bits}, steps={c.steps}, salient={self.salient_count}, span={c.span}, grid={c.grid}"
            if c.act_bits
            else f"W{c.weight_bits}, weight-only",
        ]
        return ", ".join(parts + ([f"group_size={c.group_size}"] if c.group_size else []))

    def _apply(self, fn: Any, recurse: bool = True) -> SpikingLinear:
        # Scales stay float32 whatever the model is cast to: they give the integers their meaning.
        self._plan, scale = None, self.weight_scale
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Another mask can mean other table sizes: take the sizes of what is loaded, if they belong to its mask. The mask
        # may be a group's; it is loaded apart and shared again only if it still equals the others'.
        self._plan, mask = None, state_dict.get(prefix + "salient_mask")
        if mask is not None and tuple(mask.shape) == (self.in_features,) and not mask.is_meta:
            count = int(mask.sum())
            if count != self.salient_count:
                self._resize(count)
            self.salient_mask = torch.empty_like(self.salient_mask)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.group is not None:
            self.salient_mask = self.group.share(self.salient_mask)

    def _resize(self, salient_count: int) -> None:
        self.salient_count = salient_count
        device = self.weight_packed.device
        empty = type(self)(self.in_features, self.out_features, False, self.config, salient_count, device, self.dtype)
        for name in WEIGHT_BUFFERS:
            setattr(self, name, getattr(empty, name))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_plan": None}


def check_convertible(where: str, linear: nn.Linear, config: SpikeConfig) -> None:
    """Raises ValueError, beginning with ``where``, for a layer that cannot be converted."""
    weight = linear.weight
    if weight.is_meta:
        raise ValueError(f"{where}: the weight is on the meta device; load the model before converting it")
    if weight.dtype not in DTYPES or weight.numel() == 0:
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"{where}: the weight is {got}; a non-empty float32, bfloat16 or float16 matrix is needed")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{where}: the weight has NaN or Inf; repair or skip this layer")
    if linear.bias is not None and linear.bias.dtype not in DTYPES:
        raise ValueError(f"{where}: the bias is {linear.bias.dtype}; cast the layer to float32, bfloat16 or float16 first")
    if config.group_size and weight.shape[1] % config.group_size:
        raise ValueError(
            f"{where}: K = {weight.shape[1]} is not a multiple of group_size = {config.group_size};"
            " choose another group_size or skip this layer"
        )
