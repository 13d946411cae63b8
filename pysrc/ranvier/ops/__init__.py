"""Functional calls of the compiled kernels, each also a torch op in the ``ranvier::`` namespace."""

from ranvier.ops._kv_layout import KVFormat
from ranvier.ops.flash_attention import flash_attention
from ranvier.ops.hadamard import hadamard
from ranvier.ops.kv_attention import kv_attention, kv_decode, kv_encode
from ranvier.ops.spike_encode import SpikeCodes, SpikeFormat, spike_encode
from ranvier.ops.spike_events import SpikeCounts, SpikeEvents, spike_events, spike_raster
from ranvier.ops.spike_linear import PackedWeight, pack_weight, spike_linear, spike_linear_dynamic, unpack_weight
from ranvier.ops.spike_rms_norm import spike_rms_norm
from ranvier.ops.spike_silu_mul import spike_silu_mul
from ranvier.ops.ternary_linear import (
    TernaryFormat,
    dequantize_ternary,
    pack_ternary,
    ternary_format,
    ternary_linear,
    ternary_linear_dynamic,
    unpack_ternary,
)
from ranvier.ops.weight_only_linear import digit_format, weight_only_linear

__all__ = [
    "KVFormat",
    "PackedWeight",
    "SpikeCodes",
    "SpikeCounts",
    "SpikeEvents",
    "SpikeFormat",
    "TernaryFormat",
    "dequantize_ternary",
    "digit_format",
    "flash_attention",
    "hadamard",
    "kv_attention",
    "kv_decode",
    "kv_encode",
    "pack_ternary",
    "pack_weight",
    "spike_encode",
    "spike_events",
    "spike_linear",
    "spike_linear_dynamic",
    "spike_raster",
    "spike_rms_norm",
    "spike_silu_mul",
    "ternary_format",
    "ternary_linear",
    "ternary_linear_dynamic",
    "unpack_ternary",
    "unpack_weight",
    "weight_only_linear",
]
