"""Pingpong: the consumers take turns at the tensor cores, so that one's softmax runs under the other's products.

A turn is P_j V_j and then Q K_(j+1)^T. The turn of consumer w is named barrier 1 + w: it syncs there, its predecessor
arrives there.
"""

from functools import partial

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.schedules.ring import CONSUMER_REGISTERS, Tiles, epilogue, produce
from fa_reference.hopper.sm import SM, Role

CONSUMERS = 2


def kernel(sm: SM, block: AttentionBlock, stages: int = 2) -> dict[str, Role]:
    """The roles of one block."""
    tiles = Tiles.make(sm, block, stages)

    async def my_turn(wg, w):
        await wg.bar_sync(1 + w, 256)

    async def your_turn(wg, w):
        await wg.bar_arrive(1 + (w + 1) % block.consumers, 256)

    async def consumer(wg, w):
        await wg.setmaxnreg_inc(CONSUMER_REGISTERS[block.consumers])
        O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
        await wg.mbarrier_wait(tiles.Q_full, 0)
        if w == block.consumers - 1:
            await your_turn(wg, w)  # consumer 0 begins
        await my_turn(wg, w)
        for j in wg.loop(range(block.key_blocks)):
            S = wg.accumulator(block.block_k)
            K = await tiles.K.wait(wg, j)
            await wg.wgmma_fence()
            await wg.wgmma(S, tiles.Q[w], K, scale_d=False)
            await wg.wgmma_commit_group()
            await your_turn(wg, w)
            await wg.wgmma_wait_group(0)
            await tiles.K.release(wg, j)
            P, rescale = softmax.step(block.mask(S, w, j))
            del S
            O *= rescale
            V = await tiles.V.wait(wg, j)
            await wg.wgmma_fence()
            await my_turn(wg, w)
            await wg.wgmma(O, P, V, trans_b=True)
            await wg.wgmma_commit_group()
            await wg.wgmma_wait_group(0)
            await tiles.V.release(wg, j)
        if w < block.consumers - 1:
            await your_turn(wg, w)  # after the last consumer's last turn nobody waits for one
        await epilogue(wg, w, block, tiles.Q[w], O, softmax)

    roles = {f"consumer {w}": partial(consumer, w=w) for w in range(block.consumers)}
    return {"producer": partial(produce, block=block, tiles=tiles)} | roles
