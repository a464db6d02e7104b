"""What the schedules from chapter 7 on are given: registers for each role, and the epilogue."""

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.memory import Buffer
from fa_reference.hopper.registers import ROWS, Fragment
from fa_reference.hopper.warpgroup import Warpgroup

# Registers per thread after setmaxnreg, by the number of consumers: together at most what the block got at launch.
PRODUCER_REGISTERS = {1: 24, 2: 24, 3: 32}
CONSUMER_REGISTERS = {1: 256, 2: 240, 3: 160}


async def epilogue(
    wg: Warpgroup, w: int, block: AttentionBlock, tile: Buffer, O: Fragment, softmax: OnlineSoftmax
) -> None:
    """Normalise and store O and the log-sum-exp of consumer w; O goes through a tile of shared memory that nobody reads
    any more, such as the consumer's Q."""
    row = block.row + ROWS * w
    O, L = softmax.finish(O)
    await wg.store_global(block.L, row, L)
    await wg.store_shared(tile, O)
    await wg.fence_proxy_async()
    await wg.tma_store(block.O, row, tile)
    await wg.bulk_commit_group()
    await wg.bulk_wait_group(0)
