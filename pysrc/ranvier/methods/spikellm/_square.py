"""Square matrices of hundreds of megabytes, looked at and rearranged in place, a piece at a time."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 64  # rows or columns that are copied at once
VALUES = 1 << 19


def all_finite(matrix: Tensor) -> bool:
    """Whether no value is NaN or Inf: isfinite of the whole would make |x| first, another matrix."""
    return all(bool(rows.isfinite().all()) for rows in matrix.split(PIECE))


def permute_(matrix: Tensor, order: Tensor) -> Tensor:
    """The same storage as matrix[order][:, order]: [K, K], order int64 [K]."""
    for rows in matrix.split(PIECE):
        rows.copy_(rows[:, order])
    for columns in matrix.split(PIECE, 1):
        columns.copy_(columns[order])
    return matrix


def reverse_(matrix: Tensor) -> Tensor:
    """The same storage as matrix.flip(0, 1), rows or columns contiguous."""
    flat = (matrix if matrix.is_contiguous() else matrix.T).view(-1)
    count = flat.numel()
    for start in range(0, count // 2, VALUES):
        stop = min(start + VALUES, count // 2)
        front, back = flat[start:stop], flat[count - stop : count - start]
        held = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(held)
    return matrix


def cholesky_into(matrix: Tensor, lower: Tensor) -> bool:
    """L with L L^T = matrix into ``lower``, which is another one with contiguous columns; whether there is one.

    LAPACK works on columns: a result of that layout is made where it is, without a copy.
    """
    fault = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(lower, fault))
    return not bool(fault)
