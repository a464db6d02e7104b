"""Who holds what: register fragments of Hopper's wgmma, the key order that makes P fit, and V's transposition.

An FP8 wgmma wants its left operand A (P) with four keys of one row in a register, and its right operand B (V) with the
keys contiguous. The accumulator that P is made of has neither order. Rather than to exchange P between threads, the
kernel keeps P where it is and takes the keys in another order, which is allowed as long as V's keys take the same one.
Source: PTX ISA, "Register fragments for wgmma.mma_async.m64nNk32"; FlashAttention-3, section 3.3.
"""

import torch
from torch import Tensor

THREADS = 128
"""Threads of a warpgroup."""

GROUP = 16
"""The key order repeats every 16 keys."""


def accumulator_position(thread: int, register: int) -> tuple[int, int]:
    """(row, column) of a float32 accumulator register of wgmma m64nN: thread 0..127, register 0..N/2-1."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + 8 * ((register // 2) % 2)
    return row, 8 * (register // 4) + 2 * (lane % 4) + register % 2


def a_fragment_fp8_position(thread: int, register: int, byte: int) -> tuple[int, int]:
    """(row, k) of a byte of the A fragment of an e4m3 wgmma m64nNk32: register 0..3, byte 0..3, k 0..31."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + 8 * (register % 2)
    return row, 16 * (register // 2) + 4 * (lane % 4) + byte


def kv_order(keys: int) -> Tensor:
    """The key at every k position, so that accumulator registers need no exchange: int64, (keys,).

    Per 16 keys: 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15. Raises ValueError unless keys is a multiple of 16.
    """
    if keys < 0 or keys % GROUP:
        raise ValueError(f"keys is {keys}; allowed: a multiple of {GROUP} (wgmma takes 32 at a time)")
    position = torch.arange(keys)
    # Lane t of a quad owns accumulator columns 2t, 2t+1 and 8+2t, 8+2t+1, and operand positions 4t..4t+3.
    lane, byte = (position % GROUP) // 4, position % 4
    return position // GROUP * GROUP + 2 * lane + 8 * (byte // 2) + byte % 2


def inverse_order(order: Tensor) -> Tensor:
    """The position of every key: inverse_order(order)[order[i]] = i."""
    return torch.argsort(order)


def pack_p(accumulators: Tensor) -> Tensor:
    """Reorder accumulator registers into A fragments: the swap that every thread does among its own registers.

    accumulators (..., N / 2) of one thread or of many; returns (..., N / 32, 4, 4): k step, register, byte. Entry
    [s, r, b] belongs to k position 32 s + k of a_fragment_fp8_position and holds key kv_order(N)[32 s + k].
    Raises ValueError unless N is a multiple of 32.
    """
    registers = accumulators.shape[-1]
    if registers % 16:
        raise ValueError(f"accumulators has {registers} registers; allowed: a multiple of 16 (32 keys a k step)")
    # Of 8 registers d0..d7, d0 d1 d4 d5 lie in one row and d2 d3 d6 d7 in the row 8 below: swap the middle pairs.
    pairs = accumulators.reshape(
        *accumulators.shape[:-1], registers // 16, 2, 2, 2, 2
    )  # step, half, key+8, row+8, pair
    return pairs.transpose(-2, -3).reshape(*accumulators.shape[:-1], registers // 16, 4, 4)


def transpose_v(v: Tensor) -> Tensor:
    """V as the kernel's B operand: (..., keys, d) -> (..., d, keys), the keys in `kv_order`; any dtype."""
    return v.transpose(-1, -2)[..., kv_order(v.shape[-2]).to(v.device)]


# The same transposition as the producer warps do it, instruction by instruction on 16 keys x 16 channels.


def ldmatrix_trans(tile: Tensor) -> Tensor:
    """`ldmatrix.trans` on one 8 x 8 matrix of 16-bit units: what each lane receives.

    tile (8, 16) uint8: 8 rows of 16 bytes. Returns (32, 4) uint8, the bytes of each lane's register, lowest first:
    lane l gets the units [2 (l % 4)][l / 4] and [2 (l % 4) + 1][l / 4].
    """
    units = tile.reshape(8, 8, 2)
    lane = torch.arange(32)
    first, second = units[2 * (lane % 4), lane // 4], units[2 * (lane % 4) + 1, lane // 4]
    return torch.cat((first, second), dim=1)


def byte_perm(a: Tensor, b: Tensor, selector: int) -> Tensor:
    """`prmt`: four of the eight bytes of a (0..3) and b (4..7); the selector's last hexadecimal digit picks the first.

    a, b (..., 4) uint8, lowest byte first; returns (..., 4).
    """
    chosen = [(selector >> (4 * i)) & 0xF for i in range(4)]
    if any(c > 7 for c in chosen):
        raise ValueError(f"selector is {selector:#06x}; allowed: digits 0 to 7 (8 and above replicate signs)")
    return torch.cat((a, b), dim=-1)[..., chosen]


def stmatrix(registers: Tensor) -> Tensor:
    """`stmatrix` on one 8 x 8 matrix of 16-bit units: (32, 4) -> (8, 16); lane l fills row l / 4 from 4 (l % 4)."""
    return registers.reshape(8, 16)


def transpose_v_16x16(tile: Tensor) -> Tensor:
    """transpose_v on 16 keys x 16 channels of bytes, with nothing but ldmatrix, prmt and stmatrix.

    tile (16, 16) uint8, keys x channels; returns (16, 16) uint8, channels x keys in kv_order. The hardware transposes
    16-bit units only, here pairs of channels; prmt then parts the even channel from the odd one, and its taking bytes
    from both registers is what mixes keys 2t, 2t+1 with 8+2t, 8+2t+1: the very order that P's registers ask for.
    """
    low, high = ldmatrix_trans(tile[:8]), ldmatrix_trans(tile[8:])
    even, odd = byte_perm(low, high, 0x6420), byte_perm(low, high, 0x7531)
    out = torch.empty_like(tile)
    out[0::2], out[1::2] = stmatrix(even), stmatrix(odd)  # stmatrix takes any address for each row
    return out
