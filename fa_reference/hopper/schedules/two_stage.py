"""Two stages (Algorithm 2 of the FlashAttention-3 paper): Q K_j^T and P_(j-1) V_(j-1) are issued together, and the
softmax of block j runs under the second. With pingpong, the consumers also take turns to issue."""

from functools import partial

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.schedules.ring import CONSUMER_REGISTERS, Tiles, epilogue, produce
from fa_reference.hopper.sm import SM, Role

CONSUMERS = 2


def kernel(sm: SM, block: AttentionBlock, stages: int = 2, pingpong: bool = True) -> dict[str, Role]:
    """The roles of one block."""
    tiles = Tiles.make(sm, block, stages)

    async def my_turn(wg, w):
        if pingpong:
            await wg.bar_sync(1 + w, 256)

    async def your_turn(wg, w, j):
        after_all_turns = w == block.consumers - 1 and j == block.key_blocks - 1
        if pingpong and not after_all_turns:
            await wg.bar_arrive(1 + (w + 1) % block.consumers, 256)

    async def issue_scores(wg, w, j):
        S = wg.accumulator(block.block_k)
        K = await tiles.K.wait(wg, j)
        await wg.wgmma_fence()
        await my_turn(wg, w)
        await wg.wgmma(S, tiles.Q[w], K, scale_d=False)
        await wg.wgmma_commit_group()
        return S

    async def issue_output(wg, O, P, j):
        V = await tiles.V.wait(wg, j)
        await wg.wgmma_fence()
        await wg.wgmma(O, P, V, trans_b=True)
        await wg.wgmma_commit_group()

    async def consumer(wg, w):
        await wg.setmaxnreg_inc(CONSUMER_REGISTERS[block.consumers])
        O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
        last = block.key_blocks - 1
        await wg.mbarrier_wait(tiles.Q_full, 0)
        if last >= 0:
            if w == block.consumers - 1:
                await your_turn(wg, w, -1)  # consumer 0 begins
            S = await issue_scores(wg, w, 0)
            await your_turn(wg, w, 0)
            await wg.wgmma_wait_group(0)
            await tiles.K.release(wg, 0)
            P, rescale = softmax.step(block.mask(S, w, 0))
            del S
            for j in wg.loop(range(1, block.key_blocks)):
                S = await issue_scores(wg, w, j)
                await issue_output(wg, O, P, j - 1)
                await your_turn(wg, w, j)
                await wg.wgmma_wait_group(1)  # S is there, O still in flight
                await tiles.K.release(wg, j)
                P_next, rescale = softmax.step(block.mask(S, w, j))
                del S
                await wg.wgmma_wait_group(0)
                await tiles.V.release(wg, j - 1)
                P = P_next
                O *= rescale
            await issue_output(wg, O, P, last)
            await wg.wgmma_wait_group(0)
        await epilogue(wg, w, block, tiles.Q[w], O, softmax)

    roles = {f"consumer {w}": partial(consumer, w=w) for w in range(block.consumers)}
    return {"producer": partial(produce, block=block, tiles=tiles)} | roles
