"""Three hints an exercise, one more each time: chapters/NN_name/hints.md holds them."""

import re
from dataclasses import dataclass

from rich.console import Console
from rich.markdown import Markdown

from fa_reference.course import Chapter, chapter
from fa_reference.grading.progress import load_progress, save_progress

SECTION = re.compile(r"^## (?P<file>[\w.]+): (?P<function>\w+)\s*$", re.MULTILINE)
HINT = re.compile(r"^(?P<number>[123])\. ", re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    """The hints for one function of one of the learner's files."""

    file: str
    function: str
    hints: tuple[str, str, str]

    @property
    def name(self) -> str:
        """`file:function`, which is unique in a chapter."""
        return f"{self.file}:{self.function}"


def read_hints(where: Chapter) -> list[Exercise]:
    """The exercises of a chapter in order; ValueError if a section does not have exactly three hints."""
    text = (where.room / "hints.md").read_text(encoding="utf-8")
    heads = list(SECTION.finditer(text))
    exercises = []
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        body = text[head.end() : following.start() if following else len(text)]
        marks = list(HINT.finditer(body))
        if [m["number"] for m in marks] != ["1", "2", "3"]:
            raise ValueError(f"{where.folder}/hints.md: {head['file']}: {head['function']} needs hints 1., 2. and 3.")
        ends = [m.start() for m in marks[1:]] + [len(body)]
        hints = tuple(body[m.end() : end].strip() for m, end in zip(marks, ends, strict=True))
        exercises.append(Exercise(head["file"], head["function"], hints))
    return exercises


def is_open(where: Chapter, exercise: Exercise) -> bool:
    """True while the learner's function still contains the stub's TODO."""
    path = where.room / exercise.file
    source = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if path.suffix in (".cu", ".cuh"):
        pattern, todo = rf"^[^\n/]*\b{exercise.function}\([^;{{]*\{{.*?^\}}", "// TODO"
    else:
        end = r"(?=^(?:async def|def|class|@|[A-Z_]+ =)|\Z)"
        pattern, todo = rf"^(?:async )?def {exercise.function}\b.*?{end}", "# TODO"
    found = re.search(pattern, source, re.M | re.S)
    return found is None or todo in found[0]


def show_next_hint(number: int, *, function: str | None = None, reset: bool = False) -> int:
    """Print one hint more than last time and return the exit status.

    It is for `function` (or `file:function`; where several files have that function, the first that is still open), or
    else for the first exercise that is still open (or, with all written, has hints left). `reset` starts over with the
    first hint.
    """
    console = Console(highlight=False)
    try:
        where = chapter(number)
    except ValueError as error:
        console.print(f"no hints: {error}")
        return 2
    exercises = read_hints(where)
    progress = load_progress()
    shown: dict[str, int] = progress.setdefault(where.folder + "/hints", {})
    if reset:
        shown.clear()
    if function is not None:
        named = [e for e in exercises if function in (e.function, e.name)]
        if not named:
            names = ", ".join(e.name for e in exercises)
            console.print(f"no hints for {function!r}; the exercises of chapter {number} are {names}", soft_wrap=True)
            return 2
        chosen = next((e for e in named if is_open(where, e)), named[0])
    else:
        left = [e for e in exercises if shown.get(e.name, 0) < 3]
        chosen = next((e for e in exercises if is_open(where, e)), left[0] if left else exercises[-1])
    count = min(shown.get(chosen.name, 0) + 1, 3)
    shown[chosen.name] = count
    save_progress(progress)
    console.print(f"[bold]{chosen.file}: {chosen.function}[/], hint {count} of 3")
    console.print(Markdown(chosen.hints[count - 1]))
    last = "That was the last one. " if count == 3 else ""
    others = " ".join(e.name for e in exercises if e is not chosen)
    if others:
        console.print(
            f"[dim]{last}For another exercise: make hint CHAPTER={number} FUNCTION=... (of: {others})[/]",
            soft_wrap=True,
        )
    return 0
