"""Grading: checks run the learner's code in a child process and judge its outputs in this one."""

from fa_reference.grading.check import CheckFailed, check

__all__ = ["CheckFailed", "check"]
