"""Graded checks of chapter 6, layouts.py: exact on any machine."""

from collections.abc import Iterable

from fa_reference.grading import CheckFailed, check
from fa_reference.grading.answer import Answer

FILE = "layouts.py"
TABLE = "fa_reference.grading.table"
THREADS = range(128)
# Of a descriptor: name, lowest bit, number of bits, bytes that its 1 stands for (0: a code, not bytes).
FIELDS = (
    ("address", 0, 14, 16),
    ("bits 14-15, which are unused,", 14, 2, 0),
    ("leading byte offset", 16, 14, 16),
    ("bits 30-31, which are unused,", 30, 2, 0),
    ("stride byte offset", 32, 14, 16),
    ("bits 46-48, which are unused,", 46, 3, 0),
    ("base offset", 49, 3, 0),
    ("bits 52-61, which are unused,", 52, 10, 0),
    ("swizzle mode", 62, 2, 0),
)


def values(answer: Answer, function: str, arguments: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], object]:
    """The function's value for every tuple of arguments."""
    asked = list(arguments)
    return dict(zip(asked, answer.call(FILE, "values", function, asked, driver=TABLE), strict=True))


def whole(value: object, call: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckFailed(f"{call} must be an int; it is {value!r}")
    return value


def pair(value: object, call: str) -> tuple[int, int]:
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(part) is int for part in value):
        raise CheckFailed(f"{call} must be a tuple of two ints; it is {value!r}")
    return value


def written(function: str, arguments: tuple[int, ...]) -> str:
    return f"{function}({', '.join(map(str, arguments))})"


# ---- the formulas of the PTX ISA -------------------------------------------------------------------------------------


def swizzled(address: int) -> int:
    row, chunk, byte = address // 128, address // 16 % 8, address % 16
    return row * 128 + (chunk ^ row % 8) * 16 + byte


def accumulator(thread: int, register: int) -> tuple[int, int]:
    below, right = divmod(register, 4)[1] // 2, register // 4
    return thread // 32 * 16 + thread % 32 // 4 + below * 8, right * 8 + thread % 4 * 2 + register % 2


def a_fragment(thread: int, register: int, half: int) -> tuple[int, int]:
    return thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8, register // 2 * 8 + thread % 4 * 2 + half


def same_fields(value: object, right: dict[str, int], call: str, unused: tuple[str, ...] = ()) -> None:
    """CheckFailed naming the first field of a descriptor that is wrong. `right`: bytes or codes, 0 where left out."""
    number = whole(value, call)
    if not 0 <= number < 1 << 64:
        raise CheckFailed(f"{call} must fit into 64 bits; it is {number:#x}")
    for name, low, bits, unit in FIELDS:
        if name in unused:
            continue
        field, wanted = number >> low & (1 << bits) - 1, right.get(name, 0) // (unit or 1)
        if field != wanted:
            place = "" if "unused" in name else f", bits {low}-{low + bits - 1},"
            bytes_of = f" (= {wanted * unit} bytes / {unit})" if unit else ""
            raise CheckFailed(f"{call}: the {name}{place} must be {wanted}{bytes_of}; it is {field}")


# ---- checks ----------------------------------------------------------------------------------------------------------


@check("tma_view: a strided tensor in five dimensions", points=1)
def test_tma_view(answer: Answer) -> None:
    for shape, strides, rows in (
        ((1, 1, 64, 64), (4096, 4096, 64, 1), 64),
        ((2, 3, 100, 128), (38400, 12800, 128, 1), 64),
        ((2, 3, 100, 128), (38400, 128, 384, 1), 128),  # stored as (batch, len, heads, d)
        ((4, 5, 7, 256), (9000, 1800, 264, 1), 176),  # padded
    ):
        batch, heads, length, head_dim = shape
        right = (
            (64, length, head_dim // 64, heads, batch),
            (2 * strides[2], 128, 2 * strides[1], 2 * strides[0]),
            (64, rows, head_dim // 64, 1, 1),
        )
        call = f"tma_view({shape}, {strides}, {rows})"
        value = answer.call(FILE, "tma_view", shape, strides, rows)
        if not isinstance(value, tuple) or len(value) != 3:
            raise CheckFailed(f"{call} must be three tuples: sizes, strides, box; it is {value!r}")
        for name, got, want in zip(("sizes", "strides in bytes", "box"), value, right, strict=True):
            if not isinstance(got, tuple) or got != want:
                raise CheckFailed(f"{call}: the {name} must be {want}; they are {got!r}")


@check("swizzle: every byte of two units goes where TMA puts it", points=1)
def test_swizzle(answer: Answer) -> None:
    for (address,), value in values(answer, "swizzle", ((a,) for a in (*range(2048), 0x3FFFF, 0x2A5F0))).items():
        right = swizzled(address)
        wrong = whole(value, f"swizzle({address})") ^ right
        if wrong:
            bits = [bit for bit in range(max(20, wrong.bit_length())) if wrong >> bit & 1]
            raise CheckFailed(
                f"swizzle({address:#06x}) must be {right:#06x}; it is {value:#06x}. Wrong address bits: {bits}. (Row "
                f"{address // 128}, chunk {address // 16 % 8}: the chunk goes to place {right // 16 % 8} of its row.)"
            )


@check("tile_offset: every element of a tile", points=1)
def test_tile_offset(answer: Answer) -> None:
    shapes = [(16, 64), (64, 128), (8, 256)]
    for rows, head_dim in shapes:
        arguments = ((row, column, rows) for row in range(rows) for column in range(head_dim))
        for (row, column, _), value in values(answer, "tile_offset", arguments).items():
            call = f"tile_offset({row}, {column}, {rows})"
            offset, block = whole(value, call), rows * 128
            right = column // 64 * block + swizzled(row * 128 + column % 64 * 2)
            if offset == right:
                continue
            for what, got, want in (
                ("block of 64 columns", offset // block, right // block),
                ("row of 128 bytes in the block", offset % block // 128, right % block // 128),
                ("chunk of 16 bytes in the row", offset % 128 // 16, right % 128 // 16),
                ("byte in the chunk", offset % 16, right % 16),
            ):
                if got != want:
                    raise CheckFailed(f"{call} must be {right}; it is {offset}: {what} {got} instead of {want}")


@check("descriptor: every field in its bits", points=1)
def test_descriptor(answer: Answer) -> None:
    cases = [(0, 0, 0), (1024, 16, 1024), (0x25400, 8192, 1024), (0x8000, 22528, 512), (0x39C00, 16 * 0x3FFF, 16)]
    cases += [(1 << bit, 1 << bit % 14 + 4, 1 << 17 - bit % 14) for bit in range(4, 18)]
    for case in [*cases, (0x40000 + 2048, 16, 1024)]:
        address, leading, stride = case
        right = {"address": address & 0x3FFFF, "leading byte offset": leading, "stride byte offset": stride}
        call = f"descriptor({address:#x}, {leading}, {stride})"
        same_fields(answer.call(FILE, "descriptor", *case), {**right, "swizzle mode": 1}, call)


@check("K-major descriptors: Q and K, every step", points=1)
def test_k_major(answer: Answer) -> None:
    for address, rows, head_dim in ((0x8000, 64, 64), (0x400, 64, 128), (0x4C00, 128, 128), (0xC000, 176, 256)):
        for step in range(head_dim // 16):
            right = {"address": address + step // 4 * rows * 128 + step % 4 * 32, "stride byte offset": 1024}
            call = f"k_major_descriptor({address:#x}, {rows}, {step})"
            value = answer.call(FILE, "k_major_descriptor", address, rows, step)
            same_fields(value, {**right, "swizzle mode": 1}, call, unused=("leading byte offset",))


@check("MN-major descriptors: V, every step", points=1)
def test_mn_major(answer: Answer) -> None:
    for address, rows in ((0x8000, 64), (0x400, 128), (0xC000, 176)):
        for step in range(rows // 16):
            right = {
                "address": address + step * 2048,
                "leading byte offset": rows * 128,
                "stride byte offset": 1024,
                "swizzle mode": 1,
            }
            call = f"mn_major_descriptor({address:#x}, {rows}, {step})"
            same_fields(answer.call(FILE, "mn_major_descriptor", address, rows, step), right, call)


def same_places(answer: Answer, function: str, arguments: Iterable[tuple[int, ...]], right: object) -> None:
    """CheckFailed at the first arguments where the place differs, naming row or column."""
    for a, value in values(answer, function, arguments).items():
        call = written(function, a)
        got, want = pair(value, call), right(*a)
        if got != want:
            which = " and ".join(name for name, g, w in zip(("row", "column"), got, want, strict=True) if g != w)
            warp, lane = divmod(a[0], 32)
            raise CheckFailed(f"{call} must be {want}; it is {got}: wrong {which} (warp {warp}, lane {lane})")


@check("registers of the accumulator", points=1)
def test_accumulator(answer: Answer) -> None:
    same_places(answer, "accumulator_place", ((t, r) for t in THREADS for r in range(128)), accumulator)


@check("registers of operand A", points=1)
def test_a(answer: Answer) -> None:
    same_places(answer, "a_place", ((t, r, h) for t in THREADS for r in range(4) for h in (0, 1)), a_fragment)


@check("P stays in registers: S's accumulators are A", points=1)
def test_p(answer: Answer) -> None:
    for step in range(11):  # 176 keys
        for register in range(4):
            call = written("p_registers", (step, register))
            got = pair(answer.call(FILE, "p_registers", step, register), call)
            for half, name in ((0, "lower"), (1, "upper")):
                if not 0 <= got[half] < 88:
                    raise CheckFailed(
                        f"{call}: {got[half]} is no register of an accumulator with 176 columns (0 .. 87)"
                    )
                for thread in THREADS:
                    row, column = a_fragment(thread, register, half)
                    if accumulator(thread, got[half]) != (row, column + 16 * step):
                        raise CheckFailed(
                            f"{call} is {got}: the {name} half of A's register {register} is row {row}, key "
                            f"{column + 16 * step} for thread {thread}, but its accumulator register {got[half]} holds "
                            f"row {accumulator(thread, got[half])[0]}, key {accumulator(thread, got[half])[1]}"
                        )
