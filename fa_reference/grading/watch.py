"""Regrade whenever a file is saved."""

import subprocess
import sys
from pathlib import Path

import watchfiles
from rich.console import Console

from fa_reference.grading.runner import WRONG_CALL, WrongCall, find_folder


def watch(number: int, impl: Path | None = None) -> int:
    """Grade the folder now and after every saved change, until Ctrl-C; returns the exit status."""
    console = Console()
    try:
        _, folder, _ = find_folder(number, impl, solution=False)
    except WrongCall as error:
        console.print(f"cannot watch: {error}")
        return WRONG_CALL
    command = [sys.executable, "-m", "fa_reference", "check", str(number)]
    command += ["--impl", str(impl)] if impl else []
    try:
        _grade_on_every_save(command, folder, console)
    except KeyboardInterrupt:  # Ctrl-C is how watching ends
        pass
    return 0


def _grade_on_every_save(command: list[str], folder: Path, console: Console) -> None:
    subprocess.run(command, check=False)
    console.print(f"\n[dim]Watching {folder}: save a file to grade again, Ctrl-C to stop.[/]")
    sources = watchfiles.PythonFilter(extra_extensions=(".cu",))
    for _ in watchfiles.watch(folder, watch_filter=sources, raise_interrupt=False):
        console.rule()
        subprocess.run(command, check=False)
