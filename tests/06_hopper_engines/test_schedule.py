"""Graded checks of chapter 6, schedule.py: one warpgroup with TMA and wgmma, on the model of an SM."""

from fa_reference.grading import check, schedules
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed

QUERIES = 64


@check("schedule: one block of keys", points=1)
def test_one_block(answer: Answer) -> None:
    schedules.numbers(answer, [schedules.case(QUERIES, 64, head_dim=128)])  # not square: V and its transpose differ


@check("schedule: any length, masked, rows without keys", points=2)
def test_lengths(answer: Answer) -> None:
    schedules.numbers(answer, schedules.awkward(QUERIES))
    schedules.numbers(answer, [schedules.case(QUERIES, 300, "float16", head_dim=128)], block_k=128)


@check("schedule: right under 200 random timings", points=3)
def test_timings(answer: Answer) -> None:
    schedules.any_timing(answer, QUERIES, depths=())


@check("schedule: the next tile is loaded while this one is worked on", points=2)
def test_loads_ahead(answer: Answer) -> None:
    timeline = schedules.traced(answer, QUERIES)
    (wg,) = schedules.warpgroups(timeline.consumers, 1, "multiply")
    products = {what: timeline.of(wg, what) for what in "SO"}
    softmaxes = timeline.softmaxes(wg)
    for tile, product, after, work in (
        ("K", "S", softmaxes, "the softmax"),
        ("V", "O", products["S"][1:], "S of the next block"),
    ):
        loads = timeline.of(wg, tile)
        for n, (load, later) in enumerate(zip(loads[1:], after)):
            if load.issued > later.issued:
                raise CheckFailed(
                    f"{wg}, block {n}: the load of the next {tile} is issued at cycle {load.issued:.0f}, after {work} "
                    f"(cycle {later.issued:.0f}). The tile of {tile} is free as soon as {product} of this block is "
                    "there: issue the load then, and the tensor cores will not wait for it"
                )
