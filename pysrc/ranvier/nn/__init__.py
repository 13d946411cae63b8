"""Drop-in torch modules over the compiled kernels."""

from ranvier.nn.hadamard import Hadamard, HadamardLinear
from ranvier.nn.spike_linear import SpikeGroup, SpikingLinear
from ranvier.nn.ternary_linear import TernaryLinear

__all__ = ["Hadamard", "HadamardLinear", "SpikeGroup", "SpikingLinear", "TernaryLinear"]
