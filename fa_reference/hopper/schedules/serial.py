"""Serial: one warpgroup loads, multiplies, exponentiates and multiplies again, and waits for each."""

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.sm import SM, Role

CONSUMERS = 1


def kernel(sm: SM, block: AttentionBlock) -> dict[str, Role]:
    """The roles of one block."""
    if block.consumers != 1:
        raise ValueError(f"consumers is {block.consumers}; allowed: 1, as there is one warpgroup")
    d, block_k = block.head_dim, block.block_k
    Q_smem = sm.smem("Q", (ROWS, d), block.dtype)
    K_smem, V_smem = sm.smem("K", (block_k, d), block.dtype), sm.smem("V", (block_k, d), block.dtype)
    Q_full, K_full, V_full = sm.mbarrier("Q_full", 1), sm.mbarrier("K_full", 1), sm.mbarrier("V_full", 1)

    async def load(wg, buffer, source, row, full, parity):
        await wg.mbarrier_arrive_expect_tx(full, buffer.bytes)
        await wg.tma_load(buffer, source, row, full)
        await wg.mbarrier_wait(full, parity)

    async def warpgroup(wg):
        O, softmax = wg.full(d, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
        await load(wg, Q_smem, block.Q, block.row, Q_full, 0)
        for j in wg.loop(range(block.key_blocks)):
            await load(wg, K_smem, block.K, j * block_k, K_full, j % 2)
            S = wg.accumulator(block_k)
            await wg.wgmma_fence()
            await wg.wgmma(S, Q_smem, K_smem, scale_d=False)
            await wg.wgmma_commit_group()
            await wg.wgmma_wait_group(0)
            P, rescale = softmax.step(block.mask(S, 0, j))
            del S
            O *= rescale
            await load(wg, V_smem, block.V, j * block_k, V_full, j % 2)
            await wg.wgmma_fence()
            await wg.wgmma(O, P, V_smem, trans_b=True)
            await wg.wgmma_commit_group()
            await wg.wgmma_wait_group(0)
        O, L = softmax.finish(O)
        await wg.store_global(block.L, block.row, L)
        await wg.store_shared(Q_smem, O)  # nobody reads Q any more
        await wg.fence_proxy_async()
        await wg.tma_store(block.O, block.row, Q_smem)
        await wg.bulk_commit_group()
        await wg.bulk_wait_group(0)

    return {"warpgroup": warpgroup}
