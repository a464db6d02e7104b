"""Stubs are solutions with the marked regions cut out, so the two can never drift apart.

In a solution, the lines from `# BEGIN SOLUTION: what to write` to `# END SOLUTION` become a TODO comment and a
statement that fails with the same words. `#: ` lines right below BEGIN continue the words. `BEGIN SOLUTION(triton)`
fails when Triton compiles (or interprets) the kernel; in a CUDA file (`// BEGIN SOLUTION: ...`) only the comment stays.
"""

import json
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from textwrap import wrap

from fa_reference.course import CHAPTERS, ROOT, Chapter, chapter

BEGIN = re.compile(r"^(?P<indent>\s*)(?P<mark>#|//) BEGIN SOLUTION(?:\((?P<kind>\w+)\))?: (?P<words>.+)$")
CONTINUED = re.compile(r"^\s*(?:#|//): (?P<words>.+)$")
END = re.compile(r"^\s*(?:#|//) END SOLUTION$")
# Hashes of every stub that the course ever wrote for a file: a file that matches one holds no work of the learner's.
LEDGER = ROOT / "chapters" / ".stubs.json"
# Where `make reset` keeps what the learner wrote.
BACKUPS = ROOT / ".course" / "backup"
LINE = 112
FORMATTED = 120


class StubError(ValueError):
    """A solution whose markers do not pair up; the message names file and line."""


@dataclass
class _Region:
    indent: str
    mark: str
    kind: str | None
    words: str
    line: int

    def stub(self, file: str) -> list[str]:
        """The lines that stand in the stub for this region."""
        width = LINE - len(self.indent)
        if self.mark == "//":
            return [f"{self.indent}// {line}" for line in wrap("TODO: " + self.words, width - 3)]
        text = json.dumps(f"{file}: {self.words}", ensure_ascii=False)[1:-1]
        # As ruff would format it: one string, and one line, where they fit.
        fits = len(text) + len(self.indent) + len('    ""') <= FORMATTED
        pieces = [text] if fits else wrap(text, width - 8, drop_whitespace=False, break_long_words=False)
        body = [f'{self.indent}    "{piece}"' for piece in pieces]
        opening, closing = "raise NotImplementedError(", ")"
        if self.kind == "triton":
            opening, closing, body[-1] = "tl.static_assert(", ")", body[-1] + ","
            body.insert(0, f"{self.indent}    False,")
        elif len(self.indent + opening + text + '"")') <= FORMATTED:
            opening, body, closing = f'{opening}"{text}")', [], None
        todo = f"{self.indent}# TODO: replace this statement by your code."
        return [todo, self.indent + opening, *body, *([self.indent + closing] if closing else [])]


def cut(source: str, file: str) -> str:
    """The stub of a solution's source; StubError for markers that do not pair up."""
    stub: list[str] = []
    region: _Region | None = None
    in_words = False
    for number, line in enumerate(source.splitlines(), 1):
        begin = BEGIN.match(line)
        if begin:
            if region:
                raise StubError(f"{file}:{number}: BEGIN SOLUTION inside the region that began on line {region.line}")
            region = _Region(begin["indent"], begin["mark"], begin["kind"], begin["words"].strip(), number)
            in_words = True
        elif END.match(line):
            if not region:
                raise StubError(f"{file}:{number}: END SOLUTION without BEGIN SOLUTION")
            stub += region.stub(file)
            region = None
        elif region:
            more = CONTINUED.match(line) if in_words else None
            in_words = more is not None
            if more:
                region.words += " " + more["words"].strip()
        elif "SOLUTION" in line and ("BEGIN" in line or "END " in line):
            raise StubError(f"{file}:{number}: not a marker: {line.strip()!r}; write '# BEGIN SOLUTION: what to write'")
        else:
            stub.append(line)
    if region:
        raise StubError(f"{file}: the region that begins on line {region.line} has no END SOLUTION")
    return "\n".join(stub) + "\n"


def stub_text(where: Chapter, file: str) -> str:
    """The stub of one file of a chapter, cut from its solution; StubError if that is missing."""
    if not (where.solution / file).exists():
        raise StubError(
            f"stubs are cut from solutions/, and {where.folder}/{file} is missing there: git checkout solutions"
        )
    return cut((where.solution / file).read_text(encoding="utf-8"), file)


def write_stubs(where: Chapter, folder: Path) -> None:
    """Write all stubs of a chapter into `folder` (made if missing), replacing what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in where.all_files:
        (folder / file).write_text(stub_text(where, file), encoding="utf-8")


def _digest(text: str) -> str:
    return sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]


def _ledger() -> dict[str, list[str]]:
    return json.loads(LEDGER.read_text(encoding="utf-8")) if LEDGER.exists() else {}


def is_untouched(where: Chapter, file: str, folder: Path | None = None) -> bool:
    """True if the file in `folder` (default: the learner's) is a stub that the course itself wrote."""
    path = (folder or where.room) / file
    text = path.read_text(encoding="utf-8", errors="replace")
    return _digest(text) in _ledger().get(f"{where.folder}/{file}", []) or _digest(text) == _digest(
        stub_text(where, file)
    )


def generate() -> int:
    """Bring the learners' stubs up to date, print what was done, and return the exit status.

    A file that the learner has changed stays as it is, and the new stub is written beside it as NAME.new.
    """
    ledger = _ledger()
    for where in CHAPTERS:
        for file in where.all_files:
            key, text, path = f"{where.folder}/{file}", stub_text(where, file), where.room / file
            if not path.exists() or is_untouched(where, file):
                same = path.exists() and path.read_text(encoding="utf-8") == text
                where.room.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                print(f"{key}: {'unchanged' if same else 'written'}")
            else:
                path.with_name(f"{file}.new").write_text(text, encoding="utf-8")
                print(f"{key}: kept, as you changed it; the new stub is {file}.new")
            ledger[key] = sorted({*ledger.get(key, []), _digest(text)})
    LEDGER.write_text(json.dumps(ledger, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def drifted(folder: Path | None = None) -> list[str]:
    """The learner's files (below `folder`, default chapters/) that differ from what their solutions give when cut."""
    root = folder or ROOT / "chapters"
    return [
        f"{where.folder}/{file}"
        for where in CHAPTERS
        for file in where.all_files
        if not (path := root / where.folder / file).exists()
        or path.read_text(encoding="utf-8") != stub_text(where, file)
    ]


def check() -> int:
    """Print which stubs differ from the cut solutions and return the exit status; writes nothing."""
    files = drifted()
    print("\n".join(f"{f} differs from its cut solution" for f in files) or "every stub equals its cut solution")
    return 1 if files else 0


def reset(number: int) -> int:
    """Restore the stubs of a chapter, after moving changed files to .course/backup/NN_name/<time>/.

    Prints what was done and returns the exit status. ValueError for a chapter that does not exist.
    """
    where = chapter(number)
    try:
        _ = [stub_text(where, file) for file in where.all_files]
    except StubError as error:
        print(f"cannot reset: {error}")
        return 2
    changed = [f for f in where.all_files if (where.room / f).exists() and not is_untouched(where, f)]
    if changed:
        backup = BACKUPS / where.folder / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        backup.mkdir(parents=True)
        for file in changed:
            shutil.copy2(where.room / file, backup / file)
        print(f"Your {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} kept in {backup.relative_to(ROOT)}/")
    write_stubs(where, where.room)
    print(f"Fresh stubs in {where.room.relative_to(ROOT)}/: {', '.join(where.all_files)}")
    return 0
