"""The Hopper model: every rule catches its violation and spares the legal neighbour; numbers equal gold attention."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from fa_reference.fp8 import round_e4m3
from fa_reference.hopper import SM, Fragment, Timing, exp2
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.memory import round_to
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
    SharedMemoryOverBudget,
    WrongParity,
    WrongTxBytes,
)

SEEDS = [None, *range(8)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: handing them to other threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- rules: a minimal kernel for each, wrong or right

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


@pytest.mark.parametrize("rule, buffer, kernel", RULES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_rule_catches_its_violation_and_spares_its_neighbour(rule, buffer, kernel):
    for seed in SEEDS:
        sm = SM(seed=seed)
        sm.run(kernel(sm, False))
        sm = SM(seed=seed)
        with pytest.raises(rule) as caught:
            sm.run(kernel(sm, True))
        assert caught.type is rule and (not buffer or caught.value.buffer == buffer), (seed, caught.value)
        assert rule.rule in str(caught.value)
        assert caught.value.warpgroup or kernel in (left_half_full, expects_no_bytes)  # found when all have returned


def test_every_rule_has_a_kernel():
    tested = {rule for rule, _, _ in RULES} | {SharedMemoryOverBudget}
    assert tested == set(RuleBroken.__subclasses__())


def test_shared_memory_is_227_KiB():
    sm = SM()
    tiles = [sm.smem(f"t{i}", (64, 128), "float16") for i in range(14)]
    with pytest.raises(SharedMemoryOverBudget, match="t14 needs 16384 bytes, which makes 245760"):
        sm.smem("t14", (64, 128), "float16")
    assert all(np.isnan(tile.data).all() for tile in tiles), "a buffer not yet loaded holds NaN"


def test_a_violation_names_warpgroup_iteration_and_buffer():
    sm = SM()
    with pytest.raises(OverwriteInUse) as caught:
        sm.run(overwrite_under_own_wgmma(sm, True))
    error = caught.value
    assert (error.warpgroup, error.iteration, error.buffer) == ("worker", 1, "tile")
    assert str(error).startswith("worker, iteration 1: TMA load overwrites tile while")
    assert "wgmma by worker, iteration 0" in str(error)


def test_a_deadlock_says_who_waits_for_whom_since_when():
    sm = SM()
    with pytest.raises(Deadlock) as caught:
        sm.run(one_tile_ring(sm, lambda j: j % 2, lambda j: j % 2))
    producer, consumer, hint = caught.value.waits
    wait = r"waits since cycle 4 for empty phase 0 \(parity 0\) \(test_.*, line \d+\), lacking 1 of 1"
    assert re.match(f"producer, iteration 0: {wait}", producer)
    assert consumer.startswith("consumer, iteration 0: waits since cycle 4 for full phase 0") and "parity 1" in hint


def test_a_role_must_be_a_coroutine():
    with pytest.raises(TypeError, match="async def"):
        SM().run({"worker": lambda wg: None})


def test_without_checks_the_model_goes_on_as_hardware_would():
    def run(check):
        sm = SM(check=check)
        X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)
        got = []

        async def role(wg):
            await fill(wg, tile, X, 64, full)
            got.append((await wg.load_shared(tile)).values)
            await wg.mbarrier_wait(full, 0)
            got.append((await wg.load_shared(tile)).values)

        return got, sm.run({"worker": role})

    (early, late), report = run(check=False)
    assert np.isnan(early).all() and np.array_equal(late, np.repeat(np.arange(64, 128)[:, None] / 256, 64, axis=1))
    assert [type(error) for error in report.broken] == [ReadTooEarly]


def test_a_barrier_passes_on_what_others_know():
    """Legal and used in practice: one consumer waits for the loads, the other learns of them at a named barrier."""

    def roles(sm):
        X, tile, full = matrix(sm), sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)

        async def first(wg):
            await fill(wg, tile, X, 0, full)
            await wg.mbarrier_wait(full, 0)
            await wg.bar_sync(1, 256)

        async def second(wg):
            await wg.bar_sync(1, 256)
            await square(wg, tile)
            await wg.wgmma_wait_group(0)

        return {"first": first, "second": second}

    for seed in SEEDS:
        sm = SM(seed=seed)
        sm.run(roles(sm))


# --- fp8


def test_fp8_tiles_hold_e4m3_numbers():
    x = np.concatenate([np.linspace(-500, 500, 4001), np.linspace(-0.02, 0.02, 4001)]).astype(np.float32)
    assert np.array_equal(round_to(x, "float8_e4m3fn"), round_e4m3(torch.from_numpy(x)).numpy())


def test_v_turned_round_multiplies_as_v():
    """O = P V with V stored (keys, d): the fp8 wgmma gets V^T, made by one warpgroup for another."""
    generator = np.random.default_rng(0)
    V, P = (round_to(generator.standard_normal(shape), "float8_e4m3fn") for shape in ((96, 128), (64, 96)))
    sm = SM()
    source, got = sm.gmem("V", V, "float8_e4m3fn"), []
    rows, turned = sm.smem("rows", (96, 128), "float8_e4m3fn"), sm.smem("V", (128, 96), "float8_e4m3fn")
    rows_full, full = sm.mbarrier("rows_full", 1), sm.mbarrier("full", 1)

    async def producer(wg):
        await fill(wg, rows, source, 0, rows_full)
        await wg.mbarrier_wait(rows_full, 0)
        for column in (0, 64):
            await wg.store_shared(turned, await wg.load_shared_transposed(rows, column), column)
        await wg.fence_proxy_async()
        await wg.mbarrier_arrive(full)

    async def consumer(wg):
        A, O = Fragment(wg, P).to("float8_e4m3fn"), wg.accumulator(128)
        await wg.mbarrier_wait(full, 0)
        await wg.wgmma_fence()
        await wg.wgmma(O, A, turned, scale_d=False)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        got.append(O.values)

    sm.run({"producer": producer, "consumer": consumer})
    assert np.allclose(got[0], P @ V, rtol=1e-5, atol=1e-4)


# --- mbarrier semantics against an exhaustive reference

STAGES, TILES = 2, 5


def explore(producer_parity, consumer_parity, visit=lambda *_: None) -> set[str]:
    """All interleavings of a 2-stage ring, from the PTX text: {"ok", "race", "deadlock"}, whichever can happen.

    A state: producer's and consumer's program counters (3 and 4 steps a tile), phases completed by each full and empty
    barrier, tile that each stage holds, tile whose load is in flight to it (-1: none). A full barrier completes when
    its load does (1 arrival, which comes before the load). A wait for parity p passes iff an odd (even) number of
    phases is complete for p = 0 (1). visit(path, state) sees each state once, with a way there.
    """
    start = (0, 0, (0,) * STAGES, (0,) * STAGES, (-1,) * STAGES, (-1,) * STAGES)
    todo, known, outcomes = [(start, ())], {start}, set()

    def put(values, s, value):
        return values[:s] + (value,) + values[s + 1 :]

    while todo:
        state, path = todo.pop()
        visit(path, state)
        p, c, full, empty, held, loading = state
        following = []
        for s in range(STAGES):
            if loading[s] >= 0:  # the load completes, and with it the phase
                new = (p, c, put(full, s, full[s] + 1), empty, put(held, s, loading[s]), put(loading, s, -1))
                following.append((("tma", s), new))
        if p < 3 * TILES:
            j, step = divmod(p, 3)
            s = j % STAGES
            being_read = c // 4 % STAGES == s and c % 4 == 2 and c < 4 * TILES
            if step == 0 and empty[s] % 2 != producer_parity(j):
                following.append((("wait", s), (p + 1, *state[1:])))
            elif step == 1:
                following.append((("expect", s), (p + 1, *state[1:])))
            elif step == 2:
                if loading[s] >= 0 or being_read or (j >= STAGES and c < 4 * (j - STAGES) + 3):
                    outcomes.add("race")  # an older load in flight, or a tile not yet read
                    continue
                following.append((("load", s), (p + 1, c, full, empty, held, put(loading, s, j))))
        if c < 4 * TILES:
            j, step = divmod(c, 4)
            s = j % STAGES
            if step == 0 and full[s] % 2 != consumer_parity(j):
                following.append((("wait full", s), (p, c + 1, *state[2:])))
            elif step in (1, 2):  # starts to read, has read
                if held[s] != j or loading[s] >= 0:
                    outcomes.add("race")
                    continue
                following.append((("read", s), (p, c + 1, *state[2:])))
            elif step == 3:
                following.append((("release", s), (p, c + 1, full, put(empty, s, empty[s] + 1), held, loading)))
        if not following:
            outcomes.add("ok" if (p, c) == (3 * TILES, 4 * TILES) else "deadlock")
        for action, new in following:
            if new not in known:
                known.add(new)
                todo.append((new, (*path, action)))
    return outcomes


class WrongNumbers(Exception):
    """A tile that was there already was taken for the next: no rule is broken, but the result shows it."""


def right_parity(j):
    return j // STAGES % 2


def test_parity_equals_phase_numbers_in_every_interleaving():
    """In every reachable state of a right ring, the model's parity test says what unbounded phase numbers say."""
    compared = 0

    def visit(path, state):
        nonlocal compared
        full, empty = ([Mbarrier(f"{name}[{s}]", 1) for s in range(STAGES)] for name in ("full", "empty"))
        observed = {"wait": empty, "wait full": full}
        for action, s in path:
            if action == "expect":
                full[s].arrive("producer", set(), tx=100)
            elif action == "tma":
                full[s].complete_tx(100, set(), full[s].phase)
            elif action == "release":
                empty[s].arrive("consumer", set())
            elif action in observed:
                observed[action][s].observed = observed[action][s].phase - 1
        p, c, full_phases, empty_phases, *_ = state
        assert [m.phase for m in full + empty] == [*full_phases, *empty_phases]
        for j, barriers, flip, waits in (
            (p // 3, empty, 1, p % 3 == 0 and p < 3 * TILES),
            (c // 4, full, 0, c % 4 == 0 and c < 4 * TILES),
        ):
            if waits:
                barrier = barriers[j % STAGES]
                round_wanted = j // STAGES - flip  # a producer wants the round before to be released
                assert barrier.test_parity(right_parity(j) ^ flip) == (barrier.phase > round_wanted)
                compared += 1

    assert explore(lambda j: right_parity(j) ^ 1, right_parity, visit) == {"ok"}
    assert compared > 100


PARITIES = {
    "right": right_parity,
    "inverted": lambda j: right_parity(j) ^ 1,
    "always 0": lambda j: 0,
    "always 1": lambda j: 1,
}


@pytest.mark.parametrize("producer, consumer", list(product(PARITIES, PARITIES)))
def test_the_model_refuses_a_ring_exactly_if_some_interleaving_goes_wrong(producer, consumer):
    outcomes = explore(lambda j: PARITIES[producer](j) ^ 1, PARITIES[consumer])
    for seed in SEEDS:
        sm = SM(seed=seed)
        X = matrix(sm, 64 * TILES)
        tiles = [sm.smem(f"tile[{s}]", (64, 64), "float16") for s in range(STAGES)]
        full, empty = ([sm.mbarrier(f"{name}[{s}]", 1) for s in range(STAGES)] for name in ("full", "empty"))

        async def produce(wg, X=X, tiles=tiles, full=full, empty=empty):
            for j in wg.loop(range(TILES)):
                s = j % STAGES
                await wg.mbarrier_wait(empty[s], PARITIES[producer](j) ^ 1)
                await fill(wg, tiles[s], X, 64 * j, full[s])

        async def consume(wg, tiles=tiles, full=full, empty=empty):
            for j in wg.loop(range(TILES)):
                s = j % STAGES
                await wg.mbarrier_wait(full[s], PARITIES[consumer](j))
                if (await wg.load_shared(tiles[s])).values[0, 0] != 64 * j / 256:
                    raise WrongNumbers(f"tile {j}")
                await wg.mbarrier_arrive(empty[s])

        roles = {"producer": produce, "consumer": consume}
        if outcomes == {"ok"}:
            sm.run(roles)
        else:  # in every run, not only in the unlucky ones
            with pytest.raises((WrongParity, Deadlock, ReadTooEarly, OverwriteInUse, MissedPhase, WrongNumbers)):
                sm.run(roles)


# --- time


def one_product(columns, k, timing=None, dtype="float16"):
    """Cycles that one 64 x columns x k product keeps the tensor cores busy."""
    sm = SM(timing)
    X, tile = matrix(sm, columns, k, dtype), sm.smem("tile", (columns, k), dtype)
    full = sm.mbarrier("full", 1)

    async def role(wg):
        await fill(wg, tile, X, 0, full)
        await wg.mbarrier_wait(full, 0)
        D, A = wg.accumulator(columns), wg.full(k, 1.0).to(dtype)
        await wg.wgmma_fence()
        await wg.wgmma(D, A, tile, scale_d=False)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        assert np.allclose(D.values[0], k * tile.data[:, 0])

    return sm.run({"worker": role}).busy["wgmma"]


def test_units_work_at_their_rates():
    assert one_product(128, 128) == pytest.approx(2 * 64 * 128 * 128 / 4096, rel=0.01)
    assert one_product(128, 128, dtype="float8_e4m3fn") == pytest.approx(64 * 128 * 128 / 4096, rel=0.01)
    assert one_product(64, 64, replace(Timing(), smem_bytes_per_clk=16)) == 64 * 64 * 2 / 16, "bound by shared memory"
    sm = SM()

    async def role(wg):
        exp2(wg.full(128, 0.0))
        await wg.wgmma_fence()

    assert sm.run({"worker": role}).busy["exp"] == pytest.approx(64 * 128 / 16, rel=0.01)
