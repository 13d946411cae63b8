"""ternary_linear: spike codes x packed 2-bit weights with a tail of 4-bit salient channels; integer sums of either range.

    partial[split, r, m, n] = sum_{k in r, in the split} c[m, k] q[n, k],   r = 0 ordinary channels, r = 1 salient ones

spike_linear_combine (kernels/spike_linear.py) adds the splits, takes the zero points off by the code sums and scales. Weights:
[N/32][blocks][64 bytes], first the ordinary blocks of eight channels: byte 4 i + j holds from its low bits upwards channel j of
output i, channel j of output 16 + i, channel 4 + j of output i, channel 4 + j of output 16 + i; then the salient blocks of
four, in nibbles. Codes come in the same blocks, each range filled up with zeros: int8 [M, stride], salient ones from
salient_at.
"""

import triton
import triton.language as tl
from ranvier.kernels._blocks import both_halves, by_output, dot4, stacked, stacked_outputs


@triton.jit(do_not_specialize=["M"])
def ternary_linear_gemv(
    codes, weight, partial, M, N, stride, salient_at, rows, low_rows,
    ROWS: tl.constexpr, TILE: tl.constexpr, RANGES: tl.constexpr, FIRST_BITS: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """32 outputs of M <= ROWS tokens; grid (N/32, SPLITS). codes and weight as words, stride and salient_at in words.

    FIRST_BITS: 2, or 4 where all channels are salient. low_rows: blocks of the first range, rows: of both.
    """
    strip, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.arange(0, ROWS)
    m = tl.minimum(token, M - 1)[:, None, None]
    weight += strip * rows * 16
    lane = tl.arange(0, 16)[None, None, :]
    n = strip * 32 + tl.arange(0, 32)
    keep = (token < M)[:, None] & (n < N)[None, :]
    for r in tl.static_range(RANGES):
        low = tl.zeros((ROWS, TILE, 16), dtype=tl.int32)
        high = tl.zeros((ROWS, TILE, 16), dtype=tl.int32)
        begin = 0 if r == 0 else low_rows
        end = low_rows if r + 1 < RANGES else rows
        piece = tl.cdiv(tl.cdiv(end - begin, TILE), SPLITS) * TILE
        first = begin + split * piece
        last = tl.minimum(first + piece, end)
        for i in tl.range(tl.maximum(tl.cdiv(last - first, TILE), 0), num_stages=STAGES):
            block = (first + i * TILE + tl.arange(0, TILE))[None, :, None]
            live = block < last
            w = tl.load(weight + block * 16 + lane, mask=live, other=0)
            if r == 0 and FIRST_BITS == 2:
                at = codes + m * stride + 2 * block
                c = tl.broadcast_to(tl.load(at, mask=live, other=0), (ROWS, TILE, 16))
                d = tl.broadcast_to(tl.load(at + 1, mask=live, other=0), (ROWS, TILE, 16))
                low = dot4(tl.broadcast_to(w & 0x03030303, (ROWS, TILE, 16)), c, low, DOT)
                high = dot4(tl.broadcast_to((w >> 2) & 0x03030303, (ROWS, TILE, 16)), c, high, DOT)
                low = dot4(tl.broadcast_to((w >> 4) & 0x03030303, (ROWS, TILE, 16)), d, low, DOT)
                high = dot4(tl.broadcast_to((w >> 6) & 0x03030303, (ROWS, TILE, 16)), d, high, DOT)
            else:
                at = codes + m * stride + (salient_at if r == 1 else 0) + block - begin
                c = tl.broadcast_to(tl.load(at, mask=live, other=0), (ROWS, TILE, 16))
                low = dot4(tl.broadcast_to(w & 0x0F0F0F0F, (ROWS, TILE, 16)), c, low, DOT)
                high = dot4(tl.broadcast_to((w >> 4) & 0x0F0F0F0F, (ROWS, TILE, 16)), c, high, DOT)
        both = both_halves(tl.sum(low, axis=1), tl.sum(high, axis=1), ROWS)
        to = partial + ((split * RANGES + r) * M + token).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, both, mask=keep)


@triton.jit(do_not_specialize=["M"])
def ternary_linear_gemm(
    codes, weight, partial, M, N, stride, salient_at, rows, low_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, RANGES: tl.constexpr, FIRST_BITS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs x BLOCK_M tokens; grid (M tiles, N tiles, SPLITS). codes int8, stride and salient_at in bytes."""
    split = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(token, M - 1).to(tl.int64)
    n = stacked_outputs(tl.program_id(1), BLOCK_N)
    STRIPS: tl.constexpr = BLOCK_N // 32
    strip = tl.minimum(tl.program_id(1) * STRIPS + tl.arange(0, STRIPS), tl.cdiv(N, 32) - 1).to(tl.int64)
    byte, channel = tl.arange(0, 64 * BLOCK), tl.arange(0, 4 * BLOCK)
    for r in tl.static_range(RANGES):
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        begin = 0 if r == 0 else low_rows
        end = low_rows if r + 1 < RANGES else rows
        piece = tl.cdiv(tl.cdiv(end - begin, BLOCK), SPLITS) * BLOCK
        first = begin + split * piece
        last = tl.minimum(first + piece, end)
        for block in range(first, last, BLOCK):
            at = weight + ((strip * rows + block) * 64)[:, None] + byte[None, :]
            p = tl.load(at, mask=(byte < (last - block) * 64)[None, :], other=0)
            p = by_output(p, STRIPS, BLOCK)
            live = channel[:, None] < (last - block) * 4
            if r == 0 and FIRST_BITS == 2:
                place = codes + (m * stride + block * 8)[None, :] + (channel // 4 * 8 + channel % 4)[:, None]
                c = tl.load(place, mask=live, other=0)
                d = tl.load(place + 4, mask=live, other=0)
                acc = tl.dot(stacked(p & 3, (p >> 2) & 3, BLOCK_N, 4 * BLOCK), c, acc, out_dtype=tl.int32)
                acc = tl.dot(stacked((p >> 4) & 3, p >> 6, BLOCK_N, 4 * BLOCK), d, acc, out_dtype=tl.int32)
            else:
                place = codes + (m * stride + (salient_at if r == 1 else 0) + (block - begin) * 4)[None, :] + channel[:, None]
                c = tl.load(place, mask=live, other=0)
                acc = tl.dot(stacked(p & 15, p >> 4, BLOCK_N, 4 * BLOCK), c, acc, out_dtype=tl.int32)
        to = partial + (split * RANGES + r) * (M.to(tl.int64) * N) + token.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(to, acc, mask=(token < M)[None, :] & (n < N)[:, None])
