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


@triton.jit
def _dot4(w, c, acc, DOT: tl.constexpr):
    """acc + sum_j w_j c_j over the four bytes of each word; w_j are 0..15, c_j signed."""
    if DOT == "cuda":
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, c, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    elif DOT == "hip":
        acc = tl.inline_asm_elementwise(
            "v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v", [w, c, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for j in tl.static_range(4):
            acc += ((w >> (8 * j)) & 15) * ((c << (24 - 8 * j)) >> 24)
    return acc


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
                low = _dot4(tl.broadcast_to(w & 0x03030303, (ROWS, TILE, 16)), c, low, DOT)
                high = _dot4(tl.broadcast_to((w >> 2) & 0x03030303, (ROWS, TILE, 16)), c, high, DOT)
                low = _dot4(tl.broadcast_to((w >> 4) & 0x03030303, (ROWS, TILE, 16)), d, low, DOT)
                high = _dot4(tl.broadcast_to((w >> 6) & 0x03030303, (ROWS, TILE, 16)), d, high, DOT)
            else:
                at = codes + m * stride + (salient_at if r == 1 else 0) + block - begin
                c = tl.broadcast_to(tl.load(at, mask=live, other=0), (ROWS, TILE, 16))
                low = _dot4(tl.broadcast_to(w & 0x0F0F0F0F, (ROWS, TILE, 16)), c, low, DOT)
                high = _dot4(tl.broadcast_to((w >> 4) & 0x0F0F0F0F, (ROWS, TILE, 16)), c, high, DOT)
        both = tl.permute(tl.join(tl.sum(low, axis=1), tl.sum(high, axis=1)), (0, 2, 1))
        to = partial + ((split * RANGES + r) * M + token).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, tl.reshape(both, (ROWS, 32)), mask=keep)


@triton.jit
def _halves(low, high, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of the outputs i of all strips, then those of the outputs 16 + i: int8 [ROWS, COLUMNS]."""
    return tl.reshape(tl.permute(tl.join(low, high).to(tl.int8), (2, 0, 1)), (ROWS, COLUMNS))


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
    row = tl.arange(0, BLOCK_N)
    n = tl.program_id(1) * BLOCK_N + row % (BLOCK_N // 2) // 16 * 32 + row // (BLOCK_N // 2) * 16 + row % 16
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
            p = tl.reshape(tl.permute(tl.reshape(p, (STRIPS, BLOCK, 16, 4)), (0, 2, 1, 3)), (16 * STRIPS, 4 * BLOCK))
            live = channel[:, None] < (last - block) * 4
            if r == 0 and FIRST_BITS == 2:
                place = codes + (m * stride + block * 8)[None, :] + (channel // 4 * 8 + channel % 4)[:, None]
                c = tl.load(place, mask=live, other=0)
                d = tl.load(place + 4, mask=live, other=0)
                acc = tl.dot(_halves(p & 3, (p >> 2) & 3, BLOCK_N, 4 * BLOCK), c, acc, out_dtype=tl.int32)
                acc = tl.dot(_halves((p >> 4) & 3, p >> 6, BLOCK_N, 4 * BLOCK), d, acc, out_dtype=tl.int32)
            else:
                place = codes + (m * stride + (salient_at if r == 1 else 0) + (block - begin) * 4)[None, :] + channel[:, None]
                c = tl.load(place, mask=live, other=0)
                acc = tl.dot(_halves(p & 15, p >> 4, BLOCK_N, 4 * BLOCK), c, acc, out_dtype=tl.int32)
        to = partial + (split * RANGES + r) * (M.to(tl.int64) * N) + token.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(to, acc, mask=(token < M)[None, :] & (n < N)[:, None])
