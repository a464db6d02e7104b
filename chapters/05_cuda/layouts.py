"""Where things lie: the swizzle of shared memory, the addresses that `ldmatrix` takes, and the fragments of `mma`.

Pure functions of small numbers, so that they can be graded exactly on any machine; the kernels use the same formulas.
A lane is a thread's number in its warp, 0 .. 31. A chunk is 16 bytes: 8 numbers of 16 bits. Matrices follow the PTX ISA
(sections "ldmatrix" and "Matrix Fragments for mma.m16n8k16"): D (16, 8) += A (16, 16) B (16, 8).
"""


def swizzle(row: int, chunk: int) -> int:
    """The place (0 ..) in `row` of a tile in shared memory where `chunk` is kept.

    Within a row no two chunks may share a place. Shared memory has 32 banks of 4 bytes, so eight places of 16 bytes are
    all banks once: place modulo 8 decides which. The eight rows 8 i .. 8 i + 7 of one chunk must go to eight different
    banks, and so must the eight chunks 8 i .. 8 i + 7 of one row.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: let the row number move its chunks: neighbouring rows keep the same chunk in different places"
    )


def c_fragment(lane: int, register: int) -> tuple[int, int]:
    """(row, column) of the accumulator D (16, 8) that `lane` holds in its `register` (0 .. 3, one float each).

    Lanes 0-3 hold row 0, lanes 4-7 row 1, ...; a lane has two neighbouring columns, and the same two eight rows below.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: row from lane // 4 and the register's upper bit, column from lane % 4 and the register's lower bit"
    )


def a_fragment(lane: int, register: int, half: int) -> tuple[int, int]:
    """(row, column) of A (16, 16) in `half` (0 lower, 1 upper 16 bits) of `register` (0 .. 3) of `lane`.

    Four 8 x 8 matrices laid out like the two of D: register 0 upper left, 1 below it, 2 right of it, 3 lower right.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: as in c_fragment, with the half for the neighbouring column; the register's bits say which matrix"
    )


def b_fragment(lane: int, register: int, half: int) -> tuple[int, int]:
    """(row, column) of B (16, 8) in `half` of `register` (0, 1) of `lane`: rows run along the summed dimension.

    The transpose of A's upper half: lane // 4 is the column, and a lane has two neighbouring rows, and two more eight
    rows below.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError("layouts.py: exchange the roles of row and column of a_fragment")


def q_address(lane: int) -> tuple[int, int]:
    """(row, chunk) that `lane` hands to ldmatrix_x4 to load the A fragment of Q's rows 0 .. 15, columns 0 .. 15.

    Lanes 8 i .. 8 i + 7 name the eight rows of matrix i, whose elements arrive in register i: element (r, c) of it in
    lane 4 r + c // 2.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: which of a_fragment's four matrices is lane // 8, and which of its rows is lane % 8?"
    )


def k_address(lane: int) -> tuple[int, int]:
    """(row, chunk) that `lane` hands to ldmatrix_x4 for the B fragments of K^T: K's rows 0 .. 15, columns 0 .. 15.

    S = Q K^T, so B (16, 8) is K (8 keys, 16 columns) transposed: what ldmatrix hands out of K's rows is B as it stands.
    Registers 0 and 1 are B's registers 0 and 1 for keys 0 .. 7, registers 2 and 3 those for keys 8 .. 15.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: matrices 0 and 1 are side by side in K's rows 0 .. 7, matrices 2 and 3 in its rows 8 .. 15"
    )


def v_address(lane: int) -> tuple[int, int]:
    """(row, chunk) that `lane` hands to ldmatrix_x4_transposed for the B fragments of V's rows and columns 0 .. 15.

    O = P V, so B's rows are V's rows (keys); every 8 x 8 matrix arrives transposed. Registers 0 and 1 are B's registers
    0 and 1 for columns 0 .. 7 of V, registers 2 and 3 those for columns 8 .. 15.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: matrices 0 and 1 are one above the other in V's columns 0 .. 7, matrices 2 and 3 right of them"
    )


def p_register(register: int) -> tuple[int, int]:
    """(tile, first) such that registers first and first + 1 of accumulator `tile` (0 or 1) pack into A's `register`.

    S is computed in tiles of 8 keys; two neighbouring tiles are the 16 columns of the A fragment of P for O += P V.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "layouts.py: compare a_fragment with c_fragment: which tile has A's column, which registers its row?"
    )
