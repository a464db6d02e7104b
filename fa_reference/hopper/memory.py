"""Global memory, shared memory, and who knows what about it.

A warpgroup may rely on an access to shared memory being over only if something told it so: its own program order, a
`wait_group`, or a barrier at which somebody arrived who knew. The model keeps, for every warpgroup and barrier, the set
of such facts. An access that conflicts with one not known to be over is an error even in a run in which, by luck, it
was over: this is happens-before race detection, written as sets instead of vector clocks.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fa_reference.hopper.rules import SharedMemoryOverBudget

SHARED_MEMORY_BYTES = 227 * 1024
FP8 = "float8_e4m3fn"
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, FP8: 1}
ALIGNMENT = 1024  # of a tile, so that the 128-byte swizzle pattern starts with it


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` rounded to `dtype` (nearest, ties to even; fp8 saturates), kept in a float32 array."""
    if dtype == "float32":
        return values.astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if dtype == FP8:
        tensor = tensor.clamp(-448, 448)
    return tensor.to(getattr(torch, dtype)).float().numpy()


class GlobalTensor:
    """A matrix (rows, columns) in global memory, as a TMA tensor map describes it: `level` is where TMA finds it."""

    def __init__(self, name: str, data: np.ndarray, dtype: str, level: str = "L2") -> None:
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype of {name} is {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
        if level not in ("L2", "HBM"):
            raise ValueError(f"level of {name} is {level!r}; allowed: L2, HBM")
        self.name, self.dtype, self.level = name, dtype, level
        self.data = np.asarray(data, dtype=np.float32)

    def box(self, row: int, shape: tuple[int, int]) -> np.ndarray:
        """Rows row.. of the tensor; rows outside it are zeros, as TMA fills them."""
        tile = np.zeros(shape, np.float32)
        inside = self.data[row : row + shape[0]]
        tile[: len(inside)] = inside
        return tile

    def put(self, row: int, tile: np.ndarray) -> None:
        """Store a tile at rows row..; rows outside the tensor are dropped."""
        target = self.data[row : row + len(tile)]
        target[:] = round_to(tile[: len(target)], self.dtype)


@dataclass(eq=False)
class Access:
    """One read or write of a shared-memory buffer by an instruction."""

    what: str  # "TMA load", "wgmma", "st.shared", ...
    where: dict  # warpgroup, iteration and buffer, as exceptions name them
    writes: bool
    generic: bool  # an ordinary load or store; the others go through the async proxy
    mbarrier: object = None  # on which its completion is signalled, if it is a TMA load
    old_news: str = ""  # a reason to think that it came too early
    current: bool = True  # False once the buffer was safely overwritten: then nobody needs to know about it any more

    def __str__(self) -> str:
        return f"{self.what} by {self.where['warpgroup']}, {self.where['place']}"


# (access, "over") or, for an ordinary store, (access, "fenced"): made visible to the async proxy.
Fact = tuple[Access, str]


def still_needed(facts: set[Fact]) -> set[Fact]:
    """The facts about what buffers hold now; the others would only make the sets grow."""
    return {fact for fact in facts if fact[0].current}


class Buffer:
    """A tile in shared memory. It holds NaN until something is written to it."""

    def __init__(self, name: str, shape: tuple[int, int], dtype: str) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.bytes = shape[0] * shape[1] * DTYPE_BYTES[dtype]
        self.data = np.full(shape, np.nan, np.float32)
        self.source = ""  # the tensor from which TMA last loaded it
        self.last_write: Access | None = None
        self.reads: list[Access] = []

    def conflicts(self, writes: bool, known: set[Fact]) -> list[Access]:
        """Accesses that must be over before a new one, and are not known to be."""
        before = [self.last_write] if self.last_write else []
        return [a for a in before + (self.reads if writes else []) if (a, "over") not in known]

    def unfenced(self, known: set[Fact]) -> bool:
        """True if the async proxy may not see what the buffer holds: ordinary stores and no proxy fence after them."""
        write = self.last_write
        return write is not None and write.generic and (write, "fenced") not in known

    def add(self, access: Access) -> None:
        """Note an access that has been checked."""
        if not access.writes:
            self.reads.append(access)
            return
        for old in [self.last_write, *self.reads]:
            if old:
                old.current = False
        self.last_write, self.reads = access, []

    def __repr__(self) -> str:
        return f"Buffer({self.name}, {self.shape[0]} x {self.shape[1]} {self.dtype})"


class SharedMemory:
    """What one block has allocated."""

    def __init__(self) -> None:
        self.used = 0
        self.buffers: list[Buffer] = []

    def allocate(self, name: str, shape: tuple[int, int], dtype: str) -> Buffer:
        """A tile, aligned to 1024 bytes."""
        buffer = Buffer(name, shape, dtype)
        self.take(-(-buffer.bytes // ALIGNMENT) * ALIGNMENT, name)
        self.buffers.append(buffer)
        return buffer

    def take(self, size: int, name: str) -> None:
        """Reserve `size` bytes; SharedMemoryOverBudget if the block has no more."""
        self.used += size
        if self.used > SHARED_MEMORY_BYTES:
            held = ", ".join(f"{b.name} {b.bytes}" for b in self.buffers)
            raise SharedMemoryOverBudget(
                f"{name} needs {size} bytes, which makes {self.used} in all. Allocated so far: {held or 'nothing'}",
                buffer=name,
            )
