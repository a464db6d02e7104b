"""Graded checks of chapter 8, schedule.py: consumers that take turns, on the model of an SM."""

from fa_reference.grading import check, schedules
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed
from fa_reference.hopper import covered, overlap

QUERIES = 128
UNDER = 0.55  # of a softmax, under the other consumer's products: with turns 0.7, without (chapter 7) 0.3


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


@check("schedule: the turns alternate, whatever the timing", points=2)
def test_alternates(answer: Answer) -> None:
    schedules.alternates(answer, QUERIES)


@check("schedule: softmax runs under the other consumer's products", points=2)
def test_overlap(answer: Answer) -> None:
    timeline = schedules.traced(answer, QUERIES)
    consumers = schedules.warpgroups(timeline.consumers, 2, "multiply")
    for one, other in (consumers, consumers[::-1]):
        # The first and the last have no counterpart: there the other one has not begun, or is done.
        softmax = timeline.softmaxes(one)[1:-1]
        products = [p for p in timeline.products if p.warpgroup == other]
        share = overlap(softmax, products) / max(1.0, covered(softmax))
        if share < UNDER:
            raise CheckFailed(
                f"{one}: in only {share:.0%} of the time of its softmaxes do the tensor cores work for {other}; with "
                f"turns it is more than {UNDER:.0%}. Is the turn handed on before the softmax, as soon as S is issued? "
                "Or has each product a turn of its own? O += P V and the next S belong into one: between them the turn "
                "is neither handed on nor waited for"
            )
