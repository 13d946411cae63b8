"""Functional calls of the compiled kernels, each also a torch op in the ``ranvier::`` namespace."""

from ranvier.ops._kv_layout import KVFormat
from ranvier.ops.kv_attention import kv_attention, kv_decode, kv_encode
from ranvier.ops.spike_encode import SpikeCodes, SpikeFormat, spike_encode
from ranvier.ops.spike_events import SpikeCounts, SpikeEvents, spike_events, spike_raster
from ranvier.ops.spike_linear import PackedWeight, pack_weight, spike_linear, spike_linear_dynamic, unpack_weight

__all__ = [
    "KVFormat",
    "PackedWeight",
    "SpikeCodes",
    "SpikeCounts",
    "SpikeEvents",
    "SpikeFormat",
    "kv_attention",
    "kv_decode",
    "kv_encode",
    "pack_weight",
    "spike_encode",
    "spike_events",
    "spike_linear",
    "spike_linear_dynamic",
    "spike_raster",
    "unpack_weight",
]
