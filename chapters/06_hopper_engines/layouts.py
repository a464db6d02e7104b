"""Where things lie on Hopper: tensors as TMA sees them, its swizzled tiles, wgmma's descriptors and registers.

Pure functions of integers, graded exactly on any machine; tma_tile.cu and wgmma_tile.cu use the same formulas.
A tile has `rows` rows of head_dim 16-bit numbers. TMA delivers it as head_dim / 64 blocks, one after another, each of
`rows` rows of 64 numbers (128 bytes), and permutes 16-byte chunks inside each row: the 128-byte swizzle.
"thread" is a thread's number in its warpgroup, 0 .. 127. PTX ISA: "Tensor swizzling modes", "Matrix Descriptor",
"Register Fragments for wgmma.mma_async.m64nNk16".
"""


def tma_view(
    shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], rows: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(sizes, strides, box) that describe a tensor (B, H, N, d) of 16-bit numbers and its tiles of `rows` rows to TMA.

    TMA counts dimensions from the innermost: (64 columns, N, d / 64 blocks of columns, H, B). Sizes and box in elements
    (five each); strides in bytes (four: the innermost is contiguous). `strides` of the tensor are in elements. The
    blocks are a dimension of their own because the swizzle spans 128 bytes, so a box may be 64 numbers wide, no more.
    Head and batch are, so that a tile which sticks out behind the last row reads zeros, not the next head.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: a row further is strides[2] numbers of 2 bytes, a block of columns further is 128 bytes"
    )


def swizzle(address: int) -> int:
    """Where TMA's 128-byte swizzle puts the byte that would lie at shared-memory byte `address` without it.

    Bits 4 to 6 of the address (which chunk of a 128-byte row) are combined by exclusive or with bits 7 to 9 (which row
    of eight). All other bits stay. Applying it twice gives the address back.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError("layouts.py: bring bits 7 to 9 down to 4 to 6, drop all others, and combine with ^")


def tile_offset(row: int, column: int, rows: int) -> int:
    """Byte offset of element (row, column) in a tile of `rows` rows as TMA delivers it; the tile starts at 0.

    `rows` is a multiple of 8, so every block starts at a multiple of 1024 and the swizzle sees the same bits in each.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: the block of 64 columns, the row of 128 bytes in it, the column's 2 bytes in the row; then swizzle"
    )


def descriptor(address: int, leading: int, stride: int) -> int:
    """wgmma's 64-bit description of an operand in shared memory, for the 128-byte swizzle; arguments in bytes.

    Bits 0-13: address / 16, of which the address' lower 18 bits count; 16-29: leading byte offset / 16; 32-45: stride
    byte offset / 16; 49-51: base offset, 0 for tiles that start at a multiple of 1024; 62-63: the swizzle, 1 = 128 B.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: shift the three numbers and the mode to their places, and combine them with |"
    )


def k_major_descriptor(address: int, rows: int, step: int) -> int:
    """Descriptor of columns 16 step .. 16 step + 15 of all rows of the tile at `address`: Q or K in S = Q K^T.

    "K-major": neighbours in memory are neighbours along the summed dimension (PTX calls it K). The stride is the
    distance from 8 rows to the next 8; the leading offset is not used (write 16). A step of 16 columns is 32 bytes, and
    four of them fill a row of 128 bytes; the swizzle needs no thought: the hardware applies it to what is added here.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: move the address to the block of 64 columns, then to the step inside its rows"
    )


def mn_major_descriptor(address: int, rows: int, step: int) -> int:
    """Descriptor of rows 16 step .. 16 step + 15, all columns, of the tile at `address`: V in O = P V.

    "MN-major": the summed dimension (the keys) runs from row to row, neighbours in memory run along N (head_dim). The
    leading offset is the distance from 64 columns to the next 64, the stride that from 8 keys to the next 8.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: move the address 16 rows a step; the leading offset is a whole block of 64 columns"
    )


def accumulator_place(thread: int, register: int) -> tuple[int, int]:
    """(row, column) of the accumulator D (64, N) that `thread` holds in its `register`, 0 .. N / 2 - 1.

    Each of the four warps has 16 rows. A warp's 16 rows x 8 columns are chapter 5's fragment of an accumulator, with
    registers 0 .. 3; the next four registers are the next 8 columns.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: warp, lane and the register's bits give the row; the register's upper bits pick 8 columns"
    )


def a_place(thread: int, register: int, half: int) -> tuple[int, int]:
    """(row, column) of A (64, 16) that `thread` holds in `half` (0 lower, 1 upper 16 bits) of `register`, 0 .. 3.

    This is operand A in registers: P in O = P V. Per warp it is chapter 5's fragment of A.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError("layouts.py: as in chapter 5, 16 rows a warp")


def p_registers(step: int, register: int) -> tuple[int, int]:
    """Which two accumulator registers of S, rounded, are the lower and upper half of A's `register` in a step of P V.

    Step k sums over keys 16 k .. 16 k + 15, which are columns of S. The right pair is in the same thread: no number has
    to move. That is why P needs no shared memory.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: find the accumulator register with a_place's row and with its column + 16 step"
    )
