"""The model of an SM: FP8 numbers, and units that work at their rates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_kernels import fill, matrix

from fa_reference.fp8 import round_e4m3
from fa_reference.hopper import SM, Fragment, Timing, exp2
from fa_reference.hopper.memory import round_to


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
