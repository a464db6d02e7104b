"""What README says to type exists, and what it links to is there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fa_reference.cli import app
from fa_reference.course import CHAPTERS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL) + re.findall(r"`([^`\n]+)`", README))
DOCUMENTS = [ROOT / "README.md", ROOT / "CREDITS.md", *sorted(ROOT.glob("chapters/*/hints.md"))]


def make_calls() -> list[list[str]]:
    found = re.findall(r"\bmake((?: +(?:[A-Z]+=\S*|[a-z][a-z-]*))+)", re.sub(r"#.*", "", CODE))
    return [shlex.split(call) for call in found]


def options_of(command: str) -> set[str]:
    parameters = get_command(app).commands[command].params
    return {option for parameter in parameters for option in parameter.opts}


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    assert len(make_calls()) > 10
    for call in make_calls():
        for word in call:
            assert "=" in word or word in targets, f"make {' '.join(call)}"


def test_every_make_variable_exists():
    for name in set(re.findall(r"\b([A-Z]{3,})=", CODE)):
        assert re.search(rf"\$\$?[({{]?{name}\b", MAKEFILE), name


def test_every_course_command_exists_with_its_options():
    calls = re.findall(r"-m fa_reference ([a-z]+)((?: [^\n`]*)?)", CODE)
    assert calls
    for command, rest in calls:
        assert command in get_command(app).commands
        for option in re.findall(r"(--[a-z-]+)", rest):
            assert option in options_of(command), f"{command} {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_exists(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_every_named_path_exists():
    for path in set(re.findall(r"`((?:chapters|solutions|tests|fa_reference|constraints|tools)/[\w./-]*)`", README)):
        if "NN_name" not in path:
            assert (ROOT / path).exists(), path


def test_the_course_map_has_every_chapter_with_its_hours():
    rows = re.findall(r"^\| \[(\d+) [^\]]*\]\(chapters/([^/]+)/\) \|.*\| ([\d.]+) \|$", README, re.MULTILINE)
    assert [(int(number), folder, float(hours)) for number, folder, hours in rows] == [
        (chapter.number, chapter.folder, chapter.hours) for chapter in CHAPTERS
    ]


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in CODE
    assert re.search(r"^exec make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_measured_results_are_between_their_markers():
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
    assert README.index("<!-- results:begin -->") < README.index("<!-- results:end -->")
