"""One warpgroup that does everything, on the model of an SM: it has tiles loaded by TMA and multiplies them by wgmma.

The schedule of attention.cu, written for `fa_reference.hopper`: one tile of Q, one of K, one of V. Loads and products
are asynchronous: the warpgroup only starts them, and must know when they are over. A tile is free for the next block
as soon as the product that read it is over, so the next load can run while the warpgroup does something else.
"""

from dataclasses import dataclass
from functools import partial

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.memory import Buffer, GlobalTensor
from fa_reference.hopper.registers import ROWS, Fragment
from fa_reference.hopper.sm import SM, Role
from fa_reference.hopper.warpgroup import Warpgroup

CONSUMERS = 1


@dataclass(frozen=True)
class Shared:
    """Shared memory of the block: Q (64, d), K and V (block_k, d), and for each an mbarrier that counts one arrival."""

    Q: Buffer
    K: Buffer
    V: Buffer
    Q_full: Mbarrier
    K_full: Mbarrier
    V_full: Mbarrier


def kernel(sm: SM, block: AttentionBlock) -> dict[str, Role]:
    """Declare shared memory and return the roles: one warpgroup, for 64 queries. ValueError for more."""
    if block.consumers != 1:
        raise ValueError(f"consumers is {block.consumers}; allowed: 1, as there is one warpgroup")
    shared = Shared(
        sm.smem("Q", (ROWS, block.head_dim), block.dtype),
        sm.smem("K", (block.block_k, block.head_dim), block.dtype),
        sm.smem("V", (block.block_k, block.head_dim), block.dtype),
        sm.mbarrier("Q_full", 1),
        sm.mbarrier("K_full", 1),
        sm.mbarrier("V_full", 1),
    )
    return {"warpgroup": partial(attention, block=block, shared=shared)}


async def load(wg: Warpgroup, tile: Buffer, source: GlobalTensor, row: int, full: Mbarrier) -> None:
    """Start to load rows row.. of `source` into `tile`; its bytes complete the current phase of `full`.

    Does not wait for the tile. Rows outside `source` arrive as zeros, and count as bytes like the others.
    """
    # BEGIN SOLUTION: arrive at the mbarrier and announce the bytes of the tile, then issue the TMA load
    await wg.mbarrier_arrive_expect_tx(full, tile.bytes)
    await wg.tma_load(tile, source, row, full)
    # END SOLUTION


async def store(wg: Warpgroup, block: AttentionBlock, tile: Buffer, O: Fragment) -> None:
    """Store O (64, d) to rows block.row.. of block.O: through `tile` in shared memory, by TMA. Waits until it is done.

    Instructions: store_shared, fence_proxy_async, tma_store, bulk_commit_group, bulk_wait_group.
    """
    # BEGIN SOLUTION: registers to the tile by ordinary stores; a proxy fence, since TMA reads through another proxy;
    #: the TMA store in a group of its own, and wait until no group is pending
    await wg.store_shared(tile, O)
    await wg.fence_proxy_async()
    await wg.tma_store(block.O, block.row, tile)
    await wg.bulk_commit_group()
    await wg.bulk_wait_group(0)
    # END SOLUTION


async def attention(wg: Warpgroup, block: AttentionBlock, shared: Shared) -> None:
    """The warpgroup: attention of 64 queries with keys and values of block.key_blocks blocks (none, if it is 0).

    S = Q K^T takes both operands from shared memory; O += P V takes P from registers and V as it is stored, (keys, d):
    trans_b=True. softmax.step(S) returns P and the factor for the O so far. block.mask(S, 0, j) is S of key block j
    with -inf where there is no key, or where the query may not see it. Loop over wg.loop(range(block.key_blocks)), so
    that messages and the picture name the block. Q is waited for even if there is no block: its tile is used below.
    """
    O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
    # BEGIN SOLUTION: start to load Q and the first blocks of K and V; wait for Q. For every block: wait for K, S = Q
    #: K^T (fence, wgmma, commit, wait), start to load the next K; mask, softmax, rescale O; wait for V, O += P V,
    #: start to load the next V. The phase of K_full and V_full is the number of the block
    await load(wg, shared.Q, block.Q, block.row, shared.Q_full)
    if block.key_blocks:
        await load(wg, shared.K, block.K, 0, shared.K_full)
        await load(wg, shared.V, block.V, 0, shared.V_full)
    await wg.mbarrier_wait(shared.Q_full, 0)
    for j in wg.loop(range(block.key_blocks)):
        next_row = (j + 1) * block.block_k
        S = wg.accumulator(block.block_k)
        await wg.mbarrier_wait(shared.K_full, j % 2)
        await wg.wgmma_fence()
        await wg.wgmma(S, shared.Q, shared.K, scale_d=False)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        if j + 1 < block.key_blocks:
            await load(wg, shared.K, block.K, next_row, shared.K_full)

        P, rescale = softmax.step(block.mask(S, 0, j))
        O *= rescale

        await wg.mbarrier_wait(shared.V_full, j % 2)
        await wg.wgmma_fence()
        await wg.wgmma(O, P, shared.V, trans_b=True)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        if j + 1 < block.key_blocks:
            await load(wg, shared.V, block.V, next_row, shared.V_full)
    # END SOLUTION
    O, L = softmax.finish(O)
    await wg.store_global(block.L, block.row, L)
    await store(wg, block, shared.Q, O)  # nobody reads Q any more
