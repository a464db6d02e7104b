"""What a grading run found, printed as it happens and kept as data."""

import os
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import indent

from rich.console import Console
from rich.markup import escape

from fa_reference.course import Chapter

PASSED, FAILED, NOT_GRADED = "passed", "failed", "not graded here"
COMPILED, RAN = "compiled", "CPU"  # how a check was graded; on a GPU: the GPU's name
MARKS = {PASSED: "[green]✓[/]", FAILED: "[red]✗[/]", NOT_GRADED: "[yellow]–[/]"}


class _PatientConsole(Console):
    """Goes on in silence once whoever read the output (`| head`) is gone, instead of ending the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True)
class Outcome:
    """One check's result: `message` is the failure, the reason why it was not graded here, or what was measured.

    how: COMPILED (machine code was looked at, nothing ran), RAN (on the CPU), or the name of the GPU that it ran on.
    """

    name: str
    file: str
    points: int
    state: str
    message: str = ""
    printed: str = ""
    how: str = RAN


def _cause(message: str) -> str:
    """What two failures have in common if they have the same cause: the message without the case it was seen in."""
    words, run, _ = message.partition("\nin a run with")  # on the model of an SM, where cycles and tiles differ
    return re.sub(r"\d[\d.,]*", "#", words) if run else message.split("\nsmallest failing case")[0]


def _way(how: str) -> str:
    """How checks were graded, for the last lines of a report."""
    words = {COMPILED: "by their machine code alone (which says nothing about right numbers)", RAN: "on this CPU"}
    return words.get(how, f"on the {how}")


@dataclass
class Report:
    """All outcomes of one grading run of one folder."""

    where: Chapter
    folder: Path
    whose: str
    selected: bool = False  # only some of the chapter's checks were asked for
    outcomes: list[Outcome] = field(default_factory=list)
    console: Console = field(default_factory=lambda: _PatientConsole(highlight=False, soft_wrap=True))
    explained: dict[str, str] = field(default_factory=dict)  # message -> the first check that failed with it
    waiting: list[Outcome] = field(default_factory=list)  # not graded here; those of a file are printed together

    def of(self, state: str) -> list[Outcome]:
        """The outcomes in one of the three states."""
        return [o for o in self.outcomes if o.state == state]

    @property
    def failed(self) -> list[Outcome]:
        """Failed checks."""
        return self.of(FAILED)

    @property
    def graded(self) -> list[Outcome]:
        """Checks that ran: passed or failed."""
        return self.of(PASSED) + self.of(FAILED)

    def begin(self) -> None:
        """Print what is graded: always the first line."""
        self.console.print(f"Grading [bold]{escape(str(self.folder))}[/] ({self.whose})")
        self.console.print(f"Chapter {self.where.number}: {self.where.title}\n")

    def add(self, outcome: Outcome) -> None:
        """Keep and print one outcome."""
        if not self.outcomes or self.outcomes[-1].file != outcome.file:
            self._print_waiting()
            self.console.print(f"[bold]{outcome.file}[/]")
        self.outcomes.append(outcome)
        if outcome.state == NOT_GRADED:
            self.waiting.append(outcome)
            return
        got = outcome.points if outcome.state == PASSED else 0
        how = {COMPILED: "  [dim]compiled, not run[/]", RAN: "", "": ""}.get(outcome.how, f"  [dim]{outcome.how}[/]")
        points = f"  [dim]{got}/{outcome.points}[/]{how}"
        self.console.print(f"  {MARKS[outcome.state]} {escape(outcome.name)}{points}")
        if outcome.message:
            first = self.explained.setdefault(_cause(outcome.message), outcome.name)
            words = outcome.message if first == outcome.name else f'the same as for "{first}"'
            self.console.print(indent(escape(words), "      "))
        if outcome.printed:
            self.console.print(indent("your code printed:\n" + escape(outcome.printed), "      "), style="dim")

    def _print_waiting(self) -> None:
        """Print what of the last file was not graded here: one line for each reason."""
        for reason in dict.fromkeys(o.message for o in self.waiting):
            names = " · ".join(o.name for o in self.waiting if o.message == reason)
            self.console.print(f"  {MARKS[NOT_GRADED]} {escape(names)}")
            self.console.print(f"      [yellow]not graded here[/] ({escape(reason)})")
        self.waiting.clear()

    def finish(self) -> None:
        """Print the totals of the three outcomes."""
        self._print_waiting()
        passed, failed, not_graded = (self.of(s) for s in (PASSED, FAILED, NOT_GRADED))
        points = sum(o.points for o in passed)
        possible = sum(o.points for o in self.graded)
        self.console.print(
            f"\n[green]{len(passed)} passed[/], [red]{len(failed)} failed[/], "
            f"[yellow]{len(not_graded)} not graded here[/]: {points} of {possible} points"
            + (f" ({sum(o.points for o in not_graded)} more need other hardware)" if not_graded else "")
        )
        if any(o.how != RAN for o in self.outcomes):
            ways = list(dict.fromkeys(o.how for o in self.graded))
            self.console.print("graded " + ", ".join(f"{sum(o.how == w for o in self.graded)} {_way(w)}" for w in ways))
        if not self.graded:
            self.console.print("Nothing could be graded on this machine.")
        elif failed and self.whose == "your files":
            self.console.print(f"Stuck? make hint CHAPTER={self.where.number}")
        elif not failed and self.selected:
            self.console.print(f"All selected checks pass. All of them: make check CHAPTER={self.where.number}")
        elif not failed and self.whose == "your files":
            solution = self.where.solution.relative_to(self.where.solution.parents[1])
            self.console.print(f"Well done. Compare with {solution}/ now, and see the lesson's last section.")

    def as_dict(self) -> dict:
        """The report as data: folder, outcomes, totals."""
        return {
            "schema_version": 1,
            "chapter": self.where.number,
            "title": self.where.title,
            "folder": str(self.folder),
            "graded": self.whose,
            "points": sum(o.points for o in self.of(PASSED)),
            "points_possible": sum(o.points for o in self.graded),
            "points_not_graded_here": sum(o.points for o in self.of(NOT_GRADED)),
            "totals": {state: len(self.of(state)) for state in (PASSED, FAILED, NOT_GRADED)},
            "checks": [asdict(o) for o in self.outcomes],
        }
