"""SpikeLLM: saliency-based spiking for large language models (arXiv 2407.04752), as post-training conversion."""

from ranvier.methods.spikellm.convert import LayerReport, SpikeReport, spike_, unspike_
from ranvier.methods.spikellm.fuse import FuseReport, fuse_, unfuse_
from ranvier.methods.spikellm.rotate import Rotation, RotationReport, rotate_
from ranvier.methods.spikellm.saliency import first_order_saliency, salient_mask

__all__ = [
    "FuseReport",
    "LayerReport",
    "Rotation",
    "RotationReport",
    "SpikeReport",
    "first_order_saliency",
    "fuse_",
    "rotate_",
    "salient_mask",
    "spike_",
    "unfuse_",
    "unspike_",
]
