"""Drop-in torch modules over the compiled kernels."""

from ranvier.nn.hadamard import Hadamard, HadamardLinear
from ranvier.nn.int8_linear import Int8Linear
from ranvier.nn.spike_linear import SpikeGroup, SpikingLinear
from ranvier.nn.spike_rms_norm import SpikingRMSNorm
from ranvier.nn.spike_silu_mul import SpikingGatedMLP
from ranvier.nn.ternary_linear import TernaryLinear

__all__ = [
    "Hadamard",
    "HadamardLinear",
    "Int8Linear",
    "SpikeGroup",
    "SpikingGatedMLP",
    "SpikingLinear",
    "SpikingRMSNorm",
    "TernaryLinear",
]
