"""Graded checks of chapter 8, pingpong.cu: the consumers take turns at the tensor cores."""

from fa_reference.course import ROOT
from fa_reference.grading import check, hopper, hopper_checks
from fa_reference.grading.answer import Answer

KERNEL = hopper.Kernel(8, "pingpong.py", "pingpong.cu", threads=384)


class TestCompiled(hopper_checks.Specialised):
    kernel = KERNEL


@check("turns: named barriers in the consumers' part", points=2, compiled=True)
def test_turns(answer: Answer) -> None:
    hopper.turns(KERNEL.build(answer), 1, 1)


class TestOnHopper(hopper_checks.OnHopper):
    kernel = KERNEL
    share_of_the_solution = 0.9  # chapter 7's kernel has 0.89
    previous = ROOT / "solutions" / "07_warp_specialised" / "warp_specialised.py"
