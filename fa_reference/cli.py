"""The command line of the course.

Every command imports what it needs when it runs, so that `--help` and wrong calls answer at once.
Exit status: 0 all is well, 1 something failed, 2 a wrong call (said in one line), 130 stopped with Ctrl-C.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    sys.stderr.write(f"{sys.executable} has no module typer: run `make setup`, or name a Python that has it.\n")
    sys.exit(2)

app = typer.Typer(
    name="python -m fa_reference",
    help="FlashAttention from scratch: grade, hint, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Whatever library typer stands on, this is its "the call is wrong", which carries a message.
_WrongCall = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

ChapterNumber = Annotated[int, typer.Argument(metavar="CHAPTER", help="Number of the chapter.")]
Implementation = Annotated[
    Path | None, typer.Option("--impl", help="Folder with the files to grade, instead of your own.")
]


def _existing_chapter(number: int) -> int:
    """Return `number`; raises the one-line error if the course has no such chapter."""
    from fa_reference.course import CHAPTERS

    numbers = [chapter.number for chapter in CHAPTERS]
    if number not in numbers:
        raise _WrongCall(f"no chapter {number}; the chapters are {', '.join(map(str, numbers))}")
    return number


def _exit(status: int | None) -> None:
    raise typer.Exit(int(status or 0))


@app.command()
def check(
    chapter: ChapterNumber,
    impl: Implementation = None,
    solution: Annotated[bool, typer.Option("--solution", help="Grade the course's solution.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON to this file.")] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Only checks with this in their or their file's name.")
    ] = None,
) -> None:
    """Grade a chapter: your files, a folder, or the solution."""
    _existing_chapter(chapter)
    from fa_reference.grading.runner import grade

    _exit(grade(chapter=chapter, impl=impl, solution=solution, json_path=json, only=only))


@app.command()
def hint(
    chapter: ChapterNumber,
    function: Annotated[str | None, typer.Option("--function", help="For this function of the exercises.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Start with the first hint again.")] = False,
) -> None:
    """Show the next hint for a chapter: for the first function that you have not written, unless you name one."""
    _existing_chapter(chapter)
    from fa_reference.grading.hints import show_next_hint

    _exit(show_next_hint(chapter, function=function, reset=reset))


@app.command()
def progress() -> None:
    """Show where you stand in all chapters."""
    from fa_reference.grading.progress import show_progress

    _exit(show_progress())


@app.command()
def watch(chapter: ChapterNumber, impl: Implementation = None) -> None:
    """Grade a chapter again whenever one of its files is saved."""
    _existing_chapter(chapter)
    from fa_reference.grading.watch import watch as watch_files

    _exit(watch_files(chapter, impl))


@app.command()
def reset(
    chapter: ChapterNumber,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Put a chapter's stubs back; your files are kept in a backup."""
    _existing_chapter(chapter)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Put the stubs of chapter {chapter} back? Your files are kept in a backup.", abort=True)
    from fa_reference.stubs import reset as reset_stubs

    _exit(reset_stubs(chapter))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def lab(
    ctx: typer.Context,
    chapter: Annotated[int | None, typer.Option("--chapter", help="Open this chapter's lesson.")] = None,
) -> None:
    """Open the lessons in JupyterLab (Ctrl-C ends it); other options are passed on to it."""
    from fa_reference.course import CHAPTERS, ROOT
    from fa_reference.course import chapter as chapter_of

    number = _existing_chapter(CHAPTERS[0].number if chapter is None else chapter)
    if importlib.util.find_spec("jupyterlab") is None:
        raise _WrongCall(f"{sys.executable} has no jupyterlab; without PYTHON=..., make installs it into .venv")
    lesson = chapter_of(number).room / "lesson.ipynb"
    command = [sys.executable, "-m", "jupyterlab", "-y"]  # -y: Ctrl-C ends it without asking
    if os.geteuid() == 0:  # containers of rented machines run as root, which Jupyter refuses unless told
        command.append("--allow-root")
    command += ctx.args
    command += [str(lesson.relative_to(ROOT))] if lesson.exists() else []
    os.chdir(ROOT)
    os.execv(sys.executable, command)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def bench(ctx: typer.Context) -> None:
    """Race all versions; `bench --help` lists its options."""
    from fa_reference.bench.cli import main as bench_main

    _exit(bench_main(list(ctx.args)))


@app.command()
def doctor() -> None:
    """Say what this machine has, and which chapters can be graded on it."""
    from fa_reference.doctor import show

    _exit(show())


@app.command()
def stubs(check: Annotated[bool, typer.Option("--check", help="Compare only; write nothing.")] = False) -> None:
    """For contributors: cut the learner's files from the solutions."""
    from fa_reference import stubs as stub_files

    _exit(stub_files.check() if check else stub_files.generate())


@app.command()
def lessons(
    check: Annotated[bool, typer.Option("--check", help="Compare only; write nothing.")] = False,
    chapter: Annotated[int | None, typer.Option("--chapter", help="Only this chapter.")] = None,
) -> None:
    """For contributors: execute the lessons and write the notebooks."""
    if chapter is not None:
        _existing_chapter(chapter)
    from fa_reference import lessons as lesson_files

    _exit(lesson_files.check(chapter) if check else lesson_files.build(chapter))


def _needed_by_the_course(module: str) -> bool:
    """Is this the import name of something that pyproject.toml asks for?"""
    known = {"torch", "triton", "cuda", "numpy", "typer", "rich", "pytest", "hypothesis", "watchfiles", "matplotlib"}
    return module.partition(".")[0] in known | {"ipykernel", "jupytext", "nbclient", "nbconvert", "nbformat"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; `arguments` default to the command line's."""
    try:
        status = typer.main.get_command(app).main(arguments, prog_name="python -m fa_reference", standalone_mode=False)
    except _WrongCall as error:
        message = re.sub(r"\s+", " ", error.format_message()).strip()
        if message:  # without one, the help has been printed already
            print(message, file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("\nStopped.", file=sys.stderr)
        return 130
    except typer.Exit as error:  # raised only by some versions; the others return its code
        return error.exit_code
    except ModuleNotFoundError as error:
        if not _needed_by_the_course(error.name or ""):
            raise
        print(
            f"{sys.executable} has no module {error.name}: run `make setup`, or name a Python that has it.",
            file=sys.stderr,
        )
        return 2
    return status if isinstance(status, int) else 0
