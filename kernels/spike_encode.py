"""spike_encode: tokens to int8 spike codes, scales and code sums; spike_rms_norm and spike_silu_mul: the same in one launch.

    code = (clip(rint(x / step) + z, floor, ceiling) - centre) * gain

One program a token, its row read once from memory and again from cache: extremes, then codes. Every division is IEEE's and
every rounding half to even, so the integers are those of the CPU kernel. Formats: ranvier.reference.spike_encode.
"""

import triton
import triton.language as tl


@triton.jit
def _rint(v):
    """Round half to even of |v| <= 2^22: no contraction or reassociation may touch it."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _clamp(v, low, high):
    return tl.minimum(tl.maximum(v, low), high)


@triton.jit
def _step(width, levels):
    return _clamp(tl.div_rn(width, levels), 1e-5, 1e4)


@triton.jit
def _zero_point(low, step, ceiling, CENTRED: tl.constexpr):
    """The zero point of an asymmetric range; of a centred one it is a level."""
    # The quotient may pass what _rint takes; both bounds of the result lie far inside.
    raw = _rint(_clamp(tl.div_rn(-low, step), -1e6, 1e6))
    if CENTRED:
        raw = _clamp(raw, 0.0, ceiling)
    else:
        raw = _clamp(raw, -1e4, 1e4)
    return raw


@triton.jit
def _code(x, step, zero, floor, ceiling, centre, gain):
    # Zero points reach 1e4 and bounds 255: a quotient cut at 1e6 is past them as well.
    u = _clamp(_rint(_clamp(tl.div_rn(x, step), -1e6, 1e6)) + zero, floor, ceiling)
    return ((u - centre) * gain).to(tl.int32)


@triton.jit
def _exp_negative(x):
    """e^-x in the order of csrc/spike_silu_mul/spike_silu_mul.h. NaN takes a bound."""
    zero = tl.zeros_like(x)
    z = _clamp(-x, -104.0, 104.0)
    n = _rint(z * 1.44269504)
    r = tl.fma(-n, zero + -2.12194440e-4, tl.fma(-n, zero + 0.693359375, z))
    p = zero + 1.0 / 5040
    p = tl.fma(p, r, zero + 1.0 / 720)
    p = tl.fma(p, r, zero + 1.0 / 120)
    p = tl.fma(p, r, zero + 1.0 / 24)
    p = tl.fma(p, r, zero + 1.0 / 6)
    p = tl.fma(p, r, zero + 0.5)
    p = tl.fma(p, r, zero + 1.0)
    p = tl.fma(p, r, zero + 1.0)
    whole = n.to(tl.int32)
    half = whole >> 1
    return p * _power_of_two(half) * _power_of_two(whole - half)


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _token(x, other, k, K, factor, SOURCE: tl.constexpr):
    """Channels k of the token, float32; 0 past the last."""
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if SOURCE == "silu_mul":
        u = tl.load(other + k, mask=k < K, other=0.0).to(tl.float32)
        v = tl.div_rn(v, 1.0 + _exp_negative(v)).to(x.dtype.element_ty).to(tl.float32) * u
        v = v.to(x.dtype.element_ty).to(tl.float32)
    elif SOURCE is not None:
        w = tl.load(other + k, mask=k < K, other=0.0).to(tl.float32)
        v = v * factor
        if SOURCE == "after_cast":
            v = w * v.to(x.dtype.element_ty).to(tl.float32)
        elif SOURCE == "one_plus":
            v = v * (1.0 + w)
        else:
            v = v * w
        v = v.to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def _salient(mask, k, K):
    if mask is None:
        return k < 0
    return tl.load(mask + k, mask=k < K, other=0) != 0


@triton.jit
def _extremes(
    x, other, mask, K, factor, BLOCK: tl.constexpr, SEPARATE: tl.constexpr, COMPAT: tl.constexpr, SOURCE: tl.constexpr
):
    """min and max of the channels that set the asymmetric range, the largest salient magnitude, whether all are finite."""
    start: tl.constexpr = float("inf") if COMPAT else 0.0
    low = tl.full((BLOCK,), start, tl.float32)
    high = tl.full((BLOCK,), -start, tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    odd = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        v = _token(x, other, k, K, factor, SOURCE)
        odd |= ((v.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000).to(tl.int32)
        counts = k < K
        if SEPARATE:
            salient = _salient(mask, k, K)
            largest = tl.where(salient, tl.maximum(largest, tl.abs(v)), largest)
            counts = counts & (salient == 0)
        low = tl.where(counts, tl.minimum(low, v), low)
        high = tl.where(counts, tl.maximum(high, v), high)
    return tl.min(low, axis=0), tl.max(high, axis=0), tl.max(largest, axis=0), tl.max(odd, axis=0) == 0


@triton.jit
def _quantizers(
    low, high, largest,
    BITS: tl.constexpr, STEPS: tl.constexpr, SEPARATE: tl.constexpr, COMPAT: tl.constexpr,
):  # fmt: skip
    """(step, zero, floor, ceiling, centre, gain, scale) of the ordinary channels, then of the salient ones."""
    levels: tl.constexpr = 2.0**BITS - 1.0
    wide: tl.constexpr = STEPS * (2.0**BITS - 1.0)
    fine_levels: tl.constexpr = STEPS * 2.0**BITS - 1.0
    none = tl.zeros_like(low)  # low can be infinite
    own_step = _step(largest, 127.0)
    if BITS == 8:
        step = _step(tl.maximum(high, -low), 127.0)
        if SEPARATE:
            return step, none, -127.0, 127.0, none, 1.0, step, own_step, none, -127.0, 127.0, none, 1.0, own_step
        return step, none, -127.0, 127.0, none, 1.0, step, step, none, -127.0, 127.0, none, 1.0, step
    if SEPARATE or COMPAT:
        step = _step(high - low, levels)
        zero = _zero_point(low, step, levels, not COMPAT)
        centre = none if COMPAT else zero
        if SEPARATE:
            return step, zero, 0.0, levels, centre, 1.0, step, own_step, none, -127.0, 127.0, none, 1.0, own_step
        fine = _step(high - low, fine_levels)
        fine_zero = _zero_point(low, fine, fine_levels, False)
        return step, zero, 0.0, levels, none, 1.0, step, fine, fine_zero, 0.0, fine_levels, none, 1.0, fine
    fine = _step(high - low, wide)
    step = STEPS * 1.0 * fine
    zero = _zero_point(low, step, levels, True)
    fine_zero = _zero_point(low, fine, wide, True)
    return step, zero, 0.0, levels, zero, STEPS * 1.0, fine, fine, fine_zero, 0.0, wide, fine_zero, 1.0, fine


@triton.jit
def _root_mean_square(x, K, epsilon, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        squares += v * v
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), K * 1.0) + epsilon))


@triton.jit
def spike_encode(
    x, other, mask, made, codes, scale, code_sum, zero, epsilon, clip, K, low_count, groups, code_stride, salient_at,
    BITS: tl.constexpr, STEPS: tl.constexpr, SEPARATE: tl.constexpr, COMPAT: tl.constexpr, RANGES: tl.constexpr,
    ALL_SALIENT: tl.constexpr, GROUP: tl.constexpr, SOURCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token program_id(0): x [M, K] -> codes int8 [M, code_stride], scale and zero [M, RANGES], code_sum [M, groups].

    Two ranges: the salient channels' codes begin at salient_at. Codes between the ranges and the row's end are filled with
    zeros. mask: bool [K] or None. SOURCE: None to encode x; "silu_mul": silu(x) other, of other [M, K];
    else RMSNorm(x) with the weight other [K], applied as ranvier.reference.spike_rms_norm says by that name. made: [M, K] for
    what was encoded, or None.
    clip: the share of a token's range that its codes span. GROUP: channels a code sum, a power of two of one range;
    0: one sum a range; -1: spike_code_sums makes them.
    """
    m = tl.program_id(0).to(tl.int64)
    x += m * K
    codes += m * code_stride
    factor = 1.0
    if SOURCE == "silu_mul":
        other += m * K
    elif SOURCE is not None:
        factor = _root_mean_square(x, K, epsilon, BLOCK)
    low, high, largest, finite = _extremes(x, other, mask, K, factor, BLOCK, SEPARATE, COMPAT, SOURCE)
    # Quantizers of an ordinary token in place of those of one that is not finite: it gets no codes at all.
    low = tl.where(finite, low, 0.0) * clip
    high = tl.where(finite, high, 0.0) * clip
    largest = tl.where(finite, largest, 0.0) * clip
    (step, z, floor, ceiling, centre, gain, first_scale, fine_step, fine_z, fine_floor, fine_ceiling, fine_centre, fine_gain,
     fine_scale) = _quantizers(low, high, largest, BITS, STEPS, SEPARATE, COMPAT)  # fmt: skip
    sums = tl.zeros((BLOCK,), tl.int32)
    fine_sums = tl.zeros((BLOCK,), tl.int32)
    before = 0
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        v = _token(x, other, k, K, factor, SOURCE)
        if made is not None:
            tl.store(made + m * K + k, v.to(made.dtype.element_ty), mask=k < K)
        salient = _salient(mask, k, K)
        ordinary_code = _code(v, step, z, floor, ceiling, centre, gain)
        fine_code = _code(v, fine_step, fine_z, fine_floor, fine_ceiling, fine_centre, fine_gain)
        c = tl.where(finite & (k < K), tl.where(salient, fine_code, ordinary_code), 0)
        if RANGES == 2:
            one = salient.to(tl.int32)
            rank = before + tl.cumsum(one, axis=0) - one
            before += tl.sum(one, axis=0)
            at = tl.where(salient, salient_at + rank, k - rank)
            tl.store(codes + at, c.to(tl.int8), mask=k < K)
            fine_sums += tl.where(salient, c, 0)
            sums += tl.where(salient, 0, c)
        else:
            tl.store(codes + k, c.to(tl.int8), mask=k < K)
            if GROUP > 0:
                index = begin // GROUP + tl.arange(0, BLOCK // GROUP)
                tl.store(
                    code_sum + m * groups + index, tl.sum(tl.reshape(c, (BLOCK // GROUP, GROUP)), axis=1), mask=index < groups
                )
            else:
                sums += c
    pad = tl.arange(0, 4)
    none = tl.zeros((4,), tl.int8)
    if RANGES == 2:
        tl.store(codes + low_count + pad, none, mask=low_count + pad < salient_at)
        end = salient_at + K - low_count
        tl.store(codes + end + pad, none, mask=end + pad < code_stride)
    else:
        tl.store(codes + K + pad, none, mask=K + pad < code_stride)
    if GROUP == 0:
        tl.store(code_sum + m * groups, tl.sum(sums, axis=0))
        if RANGES == 2:
            tl.store(code_sum + m * groups + 1, tl.sum(fine_sums, axis=0))
    nan = float("nan")
    first_zero = z - centre
    if ALL_SALIENT:
        first_scale = fine_scale
        first_zero = fine_z - fine_centre
    tl.store(scale + m * RANGES, tl.where(finite, first_scale, nan))
    tl.store(zero + m * RANGES, tl.where(finite, first_zero, 0.0).to(tl.int32))
    if RANGES == 2:
        tl.store(scale + m * RANGES + 1, tl.where(finite, fine_scale, nan))
        tl.store(zero + m * RANGES + 1, tl.where(finite, fine_z - fine_centre, 0.0).to(tl.int32))


@triton.jit
def spike_code_sums(
    codes, code_sum, low_count, high_count, low_groups, groups, code_stride, salient_at, group,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums of each group of either range: grid (tokens, groups / TILE). WIDTH: the next power of two of group."""
    m = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * TILE + tl.arange(0, TILE)
    second = g >= low_groups
    first = tl.where(second, (g - low_groups) * group, g * group)
    length = tl.where(second, high_count, low_count)
    base = tl.where(second, salient_at, 0)
    inside = tl.arange(0, WIDTH)
    at = first[:, None] + inside[None, :]
    live = (inside < group)[None, :] & (at < length[:, None]) & (g < groups)[:, None]
    c = tl.load(codes + m * code_stride + base[:, None] + at, mask=live, other=0).to(tl.int32)
    tl.store(code_sum + m * groups + g, tl.sum(c, axis=1), mask=g < groups)
