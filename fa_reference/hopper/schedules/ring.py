"""What the warp-specialised schedules share: rings of K and V tiles, the producer that fills them, the epilogue."""

from dataclasses import dataclass

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.memory import Buffer, GlobalTensor
from fa_reference.hopper.registers import ROWS, Fragment
from fa_reference.hopper.sm import SM
from fa_reference.hopper.warpgroup import Warpgroup

# Registers per thread after setmaxnreg, by the number of consumers: together at most what the block got at launch.
PRODUCER_REGISTERS = {1: 24, 2: 24, 3: 32}
CONSUMER_REGISTERS = {1: 256, 2: 240, 3: 160}


@dataclass(frozen=True)
class Ring:
    """`stages` tiles in shared memory, each with a full barrier (one arrival, and bytes) and an empty barrier.

    Tile j goes to stage j % stages, in round j // stages: its full barrier's phase is the round, and so is the phase
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

    def stage(self, j: int) -> tuple[int, int]:
        """(stage, parity of the round) of tile j."""
        return j % len(self.tiles), j // len(self.tiles) % 2

    async def load(self, wg: Warpgroup, j: int) -> None:
        """Producer: wait until tile j's stage is free (the round before was released), then load."""
        s, parity = self.stage(j)
        await wg.mbarrier_wait(self.empty[s], parity ^ 1)
        await wg.mbarrier_arrive_expect_tx(self.full[s], self.tiles[s].bytes)
        await wg.tma_load(self.tiles[s], self.source, j * self.tiles[s].shape[0], self.full[s])

    async def wait(self, wg: Warpgroup, j: int) -> Buffer:
        """Consumer: tile j, once it is there."""
        s, parity = self.stage(j)
        await wg.mbarrier_wait(self.full[s], parity)
        return self.tiles[s]

    async def release(self, wg: Warpgroup, j: int) -> None:
        """Consumer: this warpgroup has read tile j."""
        await wg.mbarrier_arrive(self.empty[self.stage(j)[0]])


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
    """The producer warpgroup: Q once, then tiles as stages become free, each K_(j+1) before V_j.

    A consumer may need K_(j+1) before it can release V_(j-1), so waiting for V_j's stage first would hold it up.
    """
    await wg.setmaxnreg_dec(PRODUCER_REGISTERS[block.consumers])
    await wg.mbarrier_arrive_expect_tx(tiles.Q_full, sum(Q.bytes for Q in tiles.Q))
    for w, Q in enumerate(tiles.Q):
        await wg.tma_load(Q, block.Q, block.row + ROWS * w, tiles.Q_full)
    for j in wg.loop(range(block.key_blocks)):
        if j == 0:
            await tiles.K.load(wg, 0)
        if j + 1 < block.key_blocks:
            await tiles.K.load(wg, j + 1)
        await tiles.V.load(wg, j)


async def epilogue(
    wg: Warpgroup, w: int, block: AttentionBlock, Q: Buffer, O: Fragment, softmax: OnlineSoftmax
) -> None:
    """Normalise and store O (through this consumer's Q tile, which nobody reads any more) and the log-sum-exp."""
    row = block.row + ROWS * w
    O, L = softmax.finish(O)
    await wg.store_global(block.L, row, L)
    await wg.store_shared(Q, O)
    await wg.fence_proxy_async()
    await wg.tma_store(block.O, row, Q)
    await wg.bulk_commit_group()
    await wg.bulk_wait_group(0)
