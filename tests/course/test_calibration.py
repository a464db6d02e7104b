"""The calibration of the model of an SM: its record, the kernels that measured it, and what the model predicts."""

import json
import math
import time
from dataclasses import replace

import pytest

from fa_reference.hopper import Timing, calibrate, kernel_clocks, predict, together
from fa_reference.hopper.timing import CALIBRATED, RECORD
from fa_reference.hopper.variants import CHANGES, VARIANTS, Variant
from fa_reference.kernels import KernelUnavailable, compiler_version, count_instructions

WITHIN = 0.15
MISSES = {(10, 128)}  # cuda/CALIBRATION.md says what is known about it


@pytest.fixture(scope="module")
def compiler():
    try:
        return compiler_version()
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name, fp8", [("units", 0), ("wgmma", 0), ("barriers", 0), ("tma", 0), ("beside", 0), ("beside", 1)]
)
def test_the_micro_kernels_compile_without_spills_or_notes(compiler, name, fp8):
    compiled = calibrate.build(name, fp8=bool(fp8))
    assert compiled.report.notes == (), compiled.report.describe()
    for kernel, used in compiled.report.kernels.items():
        assert used.spill_store_bytes + used.spill_load_bytes == 0, kernel


def test_the_micro_kernels_contain_what_they_measure(compiler):
    units, wgmma, beside = (count_instructions(calibrate.build(name).cubin) for name in ("units", "wgmma", "beside"))
    chain = 8 * (calibrate.CHAINS + 1)  # of a rate and of a latency kernel, unrolled by eight
    assert units["MUFU"] >= 2 * chain
    assert units["SHFL"] >= chain
    # Per shape: batches of 1, 2, 4, 8 alone and one of 8 in a loop, from shared memory and from registers.
    assert wgmma["HGMMA"] >= len(calibrate.WGMMA_N) * 2 * (1 + 2 + 4 + 8 + 8)
    assert wgmma["QGMMA"] == len(calibrate.WGMMA_N) * 2 * (1 + 2 + 4 + 8 + 8)
    softmaxes = 3  # the kernel's own, and two in `beside`
    assert beside["MUFU"] >= softmaxes * 66
    assert beside["FADD"] >= softmaxes * 64, "the row sums must not have been left out"


def test_every_value_says_where_it_comes_from():
    record = json.loads(RECORD.read_text())
    device = record["provenance"]["device"]
    assert CALIBRATED
    assert "H100" in device
    assumed = []
    for name, (value, source) in Timing().sources().items():
        assert math.isfinite(value) and value > 0, name
        if device not in source:
            assumed.append(name)
    assert sorted(assumed) == ["issue", "lost_beside", "lost_together", "smem_bytes_per_clk"]


def test_values_follow_the_record():
    record = json.loads(RECORD.read_text())
    timing = Timing()
    assert timing.exp_latency == record["units"]["exp2"]["latency"]
    assert timing.exp_per_clk == pytest.approx(128 / record["units"]["exp2"]["clocks_by_warps"]["4"], abs=1e-3)
    assert timing.tensor_flop_per_clk == pytest.approx(4096, rel=0.01), "the data sheet's rate is reached"
    assert timing.fp8_factor == pytest.approx(2, rel=0.01)
    beside = record["units"]["max"]["clocks_beside_SS"] / record["units"]["max"]["clocks_by_warps"]["1"]
    assert timing.alu_beside > beside > 1, "the tensor cores were not busy all of the time"


@pytest.fixture(scope="module")
def committed():
    return json.loads(predict.PATH.read_text())


@pytest.fixture(scope="module")
def rows():
    return predict.predictions()


def test_the_committed_table_is_what_the_model_says(committed, rows):
    assert committed["measured_in"] == RECORD.name
    again = "if the model was changed on purpose: python -m fa_reference.hopper.predict --write"
    now = [{**row.__dict__} for row in rows]
    assert committed["predictions"] == now, again
    timing = {name: {"value": value, "source": source} for name, (value, source) in Timing().sources().items()}
    assert committed["timing"] == timing, again


def test_the_variants_are_predicted_too(committed):
    now = [{**row.__dict__} for row in predict.held_out()]
    assert committed["held_out"] == now, (
        "if the model was changed on purpose: python -m fa_reference.hopper.predict --write"
    )
    assert len(now) == len(VARIANTS) == len({variant.name for variant in VARIANTS})


@pytest.mark.parametrize("chapter, change", CHANGES)
def test_a_change_of_a_schedule_is_one_of_its_kernel(compiler, chapter, change):
    variant = Variant(chapter, 64, change=change, key_blocks=8)
    assert kernel_clocks.faults(variant) == ""
    assert predict.simulate(variant.schedule(), 64, key_blocks=8).cycles > 0
    assert variant.kernel().source.read_text() != Variant(chapter, 64).kernel().source.read_text()


def test_what_is_lost_is_set_on_softmax_steps_that_share_the_units():
    assert abs(together.mean_error(together.SHARED)) < 0.03
    assert abs(together.mean_error(together.SHARED_BESIDE)) < 0.03
    alone = [together.beside(d, "alone")["softmax"] / together.measured(d, "alone")["softmax"] - 1 for d in (64, 128)]
    assert max(map(abs, alone)) < 0.05, "follows from the units alone"


def test_the_committed_answers_are_what_the_model_says(committed):
    names = ["two stages, d 128, as it is", "exponential unit twice as fast", "d 256", "fp8, d 128"]
    now = [{**row.__dict__} for row in predict.what_if(names)]
    assert [row for row in committed["what_if"] if row["name"] in names] == now
    assert [row["name"] for row in committed["what_if"]] == list(predict.WHAT_IF)
    assert now[1]["clocks"] < now[0]["clocks"]
    assert now[2]["clocks"] is None
    assert "OverBudget" in now[2]["impossible"]


def test_predictions_are_within_what_was_promised(rows):
    beyond = {(row.chapter, row.head_dim) for row in rows if abs(row.error) > WITHIN}
    assert beyond == MISSES, [row for row in rows if (row.chapter, row.head_dim) in beyond]


def test_the_model_has_the_measured_order(rows):
    for head_dim in (64, 128):
        specialised = [row for row in rows if row.head_dim == head_dim and row.chapter >= 7]
        predicted, measured = (
            [row.chapter for row in sorted(specialised, key=lambda row, by=by: -getattr(row, by))]
            for by in ("predicted", "measured")
        )
        assert predicted == measured
        assert predicted[0] == 7


def test_a_block_of_64_key_blocks_takes_less_than_two_seconds():
    start = time.process_time()
    predict.simulate("two-stage", 128)
    assert time.process_time() - start < 2


def test_what_ifs_change_what_they_say():
    slow = predict.simulate("two-stage", 128, key_blocks=8)
    fast = predict.simulate("two-stage", 128, key_blocks=8, timing=replace(Timing(), **predict.FASTER_EXP))
    assert fast.cycles < slow.cycles
    assert fast.busy["exp"] == pytest.approx(slow.busy["exp"] / 2)
    two, three = (predict.simulate("one warpgroup", 64, key_blocks=8, blocks=blocks).cycles for blocks in (2, 3))
    assert two < three < 1.5 * two, "blocks that share an SM overlap, and get in each other's way"
