"""Graded checks of chapter 10, layouts.py: exact on any machine. Any order of the keys passes that fits together."""

import torch

from fa_reference.fp8 import layouts as reference
from fa_reference.grading import CheckFailed, check
from fa_reference.grading.answer import Answer

FILE = "layouts.py"
KEYS = 128
LANES = range(32)
# One warp and a lane of another: the warps differ by 16 rows only.
THREADS = (*LANES, 32, 77, 127)


def whole(value: object, call: str, count: int | None = None) -> object:
    """The value, if it is an int (count None) or a tuple of `count` ints; CheckFailed otherwise."""
    parts = [value] if count is None else value
    if not isinstance(parts, list | tuple) or len(parts) != (count or 1) or not all(type(p) is int for p in parts):
        raise CheckFailed(
            f"{call} must be {'an int' if count is None else f'a tuple of {count} ints'}; it is {value!r}"
        )
    return value


def key_order(answer: Answer, keys: int) -> list[int]:
    order = [whole(answer.call(FILE, "key_at", i), f"key_at({i})") for i in range(keys)]
    for first in range(0, keys, 32):
        if sorted(order[first : first + 32]) != list(range(first, first + 32)):
            raise CheckFailed(
                f"positions {first} .. {first + 31} are one wgmma: key_at must give them the keys {first} .. "
                f"{first + 31}, each once; it gives {order[first : first + 32]}"
            )
    return order


@check("operand A: who holds which byte", points=1)
def test_a_place(answer: Answer) -> None:
    for thread in THREADS:
        for register in range(4):
            for byte in range(4):
                value = answer.call(FILE, "a_place", thread, register, byte)
                right = reference.a_fragment_fp8_position(thread, register, byte)
                if value != right:
                    raise CheckFailed(f"a_place({thread}, {register}, {byte}) must be {right}; it is {value!r}")


@check("P stays in its thread, and in its row", points=2)
def test_p_registers(answer: Answer) -> None:
    used = []
    for register in range(KEYS // 8):
        call = f"p_registers({register})"
        mine = whole(answer.call(FILE, "p_registers", register), call, 4)
        used += mine
        for thread in (0, 5, 77):
            row, _ = reference.a_fragment_fp8_position(thread, register % 4, 0)
            for byte, source in enumerate(mine):
                if not 0 <= source < KEYS // 2:
                    raise CheckFailed(f"{call} names accumulator register {source}; there are {KEYS // 2}")
                found, _ = reference.accumulator_position(thread, source)
                if found != row:
                    raise CheckFailed(
                        f"{call}: A's register {register % 4} of thread {thread} is row {row}; byte {byte} would come "
                        f"from accumulator register {source}, which is row {found}"
                    )
    if sorted(used) != list(range(KEYS // 2)):
        raise CheckFailed(f"the {KEYS // 8} registers of P must use all {KEYS // 2} accumulators, each once: {used}")


@check("the keys' order is the one that P's registers have", points=2)
def test_key_order(answer: Answer) -> None:
    order = key_order(answer, KEYS)
    for register in range(KEYS // 8):
        mine = whole(answer.call(FILE, "p_registers", register), f"p_registers({register})", 4)
        for thread in (0, 1, 2, 3, 30):
            for byte, source in enumerate(mine):
                _, position = reference.a_fragment_fp8_position(thread, register % 4, byte)
                position += 32 * (register // 4)
                _, column = reference.accumulator_position(thread, source)
                if order[position] != column:
                    raise CheckFailed(
                        f"position {position} is byte {byte} of register {register} of thread {thread}, made of its "
                        f"accumulator register {source}, which is key {column}; key_at({position}) is {order[position]}"
                    )


@check("V turned round: P V is unchanged", points=1)
def test_transpose(answer: Answer) -> None:
    order = key_order(answer, 64)
    p, v = torch.randint(-8, 9, (64, 64)).double(), torch.randint(-8, 9, (64, 24)).double()
    turned = answer.call(FILE, "transpose_v", v)
    if not isinstance(turned, torch.Tensor) or turned.shape != (24, 64):
        raise CheckFailed("transpose_v of V (64 keys, 24 channels) must be a tensor (24, 64)")
    if not torch.equal(p[:, order] @ turned.mT, p @ v):
        wrong = "channels x keys, but the keys are not in the order of key_at" if torch.equal(turned, v.mT) else "wrong"
        raise CheckFailed(f"transpose_v is {wrong}: P with its columns in key_at's order, times V, is not P V")


@check("ldmatrix, prmt, stmatrix turn V round", points=3)
def test_instructions(answer: Answer) -> None:
    order = key_order(answer, 32)[:16]
    if sorted(order) != list(range(16)):
        raise CheckFailed("the tile has 16 keys: key_at must keep positions 0 .. 15 among them")
    places, channels, chosen = set(), [], []
    for lane in LANES:
        place = whole(answer.call(FILE, "load_place", lane), f"load_place({lane})", 2)
        if not (0 <= place[0] < 16 and 0 <= place[1] < 2):
            raise CheckFailed(f"load_place({lane}) must be a key 0 .. 15 and a chunk 0 or 1; it is {place}")
        places.add(tuple(place))
        channels.append(whole(answer.call(FILE, "store_place", lane), f"store_place({lane})"))
        chosen += whole(answer.call(FILE, "selectors", lane), f"selectors({lane})", 2)
    if len(places) != 32:
        raise CheckFailed(f"32 lanes must load 32 different places; there are {len(places)}")
    if sorted(channels) != list(LANES):
        raise CheckFailed(f"32 lanes must store the 32 channels, each once; they store {channels}")
    if bad := [s for s in chosen if s & ~0x7777]:
        raise CheckFailed(f"a selector has four digits from 0 to 7; one is {bad[0]:#x}")
    tile = torch.arange(512).reshape(16, 32)
    low, high = ((tile // 256 if i else tile % 256).to(torch.uint8) for i in (0, 1))
    pieces = [answer.call(FILE, "turned_by_instructions", part).long() for part in (low, high)]
    turned = pieces[0] + 256 * pieces[1]
    right = tile.T[:, order]
    wrong = turned != right
    if wrong.any():
        channel, position = wrong.nonzero()[0].tolist()
        key, source = divmod(int(turned[channel, position]), 32)
        raise CheckFailed(
            f"{int(wrong.sum())} of 512 bytes are wrong: channel {channel}, position {position} must be key "
            f"{order[position]}; it is key {key} of channel {source}"
        )


@check("no bank conflicts, neither loading nor storing", points=1)
def test_banks(answer: Answer) -> None:
    for name, words in (("load_place", "load"), ("store_place", "store")):
        for matrix in range(4):
            rows = []
            for lane in range(8 * matrix, 8 * matrix + 8):
                value = answer.call(FILE, name, lane)
                # A row of 128 bytes keeps 16-byte chunk c at place c ^ (row % 8): places are banks.
                row, chunk = value if name == "load_place" else (value, 0)
                rows.append((chunk ^ row % 8) % 8)
            if len(set(rows)) < 8:
                raise CheckFailed(
                    f"the 8 rows that matrix {matrix} is to {words} lie in places {rows} of their 128 bytes: equal "
                    f"places are the same banks, one after the other. Which rows differ modulo 8? ({name})"
                )
