"""Two stages (Algorithm 2 of the FlashAttention-3 paper): softmax of block j runs under the product O += P V of j - 1.

The schedule of fa3.cu, on the model of an SM. Q K_j^T and P_(j-1) V_(j-1) are issued together, in one turn; only the
first is waited for before the softmax. Rings, producer and epilogue are those of chapter 7, the turns those of
chapter 8. What is given here: fa_reference/hopper/ring.py.
"""

from functools import partial

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.given import CONSUMER_REGISTERS, epilogue
from fa_reference.hopper.registers import Fragment
from fa_reference.hopper.ring import Tiles, produce
from fa_reference.hopper.sm import SM, Role
from fa_reference.hopper.warpgroup import Warpgroup

CONSUMERS = 2


def kernel(sm: SM, block: AttentionBlock, stages: int = 2, pingpong: bool = True) -> dict[str, Role]:
    """Declare shared memory and return the roles: a producer, and consumers with 64 queries each."""
    tiles = Tiles.make(sm, block, stages)
    each = {w: partial(consumer, block=block, tiles=tiles, w=w, pingpong=pingpong) for w in range(block.consumers)}
    return {"producer": partial(produce, block=block, tiles=tiles)} | {f"consumer {w}": each[w] for w in each}


async def my_turn(wg: Warpgroup, w: int) -> None:
    """Wait for consumer w's turn."""
    await wg.bar_sync(1 + w, 256)


async def your_turn(wg: Warpgroup, w: int, consumers: int) -> None:
    """Hand the turn on, without waiting."""
    await wg.bar_arrive(1 + (w + 1) % consumers, 256)


async def issue_scores(wg: Warpgroup, S: Fragment, tiles: Tiles, w: int, j: int) -> None:
    """Wait for K_j; issue S = Q K_j^T as one group. Does not wait for S."""
    K = await tiles.K.wait(wg, j)
    await wg.wgmma_fence()
    await wg.wgmma(S, tiles.Q[w], K, scale_d=False)
    await wg.wgmma_commit_group()


async def issue_output(wg: Warpgroup, O: Fragment, P: Fragment, tiles: Tiles, j: int) -> None:
    """Wait for V_j; issue O += P V_j as one group. Does not wait for O."""
    V = await tiles.V.wait(wg, j)
    await wg.wgmma_fence()
    await wg.wgmma(O, P, V, trans_b=True)
    await wg.wgmma_commit_group()


async def consumer(wg: Warpgroup, block: AttentionBlock, tiles: Tiles, w: int, pingpong: bool) -> None:
    """Consumer w. There is a turn for every block but the first (and without `pingpong` none).

    Groups complete in the order in which they were committed: wait_group(n) waits for all but the newest n.
    """
    await wg.setmaxnreg_inc(CONSUMER_REGISTERS[block.consumers])
    O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
    await wg.mbarrier_wait(tiles.Q_full, 0)
    last = block.key_blocks - 1
    turns = pingpong and last > 0
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "schedule.py: if there are turns, consumer 0 gets one from the last consumer. If there are blocks: S "
        "and softmax of block 0. For every other block j, in one turn: issue S of block j, issue O of block j"
        " - 1, hand the turn on (unless nobody waits for it any more). Wait for S alone, release K; mask and "
        "softmax of block j, P of j - 1 is still read, `step` returns a new one; wait for O, release V of j -"
        " 1 (not yet of j), rescale O. At the end: O of the last block"
    )
    await epilogue(wg, w, block, tiles.Q[w], O, softmax)
