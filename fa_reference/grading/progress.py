"""What the learner has reached so far, remembered in .course/progress.json (not tracked by git)."""

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fa_reference.course import CHAPTERS, ROOT, Chapter

if TYPE_CHECKING:
    from fa_reference.grading.report import Report

FILE = ROOT / ".course" / "progress.json"


def load_progress() -> dict[str, Any]:
    """Everything remembered, by chapter folder; an unreadable file counts as empty."""
    try:
        return json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def save_progress(progress: dict[str, Any]) -> None:
    """Remember; written whole or not at all."""
    FILE.parent.mkdir(exist_ok=True)
    temporary = FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(progress, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(FILE)


def digest(path: Path) -> str:
    """A short hash of a file's content."""
    return sha256(path.read_bytes()).hexdigest()[:16]


def record_progress(report: "Report") -> None:
    """Remember the outcome of grading the learner's own files."""
    progress = load_progress()
    entry = progress.setdefault(report.where.folder, {})
    entry["points"] = report.as_dict()["points"]
    entry["points_possible"] = report.as_dict()["points_possible"]
    entry["not_graded_here"] = len(report.outcomes) - len(report.graded)
    entry["passing_files"] = {
        file: digest(report.where.room / file)
        for file in report.where.files
        if (report.where.room / file).exists()
        and any(o.file == file for o in report.graded)
        and not any(o.file == file for o in report.failed)
    }
    save_progress(progress)


def passes(where: Chapter, file: str) -> bool:
    """True if the learner's file, as it is now, passed all its checks when it was last graded."""
    known = load_progress().get(where.folder, {}).get("passing_files", {})
    path = where.room / file
    return path.exists() and known.get(file) == digest(path)


def show_progress() -> None:
    """Print a table of all chapters."""
    progress = load_progress()
    table = Table(title="Progress", title_justify="left")
    for column in ("chapter", "", "points", "files done"):
        table.add_column(column)
    for where in CHAPTERS:
        entry = progress.get(where.folder)
        if entry is None:
            points, done = "not started", ""
        else:
            points = f"{entry['points']} of {entry['points_possible']}"
            if entry["not_graded_here"]:
                points += f" ({entry['not_graded_here']} checks not graded here)"
            done = " ".join(f"{'✓' if passes(where, f) else '·'} {f}" for f in where.files)
        table.add_row(str(where.number), where.title, points, done)
    Console().print(table)
