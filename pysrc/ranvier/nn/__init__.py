"""Drop-in torch modules over the compiled kernels."""

from ranvier.nn.spike_linear import SpikeGroup, SpikingLinear

__all__ = ["SpikeGroup", "SpikingLinear"]
