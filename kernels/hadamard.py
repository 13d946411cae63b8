"""hadamard: y = x (C_m (x) S_p) / sqrt(m p) for rows of m p values, p a power of two; additions in float32.

The order is that of csrc/hadamard/hadamard.h, and so are the bits: butterflies (a + b, a - b) at distances 1, 2, ... p / 2
within each of the m pieces, then out_i = c_0i x_0 + c_1i x_1 + ... over the pieces, then one product with the scale.
"""

import triton
import triton.language as tl


@triton.jit
def _butterfly(v, P: tl.constexpr, DISTANCE: tl.constexpr):
    pairs = tl.permute(tl.reshape(v, (P // (2 * DISTANCE), 2, DISTANCE)), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (P,))


@triton.jit
def hadamard_pieces(x, y, scale, stride, P: tl.constexpr, RUN: tl.constexpr, FIRST: tl.constexpr, STEPS: tl.constexpr):
    """STEPS butterflies, from the distance 2^FIRST of a tile of P values upwards, then the scale; grid (pieces, stride / RUN).

    A tile is P / RUN runs of RUN neighbours, a stride apart. Whole pieces: one run, FIRST = 0. Of a piece that is too long
    for one program: its parts as pieces of their own, then, with 2^FIRST = RUN and as many runs as parts, what joins them.
    """
    i = tl.arange(0, P)
    at = tl.program_id(0).to(tl.int64) * (P // RUN) * stride + tl.program_id(1) * RUN + i // RUN * stride + i % RUN
    v = tl.load(x + at).to(tl.float32)
    for step in tl.static_range(FIRST, FIRST + STEPS):
        v = _butterfly(v, P, 2**step)
    tl.store(y + at, (v * scale).to(y.dtype.element_ty))


@triton.jit
def hadamard_core(x, matrix, y, scale, M, p, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """C_m across the pieces of a row: x float32 [rows, M, p], matrix [M, M] with what piece j adds to each output in row j.

    Grid (rows, M / BLOCK_M, p / BLOCK_P).
    """
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = tl.program_id(0).to(tl.int64) * M * p
    total = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for j in range(M):
        piece = tl.load(x + row + j * p + k, mask=k < p, other=0.0)
        sign = tl.load(matrix + j * M + i, mask=i < M, other=0.0)
        total += sign[:, None] * piece[None, :]
    keep = (i < M)[:, None] & (k < p)[None, :]
    tl.store(y + row + i[:, None] * p + k[None, :], (total * scale).to(y.dtype.element_ty), mask=keep)
