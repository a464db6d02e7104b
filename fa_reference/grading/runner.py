"""Grade a folder: run a chapter's checks with pytest and report three outcomes."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fa_reference import course
from fa_reference.course import Chapter
from fa_reference.grading.answer import Answer, Workshop
from fa_reference.grading.check import NEEDS, CheckFailed
from fa_reference.grading.progress import record_progress
from fa_reference.grading.report import COMPILED, FAILED, NOT_GRADED, PASSED, RAN, Outcome, Report

OK, SOMETHING_FAILED, WRONG_CALL = 0, 1, 2


class WrongCall(ValueError):
    """A call that cannot be graded: no such chapter, no such folder."""


def _missing(needs: str | None) -> str | None:
    """Why a check cannot run on this machine; None if it can."""
    if needs is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return NEEDS[needs]
    if needs == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        return f"{NEEDS[needs]}: it has a {torch.cuda.get_device_name()}"
    return None


def workshop_for(where: Chapter) -> Workshop:
    """A workshop with what this chapter's files import loaded."""
    return Workshop(["fa_reference.triton_cpu"] if any("triton" in f for f in where.files) else [])


def graded_file(where: Chapter, checks: Path) -> str:
    """The learner's file that a test module grades: test_naive.py is about naive.py (or naive.cu)."""
    stem = checks.stem.removeprefix("test_")
    return next(file for file in where.files if Path(file).stem == stem)


def skip_if_not_graded_here(item: pytest.Item) -> None:
    """Skip a check, with the reason, that needs other hardware."""
    reason = _missing(item.get_closest_marker("check").kwargs["needs"])
    if reason:
        pytest.skip(reason)


def verdict(item: pytest.Item, call: pytest.CallInfo) -> tuple[str, str] | None:
    """One of the three outcomes and its message, if this phase of a check decides it."""
    if call.when == "setup" and call.excinfo is not None:
        return FAILED, f"the check could not start (a bug of the course): {call.excinfo.value}"
    if call.when != "call":
        return None
    if call.excinfo is None:
        return PASSED, ""
    reason = _skip_reason(call)
    return (NOT_GRADED, reason) if reason is not None else (FAILED, _words(call.excinfo.value, item))


def _gpu_name(state: str) -> str:
    """The GPU that a check ran on; empty for one that did not run."""
    import torch

    return "" if state == NOT_GRADED else torch.cuda.get_device_name()


class GradingPlugin:
    """The pytest plugin that gives checks their `answer` and collects outcomes."""

    def __init__(self, where: Chapter, folder: Path, report: Report) -> None:
        self.folder = folder
        self.report = report
        self.workshop = workshop_for(where)

    @pytest.fixture
    def answer(self) -> Answer:
        """The graded folder, in a child process of this check's own."""
        answer = Answer(self.workshop, self.folder)
        yield answer
        answer.close()

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "check(name, points, needs, compiled): a graded check")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport:
        report = yield
        if outcome := verdict(item, call):
            self._add(item, *outcome)
        return report

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        skip_if_not_graded_here(item)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = self.report.where.files
        items.sort(key=lambda item: order.index(graded_file(self.report.where, item.path)))

    def _add(self, item: pytest.Item, state: str, message: str) -> None:
        mark = item.get_closest_marker("check").kwargs
        file = graded_file(self.report.where, item.path)
        answer = item.funcargs.get("answer")
        printed = answer.printed() if state == FAILED and answer is not None else ""
        if state == PASSED and answer is not None:
            message = "\n".join(answer.remarks)
        how = COMPILED if mark["compiled"] else RAN if mark["needs"] is None else _gpu_name(state)
        self.report.add(Outcome(mark["name"], file, mark["points"], state, message, printed, how))


def _skip_reason(call: pytest.CallInfo) -> str | None:
    if call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception):
        return str(call.excinfo.value.msg)
    return None


def _words(error: BaseException, item: pytest.Item) -> str:
    if isinstance(error, CheckFailed):
        return str(error)
    if isinstance(error, AssertionError):
        return str(error).split("\n")[0] or "the result is wrong"
    frame = next((f for f in reversed(_frames(error)) if Path(f[0]) == item.path), ("?", 0))
    return (
        f"the check could not judge the result ({type(error).__name__}: {error}): does the function return what its "
        f"docstring says? [{item.path.name}:{frame[1]}]"
    )


def _frames(error: BaseException) -> list[tuple[str, int]]:
    frames, trace = [], error.__traceback__
    while trace:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return frames


def find_folder(number: int, impl: Path | None, solution: bool) -> tuple[Chapter, Path, str]:
    """(chapter, folder to grade, whose it is); WrongCall with one line for a chapter or a folder that is not there."""
    try:
        where = course.chapter(number)
    except ValueError as error:
        raise WrongCall(str(error)) from None
    if solution and impl is not None:
        raise WrongCall("IMPL and SOLUTION exclude each other: grade one folder at a time")
    if solution:
        return where, where.solution, "the reference solution"
    if impl is None:
        return where, where.room, "your files"
    if not impl.is_dir():
        raise WrongCall(f"no folder {impl}: IMPL must be a folder that holds {', '.join(where.files)}")
    nested = impl / where.folder
    return where, (nested if nested.is_dir() else impl).resolve(), "the folder named by IMPL"


def grade(
    chapter: int,
    impl: Path | None = None,
    solution: bool = False,
    json_path: Path | None = None,
    only: str | None = None,
) -> int:
    """Grade one chapter, print the report and return the exit status.

    impl: a folder with the chapter's files; solution: grade the reference solution; json_path: write the report there;
    only: run the checks whose name, or whose file's name, contains this text. Returns 0 if nothing failed and something
    was graded, 1 if something failed (or nothing could be graded), 2 for a wrong call.
    """
    try:
        where, folder, whose = find_folder(chapter, impl, solution)
        if json_path is not None and not json_path.resolve().parent.is_dir():
            raise WrongCall(f"no folder {json_path.resolve().parent} to write the JSON report to")
    except WrongCall as error:
        print(f"cannot grade: {error}")
        return WRONG_CALL
    report = Report(where, folder, whose, selected=bool(only))
    report.begin()
    plugin = GradingPlugin(where, folder, report)
    arguments = [str(where.tests), "-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts="]
    try:
        status = pytest.main(arguments, plugins=[plugin, Selection(where, only)])
    finally:
        plugin.workshop.close()
    if status in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        print("grading was interrupted" if status == pytest.ExitCode.INTERRUPTED else "the checks could not be run")
        return SOMETHING_FAILED
    if only and not report.outcomes:
        print(f"cannot grade: no check of chapter {chapter} has {only!r} in its name, and no file in its own")
        return WRONG_CALL
    report.finish()
    exit_status = OK if report.graded and not report.failed else SOMETHING_FAILED
    if json_path is not None:
        data = {**report.as_dict(), "exit_status": exit_status, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        json_path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if folder == where.room and not only:
        record_progress(report)
    return exit_status


class Selection:
    """Keeps the checks whose name, or whose file's name, contains a text."""

    def __init__(self, where: Chapter, only: str | None) -> None:
        self.where, self.only = where, only

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        unmarked = [item.nodeid for item in items if item.get_closest_marker("check") is None]
        if unmarked:
            raise pytest.UsageError(f"not marked as checks: {', '.join(unmarked)}")
        if self.only:
            items[:] = [item for item in items if any(self.only.lower() in name.lower() for name in self._names(item))]

    def _names(self, item: pytest.Item) -> tuple[str, str]:
        return item.get_closest_marker("check").kwargs["name"], graded_file(self.where, item.path)
