"""The model of an SM: every rule catches its violation and spares the legal neighbour, and says who and where."""

import re

import numpy as np
import pytest
from model_kernels import (
    RULES,
    SEEDS,
    expects_no_bytes,
    fill,
    left_half_full,
    matrix,
    one_tile_ring,
    overwrite_under_own_wgmma,
    square,
)

from fa_reference.hopper import SM
from fa_reference.hopper.rules import (
    Deadlock,
    OverwriteInUse,
    ReadTooEarly,
    RuleBroken,
    SharedMemoryOverBudget,
)


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
    wait = r"waits since cycle 4 for empty phase 0 \(parity 0\) \(model_kernels.py, line \d+\), lacking 1 of 1"
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
