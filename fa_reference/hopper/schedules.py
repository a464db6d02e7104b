"""The schedules of chapters 6 to 10 by name: each is a step from the one before it.

A schedule is a module with CONSUMERS, the number of warpgroups with 64 queries each, and kernel(sm, block, ...), which
declares shared memory and barriers and returns the roles by name.
"""

from pathlib import Path
from types import ModuleType

from fa_reference.course import ROOT
from fa_reference.versions import load_file

CHAPTERS = {"one warpgroup": 6, "warp-specialised": 7, "pingpong": 8, "two-stage": 9, "fp8": 10}


def schedule_file(number: int) -> Path:
    """The course's schedule.py of a chapter from 6 to 10; ValueError for another chapter."""
    if number not in CHAPTERS.values():
        raise ValueError(f"chapter {number} has no schedule: chapters 6 to 10 have one")
    return next((ROOT / "solutions").glob(f"{number:02d}_*")) / "schedule.py"


def load_schedule(name: str) -> ModuleType:
    """The course's schedule with one of the names in CHAPTERS, as a fresh module; KeyError for another name."""
    return load_file(schedule_file(CHAPTERS[name]))
