"""Graded checks of chapter 9, schedule.py: softmax under the same warpgroup's product, on the model of an SM."""

from fa_reference.grading import check, schedules
from fa_reference.grading.answer import Answer

QUERIES = 128


@check("schedule: any length, masked, rows without keys", points=1)
def test_lengths(answer: Answer) -> None:
    schedules.numbers(answer, [schedules.case(QUERIES, 64), *schedules.awkward(QUERIES)])
    schedules.numbers(answer, [schedules.case(QUERIES, 500, "float16", head_dim=128)], block_k=128)


@check("schedule: every number of stages, fewer blocks than stages", points=1)
def test_depths(answer: Answer) -> None:
    schedules.every_depth(answer, QUERIES)


@check("schedule: right under 200 random timings", points=3)
def test_timings(answer: Answer) -> None:
    schedules.any_timing(answer, QUERIES)


@check("schedule: P V is in flight during the next softmax", points=3)
def test_two_stages(answer: Answer) -> None:
    schedules.softmax_under_own_product(answer, QUERIES)


@check("schedule: the turns alternate, whatever the timing", points=1)
def test_alternates(answer: Answer) -> None:
    schedules.alternates(answer, QUERIES, two_stages=True)
