"""Runs in the learner's child process: a function's values for many arguments, in one request."""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


def values(module: ModuleType, function: str, arguments: Iterable[tuple]) -> list[Any]:
    """The function's value for every tuple of arguments, in order; AttributeError if the file has no such function."""
    called = getattr(module, function, None)
    if not callable(called):
        raise AttributeError(f"{Path(module.__file__).name} has no function {function}")
    return [called(*each) for each in arguments]
