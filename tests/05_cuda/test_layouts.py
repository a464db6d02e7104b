"""Graded checks of chapter 5, layouts.py: exact on any machine."""

from collections.abc import Callable, Iterable

from fa_reference.grading import CheckFailed, check
from fa_reference.grading.answer import Answer

FILE = "layouts.py"
LANES = range(32)


def table(answer: Answer, function: str, arguments: Iterable[tuple]) -> dict[tuple, object]:
    """The function's value for every tuple of arguments."""
    return {a: answer.call(FILE, function, *a) for a in arguments}


def agree(answer: Answer, function: str, arguments: Iterable[tuple], expected: Callable) -> None:
    """CheckFailed at the first arguments where the function differs from the PTX ISA's formula."""
    for a, value in table(answer, function, arguments).items():
        right = expected(*a)
        if not isinstance(value, tuple) or len(value) != 2 or tuple(value) != right:
            call = f"{function}({', '.join(map(str, a))})"
            raise CheckFailed(f"{call} must be {right}; it is {value!r}")


# Elements of an 8 x 8 matrix that `ldmatrix` hands to a lane: row lane // 4, two neighbouring columns.
def c_place(lane: int, register: int) -> tuple[int, int]:
    return lane // 4 + register // 2 * 8, lane % 4 * 2 + register % 2


def a_place(lane: int, register: int, half: int) -> tuple[int, int]:
    return lane // 4 + register % 2 * 8, lane % 4 * 2 + half + register // 2 * 8


def b_place(lane: int, register: int, half: int) -> tuple[int, int]:
    return lane % 4 * 2 + half + register * 8, lane // 4


@check("swizzle: every chunk has a place of its own", points=1)
def test_swizzle_is_a_permutation(answer: Answer) -> None:
    for chunks in (8, 16):  # head_dim 64 and 128
        places = table(answer, "swizzle", ((row, chunk) for row in range(16) for chunk in range(chunks)))
        for row in range(16):
            used = sorted(places[row, chunk] for chunk in range(chunks))
            if used != list(range(chunks)):
                raise CheckFailed(
                    f"with {chunks} chunks a row, the chunks of row {row} must fill places 0 .. {chunks - 1}, each "
                    f"once; they go to {used}"
                )


@check("swizzle: no bank conflicts", points=2)
def test_swizzle_has_no_conflicts(answer: Answer) -> None:
    for chunks in (8, 16):
        places = table(answer, "swizzle", ((row, chunk) for row in range(16) for chunk in range(chunks)))
        for first_row in (0, 8):
            for chunk in range(chunks):
                banks = [places[first_row + r, chunk] % 8 for r in range(8)]
                if len(set(banks)) < 8:
                    raise CheckFailed(
                        f"chunk {chunk} of rows {first_row} .. {first_row + 7} lies at places {banks} modulo 8: "
                        f"ldmatrix reads these eight at once, and {8 - len(set(banks))} must wait for another"
                    )
        for row in range(16):
            for first in range(0, chunks, 8):
                banks = [places[row, first + c] % 8 for c in range(8)]
                if len(set(banks)) < 8:
                    raise CheckFailed(f"chunks {first} .. {first + 7} of row {row} share banks when they are written")


@check("fragment of the accumulator", points=1)
def test_c(answer: Answer) -> None:
    agree(answer, "c_fragment", ((lane, r) for lane in LANES for r in range(4)), c_place)


@check("fragment of A", points=1)
def test_a(answer: Answer) -> None:
    agree(answer, "a_fragment", ((lane, r, h) for lane in LANES for r in range(4) for h in range(2)), a_place)


@check("fragment of B", points=1)
def test_b(answer: Answer) -> None:
    agree(answer, "b_fragment", ((lane, r, h) for lane in LANES for r in range(2) for h in range(2)), b_place)


def loaded(answer: Answer, function: str, transposed: bool) -> dict[tuple[int, int, int], tuple[int, int]]:
    """(lane, register, half) -> (row, column) in shared memory of what ldmatrix delivers for these addresses."""
    address = {}
    for (lane,), value in table(answer, function, ((lane,) for lane in LANES)).items():
        if not isinstance(value, tuple) or len(value) != 2 or value[0] not in range(16) or value[1] not in range(2):
            raise CheckFailed(f"{function}({lane}) must be a row 0 .. 15 and a chunk 0 or 1; it is {value!r}")
        address[lane] = value
    delivered = {}
    for lane in LANES:
        for register in range(4):
            for half in range(2):
                r, c = lane // 4, lane % 4 * 2 + half
                if transposed:
                    r, c = c, r
                row, chunk = address[register * 8 + r]
                delivered[lane, register, half] = (row, chunk * 8 + c)
    return delivered


def delivers(answer: Answer, function: str, transposed: bool, wanted: Callable) -> None:
    for (lane, register, half), place in loaded(answer, function, transposed).items():
        right = wanted(lane, register, half)
        if place != right:
            raise CheckFailed(
                f"with the addresses of {function}, lane {lane} receives in register {register}, half {half}, the "
                f"element of row {place[0]}, column {place[1]}; mma wants row {right[0]}, column {right[1]} there"
            )


@check("ldmatrix addresses: Q becomes A", points=1)
def test_q_address(answer: Answer) -> None:
    delivers(answer, "q_address", False, a_place)


@check("ldmatrix addresses: K becomes B", points=1)
def test_k_address(answer: Answer) -> None:
    def wanted(lane: int, register: int, half: int) -> tuple[int, int]:
        column, key = b_place(lane, register % 2, half)  # B is K transposed
        return key + register // 2 * 8, column

    delivers(answer, "k_address", False, wanted)


@check("ldmatrix addresses: V becomes B, transposed on the way", points=1)
def test_v_address(answer: Answer) -> None:
    def wanted(lane: int, register: int, half: int) -> tuple[int, int]:
        key, column = b_place(lane, register % 2, half)
        return key, column + register // 2 * 8

    delivers(answer, "v_address", True, wanted)


@check("P stays in registers: accumulators become A", points=1)
def test_p_register(answer: Answer) -> None:
    for register in range(4):
        value = answer.call(FILE, "p_register", register)
        if not isinstance(value, tuple) or value not in {(tile, first) for tile in (0, 1) for first in (0, 2)}:
            raise CheckFailed(f"p_register({register}) must be a tile, 0 or 1, and 0 or 2; it is {value!r}")
        tile, first = value
        for lane in LANES:
            for half in range(2):
                row, column = c_place(lane, first + half)
                if (row, column + 8 * tile) != a_place(lane, register, half):
                    raise CheckFailed(
                        f"A's register {register} of lane {lane}, half {half}, is row, column "
                        f"{a_place(lane, register, half)} of P; accumulator {tile}, register {first + half} holds "
                        f"{(row, column + 8 * tile)}"
                    )
