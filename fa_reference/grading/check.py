"""What a graded check is: a pytest function with a name, points, and what it needs to run."""

from collections.abc import Callable

import pytest


class CheckFailed(AssertionError):
    """A check's verdict in words for the learner."""


class NotWritten(CheckFailed):
    """The learner has not written this part yet: the stub's own words."""


class CannotRun(CheckFailed):
    """The file cannot be used at all: a syntax error, a missing file or function, an exit."""


# What a check may need beyond any machine, and the reason given where it is missing.
NEEDS = {
    "gpu": "no CUDA GPU on this machine",
    "hopper": "no Hopper GPU (H100, H200) on this machine",
}


def check(
    name: str, *, points: int = 1, needs: str | None = None, compiled: bool = False, timed: bool = False
) -> Callable[[Callable], Callable]:
    """Mark a pytest function as a graded check.

    `name` states the property in words; `needs` is a key of NEEDS, without which the check is reported as not graded
    here; `compiled` says that it looks at machine code that never runs, `timed` that it measures time on the GPU, which
    it must not share then. The file that is graded follows from the test module: test_naive.py grades naive.py.
    """
    if needs is not None and needs not in NEEDS:
        raise ValueError(f"needs is {needs!r}; allowed: {', '.join(NEEDS)}")
    return pytest.mark.check(name=name, points=points, needs=needs, compiled=compiled, timed=timed)
