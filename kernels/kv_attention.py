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
