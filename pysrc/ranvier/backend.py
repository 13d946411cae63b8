"""Which backend runs an op, and why another cannot.

A backend's name is a contract: asked for by name it runs or raises with the reason; nothing falls back in silence. Without a
name the tensor's device decides: CPU tensors take ``cpu``, CUDA tensors ``triton``, tensors elsewhere ``reference``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ranvier import _C

BACKENDS = ("cpu", "triton", "reference")


class BackendError(RuntimeError):
    """The backend asked for cannot run this op here; the message says why and what can."""


def check_isa_variable() -> None:
    """Raises ValueError when RANVIER_ISA names no level; a level above the processor's is lowered to it."""
    wanted, levels = os.environ.get("RANVIER_ISA"), _C.isa_levels()
    if wanted is not None and wanted not in levels:
        raise ValueError(f"RANVIER_ISA is {wanted!r}; allowed are {', '.join(levels)}")


@functools.cache
def connect_threads() -> bool:
    """Hands torch's thread pool to the compiled module; False where this torch has none to offer: kernels then run serially."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        torch_cpu = ctypes.CDLL(str(library))
        addresses = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value for name in _THREAD_FUNCTIONS]
    except (OSError, AttributeError):
        return False
    _C.set_parallel(*addresses)
    return True


_THREAD_FUNCTIONS = ("torch_parallel_for", "torch_get_num_threads")


def default_backend(device: torch.device) -> str:
    """The backend that tensors of this device take when none is named."""
    return {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")


def why_not(backend: str, implementations: dict[str, Callable], device: torch.device | None = None) -> str | None:
    """The reason why ``backend`` cannot run an op with these implementations, or None when it can."""
    if backend not in BACKENDS:
        return f"there is no backend {backend!r}; the backends are {', '.join(BACKENDS)}"
    if backend not in implementations:
        return f"this op has no {backend} kernel"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
    if device is not None and backend in ("cpu", "triton") and default_backend(device) != backend:
        return f"its kernels take {'CPU' if backend == 'cpu' else 'CUDA'} tensors and these are on {device}"
    return None


def choose(name: str, implementations: dict[str, Callable], device: torch.device, backend: str | None = None) -> Callable:
    """The implementation to run. Raises BackendError with the reason when it cannot."""
    wanted = backend or default_backend(device)
    reason = why_not(wanted, implementations, device)
    if reason is not None:
        runnable = [b for b in BACKENDS if why_not(b, implementations, device) is None]
        raise BackendError(f"{name}: backend {wanted!r} cannot run: {reason}; can run here: {', '.join(runnable) or 'none'}")
    return implementations[wanted]
