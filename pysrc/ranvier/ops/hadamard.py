"""hadamard: rows times an orthogonal matrix of +-1 / sqrt(n), in n log n additions.

    y = x (I_b (x) H_n) / sqrt(n),    H_n = C_m (x) S_p,    H_n H_n^T = n I

Which orders there are, and how they are built: :mod:`ranvier.reference.hadamard`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ranvier import _C
from ranvier.ops._args import DTYPES, MAX_CHANNELS, check_float, check_tokens, plain
from ranvier.ops._declare import declare
from ranvier.ops._triton import Launch, run
from ranvier.reference import hadamard as reference
from ranvier.reference.hadamard import hadamard_core, hadamard_order

SCHEMA = "hadamard(Tensor x, int order, bool transpose) -> Tensor"
# On a GPU: the longest piece that one program transforms (its values pass through 64 KiB of shared memory), and the tile of
# the two passes that a longer one takes.
WHOLE_PIECE, TILE = 16384, 4096


@functools.cache
def order_fault(order: int) -> str | None:
    """Why there is no matrix of this order, None where there is one."""
    if isinstance(order, bool) or not isinstance(order, int):
        return f"order is {order!r}; pass a whole number"
    if not 1 <= order <= MAX_CHANNELS:
        return f"order is {order}; allowed are 1 to {MAX_CHANNELS}"
    if hadamard_core(order) is None:
        return f"there is no Hadamard matrix of order {order} here; its largest divisor that has one is {hadamard_order(order)}"
    return None


def check(x: Tensor, order: int, transpose: bool) -> None:
    check_tokens("hadamard", x)
    fault = order_fault(order)
    if fault is not None:
        raise ValueError(f"hadamard: {fault}")
    if x.shape[-1] % order:
        raise ValueError(f"hadamard: x has {x.shape[-1]} channels in its last dimension, which is no multiple of order {order}")


def fake(x: Tensor, order: int, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


@functools.cache
def _matrix(core: int, transpose: bool) -> Tensor:
    """Row j holds what piece j adds to each output, as csrc/hadamard reads it."""
    matrix = reference.core_matrix(core)
    return (matrix.T if transpose else matrix).to(torch.float32).contiguous()


@functools.cache
def _core(order: int, transpose: bool) -> tuple[int, int]:
    """m and the address of its matrix, which is kept for good."""
    core = hadamard_core(order)
    return core, _matrix(core, transpose).data_ptr() if core > 1 else 0


def cpu(x: Tensor, order: int, transpose: bool) -> Tensor:
    if not x.is_contiguous() or x.is_neg():
        x = plain(x)
    y = torch.empty_like(x)
    _C.hadamard(x.data_ptr(), y.data_ptr(), x.numel() // order, order, *_core(order, transpose), DTYPES[x.dtype])
    return y


def _piece_launch(x: Tensor, y: Tensor, scale: float, tile: int, run: int, first: int, stride: int) -> Launch:
    """Butterflies within tiles of ``tile`` values, runs of ``run`` neighbours a stride apart, at distances from 2^first."""
    shape = {"P": tile, "RUN": run, "FIRST": first, "STEPS": tile.bit_length() - 1 - first}
    grid = (x.numel() // (tile // run * stride), stride // run)
    options = {"num_warps": max(4, min(tile // 512, 16))}
    return Launch("hadamard", "hadamard_pieces", grid, {"x": x, "y": y, "scale": scale, "stride": stride, **shape}, options)


def launches(x: Tensor, order: int, matrix: Tensor | None, y: Tensor) -> list[Launch]:
    """What fills y, contiguous like x: pieces, long ones in two passes, then the core, where matrix [m, m] is one."""
    core = 1 if matrix is None else matrix.shape[0]
    rows, piece = x.numel() // order, order // core
    scale = float(1 / torch.tensor(order, dtype=torch.float64).sqrt())
    made: list[Launch] = []
    if piece > WHOLE_PIECE:
        parts = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        made.append(_piece_launch(x, parts, 1.0, TILE, TILE, 0, TILE))
        x, tile, run, stride = parts, TILE, TILE * TILE // piece, TILE
    else:
        tile, run, stride = piece, piece, piece
    middle = y if matrix is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    first = run.bit_length() - 1 if stride < piece else 0
    made.append(_piece_launch(x, middle, scale if matrix is None else 1.0, tile, run, first, stride))
    if matrix is not None:
        block = min(128, max(16, piece))
        across = {"x": middle, "matrix": matrix, "y": y, "scale": scale, "M": core, "p": piece, "BLOCK_M": 16, "BLOCK_P": block}
        made.append(Launch("hadamard", "hadamard_core", (rows, -(-core // 16), -(-piece // block)), across, {"num_warps": 4}))
    return made


@functools.cache
def _matrix_on(core: int, transpose: bool, device: torch.device) -> Tensor:
    return _matrix(core, transpose).to(device)


def triton(x: Tensor, order: int, transpose: bool) -> Tensor:
    x, core = plain(x), hadamard_core(order)
    y = torch.empty_like(x)
    run(launches(x, order, _matrix_on(core, transpose, x.device) if core > 1 else None, y))
    return y


def setup_context(ctx, inputs, output) -> None:
    _, ctx.order, ctx.transpose = inputs


def backward(ctx, grad: Tensor):
    return op(grad, ctx.order, not ctx.transpose), None, None


op = declare(
    SCHEMA,
    check=check,
    fake=fake,
    cpu=cpu,
    triton=triton,
    reference=reference.hadamard,
    backward=backward,
    setup_context=setup_context,
    exact=True,
    places=("reference", "csrc", "kernels", "ops", "nn", "tests", "benchmarks"),
    dtypes=tuple(DTYPES),
)


def hadamard(x: Tensor, order: int | None = None, *, transpose: bool = False, backend: str | None = None) -> Tensor:
    """Rotate the last dimension: y = x (I (x) H_n) / sqrt(n), and with H_n^T where ``transpose``, which undoes it.

    x: float32, bfloat16 or float16 [..., K], y alike; float32 inside. order: n, a divisor of K; None takes the largest
    there is, :func:`hadamard_order`, which is K for nearly every width of a model. With n < K each n channels are a block
    of their own. The gradient is the other direction's transform, and has one itself.

    Raises ValueError for an order without a matrix or that does not divide K, TypeError for other dtypes, BackendError for
    a backend that cannot run. Source: the rotations of QuaRot, arXiv 2404.00456.
    """
    if order is None:
        check_float("hadamard", "x", x)
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(f"hadamard: x has shape {list(x.shape)}; its last dimension must hold channels")
        order = hadamard_order(int(x.shape[-1]))
    return op(x, order, transpose, backend=backend)
