"""llama.cpp's own kernels, called in the ggml libraries of llama-cpp-python: no model, no tokenizer, one product.

Q4_0 lies in the buffers into which ggml repacks it for this processor ("CPU_REPACK"), Q4_K and TQ2_0 (ternary, 2.06 bits a
weight) in a plain buffer. A call
is one graph of one ggml_mul_mat of float32 activations, which ggml quantizes to 8 bits itself, on as many threads as
torch has.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peers.base import INT8_INPUT, Bound, Layers, Peer, call_bytes

TYPES = {"Q4_0": 2, "Q4_K": 12, "TQ2_0": 35}  # enum ggml_type
FLOAT32 = 0
SUCCESS = 0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_POINTER, _INT, _INT64, _SIZE, _BOOL, _TEXT = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p,
)  # fmt: skip
_SIGNATURES = {
    "base": {
        "ggml_init": (_POINTER, _InitParams),
        "ggml_free": (None, _POINTER),
        "ggml_log_set": (None, _POINTER, _POINTER),
        "ggml_tensor_overhead": (_SIZE,),
        "ggml_graph_overhead": (_SIZE,),
        "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, _INT64, _INT64),
        "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
        "ggml_new_graph": (_POINTER, _POINTER),
        "ggml_build_forward_expand": (None, _POINTER, _POINTER),
        "ggml_row_size": (_SIZE, _INT, _INT64),
        "ggml_quantize_chunk": (_SIZE, _INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER),
        "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
        "ggml_backend_buffer_free": (None, _POINTER),
        "ggml_backend_buft_name": (_TEXT, _POINTER),
        "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
        "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
        "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
        "ggml_backend_get_device": (_POINTER, _POINTER),
        "ggml_backend_dev_backend_reg": (_POINTER, _POINTER),
        "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, _TEXT),
    },
    "cpu": {
        "ggml_backend_cpu_init": (_POINTER,),
        "ggml_backend_cpu_buffer_type": (_POINTER,),
        "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    },
}


class _Library:
    """The functions above as attributes, with a CPU backend made once."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        folder = Path(spec.origin).parent / "lib"
        for part, functions in _SIGNATURES.items():
            library = ctypes.CDLL(str(folder / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL)
            for name, (result, *parameters) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, parameters
                setattr(self, name.removeprefix("ggml_"), function)
        # Otherwise every repacked tensor prints a line.
        self._silent = ctypes.CFUNCTYPE(None, _INT, _TEXT, _POINTER)(lambda level, text, data: None)
        self.log_set(ctypes.cast(self._silent, _POINTER), None)
        self.backend = self.backend_cpu_init()

    def buffer_type(self, repacked: bool) -> int:
        """The plain buffer type, or the one that repacks. Raises RuntimeError where this build has none."""
        if not repacked:
            return self.backend_cpu_buffer_type()
        device = self.backend_get_device(self.backend)
        registry = self.backend_dev_backend_reg(device)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(device)
            for i in range(64):
                if not extra or not extra[i]:
                    break
                if self.backend_buft_name(extra[i]) == b"CPU_REPACK":
                    return extra[i]
        raise RuntimeError("this build of ggml has no CPU_REPACK buffers")


@functools.cache
def _library() -> _Library:
    return _Library()


class _Context:
    """A ggml context that holds tensors' headers, and the buffer that holds their data."""

    def __init__(self, tensors: int, graphs: int = 0) -> None:
        g = self._ggml = _library()
        size = tensors * g.tensor_overhead() + graphs * g.graph_overhead() + 1024
        self.handle, self.buffer = g.init(_InitParams(size, None, True)), None

    def allocate(self, buffer_type: int) -> None:
        self.buffer = self._ggml.backend_alloc_ctx_tensors_from_buft(self.handle, buffer_type)
        if not self.buffer:
            raise MemoryError("ggml could not allocate its tensors")

    def __del__(self) -> None:
        if self.buffer:
            self._ggml.backend_buffer_free(self.buffer)
        self._ggml.free(self.handle)


def _quantize(weight: Tensor, kind: int) -> np.ndarray:
    g, (n, k) = _library(), weight.shape
    data = np.empty(n * g.row_size(kind, k), dtype=np.uint8)
    g.quantize_chunk(kind, weight.contiguous().data_ptr(), data.ctypes.data, 0, n, k, None)
    return data


class _Product:
    """Graphs of one product of x with each copy of the weight."""

    def __init__(self, weights: list[tuple[_Context, int]], x: Tensor, outputs: int) -> None:
        g = self._ggml = _library()
        m, k = x.shape
        self._weights, self._shape = weights, (m, outputs)
        self._context = _Context(1 + len(weights), len(weights))
        handle = self._context.handle
        given = g.new_tensor_2d(handle, FLOAT32, k, m)
        self._results = [g.mul_mat(handle, weight, given) for _, weight in weights]
        self._graphs = [g.new_graph(handle) for _ in weights]
        for graph, result in zip(self._graphs, self._results, strict=True):
            g.build_forward_expand(graph, result)
        self._context.allocate(g.backend_cpu_buffer_type())
        g.backend_tensor_set(given, x.data_ptr(), 0, 4 * x.numel())

    def __call__(self, i: int) -> None:
        status = self._ggml.backend_graph_compute(self._ggml.backend, self._graphs[i])
        if status != SUCCESS:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def output(self) -> Tensor:
        self(0)
        y = torch.empty(self._shape)
        self._ggml.backend_tensor_get(self._results[0], y.data_ptr(), 0, 4 * y.numel())
        return y


def _load(kind: str, repacked: bool) -> Callable[[Tensor, Callable[[float], int]], Layers]:
    def load(weight: Tensor, copies_for: Callable[[float], int]) -> Layers:
        from gguf.quants import GGMLQuantizationType, dequantize

        g, (n, k) = _library(), weight.shape
        g.backend_cpu_set_n_threads(g.backend, torch.get_num_threads())
        data = _quantize(weight, TYPES[kind])
        weights = []
        for _ in range(copies_for(data.nbytes)):
            context = _Context(1)
            tensor = g.new_tensor_2d(context.handle, TYPES[kind], k, n)
            context.allocate(g.buffer_type(repacked))
            g.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
            weights.append((context, tensor))
        by_row = data.reshape(n, -1)

        def rows(outputs: Tensor) -> Tensor:
            return torch.from_numpy(dequantize(by_row[outputs.numpy()], GGMLQuantizationType[kind])).double()

        def bind(x: Tensor) -> Bound:
            product = _Product(weights, x.contiguous(), n)
            return Bound(product, product.output, x.double(), call_bytes(x, n, 4))

        return Layers(data.nbytes, len(weights), rows, INT8_INPUT, bind)

    return load


_INSTALL = {
    "module": "llama_cpp",
    "install": "pip install llama-cpp-python gguf (builds for some ten minutes; make bench-peers)",
}
PEERS = [
    Peer("llama.cpp Q4_0 repacked", "float32", _load("Q4_0", True), multiple=32, **_INSTALL),
    Peer("llama.cpp Q4_K", "float32", _load("Q4_K", False), multiple=256, **_INSTALL),
]
TERNARY_PEERS = [Peer("llama.cpp TQ2_0", "float32", _load("TQ2_0", False), multiple=256, **_INSTALL)]
