"""Build and check the lessons: lesson.py is the text, lesson.ipynb the same with its outputs.

The text pair (jupytext's percent format) is what authors edit; the notebook is made from it and executed.
"""

import os
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from fa_reference.course import CHAPTERS, ROOT, Chapter

SECONDS_PER_LESSON = 300


class LessonError(RuntimeError):
    """A lesson that does not run, or whose notebook is not in step with its text."""


def _chosen(number: int | None) -> list[Chapter]:
    return [c for c in CHAPTERS if number in (None, c.number) and (c.room / "lesson.py").exists()]


def _text(where: Chapter) -> nbformat.NotebookNode:
    notebook = jupytext.read(where.room / "lesson.py")
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"  # stable ids: rebuilding changes only what changed
    return notebook


def execute(where: Chapter) -> nbformat.NotebookNode:
    """The lesson with its outputs, run from the repository's root; LessonError naming the cell that failed."""
    notebook = _text(where)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook, timeout=SECONDS_PER_LESSON, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise LessonError(f"{where.folder}/lesson.py does not run:\n{error}") from None
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def build(number: int | None = None) -> int:
    """Execute the lessons (or one) and write their notebooks; prints a line each and returns the exit status."""
    for where in _chosen(number):
        began = time.monotonic()
        notebook = execute(where)
        nbformat.write(notebook, where.room / "lesson.ipynb")
        print(f"{where.folder}/lesson.ipynb: executed in {time.monotonic() - began:.1f} s")
    return 0


def out_of_step(where: Chapter) -> str | None:
    """Why the committed notebook is not the text pair with outputs; None if it is."""
    path: Path = where.room / "lesson.ipynb"
    if not path.exists():
        return f"{where.folder}/lesson.ipynb is missing"
    committed, text = nbformat.read(path, as_version=4), _text(where)
    if [(c.cell_type, c.source) for c in committed.cells] != [(c.cell_type, c.source) for c in text.cells]:
        return f"{where.folder}/lesson.ipynb is not in step with lesson.py: run make lessons"
    code = [c for c in committed.cells if c.cell_type == "code"]
    if any(c.execution_count is None for c in code):
        return f"{where.folder}/lesson.ipynb has cells that were not executed: run make lessons"
    if any(o.output_type == "error" for c in code for o in c.outputs):
        return f"{where.folder}/lesson.ipynb has a cell with an error"
    return None


def check(number: int | None = None) -> int:
    """Print which notebooks are not in step with their text and return the exit status; executes nothing."""
    problems = [problem for where in _chosen(number) if (problem := out_of_step(where))]
    print("\n".join(problems) or "every lesson is in step with its text")
    return 1 if problems else 0
