"""Warp specialisation (Algorithm 1 of the FlashAttention-3 paper): a producer warpgroup loads, consumers compute."""

from functools import partial

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.schedules.ring import CONSUMER_REGISTERS, Tiles, epilogue, produce
from fa_reference.hopper.sm import SM, Role

CONSUMERS = 2


def kernel(sm: SM, block: AttentionBlock, stages: int = 2) -> dict[str, Role]:
    """The roles of one block."""
    tiles = Tiles.make(sm, block, stages)

    async def consumer(wg, w):
        await wg.setmaxnreg_inc(CONSUMER_REGISTERS[block.consumers])
        O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
        await wg.mbarrier_wait(tiles.Q_full, 0)
        for j in wg.loop(range(block.key_blocks)):
            S = wg.accumulator(block.block_k)
            K = await tiles.K.wait(wg, j)
            await wg.wgmma_fence()
            await wg.wgmma(S, tiles.Q[w], K, scale_d=False)
            await wg.wgmma_commit_group()
            await wg.wgmma_wait_group(0)
            await tiles.K.release(wg, j)
            P, rescale = softmax.step(block.mask(S, w, j))
            del S
            O *= rescale
            V = await tiles.V.wait(wg, j)
            await wg.wgmma_fence()
            await wg.wgmma(O, P, V, trans_b=True)
            await wg.wgmma_commit_group()
            await wg.wgmma_wait_group(0)
            await tiles.V.release(wg, j)
        await epilogue(wg, w, block, tiles.Q[w], O, softmax)

    roles = {f"consumer {w}": partial(consumer, w=w) for w in range(block.consumers)}
    return {"producer": partial(produce, block=block, tiles=tiles)} | roles
