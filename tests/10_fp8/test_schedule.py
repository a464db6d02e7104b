"""Graded checks of chapter 10, schedule.py: a producer that turns V round for fp8, on the model of an SM."""

from fa_reference.grading import check, schedules
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed
from fa_reference.grading.schedules import FP8

QUERIES = 128
DEPTHS = (2, 3, 4)


@check("schedule: one block of keys", points=1)
def test_one_block(answer: Answer) -> None:
    schedules.numbers(answer, [schedules.case(QUERIES, 64, FP8)])


@check("schedule: any length, masked, rows without keys", points=1)
def test_lengths(answer: Answer) -> None:
    schedules.numbers(answer, schedules.awkward(QUERIES, FP8))
    schedules.numbers(answer, [schedules.case(QUERIES, 500, FP8, head_dim=128)], block_k=128)


@check("schedule: every number of stages, fewer blocks than stages", points=1)
def test_depths(answer: Answer) -> None:
    schedules.every_depth(answer, QUERIES, FP8, DEPTHS)


@check("schedule: right under 200 random timings", points=3)
def test_timings(answer: Answer) -> None:
    schedules.any_timing(answer, QUERIES, FP8, DEPTHS)


@check("schedule: V is turned round by the producer, ahead of the consumers", points=2)
def test_producer_transposes(answer: Answer) -> None:
    timeline = schedules.traced(answer, QUERIES, FP8)
    consumers = schedules.warpgroups(timeline.consumers, 2, "multiply")
    for wg in consumers:
        stores, reads = timeline.count(wg, "st.shared"), timeline.count(wg, "ldmatrix.trans", "ld.shared")
        if reads or stores > 1:
            raise CheckFailed(
                f"{wg} reads {reads} and writes {stores} tiles of shared memory; it should only write its output. The "
                "producer's warps have nothing else to do: let them turn V round"
            )
        waits, blocks = timeline.count(wg, "mbarrier.try_wait"), len(timeline.of(wg, "S"))
        if waits > 1 + 2 * blocks:
            raise CheckFailed(
                f"{wg} waits {waits} times at mbarriers for {blocks} blocks: once for Q, K_j and V_j is enough"
            )
    schedules.runs_ahead(answer, QUERIES, FP8, DEPTHS)
