"""ranvier: compiled kernels that really execute published adaptation methods.

``ranvier.spike_(model, ranvier.SpikeConfig(), calibration)`` turns every linear layer of a model into a spiking one;
``ranvier.nn`` has the modules, ``ranvier.ops`` the functional calls, ``ranvier.reference`` the formulas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ranvier import _C as _C
from ranvier.backend import BackendError, check_isa_variable, connect_threads
from ranvier.config import SpikeConfig

if TYPE_CHECKING:
    from ranvier.integrations.folder import load, save
    from ranvier.methods.spikellm import fuse_, spike_, unspike_

__version__ = "0.1.0"
__all__ = ["BackendError", "SpikeConfig", "fuse_", "load", "nn", "ops", "reference", "save", "spike_", "unspike_"]

check_isa_variable()
connect_threads()

_LAZY = {
    "fuse_": "ranvier.methods.spikellm",
    "load": "ranvier.integrations.folder",
    "save": "ranvier.integrations.folder",
    "spike_": "ranvier.methods.spikellm",
    "unspike_": "ranvier.methods.spikellm",
}
_LAZY_MODULES = ("nn", "ops", "reference", "methods", "integrations")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"ranvier.{name}")
    raise AttributeError(f"module 'ranvier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
