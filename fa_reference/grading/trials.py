"""Run a chapter's checks on many answers at once: on every mutant and every correct variant of it.

The checks run as the grader runs them, by pytest and in a child process each, but all answers share one collection and
one preloaded process, so that a trial costs little more than the learner's code in it.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_reference.course import Chapter, chapter
from fa_reference.grading.answer import Answer
from fa_reference.grading.mutants import Patched, read_answers
from fa_reference.grading.report import FAILED, PASSED
from fa_reference.grading.runner import graded_file, skip_if_not_graded_here, verdict, workshop_for

Wanted = Callable[[Patched, str, Mapping[str, Any]], bool]  # answer, file and marker of a check


@dataclass(frozen=True)
class Trial:
    """One check on one answer. state: passed, failed or not graded here, as in a report."""

    chapter: int
    answer: str  # the Patched's label
    check: str
    checked_in: str  # the learner's file that the check belongs to
    state: str
    message: str
    seconds: float

    @property
    def kills(self) -> bool:
        """True if the check failed."""
        return self.state == FAILED


def reaches(answer: Patched, checks: Path) -> bool:
    """True if a test module reads the answer's patched file: it grades that file, or names it."""
    own = graded_file(answer.where_it_lives, checks) == answer.file
    return own or f'"{answer.file}"' in checks.read_text(encoding="utf-8")


def only_its_own_check(answer: Patched, file: str, about: Mapping[str, Any]) -> bool:
    """A mutant runs the check that must kill it, a correct variant all of them."""
    return not answer.is_mutant or (answer.checked_in, answer.check) == (file, about["name"])


class TrialPlugin:
    """The pytest plugin that runs every wanted check once for each answer."""

    def __init__(self, where: Chapter, answers: Sequence[Patched], wanted: Wanted, folder: Path) -> None:
        self.where = where
        self.answers = answers
        self.wanted = wanted
        self.folder = folder
        self.trials: list[Trial] = []
        self.workshop = workshop_for(where)

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "check(name, points, needs): a graded check")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        checks = Path(metafunc.module.__file__)
        about = metafunc.definition.get_closest_marker("check").kwargs
        file = graded_file(self.where, checks)
        chosen = [a for a in self.answers if reaches(a, checks) and self.wanted(a, file, about)]
        metafunc.parametrize("answer", chosen, ids=[a.label for a in chosen], indirect=True)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [i for i in items if isinstance(i.callspec.params.get("answer"), Patched)]

    @pytest.fixture
    def answer(self, request: pytest.FixtureRequest) -> Answer:
        """The patched solution, in a child process of this check's own."""
        patched: Patched = request.param
        folder = self.folder / str(self.answers.index(patched))
        self.workshop.timed_out = False  # an endless loop of one answer must not shorten the time of the next
        answer = Answer(self.workshop, folder if folder.exists() else patched.write(folder))
        yield answer
        answer.close()

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        skip_if_not_graded_here(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport:
        report = yield
        if outcome := verdict(item, call):
            label = item.callspec.params["answer"].label
            name, file = item.get_closest_marker("check").kwargs["name"], graded_file(self.where, item.path)
            self.trials.append(Trial(self.where.number, label, name, file, *outcome, round(call.duration, 3)))
        return report


def run_trials(number: int, labels: Sequence[str], everything: bool = False, timed: bool | None = None) -> list[Trial]:
    """Run a chapter's checks on the answers with these labels; `everything`: every check that reads the patched file.

    timed: only the checks that measure time, or only the others; None: both. RuntimeError if pytest could not run them.
    """
    where = chapter(number)
    answers = [a for a in read_answers(number) if a.label in labels]

    def wanted(answer: Patched, file: str, about: Mapping[str, Any]) -> bool:
        return timed in (None, about["timed"]) and (everything or only_its_own_check(answer, file, about))

    with tempfile.TemporaryDirectory() as folder:
        plugin = TrialPlugin(where, answers, wanted, Path(folder))
        options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=importlib"]
        try:
            status = pytest.main([str(where.tests), *options], plugins=[plugin])
        finally:
            plugin.workshop.close()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest could not run the checks of chapter {number}: {status!r}")
    return plugin.trials


def run_apart(parts: Sequence[tuple[int, Sequence[str], bool, bool | None]], jobs: int = 1) -> Iterator[list[Trial]]:
    """`run_trials` for every part, each in a process of its own, `jobs` at a time; results as they come."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)  # of torch: as many as cores in every process would be in the way
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(run_trials, *part) for part in parts]):
            yield done.result()


def problem(answer: Patched, trials: Sequence[Trial]) -> str | None:
    """What is wrong with the grader by these trials of one answer; None if it judged the answer as it should.

    A mutant's own check must fail, with its words in the message; no check may fail on a correct variant.
    """
    if not answer.is_mutant:
        failed = [t for t in trials if t.kills]
        return f'correct, and "{failed[0].check}" fails: {failed[0].message}' if failed else None
    own = next((t for t in trials if (t.checked_in, t.check) == (answer.checked_in, answer.check)), None)
    if own is None:
        return f'{answer.checked_in} has no check "{answer.check}", or it does not read {answer.file}'
    if own.state == PASSED:
        others = [t.check for t in trials if t.kills]
        return f'survives "{own.check}"' + (f"; it fails {others}" if others else "")
    missing = [w for w in answer.words if w.lower() not in own.message.lower()]
    return f"the message lacks {missing}: {own.message}" if own.kills and missing else None
