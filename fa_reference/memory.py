"""HBM and SRAM with a meter on the wire between them.

A GPU's SM computes on what lies on chip (shared memory and registers, "SRAM" in the papers); everything else lies in
HBM. Here an algorithm written in Python goes through a `Memory`, so that every byte it loads or stores is counted and
everything it keeps on chip must fit a budget. Numbers are real: tiles are torch tensors.

    memory = Memory(sram_bytes=100 * 1024)
    Q = memory.hbm("Q", q)                  # in HBM: no arithmetic
    Q_i = memory.load(Q, slice(0, 64))      # a tile on chip: counted
    S = Q_i @ K_j.T                         # on chip too: counts towards the budget until Python frees it
    memory.store(O, slice(0, 64), S @ V_j)
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


class OffChipAccess(RuntimeError):
    """Arithmetic on a tensor that lies in HBM."""


class SramOverflow(RuntimeError):
    """The tiles that are alive at once do not fit the SRAM budget."""


class Transfer(NamedTuple):
    """One load or store: rows start..stop of the tensor `name`."""

    action: str
    name: str
    start: int
    stop: int


def sram_budget(block_q: int, block_k: int, head_dim: int) -> int:
    """Bytes of SRAM that hold one step of a tiled attention written as plain torch expressions in float32.

    K_j, V_j (B_c, d); Q_i, O_i and three temporaries of their size (B_r, d); S, P and two temporaries (B_r, B_c);
    statistics of B_r rows.
    """
    return 4 * (2 * block_k * head_dim + 5 * block_q * head_dim + 4 * block_q * block_k + 16 * block_q)


class HbmTensor:
    """A tensor in HBM, (rows, columns) or (rows,): it has a shape and a dtype, and can only be loaded and stored."""

    def __init__(self, name: str, data: Tensor) -> None:
        self.name = name
        self.shape = tuple(data.shape)
        self.dtype = data.dtype
        self._data = data

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"HbmTensor({self.name}, shape={self.shape})"

    def __getitem__(self, index: object) -> None:
        raise OffChipAccess(f"{self.name}[...] reads HBM without being counted: use memory.load({self.name}, rows)")

    def __setitem__(self, index: object, value: object) -> None:
        raise OffChipAccess(f"{self.name}[...] = writes HBM without being counted: use memory.store")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
        raise OffChipAccess(_arithmetic(cls, args))


def _arithmetic(cls: type, args: tuple) -> str:
    name = next((a.name for a in args if isinstance(a, cls)), "a tensor")
    return f"arithmetic on {name}, which lies in HBM: load a tile of it first, with memory.load({name}, rows)"


def _refuse_arithmetic(self: HbmTensor, *others: object) -> None:
    raise OffChipAccess(_arithmetic(HbmTensor, (self,)))


for _operator in "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow neg".split():
    setattr(HbmTensor, f"__{_operator}__", _refuse_arithmetic)


class Tile(Tensor):
    """A tensor on chip. Whatever is computed from tiles is a tile, and lives in the same SRAM."""

    memory: "Memory"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        memory = next(m for m in map(_memory_of, _flatten((args, kwargs or {}))) if m is not None)
        result = super().__torch_function__(func, types, args, kwargs or {})
        for value in _flatten(result):
            if isinstance(value, Tile) and _memory_of(value) is None:
                memory._adopt(value)
        return result


def _memory_of(value: Any) -> "Memory | None":
    return value.__dict__.get("memory") if isinstance(value, Tile) else None


def _flatten(value: Any) -> list:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flatten(item)]
    return [value]


class Memory:
    """One SM's view of memory: counts every byte between HBM and SRAM and holds SRAM to `sram_bytes`.

    loaded, stored: bytes by tensor name; log: every transfer in order; peak_sram_bytes: the most that was ever alive
    on chip at once. A tile is alive while Python holds a reference to it (or to a view of it); views cost nothing.
    """

    def __init__(self, sram_bytes: int) -> None:
        self.sram_bytes = sram_bytes
        self.loaded: dict[str, int] = {}
        self.stored: dict[str, int] = {}
        self.log: list[Transfer] = []
        self.peak_sram_bytes = 0
        # storage address -> [bytes, number of live tiles that view it, shape]
        self._live: dict[int, list] = {}

    @property
    def traffic_bytes(self) -> int:
        """All bytes loaded and stored so far."""
        return sum(self.loaded.values()) + sum(self.stored.values())

    @property
    def sram_in_use(self) -> int:
        """Bytes of all live tiles."""
        return sum(size for size, _, _ in self._live.values())

    def hbm(self, name: str, data: Tensor) -> HbmTensor:
        """Put `data`, (rows, columns) or (rows,), in HBM under `name`; stores write through to `data` itself."""
        return HbmTensor(name, data)

    def load(self, source: HbmTensor, rows: slice) -> Tile:
        """Copy rows of an HBM tensor to SRAM; counted in `loaded`. IndexError for rows outside the tensor."""
        start, stop = self._rows(source, rows)
        tile = self._adopt(source._data[start:stop].clone().as_subclass(Tile))
        self._count("load", self.loaded, source, start, stop)
        return tile

    def store(self, target: HbmTensor, rows: slice, tile: Tensor) -> None:
        """Copy a tile to rows of an HBM tensor; counted in `stored`. ValueError if the shapes differ."""
        start, stop = self._rows(target, rows)
        wanted = (stop - start, *target.shape[1:])
        if tuple(tile.shape) != wanted:
            raise ValueError(f"store to {target.name}[{start}:{stop}] needs shape {wanted}, got {tuple(tile.shape)}")
        target._data[start:stop] = tile.as_subclass(Tensor).to(target.dtype)
        self._count("store", self.stored, target, start, stop)

    def full(self, shape: tuple[int, ...], value: float) -> Tile:
        """A float32 tile filled with `value`, made on chip: no HBM traffic."""
        return self._adopt(torch.full(shape, value, dtype=torch.float32).as_subclass(Tile))

    def zeros(self, shape: tuple[int, ...]) -> Tile:
        """A float32 tile of zeros, made on chip: no HBM traffic."""
        return self.full(shape, 0.0)

    def _rows(self, tensor: HbmTensor, rows: slice) -> tuple[int, int]:
        if not isinstance(tensor, HbmTensor):
            raise TypeError(f"expected a tensor in HBM (from memory.hbm), got a {type(tensor).__name__}")
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"rows of {tensor.name} must be slice(start, stop), got {rows!r}")
        start = 0 if rows.start is None else rows.start
        stop = len(tensor) if rows.stop is None else rows.stop
        if not 0 <= start <= stop <= len(tensor):
            raise IndexError(
                f"rows {start}:{stop} of {tensor.name}, which has {len(tensor)} rows: the last block may be shorter"
            )
        return start, stop

    def _count(self, action: str, counter: dict[str, int], tensor: HbmTensor, start: int, stop: int) -> None:
        row_bytes = tensor._data.element_size() * tensor._data[:1].numel() if len(tensor) else 0
        counter[tensor.name] = counter.get(tensor.name, 0) + (stop - start) * row_bytes
        self.log.append(Transfer(action, tensor.name, start, stop))

    def _adopt(self, tile: Tile) -> Tile:
        with torch._C.DisableTorchFunctionSubclass():
            storage = tile.untyped_storage()
            address, size, shape = storage.data_ptr(), storage.nbytes(), tuple(tile.shape)
        tile.memory = self
        entry = self._live.setdefault(address, [size, 0, shape])
        entry[1] += 1
        weakref.finalize(tile, self._release, address)
        in_use = self.sram_in_use
        self.peak_sram_bytes = max(self.peak_sram_bytes, in_use)
        if in_use > self.sram_bytes:
            shapes = ", ".join(str(shape) for _, _, shape in self._live.values())
            raise SramOverflow(
                f"{in_use} bytes alive in SRAM, which holds {self.sram_bytes}. Alive now: tiles of shape {shapes}. "
                "Keep fewer tiles (del what is no longer needed) or smaller blocks."
            )
        return tile

    def _release(self, address: int) -> None:
        entry = self._live[address]
        entry[1] -= 1
        if entry[1] == 0:
            del self._live[address]
