"""Rings of tiles and the producer that fills them: the answer to chapter 7's schedule, given from chapter 8 on.

Write chapter 7's schedule.py before you read on."""

from dataclasses import dataclass

from fa_reference.hopper.attention import AttentionBlock
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.given import PRODUCER_REGISTERS
from fa_reference.hopper.memory import Buffer, GlobalTensor
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.sm import SM
from fa_reference.hopper.warpgroup import Warpgroup


@dataclass(frozen=True)
class Ring:
    """Slots for tiles in shared memory, each with a full barrier (one arrival, and bytes) and an empty barrier.

    Tile j goes to slot j % slots, in round j // slots: its full barrier's phase is the round, and so is the phase
    of its empty barrier that its release completes.
    """

    source: GlobalTensor
    tiles: list[Buffer]
    full: list[Mbarrier]
    empty: list[Mbarrier]

    @classmethod
    def make(cls, sm: SM, source: GlobalTensor, rows: int, stages: int, consumers: int) -> "Ring":
        """Allocate; consumers: how many warpgroups release each tile."""
        name, shape, each = source.name, (rows, source.data.shape[1]), range(stages)
        return cls(
            source,
            [sm.smem(f"{name}[{s}]", shape, source.dtype) for s in each],
            [sm.mbarrier(f"{name}_full[{s}]", 1) for s in each],
            [sm.mbarrier(f"{name}_empty[{s}]", consumers) for s in each],
        )

    def position(self, j: int) -> tuple[int, int]:
        """(slot, parity of the round) of tile j."""
        return j % len(self.tiles), j // len(self.tiles) % 2

    async def load(self, wg: Warpgroup, j: int) -> None:
        """Producer: wait until tile j's slot is free (the round before was released), then load."""
        s, parity = self.position(j)
        await wg.mbarrier_wait(self.empty[s], parity ^ 1)
        await wg.mbarrier_arrive_expect_tx(self.full[s], self.tiles[s].bytes)
        await wg.tma_load(self.tiles[s], self.source, j * self.tiles[s].shape[0], self.full[s])

    async def wait(self, wg: Warpgroup, j: int) -> Buffer:
        """Consumer: tile j, once it is there."""
        s, parity = self.position(j)
        await wg.mbarrier_wait(self.full[s], parity)
        return self.tiles[s]

    async def release(self, wg: Warpgroup, j: int) -> None:
        """Consumer: give the slot of tile j back, as far as this warpgroup is concerned."""
        await wg.mbarrier_arrive(self.empty[self.position(j)[0]])


@dataclass(frozen=True)
class Tiles:
    """Shared memory of a block: a Q tile for every consumer, and the two rings."""

    Q: list[Buffer]
    Q_full: Mbarrier
    K: Ring
    V: Ring

    @classmethod
    def make(cls, sm: SM, block: AttentionBlock, stages: int) -> "Tiles":
        """Allocate."""
        return cls(
            [sm.smem(f"Q[{w}]", (ROWS, block.head_dim), block.dtype) for w in range(block.consumers)],
            sm.mbarrier("Q_full", 1),
            Ring.make(sm, block.K, block.block_k, stages, block.consumers),
            Ring.make(sm, block.V, block.block_k, stages, block.consumers),
        )


async def produce(wg: Warpgroup, block: AttentionBlock, tiles: Tiles) -> None:
    """The producer warpgroup: Q once, then K_j and V_j for every key block j, as slots become free."""
    await wg.setmaxnreg_dec(PRODUCER_REGISTERS[block.consumers])
    await load_queries(wg, block, tiles.Q, tiles.Q_full)
    for j in wg.loop(range(block.key_blocks)):
        await tiles.K.load(wg, j)
        await tiles.V.load(wg, j)


async def load_queries(wg: Warpgroup, block: AttentionBlock, tiles: list[Buffer], full: Mbarrier) -> None:
    """Start to load the Q tiles of all consumers, on one phase of `full`."""
    await wg.mbarrier_arrive_expect_tx(full, sum(Q.bytes for Q in tiles))
    for w, Q in enumerate(tiles):
        await wg.tma_load(Q, block.Q, block.row + ROWS * w, full)
