"""Answers that test the grader: the course's solutions with one bug each, and correct ones written differently.

They are kept as short patches in `tests/course/mutants/NN_name/FILE.toml`; the README there describes the format.
"""

import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

from fa_reference.course import ROOT, Chapter, chapter
from fa_reference.grading.check import NEEDS
from fa_reference.stubs import BEGIN, END

FOLDER = ROOT / "tests" / "course" / "mutants"
ANYWHERE = "any"
PLACES = (ANYWHERE, *NEEDS)
KEYS = {"name", "bug", "edit", "body", "whole", "check", "checked_in", "words", "where"}


class BadMutant(ValueError):
    """A patch that cannot be used: an unknown key, or words of the solution that are no longer there."""


@dataclass(frozen=True)
class Patched:
    """One answer to a chapter's `file`: a mutant (bug not empty) or a correct variant.

    edits: (old, new) texts; bodies: (function, code between its solution markers); whole: a file beside the TOML that
    takes the place of `file`. A mutant says which check of which file must fail, with which words in its message, and
    `where` the bug can be seen: "any" machine, or one with a "gpu" or a "hopper" GPU.
    """

    where_it_lives: Chapter
    file: str
    name: str
    bug: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    bodies: tuple[tuple[str, str], ...] = ()
    whole: Path | None = None
    check: str = ""
    checked_in: str = ""
    words: tuple[str, ...] = ()
    where: str = ANYWHERE

    @property
    def is_mutant(self) -> bool:
        """True for an answer with a bug."""
        return bool(self.bug)

    @property
    def label(self) -> str:
        """`file: name`, unique in its chapter."""
        return f"{self.file}: {self.name}"

    def source(self) -> str:
        """The patched file; BadMutant if the solution no longer holds what is to be replaced."""
        if self.whole is not None:
            return self.whole.read_text(encoding="utf-8")
        text = (self.where_it_lives.solution / self.file).read_text(encoding="utf-8")
        for function, code in self.bodies:
            text = _with_body(text, function, code, self.label)
        for old, new in self.edits:
            if text.count(old) != 1:
                raise BadMutant(
                    f"{self.label}: in {self.where_it_lives.folder}/{self.file} this stands {text.count(old)} times, "
                    f"not once:\n{old}"
                )
            text = text.replace(old, new)
        return text

    def write(self, folder: Path) -> Path:
        """Copy the chapter's solution to `folder` with this file patched, and return the folder."""
        shutil.copytree(self.where_it_lives.solution, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / self.file).write_text(self.source(), encoding="utf-8")
        return folder


def _with_body(text: str, function: str, code: str, label: str) -> str:
    """`text` with the code between the solution markers of `function` replaced."""
    lines, header, found = text.split("\n"), "", []
    for number, line in enumerate(lines):
        if line and not line[0].isspace() and "(" in line and line[0] not in "#/":
            header = line
        elif BEGIN.match(line) and re.search(rf"\b{re.escape(function)}\s*\(", header):
            found.append(number)
    if len(found) != 1:
        raise BadMutant(f"{label}: {len(found)} solution regions belong to a function {function}, not one")
    end = next(n for n in range(found[0], len(lines)) if END.match(lines[n]))
    margin = BEGIN.match(lines[found[0]])["indent"]
    return "\n".join([*lines[: found[0]], indent(dedent(code).strip("\n"), margin), *lines[end + 1 :]])


def _patched(where: Chapter, file: str, home: Path, kind: str, entry: dict[str, Any]) -> Patched:
    label = f"{home.name}/{Path(file).stem}.toml: {entry.get('name', '?')}"
    unknown = set(entry) - KEYS
    if unknown or "name" not in entry:
        raise BadMutant(f"{label}: unknown keys {sorted(unknown)}; allowed: {sorted(KEYS)}, and name is a must")
    if ("whole" in entry) == ("edit" in entry or "body" in entry):
        raise BadMutant(f"{label}: give either whole, or edit or body or both")
    needed = ("bug", "check", "words") if kind == "mutant" else ()
    if missing := [key for key in needed if not entry.get(key)]:
        raise BadMutant(f"{label}: a mutant needs {', '.join(missing)}")
    place = entry.get("where", ANYWHERE)
    if place not in PLACES:
        raise BadMutant(f"{label}: where is {place!r}; allowed: {', '.join(PLACES)}")
    return Patched(
        where,
        file,
        entry["name"],
        entry.get("bug", ""),
        tuple((old, new) for old, new in entry.get("edit", ())),
        tuple((function, code) for function, code in entry.get("body", ())),
        home / entry["whole"] if "whole" in entry else None,
        entry.get("check", ""),
        entry.get("checked_in", file),
        tuple(entry.get("words", ())),
        place,
    )


def read_answers(number: int, folder: Path = FOLDER) -> list[Patched]:
    """The mutants and correct variants of a chapter, in the order of its files; BadMutant for one that is malformed."""
    where = chapter(number)
    home = folder / where.folder
    answers: list[Patched] = []
    stems = {Path(file).stem: file for file in where.files}
    for path in sorted(home.glob("*.toml"), key=lambda p: [*stems, p.stem].index(p.stem)):
        if path.stem not in stems:
            raise BadMutant(f"{path.name}: chapter {number} has no file of that name; it has {', '.join(where.files)}")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := set(content) - {"mutant", "variant"}:
            raise BadMutant(f"{path}: unknown tables {sorted(unknown)}; allowed: mutant, variant")
        for kind in ("mutant", "variant"):
            answers += [_patched(where, stems[path.stem], home, kind, entry) for entry in content.get(kind, [])]
    labels = [a.label for a in answers]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise BadMutant(f"chapter {number}: these names stand twice: {', '.join(sorted(twice))}")
    return answers
