"""A warpgroup's instructions that move tiles: TMA between global and shared memory, ordinary loads and stores."""

from typing import TYPE_CHECKING

import numpy as np

from fa_reference.hopper.agent import Agent, Group, instruction
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.memory import DTYPE_BYTES, Buffer, GlobalTensor, round_to
from fa_reference.hopper.registers import ROWS, Fragment, Work
from fa_reference.hopper.rules import IllegalOperand

if TYPE_CHECKING:
    from fa_reference.hopper.sm import SM


class Copies(Agent):
    """The part of a warpgroup that copies."""

    def __init__(self, sm: "SM", name: str, registers: int) -> None:
        super().__init__(sm, name, registers)
        self.open_stores = Group()
        self.store_groups: list[Group] = []  # committed, not yet waited for

    # --- TMA

    @instruction
    async def tma_load(self, buffer: Buffer, source: GlobalTensor, row: int, mbarrier: Mbarrier) -> None:
        """cp.async.bulk.tensor, global to shared: rows row.. of `source`; its bytes complete on `mbarrier`.

        Rows outside the tensor become zeros. Returns at once; the tile is there when the mbarrier's phase completes.
        """
        await self.issue("TMA load", buffer.name, source=source.name, amount=buffer.bytes)
        self._check_box(buffer, source)
        buffer.source = source.name
        access = self.access(buffer, "TMA load", writes=True, generic=False, mbarrier=mbarrier)
        phase, where = mbarrier.phase, self.where(buffer.name)

        mbarrier.on_their_way += buffer.bytes

        def complete() -> None:
            buffer.data[:] = source.box(row, buffer.shape)
            mbarrier.on_their_way -= buffer.bytes
            mbarrier.complete_tx(buffer.bytes, {(access, "over")}, phase, **where)

        _, end = self.sm.units["TMA"].reserve(
            self._traffic(buffer, source), self, f"load {buffer.name}", self.iteration
        )
        self.sm.at(end + self._tma_latency(source), complete)

    @instruction
    async def tma_store(self, target: GlobalTensor, row: int, buffer: Buffer) -> None:
        """cp.async.bulk.tensor, shared to global: rows row.. of `target`; rows outside it are dropped."""
        await self.issue("TMA store", buffer.name)
        self._check_box(buffer, target)
        access = self.access(buffer, "TMA store", writes=False, generic=False)
        group = self.open_stores
        group.running += 1
        group.facts.add((access, "over"))

        def complete() -> None:
            target.put(row, buffer.data)
            group.one_done()

        _, end = self.sm.units["TMA"].reserve(
            self._traffic(buffer, target), self, f"store {buffer.name}", self.iteration
        )
        self.sm.at(end + self._tma_latency(target), complete)

    @instruction
    async def bulk_commit_group(self) -> None:
        """cp.async.bulk.commit_group: make a group of the TMA stores since the last one."""
        await self.issue("cp.async.bulk.commit_group")
        self.open_stores.committed = True
        self.store_groups.append(self.open_stores)
        self.open_stores = Group()

    @instruction
    async def bulk_wait_group(self, pending: int) -> None:
        """cp.async.bulk.wait_group: until at most the newest `pending` groups of TMA stores are not complete."""
        await self.issue("cp.async.bulk.wait_group", str(pending))
        await self.wait_groups(self.store_groups, pending, "TMA store")

    def _check_box(self, buffer: Buffer, tensor: GlobalTensor) -> None:
        if buffer.shape[1] != tensor.data.shape[1] or buffer.dtype != tensor.dtype or buffer.shape[0] > 256:
            columns = f"{tensor.data.shape[1]} columns of {tensor.dtype}"
            message = f"TMA between {buffer} and {tensor.name} ({columns}): columns, dtype, or more than 256 rows"
            raise IllegalOperand(message, **self.where(buffer.name))

    def _traffic(self, buffer: Buffer, tensor: GlobalTensor) -> float:
        """Bytes, as the TMA unit counts them: those of HBM take longer."""
        self.sm.units["smem"].count(buffer.bytes)
        timing = self.sm.timing
        return buffer.bytes * (timing.l2_bytes_per_clk / timing.hbm_bytes_per_clk if tensor.level == "HBM" else 1)

    def _tma_latency(self, tensor: GlobalTensor) -> float:
        timing = self.sm.timing
        return self.sm.luck.vary(timing.tma_hbm_latency if tensor.level == "HBM" else timing.tma_l2_latency)

    # --- ordinary loads and stores

    @instruction
    async def load_shared(self, buffer: Buffer) -> Fragment:
        """ld.shared / ldmatrix: a tile of 64 rows to registers."""
        return await self._load_shared("ld.shared", buffer, buffer.data)

    @instruction
    async def load_shared_transposed(self, buffer: Buffer, column: int) -> Fragment:
        """ldmatrix.trans: columns column .. column + 63 of a tile, as the 64 rows of one in registers.

        The hardware transposes units of 16 bits; for fp8 a byte permutation (prmt) then parts the two rows in a unit.
        """
        columns = buffer.data[:, column : column + ROWS]
        if columns.shape[1] != ROWS:
            message = f"ldmatrix.trans of columns {column} to {column + ROWS - 1} of {buffer}"
            raise IllegalOperand(message, **self.where(buffer.name))
        tile = await self._load_shared("ldmatrix.trans", buffer, columns.T)
        if DTYPE_BYTES[buffer.dtype] == 1:
            self.work.append(Work("ALU", 128 * tile.registers, "prmt", self.iteration))
        return tile

    async def _load_shared(self, what: str, buffer: Buffer, values: np.ndarray) -> Fragment:
        await self.issue(what, buffer.name)
        access = self.access(buffer, what, writes=False, generic=True)
        values = values.copy()
        size = values.size * DTYPE_BYTES[buffer.dtype]
        await self.sleep_until(self.sm.units["smem"].reserve(size, self, f"load {buffer.name}", self.iteration)[1])
        self.known.add((access, "over"))
        return Fragment(self, values, buffer.dtype)

    @instruction
    async def store_shared(self, buffer: Buffer, tile: Fragment, row: int = 0) -> None:
        """st.shared / stmatrix: a tile to rows row .. row + 63 of one in shared memory, through the generic proxy."""
        await self.issue("st.shared", buffer.name)
        if (row + ROWS > buffer.shape[0], tile.shape[1]) != (False, buffer.shape[1]):
            message = f"st.shared of {tile} to rows {row} to {row + ROWS - 1} of {buffer}"
            raise IllegalOperand(message, **self.where(buffer.name))
        access = self.access(buffer, "st.shared", writes=True, generic=True)
        buffer.data[row : row + ROWS] = round_to(tile.values, buffer.dtype)
        size = tile.shape[0] * tile.shape[1] * DTYPE_BYTES[buffer.dtype]
        await self.sleep_until(self.sm.units["smem"].reserve(size, self, f"store {buffer.name}", self.iteration)[1])
        self.known.add((access, "over"))

    @instruction
    async def store_global(self, target: GlobalTensor, row: int, tile: Fragment) -> None:
        """st.global: a tile to rows row.. of `target`; the kernel itself must leave out rows outside it."""
        await self.issue("st.global", target.name)
        target.put(row, tile.values)
