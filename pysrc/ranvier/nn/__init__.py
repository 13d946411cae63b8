"""Drop-in torch modules over the compiled kernels."""

from ranvier.nn.spike_linear import SpikeGroup, SpikingLinear
from ranvier.nn.spike_rms_norm import SpikingRMSNorm
from ranvier.nn.spike_silu_mul import SpikingGatedMLP

__all__ = ["SpikeGroup", "SpikingGatedMLP", "SpikingLinear", "SpikingRMSNorm"]
