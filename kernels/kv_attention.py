"""kv_attention: decode attention over a packed 4-bit key-value cache, split over tokens, and the kernel that joins the splits.

    out = softmax(scale q k^T + mask) v   over the visible tokens,   k, v = zero_t + scale_t (2 nibble + bit)

The cache is [batch, kv head, block] of 64 tokens, its layout that of csrc/kv_attention/kv_attention.h. One program reads the
blocks of one kv head for all query heads that share it. Codes never become keys:
q k = zero_t sum_d q_d + scale_t (2 q n + q b), three small dots with exact operands; values likewise, their scale taken
into the weights.
"""

import triton
import triton.language as tl


@triton.jit
def _key_nibbles(base, LINES: tl.constexpr, lines):
    """Low and high nibbles of a block's keys: [64 tokens, 4 * LINES] each, channels 8 line + c and 8 line + 4 + c."""
    group, line = tl.arange(0, 4)[:, None, None], tl.arange(0, LINES)[None, :, None]
    at = base + (group * lines + line) * 64 + tl.arange(0, 64)[None, None, :]
    packed = tl.load(at, mask=(line < lines) & (tl.arange(0, 64)[None, None, :] >= 0), other=0)
    packed = tl.reshape(packed, (4, LINES, 16, 4))
    packed = tl.reshape(tl.permute(packed, (0, 2, 1, 3)), (64, 4 * LINES))
    return packed & 15, packed >> 4


@triton.jit
def _value_nibbles(base, LINES: tl.constexpr, lines):
    """Low and high nibbles of a block's values: [64 tokens, 16 * LINES] each, channels 32 line + i and 32 line + 16 + i."""
    quad, line = tl.arange(0, 16)[:, None, None], tl.arange(0, LINES)[None, :, None]
    at = base + (quad * lines + line) * 64 + tl.arange(0, 64)[None, None, :]
    packed = tl.load(at, mask=(line < lines) & (tl.arange(0, 64)[None, None, :] >= 0), other=0)
    packed = tl.reshape(packed, (16, LINES, 16, 4))
    packed = tl.reshape(tl.permute(packed, (0, 3, 1, 2)), (64, 16 * LINES))
    return packed & 15, packed >> 4


@triton.jit
def _key_bits(base, QUADS: tl.constexpr, quads):
    """The further bits of salient channels 4 quad + c: [64 tokens, 4 * QUADS]."""
    token, channel = tl.arange(0, 64)[:, None], tl.arange(0, 4 * QUADS)[None, :]
    bit = token % 16 * 4 + channel % 4
    at = base + (token // 16 * quads + channel // 4) * 8 + bit // 8
    return (tl.load(at, mask=(channel < 4 * quads) & (token >= 0), other=0) >> (bit % 8).to(tl.uint8)) & 1


@triton.jit
def _value_bits(base, GROUPS: tl.constexpr, groups):
    """The further bits of salient channels 16 group + i: [64 tokens, 16 * GROUPS]."""
    token, channel = tl.arange(0, 64)[:, None], tl.arange(0, 16 * GROUPS)[None, :]
    bit = channel % 16 * 4 + token % 4
    at = base + (token // 4 * groups + channel // 16) * 8 + bit // 8
    return (tl.load(at, mask=(channel < 16 * groups) & (token >= 0), other=0) >> (bit % 8).to(tl.uint8)) & 1


@triton.jit
def _query(query, order, channel, live, D):
    """q at these places of the head's order: [rows, channels], 0 past the last."""
    inside = channel < D
    at = tl.load(order + channel, mask=inside, other=0)
    return tl.load(query[:, None] + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["queries", "blocks", "splits", "mask_width"])
def kv_attention_split(
    query, cache, key_order, lengths, starts, mask, sums, partial, logit_scale,
    D, queries, group, kv_heads, blocks, splits, block_bytes, key_bits, key_scale, value_codes, value_bits, value_scale,
    quads, value_groups, query_b, query_h, query_q, mask_b, mask_h, mask_q, mask_width,
    ROWS: tl.constexpr, PADDED: tl.constexpr, QUADS: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """CHUNK blocks of one kv head; grid (batch * kv_heads, splits, row tiles). A row is a query of one of the group's heads.

    sums [batch * kv_heads, splits, group * queries, 2]: the largest logit (base 2) and the sum of weights; partial
    [..., PADDED]: the weighted values in the order of the head's values. logit_scale includes log2(e).
    """
    TYPE: tl.constexpr = query.dtype.element_ty
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    rows = group * queries
    live = row < rows
    b, h = head // kv_heads, head % kv_heads
    q_index = row % queries
    q_head = h * group + row // queries
    length = tl.minimum(tl.load(lengths + b), blocks * 64).to(tl.int32)
    begin = 0
    if starts is not None:
        begin = tl.maximum(tl.load(starts + b), 0).to(tl.int32)
    last = length - queries + q_index
    query += b * query_b
    at_query = query + q_head * query_h + q_index * query_q
    order = key_order + h * D
    half_lines: tl.constexpr = PADDED // 8
    c = tl.arange(0, 4 * half_lines)
    q_low = _query(at_query, order, c // 4 * 8 + c % 4, live, D)
    q_high = _query(at_query, order, c // 4 * 8 + c % 4 + 4, live, D)
    q_bits = _query(at_query, order, tl.arange(0, 4 * QUADS), live, D)
    q_sum = tl.sum(q_low.to(tl.float32), axis=1) + tl.sum(q_high.to(tl.float32), axis=1)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS, PADDED // 2), tl.float32)
    high = tl.zeros((ROWS, PADDED // 2), tl.float32)
    bits = tl.zeros((ROWS, 16 * GROUPS), tl.float32)
    lines = (D + 31) // 32 * 4
    first = tl.maximum(split * CHUNK, begin // 64)
    stop = tl.minimum(split * CHUNK + CHUNK, tl.cdiv(length, 64))
    for block in tl.range(first, stop, num_stages=STAGES):
        base = cache + (head * blocks + block) * block_bytes
        t = block * 64 + tl.arange(0, 64)
        halves = (base + key_scale).to(tl.pointer_type(tl.float16))
        k_scale = tl.load(halves + tl.arange(0, 64)).to(tl.float32)
        k_zero = tl.load(halves + 64 + tl.arange(0, 64)).to(tl.float32)
        n_low, n_high = _key_nibbles(base, half_lines, lines)
        dots = tl.dot(q_low, tl.trans(n_low.to(TYPE)), input_precision="ieee")
        dots += tl.dot(q_high, tl.trans(n_high.to(TYPE)), input_precision="ieee")
        key_bit = _key_bits(base + key_bits, QUADS, quads).to(TYPE)
        dots = 2.0 * dots + tl.dot(q_bits, tl.trans(key_bit), input_precision="ieee")
        logits = logit_scale * (q_sum[:, None] * k_zero[None, :] + dots * k_scale[None, :])
        if mask is not None:
            place = mask + b * mask_b + q_head[:, None] * mask_h + q_index[:, None] * mask_q + t[None, :]
            shown = tl.load(place, mask=live[:, None] & (t < mask_width)[None, :], other=0.0)
            logits += shown * 1.4426950408889634
        seen = (t[None, :] <= last[:, None]) & (t >= begin)[None, :] & live[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        # A NaN has to survive the maximum: it goes into the weights below, not into what they are measured from.
        above = tl.maximum(top, tl.max(tl.where(logits == logits, logits, float("-inf")), axis=1))
        base_line = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(logits - base_line[:, None])
        keep = tl.exp2(top - base_line)
        halves = (base + value_scale).to(tl.pointer_type(tl.float16))
        v_scale = tl.load(halves + tl.arange(0, 64)).to(tl.float32)
        v_zero = tl.load(halves + 64 + tl.arange(0, 64)).to(tl.float32)
        # Weights times scales as halves: relative to the block's largest scale, so that none of weight is lost.
        largest = tl.max(tl.where(v_scale == v_scale, v_scale, 0.0), axis=0)
        scaled = tl.where(seen, weights * (v_scale / largest)[None, :], 0.0).to(TYPE)
        shift = shift * keep + tl.sum(tl.where(seen, weights * v_zero[None, :], 0.0), axis=1)
        total = total * keep + tl.sum(weights, axis=1)
        v_low, v_high = _value_nibbles(base + value_codes, PADDED // 32, lines // 4)
        low = low * keep[:, None] + largest * tl.dot(scaled, v_low.to(TYPE), input_precision="ieee")
        high = high * keep[:, None] + largest * tl.dot(scaled, v_high.to(TYPE), input_precision="ieee")
        v_bits = _value_bits(base + value_bits, GROUPS, value_groups).to(TYPE)
        bits = bits * keep[:, None] + largest * tl.dot(scaled, v_bits, input_precision="ieee")
        top = above
    at = (head * splits + split) * rows + row
    tl.store(sums + 2 * at, top, mask=live)
    tl.store(sums + 2 * at + 1, total, mask=live)
    c = tl.arange(0, PADDED // 2)
    to = partial + at[:, None] * (PADDED + 16 * GROUPS)
    place = c // 16 * 32 + c % 16
    tl.store(to + place[None, :], 2.0 * low + shift[:, None], mask=live[:, None])
    tl.store(to + place[None, :] + 16, 2.0 * high + shift[:, None], mask=live[:, None])
    tl.store(to + PADDED + tl.arange(0, 16 * GROUPS)[None, :], bits, mask=live[:, None])


@triton.jit(do_not_specialize=["queries", "splits"])
def kv_attention_join(
    sums, partial, value_order, out, D, queries, group, kv_heads, splits,
    PADDED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of a row; grid (batch * kv_heads, group * queries). out [batch, heads, queries, D], 0 for no tokens."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = group * queries
    c = tl.arange(0, PADDED)
    top, total = float("-inf"), 0.0
    value = tl.zeros((PADDED,), tl.float32)
    for split in range(splits):
        at = (head * splits + split) * rows + row
        its_top, its_total = tl.load(sums + 2 * at), tl.load(sums + 2 * at + 1)
        above = tl.maximum(top, its_top)
        base_line = tl.where(above == float("-inf"), 0.0, above)
        keep, factor = tl.exp2(top - base_line), tl.exp2(its_top - base_line)
        # A split with nothing but NaN has no largest logit; what it summed still counts.
        factor = tl.where(its_total == its_total, factor, 1.0)
        whole = tl.load(partial + at * (PADDED + 16 * GROUPS) + c)
        whole += tl.load(partial + at * (PADDED + 16 * GROUPS) + PADDED + c, mask=c < 16 * GROUPS, other=0.0)
        value = value * keep + whole * factor
        total = total * keep + its_total * factor
        top = above
    value = tl.where(total == 0.0, 0.0, value / total)
    h = head % kv_heads
    to = tl.load(value_order + h * D + c, mask=c < D, other=0)
    at = ((head // kv_heads * kv_heads + h) * group + row // queries) * queries + row % queries
    tl.store(out + at * D + to, value.to(out.dtype.element_ty), mask=c < D)


@triton.jit
def _channels(x, at, mask, order, place, live, D, scale, zero):
    """Codes 2 n + b, int32, at these places of the head's order; 0 past the last channel and for tokens that are not live.

    x: where the tokens begin; at [4, ...] their offsets, scale and zero [4, ...] what their halves hold.
    """
    inside = place < D
    channel = tl.load(order + place, mask=inside, other=0)
    v = tl.load(x + at + channel, mask=live & inside, other=0.0).to(tl.float32)
    salient = tl.load(mask + channel, mask=inside, other=0) != 0
    fine = tl.div_rn(v - zero, scale + tl.zeros_like(v))
    coarse = tl.div_rn(v - zero, 2.0 * scale + tl.zeros_like(v))
    level = tl.where(salient, tl.minimum(tl.maximum(fine, 0.0), 30.0), tl.minimum(tl.maximum(coarse, 0.0), 15.0))
    level = ((level + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.where(live & inside, tl.where(salient, level, 2 * level), 0)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def kv_attention_encode(
    x, cache, order, mask, positions, steps, D, tokens, kv_heads, blocks, block_bytes, codes_at, bits_at, scale_at, lines,
    wide, x_b, x_h, x_t,
    PADDED: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Four neighbouring tokens of one kv head, those that are new; grid (batch * kv_heads, tokens / 4 + 1).

    A byte of bits is shared by tokens of these four and no other, so that programs never write the same byte. x [batch,
    kv_heads, tokens, D]; order, mask [kv_heads, D]; steps float32 [batch, kv_heads, tokens]: scales, NaN also for a token
    whose place is beyond the cache. lines: of a group's nibbles (keys), of a quad's (values); wide: units of bits.
    """
    head = tl.program_id(0).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    start = tl.load(positions + b)
    quad = (start >> 2) + tl.program_id(1)
    t = quad * 4 + tl.arange(0, 4)
    new = t - start
    given = (new >= 0) & (new < tokens)
    live = given & (t >= 0) & (t < blocks * 64)
    x += b * x_b + h * x_h
    order += h * D
    mask += h * D
    row = tl.where(live, new, 0) * x_t
    c = tl.arange(0, PADDED)
    v = tl.load(x + row[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    odd = (v.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000
    finite = tl.max(odd.to(tl.int32), axis=1) == 0
    low = tl.min(tl.where((c < D)[None, :], v, float("inf")), axis=1)
    high = tl.max(tl.where((c < D)[None, :], v, -float("inf")), axis=1)
    low = tl.where(finite, low, 0.0)
    high = tl.where(finite, high, 0.0)
    scale = tl.minimum(tl.maximum(tl.div_rn(high - low, 30.0), 3.814697265625e-06), 65504.0).to(tl.float16)
    zero = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    shown = tl.where(finite & live, scale.to(tl.float32), float("nan"))
    tl.store(steps + head * tokens + new, shown, mask=given)
    base = cache + (head * blocks + tl.where(live, t, 0) // 64) * block_bytes
    inner = t % 64
    halves = (base + scale_at).to(tl.pointer_type(tl.float16)) + inner
    tl.store(halves, shown.to(tl.float16), mask=live)
    tl.store(halves + 64, zero, mask=live)
    fine, at_zero, kept = scale.to(tl.float32), zero.to(tl.float32), live & finite
    n = tl.arange(0, PADDED // 2)
    if KEYS:
        place = n // 4 * 8 + n % 4
        to = (inner // 16)[:, None] * lines * 64 + (n // 4 * 64)[None, :] + (inner % 16 * 4)[:, None] + (n % 4)[None, :]
        STEP: tl.constexpr = 4
    else:
        place = n // 16 * 32 + n % 16
        to = (inner // 4)[:, None] * lines * 64 + (n // 16 * 64 + n % 16 * 4)[None, :] + (inner % 4)[:, None]
        STEP: tl.constexpr = 16
    args = row[:, None]
    first = _channels(x, args, mask, order, place[None, :], kept[:, None], D, fine[:, None], at_zero[:, None])
    second = _channels(x, args, mask, order, place[None, :] + STEP, kept[:, None], D, fine[:, None], at_zero[:, None])
    packed = ((first >> 1) | ((second >> 1) << 4)).to(tl.uint8)
    stored = live[:, None] & (place < (D + 31) // 32 * 32)[None, :]
    tl.store(base[:, None] + codes_at + to, packed, mask=stored)
    # Bits: [4 tokens, WIDE units, bits of a unit], added up to the bytes they share.
    if KEYS:
        unit, j = tl.arange(0, WIDE)[None, :, None], tl.arange(0, 4)[None, None, :]
        shift = (inner % 2 * 4)[:, None, None] + j
        code = _channels(
            x, row[:, None, None], mask, order, 4 * unit + j, kept[:, None, None], D, fine[:, None, None],
            at_zero[:, None, None],
        )  # fmt: skip
        ours = tl.sum((code & 1) << shift, axis=2)
        clear = tl.where(live, 15 << (inner % 2 * 4), 0)
        ours = tl.sum(tl.reshape(ours, (2, 2, WIDE)), axis=1)
        clear = tl.sum(tl.reshape(clear, (2, 2)), axis=1)[:, None]
        pair = quad * 4 + 2 * tl.arange(0, 2)
        any_live = tl.max(tl.reshape(live.to(tl.int32), (2, 2)), axis=1) != 0
        place = tl.where(any_live, pair, 0)
        line = (place % 64 // 16)[:, None] * wide + tl.arange(0, WIDE)[None, :]
        byte = cache + (head * blocks + place // 64)[:, None] * block_bytes + bits_at + line * 8 + (place % 16 // 2)[:, None]
        there = any_live[:, None] & (tl.arange(0, WIDE) < wide)[None, :]
    else:
        unit, j = tl.arange(0, WIDE * 8)[None, :, None], tl.arange(0, 2)[None, None, :]
        shift = j * 4 + (inner % 4)[:, None, None]
        code = _channels(
            x, row[:, None, None], mask, order, 2 * unit + j, kept[:, None, None], D, fine[:, None, None],
            at_zero[:, None, None],
        )  # fmt: skip
        ours = tl.sum(tl.sum((code & 1) << shift, axis=2), axis=0)
        clear = tl.sum(tl.where(live, 17 << (inner % 4), 0), axis=0)
        k = tl.arange(0, WIDE * 8)
        at = tl.maximum(tl.minimum(quad * 4, blocks * 64 - 4), 0)
        byte = cache + (head * blocks + at // 64) * block_bytes + bits_at + (at % 64 // 4 * wide + k // 8) * 8 + k % 8
        there = (k < 8 * wide) & (k * 0 + clear != 0)
    old = tl.load(byte, mask=there, other=0).to(tl.int32)
    tl.store(byte, ((old & (255 - clear)) | ours).to(tl.uint8), mask=there)
