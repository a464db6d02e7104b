"""Who holds what in FP8: operand A in registers, the order of the keys that suits it, and V turned round.

Pure functions, graded exactly on any machine; fp8.cu uses the same formulas. An e4m3 wgmma (m64nNk32) takes P as
operand A from registers, four keys of one row in each, and V as operand B with the keys contiguous. The accumulator
that P is made of has another layout. No number has to change threads, though: a product does not care in which order
it sums, so P keeps its registers, the keys are taken in the order that results, and V is written down in the same
order. "thread" is a thread's number in its warpgroup, 0 .. 127; "lane" its number in its warp. PTX ISA: "Register
Fragments for wgmma.mma_async.m64nNk32", "ldmatrix", "stmatrix", "prmt".
"""

import torch
from torch import Tensor


def a_place(thread: int, register: int, byte: int) -> tuple[int, int]:
    """(row, position) of A (64, 32) that `thread` holds in `byte` (0 lowest .. 3) of its `register`, 0 .. 3.

    Positions count along the summed dimension. As in chapter 6, but with four neighbours in a register instead of two:
    a quad's four lanes share positions 0 .. 15 of a row in register 0, and 16 .. 31 in register 2.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: the row is chapter 6's; the position comes from the register's upper bit, the lane in "
        "its quad, and the byte"
    )


def p_registers(register: int) -> tuple[int, int, int, int]:
    """The accumulator registers of S whose rounded values become bytes 0 .. 3 of P's `register`, all in one thread.

    P's registers are counted through the whole block of keys: 4 step + register of A. Accumulator register i holds row
    w + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (lane % 4) + i % 2 (chapter 6). All four must lie in the row that a_place
    wants, and all of them in the 16 keys that P's register covers.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: 8 accumulator registers are 16 keys of two rows; which four of them lie in one row?"
    )


def key_at(position: int) -> int:
    """The key of the block (its column in S) that stands at `position` of the summed dimension of P V.

    It follows from p_registers: whose accumulator column is the byte that a_place puts at this position?
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: lane t of a quad holds columns 2t, 2t+1, 8+2t, 8+2t+1 of every 16, and positions 4t .. 4t+3"
    )


def transpose_v(v: Tensor) -> Tensor:
    """V as the kernel's operand B: (keys, d) -> (d, keys), with key key_at(i) in column i. keys: a multiple of 16."""
    # TODO: replace this statement by your code.
    raise NotImplementedError("layouts.py: transpose, and pick the columns")


# transpose_v as the producer's warps do it, 16 keys x 32 channels at a time: one ldmatrix_x4_transposed, four prmt, one
# stmatrix_x4. ldmatrix takes four matrices of 8 rows x 16 bytes, and lanes 8 i .. 8 i + 7 give the addresses of the
# rows of matrix i. It transposes units of two bytes, here two neighbouring channels of one key: register i of lane l
# gets units (row 2t, unit l / 4) and (row 2t + 1, unit l / 4) of matrix i, t = l % 4.


def load_place(lane: int) -> tuple[int, int]:
    """(key, chunk) of the 16 bytes whose address `lane` hands to ldmatrix: key 0 .. 15, chunk 0 or 1 (16 channels
    each).

    Registers 0 and 1 must hold the same channels and different keys, because prmt takes its bytes from both; likewise 2
    and 3.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: matrices 0 and 1 are keys 0-7 and 8-15 of chunk 0, matrices 2 and 3 of chunk 1"
    )


def selectors(lane: int) -> tuple[int, int]:
    """The selectors of the two prmt that make `lane`'s registers 0 and 1 (and 2 and 3) for stmatrix out of the loaded.

    prmt(a, b, selector) picks four of eight bytes, a's are 0 .. 3 and b's 4 .. 7; the lowest hexadecimal digit picks
    the lowest byte. A loaded register holds, from its lowest byte: even channel and odd channel of key 2t, then of
    key 2t + 1. What is stored must be four keys of one channel, in the order of key_at.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: 0x6420 picks the even channel, 0x7531 the odd one; lanes 16 .. 31 exchange the two, so "
        "that the eight rows of a matrix to be stored are channels that differ modulo 8 (see store_place)"
    )


def store_place(lane: int) -> int:
    """The channel, 0 .. 31, of the 16 bytes (16 keys) whose address `lane` hands to stmatrix.

    Lane 8 i + r gives the address of row r of matrix i, which gets register i of lanes 4 r .. 4 r + 3. Which channel is
    that, by load_place and selectors? A row of V turned round is 128 bytes, swizzled by its number modulo 8: the eight
    rows of a matrix go to different banks if their channels differ modulo 8.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: 16 channels a pair of matrices, two neighbouring channels a row; the first matrix holds "
        "the even channels in rows 0 .. 3 and the odd ones in rows 4 .. 7, the second the others"
    )


def turned_by_instructions(tile: Tensor) -> Tensor:
    """transpose_v of a tile (16, 32) of uint8 by ldmatrix, prmt and stmatrix with the places above. Given."""
    lanes = range(32)
    loaded = torch.empty(32, 4, 4, dtype=torch.uint8)  # lane, register, byte
    for lane in lanes:
        for register in range(4):
            for half in range(2):
                key, chunk = load_place(8 * register + 2 * (lane % 4) + half)
                first = 16 * chunk + 2 * (lane // 4)
                loaded[lane, register, 2 * half : 2 * half + 2] = tile[key, first : first + 2]
    turned = torch.zeros(32, 16, dtype=torch.uint8)
    for lane in lanes:
        for register in range(4):
            pair = loaded[lane, register // 2 * 2 : register // 2 * 2 + 2].flatten()
            selector = selectors(lane)[register % 2]
            picked = pair[[selector >> 4 * i & 7 for i in range(4)]]
            turned[store_place(8 * register + lane // 4), 4 * (lane % 4) : 4 * (lane % 4) + 4] = picked
    return turned
