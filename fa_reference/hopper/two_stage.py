"""A consumer in two stages: the answer to chapter 9's schedule, given in chapter 10."""

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.given import epilogue
from fa_reference.hopper.memory import Buffer
from fa_reference.hopper.registers import Fragment
from fa_reference.hopper.ring import Tiles
from fa_reference.hopper.warpgroup import Warpgroup


async def consume(
    wg: Warpgroup, block: AttentionBlock, tiles: Tiles, O_tile: Buffer, w: int, trans_b: bool = True
) -> None:
    """Consumer w, after setmaxnreg: two stages, in turns. O leaves through O_tile; trans_b: V is stored (keys, d)."""
    O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
    last, consumers = block.key_blocks - 1, block.consumers

    async def hand_on() -> None:
        await wg.bar_arrive(1 + (w + 1) % consumers, 128 * 2)

    async def scores(S: Fragment, j: int) -> None:
        K = await tiles.K.wait(wg, j)
        await wg.wgmma_fence()
        await wg.wgmma(S, tiles.Q[w], K, scale_d=False)
        await wg.wgmma_commit_group()

    async def output(P: Fragment, j: int) -> None:
        V = await tiles.V.wait(wg, j)
        await wg.wgmma_fence()
        await wg.wgmma(O, P, V, trans_b=trans_b)
        await wg.wgmma_commit_group()

    await wg.mbarrier_wait(tiles.Q_full, 0)
    if w == consumers - 1 and last > 0:
        await hand_on()
    if last >= 0:
        S = wg.accumulator(block.block_k)
        await scores(S, 0)
        await wg.wgmma_wait_group(0)
        await tiles.K.release(wg, 0)
        P, rescale = softmax.step(block.mask(S, w, 0))
    for j in wg.loop(range(1, last + 1)):
        await wg.bar_sync(1 + w, 128 * 2)
        S = wg.accumulator(block.block_k)
        await scores(S, j)
        await output(P, j - 1)
        if (w, j) != (consumers - 1, last):
            await hand_on()
        await wg.wgmma_wait_group(1)
        await tiles.K.release(wg, j)
        P_next, rescale = softmax.step(block.mask(S, w, j))
        del S
        await wg.wgmma_wait_group(0)
        await tiles.V.release(wg, j - 1)
        P = P_next
        O *= rescale
    if last >= 0:
        await output(P, last)
        await wg.wgmma_wait_group(0)
    await epilogue(wg, w, block, O_tile, O, softmax)
