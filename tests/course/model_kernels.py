"""Minimal kernels for the model of an SM: for every rule one that breaks it, and its nearest legal neighbour."""

from collections.abc import Callable

import numpy as np

from fa_reference.hopper import SM
from fa_reference.hopper.rules import (
    BarrierCount,
    Deadlock,
    DoubleArrive,
    ExitInFlight,
    IllegalOperand,
    MissedPhase,
    MissingAwait,
    MissingProxyFence,
    MissingWgmmaFence,
    OverwriteInUse,
    ReadTooEarly,
    RegistersInFlight,
    RegistersOverBudget,
    RuleBroken,
    WrongParity,
    WrongTxBytes,
)

SEEDS = [None, *range(8)]

RULES: list[tuple[type[RuleBroken], str, Callable]] = []


def breaks(rule: type[RuleBroken], buffer: str = ""):
    """Register kernel(sm, wrong) -> roles; the wrong one breaks `rule`, on `buffer`."""

    def register(kernel: Callable) -> Callable:
        RULES.append((rule, buffer, kernel))
        return kernel

    return register


def matrix(sm: SM, rows: int = 256, columns: int = 64, dtype: str = "float16"):
    """A matrix in global memory whose row r holds r / 256."""
    return sm.gmem("X", np.repeat(np.arange(rows, dtype=np.float32)[:, None] / 256, columns, axis=1), dtype)


async def fill(wg, tile, X, row, full):
    """Load a tile, by TMA on `full`."""
    await wg.mbarrier_arrive_expect_tx(full, tile.bytes)
    await wg.tma_load(tile, X, row, full)


async def square(wg, tile, D=None):
    """Issue and commit D = tile tile^T."""
    D = wg.accumulator(tile.shape[0]) if D is None else D
    await wg.wgmma_fence()
    await wg.wgmma(D, tile, tile, scale_d=False)
    await wg.wgmma_commit_group()
    return D


@breaks(ReadTooEarly, "tile")
def tma_not_waited_for(sm, wrong):
    X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

    async def role(wg):
        await fill(wg, tile, X, 0, full)
        if not wrong:
            await wg.mbarrier_wait(full, 0)
        await wg.load_shared(tile)
        if wrong:
            await wg.mbarrier_wait(full, 0)

    return {"reader": role}


@breaks(ReadTooEarly)
def never_loaded(sm, wrong):
    tile = sm.smem("tile", (64, 64), "float16")

    async def role(wg):
        if not wrong:
            await wg.store_shared(tile, wg.full(64, 1.0).to("float16"))
        await wg.load_shared(tile)

    return {"reader": role}


@breaks(ReadTooEarly, "tile")
def right_only_by_luck(sm, wrong):
    """The load is long over when the other warpgroup reads, but nothing told it so."""
    X, tile = matrix(sm), sm.smem("tile", (64, 64), "float16")
    full, other = sm.mbarrier("full", 1), sm.mbarrier("other", 1)

    async def producer(wg):
        await fill(wg, tile, X, 0, full)
        if wrong:
            await wg.mbarrier_arrive(other)  # knows nothing of the load
            await wg.mbarrier_wait(full, 0)
        else:
            await wg.mbarrier_wait(full, 0)
            await wg.mbarrier_arrive(other)

    async def reader(wg):
        await wg.mbarrier_wait(other, 0)
        await wg.sleep_until(1e6)
        await wg.load_shared(tile)

    return {"producer": producer, "reader": reader}


@breaks(OverwriteInUse, "tile")
def overwrite_under_own_wgmma(sm, wrong):
    X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

    async def role(wg):
        for j in wg.loop(range(3)):
            await fill(wg, tile, X, 64 * j, full)
            await wg.mbarrier_wait(full, j % 2)
            await square(wg, tile)
            if not wrong:
                await wg.wgmma_wait_group(0)

    return {"worker": role}


@breaks(OverwriteInUse, "tile")
def overwrite_while_another_reads(sm, wrong):
    X, tile = matrix(sm), sm.smem("tile", (64, 64), "float16")
    full, empty = sm.mbarrier("full", 1), sm.mbarrier("empty", 1)

    async def producer(wg):
        for j in wg.loop(range(4)):
            await wg.mbarrier_wait(empty, j % 2 ^ 1)
            await fill(wg, tile, X, 64 * j, full)

    async def consumer(wg):
        for j in wg.loop(range(4)):
            await wg.mbarrier_wait(full, j % 2)
            await square(wg, tile)
            if wrong:
                await wg.mbarrier_arrive(empty)  # the wgmma may still read
            await wg.wgmma_wait_group(0)
            if not wrong:
                await wg.mbarrier_arrive(empty)

    return {"producer": producer, "consumer": consumer}


@breaks(OverwriteInUse, "tile")
def overwrite_while_another_copies_to_registers(sm, wrong):
    X, tile = matrix(sm), sm.smem("tile", (64, 64), "float16")
    full, empty = sm.mbarrier("full", 1), sm.mbarrier("empty", 1)

    async def producer(wg):
        await fill(wg, tile, X, 0, full)
        await wg.mbarrier_wait(empty, 0)
        await fill(wg, tile, X, 64, full)
        await wg.mbarrier_wait(full, 1)

    async def reader(wg):
        await wg.mbarrier_wait(full, 0)
        if wrong:
            await wg.mbarrier_arrive(empty)  # before it has read
        await wg.load_shared(tile)
        if not wrong:
            await wg.mbarrier_arrive(empty)

    return {"producer": producer, "reader": reader}


@breaks(OverwriteInUse, "tile")
def overwrite_under_store(sm, wrong):
    tile, out = sm.smem("tile", (64, 64), "float16"), matrix(sm)

    async def role(wg):
        for j in wg.loop(range(2)):
            await wg.store_shared(tile, wg.full(64, j))
            await wg.fence_proxy_async()
            await wg.tma_store(out, 64 * j, tile)
            await wg.bulk_commit_group()
            await wg.bulk_wait_group(1 if wrong else 0)
        await wg.bulk_wait_group(0)

    return {"worker": role}


def loaded_tile(sm, body):
    """One warpgroup that loads a tile and then runs body(wg, tile)."""
    X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

    async def role(wg):
        await fill(wg, tile, X, 0, full)
        await wg.mbarrier_wait(full, 0)
        await body(wg, tile)

    return {"worker": role}


@breaks(RegistersInFlight, "tile")
def accumulator_read_in_flight(sm, wrong):
    async def body(wg, tile):
        D = await square(wg, tile)
        await wg.wgmma_wait_group(1 if wrong else 0)
        D.row_max()
        await wg.wgmma_wait_group(0)

    return loaded_tile(sm, body)


@breaks(RegistersInFlight, "tile")
def newest_group_in_flight(sm, wrong):
    """Two stages: wait_group(1) covers the older product only."""

    async def body(wg, tile):
        older, newer = await square(wg, tile), await square(wg, tile)
        await wg.wgmma_wait_group(1)
        (newer if wrong else older).row_max()
        await wg.wgmma_wait_group(0)

    return loaded_tile(sm, body)


@breaks(RegistersInFlight, "tile")
def group_not_committed(sm, wrong):
    async def body(wg, tile):
        D = wg.accumulator(64)
        await wg.wgmma_fence()
        await wg.wgmma(D, tile, tile, scale_d=False)
        if not wrong:
            await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        D.row_max()

    return loaded_tile(sm, body)


@breaks(RegistersInFlight, "tile")
def a_fragment_overwritten_in_flight(sm, wrong):
    async def body(wg, tile):
        D, A = wg.full(64, 0.0), wg.full(64, 1.0).to("float16")
        await wg.wgmma_fence()
        await wg.wgmma(D, A, tile, trans_b=True)
        await wg.wgmma_commit_group()
        if not wrong:
            await wg.wgmma_wait_group(0)
        A *= 2.0
        await wg.wgmma_wait_group(0)

    return loaded_tile(sm, body)


@breaks(MissingWgmmaFence, "tile")
def accumulator_scaled_without_fence(sm, wrong):
    async def body(wg, tile):
        D = await square(wg, tile)
        await wg.wgmma_wait_group(0)
        D *= 0.5
        if not wrong:
            await wg.wgmma_fence()
        await wg.wgmma(D, tile, tile)
        await wg.wgmma(D, tile, tile)  # the same accumulator again: needs no fence
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)

    return loaded_tile(sm, body)


@breaks(MissingProxyFence, "tile")
def generic_write_then_wgmma(sm, wrong):
    tile = sm.smem("tile", (64, 64), "float16")

    async def role(wg):
        await wg.store_shared(tile, wg.full(64, 1.0))
        if not wrong:
            await wg.fence_proxy_async()
        await square(wg, tile)
        await wg.wgmma_wait_group(0)

    return {"worker": role}


@breaks(MissingProxyFence, "tile")
def proxy_fence_after_the_barrier_arrival(sm, wrong):
    tile = sm.smem("tile", (64, 64), "float16")

    async def writer(wg):
        await wg.store_shared(tile, wg.full(64, 1.0))
        if not wrong:
            await wg.fence_proxy_async()
        await wg.bar_arrive(1, 256)
        if wrong:
            await wg.fence_proxy_async()  # too late: the reader was not told about it

    async def reader(wg):
        await wg.bar_sync(1, 256)
        await wg.sleep_until(1e6)
        await square(wg, tile)
        await wg.wgmma_wait_group(0)

    return {"writer": writer, "reader": reader}


@breaks(MissingProxyFence, "tile")
def generic_write_then_tma_store(sm, wrong):
    tile, out = sm.smem("tile", (64, 64), "float16"), matrix(sm)

    async def role(wg):
        await wg.store_shared(tile, wg.full(64, 1.0))
        if not wrong:
            await wg.fence_proxy_async()
        await wg.tma_store(out, 0, tile)
        await wg.bulk_commit_group()
        await wg.bulk_wait_group(0)

    return {"worker": role}


@breaks(MissingProxyFence, "tile")
def second_half_written_after_the_fence(sm, wrong):
    tile = sm.smem("tile", (128, 64), "float16")

    async def role(wg):
        await wg.store_shared(tile, wg.full(64, 1.0), 0)
        if wrong:
            await wg.fence_proxy_async()
        await wg.store_shared(tile, wg.full(64, 1.0), 64)
        if not wrong:
            await wg.fence_proxy_async()
        S, A = wg.accumulator(128), wg.full(64, 1.0).to("float16")
        await wg.wgmma_fence()
        await wg.wgmma(S, A, tile, scale_d=False)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)

    return {"worker": role}


def one_tile_ring(sm, producer_parity, consumer_parity, tiles=4):
    X, tile = matrix(sm), sm.smem("tile", (64, 64), "float16")
    full, empty = sm.mbarrier("full", 1), sm.mbarrier("empty", 1)

    async def producer(wg):
        for j in wg.loop(range(tiles)):
            await wg.mbarrier_wait(empty, producer_parity(j))
            await fill(wg, tile, X, 64 * j, full)

    async def consumer(wg):
        for j in wg.loop(range(tiles)):
            await wg.mbarrier_wait(full, consumer_parity(j))
            await wg.load_shared(tile)
            await wg.mbarrier_arrive(empty)

    return {"producer": producer, "consumer": consumer}


@breaks(WrongParity)
def consumer_starts_with_one(sm, wrong):
    return one_tile_ring(sm, lambda j: j % 2 ^ 1, lambda j: j % 2 ^ wrong)


@breaks(WrongParity)
def producer_never_flips(sm, wrong):
    return one_tile_ring(sm, lambda j: 1 if wrong else j % 2 ^ 1, lambda j: j % 2)


@breaks(WrongParity)
def consumer_never_flips(sm, wrong):
    return one_tile_ring(sm, lambda j: j % 2 ^ 1, lambda j: 0 if wrong else j % 2)


@breaks(MissedPhase, "done")
def waiter_lags_two_phases(sm, wrong):
    done, seen = sm.mbarrier("done", 1), sm.mbarrier("seen", 1)

    async def first(wg):
        await wg.mbarrier_arrive(done)
        if not wrong:
            await wg.mbarrier_wait(seen, 0)

    async def second(wg):
        await wg.sleep_until(1e5)
        await wg.mbarrier_arrive(done)

    async def waiter(wg):
        if wrong:
            await wg.sleep_until(1e6)
        await wg.mbarrier_wait(done, 0)
        await wg.mbarrier_arrive(seen)
        await wg.mbarrier_wait(done, 1)

    return {"first": first, "second": second, "waiter": waiter}


@breaks(DoubleArrive, "empty")
def one_consumer_arrives_for_both(sm, wrong):
    empty = sm.mbarrier("empty", 2)

    async def consumer(wg):
        await wg.mbarrier_arrive(empty)
        if wrong and wg.name == "consumer 0":
            await wg.mbarrier_arrive(empty)

    async def consumer_1(wg):
        await wg.sleep_until(1e5)
        await consumer(wg)

    return {"consumer 0": consumer, "consumer 1": consumer_1}


@breaks(DoubleArrive, "done")
def arrives_again_before_anybody_saw(sm, wrong):
    done, back = sm.mbarrier("done", 1), sm.mbarrier("back", 1)

    async def worker(wg):
        await wg.mbarrier_arrive(done)
        if not wrong:
            await wg.mbarrier_wait(back, 0)
        await wg.mbarrier_arrive(done)

    async def waiter(wg):
        await wg.sleep_until(1e5)
        await wg.mbarrier_wait(done, 0)
        await wg.mbarrier_arrive(back)
        await wg.mbarrier_wait(done, 1)

    return {"worker": worker, "waiter": waiter}


def expecting(sm, size):
    X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

    async def role(wg):
        await wg.mbarrier_arrive_expect_tx(full, tile.bytes + size)
        await wg.tma_load(tile, X, 224, full)  # only 32 rows are inside: zeros count too
        await wg.mbarrier_wait(full, 0)
        await wg.sleep_until(1e6)

    return {"producer": role}


@breaks(WrongTxBytes, "tile")
def expects_too_few_bytes(sm, wrong):
    return expecting(sm, -16 if wrong else 0)


@breaks(WrongTxBytes, "full")
def expects_too_many_bytes(sm, wrong):
    return expecting(sm, 16 if wrong else 0)


@breaks(WrongTxBytes, "full")
def expects_no_bytes(sm, wrong):
    return expecting(sm, -64 * 64 * 2 if wrong else 0)


@breaks(WrongTxBytes, "tile")
def reads_bytes_that_nobody_announced(sm, wrong):
    X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

    async def role(wg):
        if wrong:
            await wg.mbarrier_arrive(full)
        else:
            await wg.mbarrier_arrive_expect_tx(full, tile.bytes)
        await wg.tma_load(tile, X, 0, full)
        await wg.mbarrier_wait(full, 0)
        await wg.load_shared(tile)

    return {"worker": role}


@breaks(WrongTxBytes)
def announces_after_the_phase_may_have_ended(sm, wrong):
    """A load may come before its announcement, and the tx-count go below zero: as long as an arrival is missing too."""
    X, tile = matrix(sm), sm.smem("tile", (64, 64), "float16")
    full, issued = sm.mbarrier("full", 1 if wrong else 2), sm.mbarrier("issued", 1)

    async def loader(wg):
        await wg.tma_load(tile, X, 0, full)
        await wg.mbarrier_arrive(issued)
        await wg.sleep_until(1e5)
        assert full.tx == -tile.bytes, "the bytes have come, and nobody has announced them"
        await wg.mbarrier_arrive_expect_tx(full, tile.bytes)
        await wg.mbarrier_wait(full, 0)
        await wg.load_shared(tile)

    async def helper(wg):
        await wg.mbarrier_wait(issued, 0)
        await wg.mbarrier_arrive(full)

    return {"loader": loader, "helper": helper}


@breaks(BarrierCount, "named barrier 1")
def counts_differ(sm, wrong):
    async def role(wg):
        await wg.bar_sync(1, 384 if wrong and wg.name == "b" else 256)

    return {"a": role, "b": role}


@breaks(BarrierCount, "named barrier 1")
def left_half_full(sm, wrong):
    async def role(wg):
        await wg.bar_arrive(1, 256)
        await wg.sleep_until(1e5)
        if wrong and wg.name == "a":
            await wg.bar_arrive(1, 256)

    return {"a": role, "b": role}


@breaks(BarrierCount, "named barrier 2")
def not_a_multiple_of_32(sm, wrong):
    async def role(wg):
        await wg.bar_sync(2, 100 if wrong else 128)

    return {"a": role}


@breaks(BarrierCount, "named barrier 1")
def comes_twice(sm, wrong):
    async def a(wg):
        await wg.bar_arrive(1, 256)
        await wg.bar_arrive(1 if wrong else 2, 256)

    async def b(wg):
        await wg.sleep_until(1e5)
        await wg.bar_sync(1, 256)
        await wg.bar_sync(2, 256)

    return {"a": a, "b": b}


@breaks(RegistersOverBudget)
def too_many_tiles(sm, wrong):
    async def role(wg):
        await wg.setmaxnreg_dec(152)  # two tiles of 64 registers, and 24
        tiles = [wg.full(128, 0.0) for _ in range(3)]
        if not wrong:
            del tiles[0]
        await wg.wgmma_fence()

    return {"worker": role}


@breaks(RegistersOverBudget)
def setmaxnreg_not_a_multiple_of_8(sm, wrong):
    async def role(wg):
        await wg.setmaxnreg_dec(100 if wrong else 104)

    return {"worker": role}


@breaks(RegistersOverBudget)
def setmaxnreg_dec_upwards(sm, wrong):
    async def role(wg):
        await wg.setmaxnreg_dec(64)
        await (wg.setmaxnreg_dec(128) if wrong else wg.setmaxnreg_inc(128))

    return {"worker": role}


@breaks(Deadlock, "setmaxnreg.inc")
def nobody_gives_registers_back(sm, wrong):
    async def worker(wg):
        await wg.setmaxnreg_inc(240)

    async def producer(wg):
        if not wrong:
            await wg.setmaxnreg_dec(24)

    return {"producer": producer, "a": worker, "b": worker}


@breaks(Deadlock, "barrier 1")
def waits_for_each_other(sm, wrong):
    async def a(wg):
        for _ in wg.loop(range(2)):
            await wg.bar_sync(1, 256)

    async def b(wg):
        for _ in wg.loop(range(1 if wrong else 2)):
            await wg.bar_sync(1, 256)

    return {"a": a, "b": b}


@breaks(ExitInFlight)
def returns_with_a_wgmma_in_flight(sm, wrong):
    async def body(wg, tile):
        await square(wg, tile)
        if not wrong:
            await wg.wgmma_wait_group(0)

    return loaded_tile(sm, body)


@breaks(ExitInFlight)
def returns_with_a_load_in_flight(sm, wrong):
    X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

    async def role(wg):
        await fill(wg, tile, X, 0, full)
        if not wrong:
            await wg.mbarrier_wait(full, 0)

    return {"worker": role}


@breaks(ExitInFlight, "tile")
def load_that_nobody_waits_for(sm, wrong):
    """It is over long before the block ends, but only by luck."""
    X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

    async def role(wg):
        await fill(wg, tile, X, 0, full)
        await wg.sleep_until(1e6)
        if not wrong:
            await wg.mbarrier_wait(full, 0)
        await wg.wgmma_fence()

    return {"worker": role}


@breaks(ExitInFlight)
def returns_with_a_store_in_flight(sm, wrong):
    async def body(wg, tile):
        await wg.tma_store(matrix(sm), 0, tile)
        await wg.bulk_commit_group()
        await wg.bulk_wait_group(1 if wrong else 0)

    return loaded_tile(sm, body)


@breaks(IllegalOperand, "tile")
def fp8_with_transposed_b(sm, wrong):
    X = matrix(sm, dtype="float8_e4m3fn")
    tile, full = sm.smem("tile", (64, 64), "float8_e4m3fn"), sm.mbarrier("full", 1)

    async def role(wg):
        await fill(wg, tile, X, 0, full)
        await wg.mbarrier_wait(full, 0)
        D = wg.accumulator(64)
        await wg.wgmma_fence()
        await wg.wgmma(D, tile, tile, scale_d=False, trans_b=wrong)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)

    return {"worker": role}


@breaks(IllegalOperand)
def box_of_other_width(sm, wrong):
    X, tile = matrix(sm), sm.smem("tile", (64, 32 if wrong else 64), "float16")
    full = sm.mbarrier("full", 1)

    async def role(wg):
        await fill(wg, tile, X, 0, full)
        await wg.mbarrier_wait(full, 0)

    return {"worker": role}


@breaks(IllegalOperand, "tile")
def transposed_beyond_the_last_column(sm, wrong):
    async def body(wg, tile):
        await wg.load_shared_transposed(tile, 64 if wrong else 0)

    return loaded_tile(sm, body)


@breaks(IllegalOperand)
def registers_of_another_warpgroup(sm, wrong):
    tiles = {}

    async def owner(wg):
        tiles["ours"] = wg.full(64, 1.0)
        await wg.wgmma_fence()
        await wg.bar_sync(1, 256)

    async def other(wg):
        tiles["mine"] = wg.full(64, 1.0)
        await wg.bar_sync(1, 256)
        tiles["mine"] + tiles["ours" if wrong else "mine"]
        await wg.wgmma_fence()

    return {"owner": owner, "other": other}


@breaks(MissingAwait)
def forgotten_await(sm, wrong):
    async def role(wg):
        fence = wg.wgmma_fence()
        if not wrong:
            await fence
        await wg.wgmma_fence()

    return {"worker": role}
