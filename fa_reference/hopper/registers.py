"""Tiles in the registers of one warpgroup, and arithmetic on them.

Arithmetic is written as in numpy and needs no `await`: it computes at once and leaves a note of the work, for which the
warpgroup's next instruction waits. A tile has 64 rows, spread over the 128 threads as the wgmma accumulator is: 64 x N
values of float32 are N / 2 registers a thread. A row statistic (64 x 1) takes 2: the four threads of a row all keep it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np

from fa_reference.hopper.memory import DTYPE_BYTES, round_to
from fa_reference.hopper.rules import IllegalOperand

if TYPE_CHECKING:
    from fa_reference.hopper.agent import Agent, Group

ROWS = 64
Operand = Union["Fragment", float]


class Work(NamedTuple):
    """Arithmetic that a warpgroup has yet to spend time on: `amount` values on `unit`: "FP32", "ALU" (comparisons),
    "exp" or "convert"."""

    unit: str
    amount: int
    name: str
    iteration: int | None  # of the loop, when it was written down
    reduces: bool = False  # its result exists only when all of it is done, and after a reduction over the quad
    in_place: bool = False  # it changes a tile that the work before it does not use
    slower: float = 1.0  # clocks of one of its instructions, in those of the unit's usual ones


class Fragment:
    """A tile of 64 rows in registers, computed in float32; `dtype` says what it was rounded to."""

    def __init__(self, wg: "Agent", values: np.ndarray, dtype: str = "float32") -> None:
        if values.ndim != 2 or values.shape[0] != ROWS:
            raise IllegalOperand(f"a tile in registers has {ROWS} rows, this one is {values.shape}", **wg.where())
        self.wg, self._values, self.dtype = wg, values, dtype
        columns = values.shape[1]
        # 32-bit registers that each of the 128 threads holds
        self.registers = 2 if columns == 1 else -(-columns * DTYPE_BYTES[dtype] // 8)
        self.in_flight: Group | None = None  # the wgmma group that uses these registers
        self.touched = wg.fences  # how many wgmma.fence came before the last access by another instruction
        wg.fragments.add(self)

    @property
    def shape(self) -> tuple[int, int]:
        """(64, columns)."""
        return self._values.shape

    @property
    def values(self) -> np.ndarray:
        """The numbers. Reading or writing them is an access to the registers, and is checked as such."""
        self.wg.check_registers_free(self)
        self.touched = self.wg.fences
        return self._values

    def __repr__(self) -> str:
        return f"Fragment({self.shape[0]} x {self.shape[1]} {self.dtype})"

    def __add__(self, other: Operand) -> "Fragment":
        return _compute(np.add, self, other)

    def __sub__(self, other: Operand) -> "Fragment":
        return _compute(np.subtract, self, other)

    def __mul__(self, other: Operand) -> "Fragment":
        return _compute(np.multiply, self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Fragment":
        """Free: every instruction can negate an operand."""
        return Fragment(self.wg, -self.values)

    def __imul__(self, other: Operand) -> "Fragment":
        """In the same registers, as the rescaling of an accumulator must be."""
        self.values[:] = _compute(np.multiply, self, other, in_place=True)._values
        return self

    def row_max(self) -> "Fragment":
        """Largest value of each row, (64, 1): over a thread's own values, then over the quad."""
        self.wg.spend("ALU", self, "max", reduces=True)
        return Fragment(self.wg, self.values.max(axis=1, keepdims=True))

    def row_sum(self) -> "Fragment":
        """Sum of each row, (64, 1). Kept per thread in a kernel, reduced over the quad once at the end: not counted."""
        self.wg.spend("FP32", self, "sum")
        return Fragment(self.wg, self.values.sum(axis=1, keepdims=True, dtype=np.float32))

    def where(self, keep: np.ndarray, otherwise: float) -> "Fragment":
        """The value where `keep` (bool, broadcast to the tile's shape), else a constant."""
        return _compute(lambda x: np.where(keep, x, np.float32(otherwise)), self, unit="ALU", name="select")

    def finite_or(self, otherwise: float) -> "Fragment":
        """A constant in place of infinities."""
        return _compute(lambda x: np.where(np.isinf(x), np.float32(otherwise), x), self, unit="ALU", name="select")

    def to(self, dtype: str) -> "Fragment":
        """Rounded to "float16", "bfloat16" or "float8_e4m3fn" and packed: an A fragment for wgmma.

        The time for it is spent when no wgmma reads an A fragment of this warpgroup any more: kernels have one array
        for P. (The numbers are there at once, in registers of their own.)
        """
        self.wg.spend_on_rounding(self, dtype)
        return Fragment(self.wg, round_to(self.values, dtype), dtype)


def _compute(
    function: Callable, *operands: Operand, unit: str = "FP32", name: str = "fma", in_place: bool = False
) -> Fragment:
    tiles = [x for x in operands if isinstance(x, Fragment)]
    if any(x.wg is not tiles[0].wg for x in tiles):
        raise IllegalOperand("a warpgroup cannot touch the registers of another", **tiles[0].wg.where())
    values = [x.values if isinstance(x, Fragment) else np.float32(x) for x in operands]
    with np.errstate(all="ignore"):  # a kernel may well compute NaN: the judge of its result will say so
        result = function(*values).astype(np.float32)
    fragment = Fragment(tiles[0].wg, result)
    fragment.wg.spend(unit, fragment, name, in_place=in_place)
    return fragment


def fma(a: Operand, b: Operand, c: Operand) -> Fragment:
    """a * b + c: one instruction per value."""
    return _compute(lambda a, b, c: a * b + c, a, b, c)


def maximum(a: Operand, b: Operand) -> Fragment:
    """The larger one."""
    return _compute(np.maximum, a, b, unit="ALU", name="max")


def exp2(x: Fragment) -> Fragment:
    """2^x: ex2.approx on the special-function unit, 16 a clock."""
    return _compute(np.exp2, x, unit="exp", name="exp2")


def log2(x: Fragment) -> Fragment:
    """log2(x): lg2.approx, on the same unit."""
    return _compute(np.log2, x, unit="exp", name="log2")


def reciprocal(x: Fragment) -> Fragment:
    """1 / x: rcp.approx, on the same unit."""
    return _compute(np.reciprocal, x, unit="exp", name="rcp")
