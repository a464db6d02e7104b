"""The grader catches every wrong answer of tests/course/mutants/, in the right words, and accepts every correct one."""

import os

import pytest
import torch

from fa_reference.course import CHAPTERS
from fa_reference.grading.kill_matrix import key, run_matrix, together
from fa_reference.grading.kill_page import records
from fa_reference.grading.mutants import ANYWHERE, BadMutant, Patched, read_answers
from fa_reference.grading.report import FAILED, NOT_GRADED, PASSED
from fa_reference.grading.trials import Trial, problem

JOBS = min(2, os.cpu_count() or 1)
# The first test of a chapter waits for all answers to it.
pytestmark = pytest.mark.timeout(900)
ANSWERS = [answer for where in CHAPTERS for answer in read_answers(where.number)]


@pytest.fixture(scope="module")
def trials_of():
    """trials_of(answer): its trials; the first question about a chapter runs all that a machine like this can see."""
    done: dict[str, list[Trial]] = {}

    def trials_of(answer: Patched) -> list[Trial]:
        if key(answer) not in done:
            number = answer.where_it_lives.number
            here = [a for a in ANSWERS if a.where_it_lives.number == number]
            if not torch.cuda.is_available():
                here = [a for a in here if a.where == ANYWHERE]
            done.update((key(a), trials) for a, trials in run_matrix(here, everything=False, jobs=JOBS))
        return done[key(answer)]

    return trials_of


def recorded(answer: Patched) -> dict | None:
    """What a recorded matrix says of a mutant on a machine that can see it."""
    for record in records():
        for entry in record["answers"]:
            named = f"{entry['chapter']} {entry['answer']}" == key(answer)
            if named and entry["states"].get(entry["check"]) not in (None, NOT_GRADED):
                return entry
    return None


@pytest.mark.parametrize("answer", ANSWERS, ids=key)
def test_the_grader_judges_it_as_it_should(answer: Patched, trials_of):
    if answer.where != ANYWHERE and not torch.cuda.is_available():
        answer.source()  # it still applies
        entry = recorded(answer)
        if entry is None:
            pytest.skip("not recorded on a GPU yet: make mutants ARGS='--where gpu hopper --quick --write' there")
        assert entry["problem"] is None and entry["states"][entry["check"]] == FAILED
        return
    assert problem(answer, trials_of(answer)) is None


def test_a_patch_that_no_longer_fits_is_refused():
    answer = ANSWERS[0]
    with pytest.raises(BadMutant, match="stands 0 times, not once"):
        Patched(answer.where_it_lives, answer.file, "x", edits=(("no such text", ""),)).source()
    with pytest.raises(BadMutant, match="0 solution regions belong to a function nobody"):
        Patched(answer.where_it_lives, answer.file, "x", bodies=(("nobody", "pass"),)).source()


def test_a_mutant_that_survives_is_reported(trials_of):
    """An answer without a bug, declared as a mutant, must be called a survivor."""
    real = next(a for a in ANSWERS if a.is_mutant and a.where == ANYWHERE)
    passed = [Trial(**{**t.__dict__, "state": "passed"}) for t in trials_of(real)]
    assert problem(real, passed).startswith("survives ")
    other = [Trial(**{**t.__dict__, "message": "something else"}) for t in trials_of(real)]
    assert problem(real, other).startswith("the message lacks ")


def test_runs_of_the_same_check_add_up_and_parts_of_a_run_do_not():
    def entry(**states: str) -> dict:
        return {"bug": "", "check": "", "states": states, "every_check": True, "repetitions": 1}

    numbers, speed = entry(numbers=PASSED), entry(speed=PASSED)
    assert together(numbers, speed)["repetitions"] == 1
    assert together(numbers, speed)["states"] == {"numbers": PASSED, "speed": PASSED}
    assert together(numbers, numbers)["repetitions"] == 2
    assert not together(numbers, entry(numbers=FAILED))["same_in_every_run"]
