"""Every chapter: its solution passes, its stub fails every check, its hints and its lesson are in order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fa_reference import lessons
from fa_reference.course import CHAPTERS, ROOT, Chapter
from fa_reference.grading.hints import is_open, read_hints
from fa_reference.grading.report import FAILED, NOT_GRADED, PASSED
from fa_reference.stubs import write_stubs
from fa_reference.versions import VERSIONS

chapters = pytest.mark.parametrize("where", CHAPTERS, ids=lambda where: where.folder)
SECONDS_PER_CHECK_RUN = 120  # about 25 s where nothing else runs


def graded(tmp_path: Path, *arguments: str | Path) -> tuple[int, dict]:
    """Exit status and report of a `check`."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "fa_reference", "check", *map(str, arguments), "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS_PER_CHECK_RUN, check=False)
    assert report.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text())


@chapters
def test_the_solution_passes(where: Chapter, tmp_path: Path):
    status, report = graded(tmp_path, where.number, "--solution")
    assert [c for c in report["checks"] if c["state"] == FAILED] == []
    assert status == 0 and report["totals"][PASSED] > 0


@chapters
def test_the_stub_fails_every_check_and_says_what_to_write(where: Chapter, tmp_path: Path):
    write_stubs(where, tmp_path)
    status, report = graded(tmp_path, where.number, "--impl", tmp_path)
    passed = [c["name"] for c in report["checks"] if c["state"] == PASSED]
    assert passed == [] and status == 1
    for outcome in report["checks"]:
        if outcome["state"] != NOT_GRADED:
            assert outcome["message"].startswith("not written yet: "), outcome


@chapters
def test_every_exercise_has_three_hints(where: Chapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    exercises = read_hints(where)
    assert {e.file for e in exercises} == set(where.files)
    hints = {e: e.hints for e in exercises}
    assert all(len(set(three)) == 3 and all(three) for three in hints.values())
    write_stubs(where, tmp_path)
    monkeypatch.setattr(Chapter, "room", tmp_path)
    assert all(is_open(where, e) for e in exercises), "hints for a function that is not cut"


@chapters
def test_the_lesson_is_in_step_with_its_text(where: Chapter):
    assert lessons.out_of_step(where) is None


@chapters
def test_the_lesson_runs(where: Chapter):
    notebook = lessons.execute(where)
    assert any(cell.cell_type == "code" and cell.outputs for cell in notebook.cells)


def test_every_version_exists_and_is_a_file_of_its_chapter():
    files = {where.number: where.all_files for where in CHAPTERS}
    for version in VERSIONS.values():
        assert (version.home / version.file).is_file()
        assert version.chapter is None or version.file in files[version.chapter]
