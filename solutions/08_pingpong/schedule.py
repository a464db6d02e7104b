"""Pingpong: the consumers take turns at the tensor cores, so that one's softmax runs under the other's products.

The schedule of pingpong.cu, on the model of an SM. A turn is O += P_j V_j and then S = Q K_(j+1)^T: what a consumer has
to multiply between two softmaxes. Rings, producer and epilogue are those of chapter 7 (fa_reference/hopper/ring.py):
`K = await tiles.K.wait(wg, j)` is K_j once it is there, `await tiles.K.release(wg, j)` gives its slot back.
"""

from functools import partial

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.given import CONSUMER_REGISTERS, epilogue
from fa_reference.hopper.ring import Tiles, produce
from fa_reference.hopper.sm import SM, Role
from fa_reference.hopper.warpgroup import Warpgroup

CONSUMERS = 2


def kernel(sm: SM, block: AttentionBlock, stages: int = 2) -> dict[str, Role]:
    """Declare shared memory and return the roles: a producer, and consumers with 64 queries each."""
    tiles = Tiles.make(sm, block, stages)
    roles = {f"consumer {w}": partial(consumer, block=block, tiles=tiles, w=w) for w in range(block.consumers)}
    return {"producer": partial(produce, block=block, tiles=tiles)} | roles


async def my_turn(wg: Warpgroup, w: int) -> None:
    """Wait until it is consumer w's turn: until its predecessor has handed the turn on.

    The turn of consumer w is named barrier 1 + w, of 256 threads: the 128 that wait for it and the 128 that hand it on.
    """
    # BEGIN SOLUTION: bar_sync at the own barrier
    await wg.bar_sync(1 + w, 256)
    # END SOLUTION


async def your_turn(wg: Warpgroup, w: int, consumers: int) -> None:
    """Hand the turn from consumer w on to the next one (after the last comes consumer 0), without waiting."""
    # BEGIN SOLUTION: bar_arrive at the barrier of the next
    await wg.bar_arrive(1 + (w + 1) % consumers, 256)
    # END SOLUTION


async def consumer(wg: Warpgroup, block: AttentionBlock, tiles: Tiles, w: int) -> None:
    """Consumer w: the loop of chapter 7, in turns.

    Consumer 0 begins, though nobody has had a turn before it. After the last turn of the last consumer nobody waits: an
    arrival there would leave a barrier half full.
    """
    await wg.setmaxnreg_inc(CONSUMER_REGISTERS[block.consumers])
    O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
    await wg.mbarrier_wait(tiles.Q_full, 0)
    # BEGIN SOLUTION: the last consumer hands the turn to consumer 0; everybody waits for its first turn. For every
    #: block: issue S and commit it, hand the turn on, wait for S, release K; mask, softmax, rescale; wait for your
    #: turn and for V (in either order), issue O += P V, wait for it (still in the turn), release V. Hand the last turn
    #: on, unless nobody waits for it
    if w == block.consumers - 1:
        await your_turn(wg, w, block.consumers)
    await my_turn(wg, w)
    for j in wg.loop(range(block.key_blocks)):
        S = wg.accumulator(block.block_k)
        K = await tiles.K.wait(wg, j)
        await wg.wgmma_fence()
        await wg.wgmma(S, tiles.Q[w], K, scale_d=False)
        await wg.wgmma_commit_group()
        await your_turn(wg, w, block.consumers)
        await wg.wgmma_wait_group(0)
        await tiles.K.release(wg, j)

        P, rescale = softmax.step(block.mask(S, w, j))
        O *= rescale

        await my_turn(wg, w)
        V = await tiles.V.wait(wg, j)
        await wg.wgmma_fence()
        await wg.wgmma(O, P, V, trans_b=True)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        await tiles.V.release(wg, j)
    if w < block.consumers - 1:
        await your_turn(wg, w, block.consumers)
    # END SOLUTION
    await epilogue(wg, w, block, tiles.Q[w], O, softmax)
