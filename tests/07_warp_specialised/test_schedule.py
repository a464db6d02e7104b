"""Graded checks of chapter 7, schedule.py: producer, consumers and rings, on the model of an SM."""

from fa_reference.grading import check, schedules
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed

QUERIES = 128


@check("schedule: slot and parity of a tile", points=1)
def test_position(answer: Answer) -> None:
    for stages in (1, 2, 3, 4):
        for j in range(3 * stages + 2):
            got = answer.call(schedules.FILE, "position", j, stages)
            slot, round_ = j % stages, j // stages
            if tuple(got) != (slot, round_ % 2):
                raise CheckFailed(
                    f"position(j={j}, stages={stages}) must be {(slot, round_ % 2)}; it returned {tuple(got)}. Tile "
                    f"{j} is number {round_} (from 0) in slot {slot}, and that is the phase of its barriers"
                )


@check("schedule: one block of keys", points=1)
def test_one_block(answer: Answer) -> None:
    schedules.numbers(answer, [schedules.case(QUERIES, 64)])


@check("schedule: any length, masked, rows without keys", points=1)
def test_lengths(answer: Answer) -> None:
    schedules.numbers(answer, schedules.awkward(QUERIES))
    schedules.numbers(answer, [schedules.case(QUERIES, 500, "float16", head_dim=128)], block_k=128)


@check("schedule: every number of stages, fewer blocks than stages", points=2)
def test_depths(answer: Answer) -> None:
    schedules.every_depth(answer, QUERIES)


@check("schedule: right under 200 random timings", points=3)
def test_timings(answer: Answer) -> None:
    schedules.any_timing(answer, QUERIES)


@check("schedule: only the producer loads, only consumers multiply", points=1)
def test_roles(answer: Answer) -> None:
    timeline = schedules.traced(answer, QUERIES)
    (producer,) = schedules.warpgroups(timeline.loaders, 1, "issue TMA loads")
    if producer in timeline.consumers:
        raise CheckFailed(f"{producer} issues TMA loads and wgmmas: loading is the producer's work, multiplying is not")
    schedules.warpgroups(timeline.consumers, 2, "multiply")


@check("schedule: the producer runs ahead by all stages", points=2)
def test_runs_ahead(answer: Answer) -> None:
    schedules.runs_ahead(answer, QUERIES, depths=(1, 2, 3, 4))
