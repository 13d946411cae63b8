"""What the products of packed weights share. Blocks of 64 bytes: byte 4 i + j holds channel j of outputs i and 16 + i."""

import triton
import triton.language as tl


@triton.jit
def dot4(w, c, acc, DOT: tl.constexpr):
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


@triton.jit
def both_halves(low, high, ROWS: tl.constexpr):
    """Outputs i and 16 + i of a strip, [ROWS, 16] twice -> [ROWS, 32], in order."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (ROWS, 32))


@triton.jit
def by_output(packed, STRIPS: tl.constexpr, BLOCKS: tl.constexpr):
    """uint8 [STRIPS, 64 * BLOCKS] as it lies in memory -> [16 * STRIPS, 4 * BLOCKS], a row for outputs i and 16 + i."""
    return tl.reshape(tl.permute(tl.reshape(packed, (STRIPS, BLOCKS, 16, 4)), (0, 2, 1, 3)), (16 * STRIPS, 4 * BLOCKS))


@triton.jit
def stacked(low, high, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Fields of :func:`by_output`'s bytes -> int8 [ROWS, CHANNELS]: outputs i of all strips, then outputs 16 + i.

    So four channels of an output stay together from memory to the tensor core's operand, and no byte has to change its thread
    after it was unpacked.
    """
    return tl.reshape(tl.permute(tl.join(low, high).to(tl.int8), (2, 0, 1)), (ROWS, CHANNELS))


@triton.jit
def stacked_outputs(tile, BLOCK_N: tl.constexpr):
    """The outputs of a tile in the order of :func:`stacked`'s rows."""
    row = tl.arange(0, BLOCK_N)
    return tile * BLOCK_N + row % (BLOCK_N // 2) // 16 * 32 + row // (BLOCK_N // 2) * 16 + row % 16
