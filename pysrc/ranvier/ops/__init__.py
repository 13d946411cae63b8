"""Functional calls of the compiled kernels, each also a torch op in the ``ranvier::`` namespace."""

from ranvier.ops.spike_encode import SpikeCodes, SpikeFormat, spike_encode
from ranvier.ops.spike_events import SpikeCounts, SpikeEvents, spike_events, spike_raster
from ranvier.ops.spike_linear import PackedWeight, pack_weight, spike_linear, spike_linear_dynamic, unpack_weight
from ranvier.ops.spike_rms_norm import spike_rms_norm
from ranvier.ops.spike_silu_mul import spike_silu_mul

__all__ = [
    "PackedWeight",
    "SpikeCodes",
    "SpikeCounts",
    "SpikeEvents",
    "SpikeFormat",
    "pack_weight",
    "spike_encode",
    "spike_events",
    "spike_linear",
    "spike_linear_dynamic",
    "spike_raster",
    "spike_rms_norm",
    "spike_silu_mul",
    "unpack_weight",
]
