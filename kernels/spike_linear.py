"""spike_linear: spike codes x packed 4-bit weights on int8 dot products.

    y[m, n] = b[n] + sum_r s_x[m, r] sum_{g in r} s_w[n, g] ( sum_{k in g} c[m, k] (q[n, k] - z_w[n, g]) - z_x[m, r] S[n, g] )

Weights are the layer's own buffers, [N/32][blocks][64 bytes]: byte 4 i + j of a block holds channel j of its four for output i
(low nibble) and output 16 + i (high nibble); so a strip of 32 outputs is one contiguous stream. Codes come in the same
blocks, int8 [M, 4 * blocks], every range filled up with zeros. Integer sums are exact and the epilogue takes the order of
the CPU kernel: t = fma(s_w, v, t) a group, y = fma(s_x, t, y) a range, the bias first.

gemv: M <= 8, four channels a dot instruction, a program reads one strip. gemm: tensor cores, outputs x tokens, so that few
tokens waste nothing. Both can split K over programs; combine then finishes.
"""

import triton
import triton.language as tl
from ranvier.kernels._blocks import both_halves, by_output, dot4, stacked, stacked_outputs


@triton.jit
def _centred(acc, sums, zeros, weight_sum, at, w_zero, COMPAT: tl.constexpr):
    """float(sum c (q - z_w)) - z_x S, rounded as the CPU kernel rounds it. at, w_zero, weight_sum: of the outputs."""
    v = (acc - w_zero * sums).to(tl.float32)
    if COMPAT:
        total = tl.load(weight_sum + at).to(tl.float32)
        v = tl.fma(-zeros.to(tl.float32) + tl.zeros_like(v), total + tl.zeros_like(v), v)
    return v


@triton.jit
def _gemv_words(
    codes, weight, m, rows, first, last, across, step, count,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Integer sums of a strip's outputs i and 16 + i: two int32 [ROWS, TILE, 16].

    Row t of the tile walks over blocks first + t * across + i * step, i < count, those below last; weight points at the
    strip's words, codes at words [M, rows]. The words of STAGES - 1 steps are on their way while one is multiplied.
    """
    lane = tl.arange(0, 16)[None, None, :]
    low = tl.zeros((ROWS, TILE, 16), dtype=tl.int32)
    high = tl.zeros((ROWS, TILE, 16), dtype=tl.int32)
    for i in tl.range(count, num_stages=STAGES):
        block = (first + tl.arange(0, TILE) * across + i * step)[None, :, None]
        live = block < last
        w = tl.load(weight + block * 16 + lane, mask=live, other=0)
        c = tl.load(codes + m[:, None, None] * rows + block, mask=live, other=0)
        c = tl.broadcast_to(c, (ROWS, TILE, 16))
        low = dot4(tl.broadcast_to(w & 0x0F0F0F0F, (ROWS, TILE, 16)), c, low, DOT)
        high = dot4(tl.broadcast_to((w >> 4) & 0x0F0F0F0F, (ROWS, TILE, 16)), c, high, DOT)
    return low, high


@triton.jit
def _group_terms(acc, at, live, sums, zeros, weight_scale, weight_zero, weight_sum, COMPAT: tl.constexpr):
    """sum over the tile's live groups of s_w v: acc [ROWS, TILE, 16], at [TILE, 16] -> [ROWS, 16]."""
    w_zero = tl.load(weight_zero + at).to(tl.int32)[None, :, :]
    v = _centred(acc, sums[:, :, None], zeros[:, None, None], weight_sum, at[None, :, :], w_zero, COMPAT)
    terms = tl.load(weight_scale + at)[None, :, :] * v
    return tl.sum(tl.where(live[None, :, None], terms, 0.0), axis=1)


@triton.jit(do_not_specialize=["M"])
def spike_linear_gemv(
    codes, scale, code_sum, zero, weight, weight_scale, weight_zero, weight_sum, bias, y, partial,
    M, N, rows, low_rows, groups, low_groups, group_rows,
    ROWS: tl.constexpr, TILE: tl.constexpr, RANGES: tl.constexpr, GROUPED: tl.constexpr, COMPAT: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """32 outputs of M <= ROWS tokens; grid (N/32, SPLITS).

    codes int32 [M, rows] and weight int32 [N/32, rows, 16] are words of four channels; low_rows and low_groups are the first
    range's. Ungrouped, a tile's rows are neighbouring blocks; grouped, each is a whole group, whose sum stays in a register.
    SPLITS > 1: partial [SPLITS, RANGES, M, N] gets the integer sums, of grouped weights the float t.
    """
    strip, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.arange(0, ROWS)
    m = tl.minimum(token, M - 1)
    weight += strip * rows * 16
    table = strip * groups * 32
    n = strip * 32 + tl.arange(0, 32)
    keep = (token < M)[:, None] & (n < N)[None, :]
    out = tl.zeros((ROWS, 32), dtype=tl.float32)
    if SPLITS == 1:
        if bias is not None:
            out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    for r in tl.static_range(RANGES):
        begin = 0 if r == 0 else low_rows
        end = low_rows if r + 1 < RANGES else rows
        zeros = tl.load(zero + m * RANGES + r)
        if GROUPED:
            base = 0 if r == 0 else low_groups
            many = low_groups if r + 1 < RANGES else groups
            many -= base
            piece = tl.cdiv(many, SPLITS)
            t_low = tl.zeros((ROWS, 16), dtype=tl.float32)
            t_high = tl.zeros((ROWS, 16), dtype=tl.float32)
            last_group = tl.minimum(split * piece + piece, many)
            for g in range(split * piece, last_group, TILE):
                last = tl.minimum(begin + last_group * group_rows, end)
                low, high = _gemv_words(
                    codes, weight, m, rows, begin + g * group_rows, last, group_rows, 1, group_rows, ROWS, TILE, STAGES, DOT
                )
                index = g + tl.arange(0, TILE)
                live = index < last_group
                index = base + tl.minimum(index, many - 1)
                at = table + index[:, None] * 32 + tl.arange(0, 16)[None, :]
                sums = tl.load(code_sum + m[:, None] * groups + index[None, :])
                t_low += _group_terms(low, at, live, sums, zeros, weight_scale, weight_zero, weight_sum, COMPAT)
                t_high += _group_terms(high, at + 16, live, sums, zeros, weight_scale, weight_zero, weight_sum, COMPAT)
            t = both_halves(t_low, t_high, ROWS)
            if SPLITS > 1:
                tl.store(partial + ((split * RANGES + r) * M + m)[:, None] * N + n[None, :], t, mask=keep)
        else:
            piece = tl.cdiv(tl.cdiv(end - begin, TILE), SPLITS) * TILE
            first = begin + split * piece
            last = tl.minimum(first + piece, end)
            count = tl.maximum(tl.cdiv(last - first, TILE), 0)
            low, high = _gemv_words(codes, weight, m, rows, first, last, 1, TILE, count, ROWS, TILE, STAGES, DOT)
            acc = both_halves(tl.sum(low, axis=1), tl.sum(high, axis=1), ROWS)
            if SPLITS > 1:
                tl.store(partial + ((split * RANGES + r) * M + m)[:, None] * N + n[None, :], acc, mask=keep)
            else:
                at = table + r * 32 + tl.arange(0, 32)[None, :]
                sums = tl.load(code_sum + m * groups + r)[:, None]
                w_zero = tl.load(weight_zero + at).to(tl.int32)
                v = _centred(acc, sums, zeros[:, None], weight_sum, at, w_zero, COMPAT)
                t = tl.load(weight_scale + at) * v
        if SPLITS == 1:
            out = tl.fma(tl.load(scale + m * RANGES + r)[:, None] + tl.zeros_like(t), t, out)
    if SPLITS == 1:
        tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], out.to(y.dtype.element_ty), mask=keep)


@triton.jit
def _gemm_sums(
    codes, weight, at_strip, at_token, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_N, BLOCK_M]: sum of c q over the blocks from first to last. at_*: where strips and tokens begin, bytes."""
    byte, channel = tl.arange(0, 64 * BLOCK), tl.arange(0, 4 * BLOCK)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for block in range(first, last, BLOCK):
        if EVEN:
            packed = tl.load(weight + (at_strip + block * 64)[:, None] + byte[None, :])
        else:
            live = byte < (last - block) * 64
            packed = tl.load(weight + (at_strip + block * 64)[:, None] + byte[None, :], mask=live[None, :], other=0)
        if EVEN:
            c = tl.load(codes + (at_token + block * 4)[None, :] + channel[:, None])
        else:
            c = tl.load(
                codes + (at_token + block * 4)[None, :] + channel[:, None], mask=channel[:, None] < (last - block) * 4, other=0
            )
        packed = by_output(packed, BLOCK_N // 32, BLOCK)
        acc = tl.dot(stacked(packed & 15, packed >> 4, BLOCK_N, 4 * BLOCK), c, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _store_tile(to, values, token, n, M, N):
    """values [outputs, tokens] to row-major [M, N]."""
    at = token.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(to + at, values, mask=(token < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def spike_linear_gemm(
    codes, scale, code_sum, zero, weight, weight_scale, weight_zero, weight_sum, bias, y, partial,
    M, N, rows, low_rows, groups, low_groups, group_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, RANGES: tl.constexpr, GROUPED: tl.constexpr,
    COMPAT: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr, STRIPE: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs x BLOCK_M tokens; grid (tiles, SPLITS), in stripes of STRIPE output tiles that share their codes.

    codes int8 [M, 4 * rows], weight uint8 [N/32, rows, 64]. BLOCK blocks of four channels a dot. EVEN: every range (or
    group) is whole tiles. partial as of spike_linear_gemv.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    n_tiles, m_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    stripe = tile // (STRIPE * m_tiles)
    wide = tl.minimum(n_tiles - stripe * STRIPE, STRIPE)
    n_tile = stripe * STRIPE + (tile % (STRIPE * m_tiles)) % wide
    m_tile = (tile % (STRIPE * m_tiles)) // wide
    token = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = stacked_outputs(n_tile, BLOCK_N)
    m = tl.minimum(token, M - 1)
    strips = tl.cdiv(N, 32)
    strip = tl.minimum(n_tile * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32), strips - 1).to(tl.int64)
    at_strip, at_token = strip * rows * 64, m.to(tl.int64) * rows * 4
    table = tl.minimum(n // 32, strips - 1) * groups * 32 + n % 32
    out = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for r in tl.static_range(RANGES):
        begin = 0 if r == 0 else low_rows
        end = low_rows if r + 1 < RANGES else rows
        if GROUPED:
            base = 0 if r == 0 else low_groups
            many = low_groups if r + 1 < RANGES else groups
            many -= base
            piece = tl.cdiv(many, SPLITS)
            zeros = tl.load(zero + m * RANGES + r)
            t = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for g in range(split * piece, tl.minimum(split * piece + piece, many)):
                first = begin + g * group_rows
                last = tl.minimum(first + group_rows, end)
                acc = _gemm_sums(codes, weight, at_strip, at_token, first, last, BLOCK_M, BLOCK_N, BLOCK, EVEN)
                at = (table + (base + g) * 32)[:, None]
                sums = tl.load(code_sum + m * groups + base + g)[None, :]
                w_zero = tl.load(weight_zero + at).to(tl.int32)
                v = _centred(acc, sums, zeros[None, :], weight_sum, at, w_zero, COMPAT)
                t = tl.fma(tl.load(weight_scale + at) + tl.zeros_like(v), v, t)
            if SPLITS > 1:
                _store_tile(partial + (split * RANGES + r) * (M.to(tl.int64) * N), t, token, n, M, N)
        else:
            piece = tl.cdiv(tl.cdiv(end - begin, BLOCK), SPLITS) * BLOCK
            first = begin + split * piece
            last = tl.minimum(first + piece, end)
            acc = _gemm_sums(codes, weight, at_strip, at_token, first, last, BLOCK_M, BLOCK_N, BLOCK, EVEN)
            if SPLITS > 1:
                _store_tile(partial + (split * RANGES + r) * (M.to(tl.int64) * N), acc, token, n, M, N)
            else:
                at = (table + r * 32)[:, None]
                sums = tl.load(code_sum + m * groups + r)[None, :]
                w_zero = tl.load(weight_zero + at).to(tl.int32)
                v = _centred(acc, sums, tl.load(zero + m * RANGES + r)[None, :], weight_sum, at, w_zero, COMPAT)
                t = tl.load(weight_scale + at) * v
        if SPLITS == 1:
            if r == 0:
                if bias is not None:
                    out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            out = tl.fma(tl.load(scale + m * RANGES + r)[None, :] + tl.zeros_like(t), t, out)
    if SPLITS == 1:
        _store_tile(y, out.to(y.dtype.element_ty), token, n, M, N)


@triton.jit(do_not_specialize=["M"])
def spike_linear_combine(
    scale, code_sum, zero, weight_scale, weight_zero, weight_sum, bias, y, partial, M, N, groups,
    BLOCK_N: tl.constexpr, RANGES: tl.constexpr, GROUPED: tl.constexpr, COMPAT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds the splits of gemv or gemm in their order and finishes; grid (N / BLOCK_N, M)."""
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    keep = n < N
    out = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if bias is not None:
        out += tl.load(bias + n, mask=keep, other=0.0).to(tl.float32)
    for r in tl.static_range(RANGES):
        total = tl.load(partial + (r * M + m) * N + n, mask=keep, other=0)
        for split in range(1, SPLITS):
            total += tl.load(partial + ((split * RANGES + r) * M + m) * N + n, mask=keep, other=0)
        if GROUPED:
            t = total
        else:
            at = tl.minimum(n // 32, tl.cdiv(N, 32) - 1) * groups * 32 + r * 32 + n % 32
            w_zero = tl.load(weight_zero + at).to(tl.int32)
            sums = tl.load(code_sum + m * groups + r)
            v = _centred(total, sums, tl.load(zero + m * RANGES + r), weight_sum, at, w_zero, COMPAT)
            t = tl.load(weight_scale + at) * v
        out = tl.fma(tl.load(scale + m * RANGES + r) + tl.zeros_like(t), t, out)
    tl.store(y + m * N + n, out.to(y.dtype.element_ty), mask=keep)
