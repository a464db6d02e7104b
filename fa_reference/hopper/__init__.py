"""A Hopper SM on a laptop: an executable model that computes, keeps time, and catches what hardware lets pass.

A kernel is a coroutine for every warpgroup, written in PTX's own notions. Here a producer loads a tile and a consumer
multiplies it by itself:

    sm = SM()
    X = sm.gmem("X", x, "float16")                       # (64, 64), float32 array of fp16 values
    tile, full = sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", count=1)

    async def producer(wg):
        await wg.mbarrier_arrive_expect_tx(full, tile.bytes)
        await wg.tma_load(tile, X, 0, full)

    async def consumer(wg):
        S = wg.accumulator(64)
        await wg.mbarrier_wait(full, 0)
        await wg.wgmma_fence()
        await wg.wgmma(S, tile, tile, scale_d=False)     # S = tile tile^T, asynchronously
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        row_max = S.row_max()                            # before wait_group: RegistersInFlight

    report = sm.run({"producer": producer, "consumer": consumer})
    print(report.table())

Read it in this order: rules, timing, memory (who knows what is over), barriers, registers, arithmetic, agent and
warpgroup (the instructions), sm (the event loop), trace and report, attention and given. Stop there while you still
mean to write the schedules yourself: ring is the answer to chapter 7, two_stage that to chapter 9, and schedules finds
the solutions of chapters 6 to 10.

What the model leaves out: a warpgroup is one agent, so divergence and barriers among its own threads do not exist;
swizzles, bank conflicts and descriptors; the order of keys in fp8 fragments; the compiler's order of instructions, and
issue slots shared by warps; why warpgroups that calculate at once lose more than units explain (it is only measured);
latencies of shared memory, so that a producer that turns V round is too fast; contention for shared memory between TMA
and wgmma; L2 and HBM shared with other SMs; clusters; the reduced accumulator precision of fp8; proxy fences for a
generic read before an asynchronous overwrite. cuda/CALIBRATION.md says how far off it is for which kernel.
"""

from fa_reference.hopper.attention import AttentionBlock, AttentionRun, run_attention
from fa_reference.hopper.registers import Fragment, exp2, fma, log2, maximum, reciprocal
from fa_reference.hopper.report import Report, covered, overlap
from fa_reference.hopper.rules import RuleBroken
from fa_reference.hopper.sm import SM
from fa_reference.hopper.timing import Timing
from fa_reference.hopper.trace import Span, plot_trace, read_trace, write_trace
from fa_reference.hopper.warpgroup import Warpgroup

__all__ = [
    "SM",
    "AttentionBlock",
    "AttentionRun",
    "Fragment",
    "Report",
    "RuleBroken",
    "Span",
    "Timing",
    "Warpgroup",
    "covered",
    "exp2",
    "fma",
    "log2",
    "maximum",
    "overlap",
    "plot_trace",
    "read_trace",
    "reciprocal",
    "run_attention",
    "write_trace",
]
