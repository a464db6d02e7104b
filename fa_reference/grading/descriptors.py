"""Which parts of shared memory wgmma is told to read: the descriptors of a kernel's products, out of its machine code.

A descriptor is a number in uniform registers, made once and then moved on by constants. Following those additions gives
what the steps of a product read, relative to each other. A kernel that makes its descriptors in another way is not
judged here: the right numbers tell.
"""

import itertools
import re
from collections.abc import Sequence

from fa_reference.kernels.sass import opcode

BYTES = 16  # that a 1 in a descriptor's address stands for
_PRODUCT = re.compile(r"HGMMA\S* (R\d+), (?:(R\d+), )?gdesc\[UR(\d+)\]")
_WRITES = re.compile(r"(?:@!?U?P\w+ )?[A-Z]\S* (?:U?P\w+, )*UR(\d+)\b(?:, (.*))?")
_MOVE = re.compile(r"(?:UR(\d+)|URZ)$")
_ADD = re.compile(r"UR(\d+), (-?0x[0-9a-f]+), URZ$")

Place = tuple[object, int]  # what a register was at some moment, and what has been added since


def steps(instructions: Sequence[str]) -> list[list[int] | None]:
    """For every operand in shared memory of every product, in program order: bytes from its lowest step to each.

    Sorted, as steps may come in any order. None for an operand whose descriptors are not one moved on by constants.
    """
    fresh = itertools.count()
    registers: dict[int, Place] = {}
    products: list[tuple[str, list[list[Place]]]] = []  # accumulator, and the places of A (unless in registers) and B
    for line in instructions:
        if found := _PRODUCT.match(line):
            accumulator, in_registers, first = found[1], found[2], int(found[3])
            read = [first + 2] if in_registers else [first, first + 2]
            if not products or products[-1][0] != accumulator or len(products[-1][1]) != len(read):
                products.append((accumulator, [[] for _ in read]))
            for places, register in zip(products[-1][1], read, strict=True):
                places.append(registers.get(register, (next(fresh), 0)))
        elif found := _WRITES.match(line):
            _write(registers, line, int(found[1]), found[2] or "", fresh)
    return [_relative(places) for _, operands in products for places in operands]


def _write(registers: dict[int, Place], line: str, to: int, operands: str, fresh: "itertools.count[int]") -> None:
    """What an instruction that writes uniform register `to` (and, with .64, the one behind it) leaves there."""
    name, place = opcode(line), None
    if not line.startswith("@"):
        if name == "UMOV" and (found := _MOVE.match(operands)) and found[1]:
            place = registers.setdefault(int(found[1]), (next(fresh), 0))
        elif name in ("UIADD3", "UIADD3.64") and (found := _ADD.match(operands)):
            base, added = registers.setdefault(int(found[1]), (next(fresh), 0))
            place = base, added + int(found[2], 16)
    registers[to] = place or (next(fresh), 0)
    if ".64" in name:
        registers[to + 1] = (next(fresh), 0)


def _relative(places: Sequence[Place]) -> list[int] | None:
    if len({base for base, _ in places}) != 1:
        return None
    lowest = min(added for _, added in places)
    return sorted(BYTES * (added - lowest) for _, added in places)
