"""Graded checks of chapter 9, fa3.cu: the softmax of a block runs beside the P V of the block before."""

import torch

from fa_reference.course import ROOT
from fa_reference.grading import check, hopper, hopper_checks
from fa_reference.grading.answer import Answer

KERNEL = hopper.Kernel(9, "fa3.py", "fa3.cu", threads=384)
EXPONENTIALS = 64  # a thread's share of 64 x 128 scores


class TestCompiled(hopper_checks.Specialised):
    kernel = KERNEL


@check("turns: named barriers in the consumers' part", points=1, compiled=True)
def test_turns(answer: Answer) -> None:
    hopper.turns(KERNEL.build(answer), 1, 1)


@check("the exponentials stand where P V is still running", points=3, compiled=True)
def test_overlap(answer: Answer) -> None:
    for head_dim, causal in ((128, False), (128, True), (64, True)):
        hopper.overlaps(KERNEL.build(answer, head_dim, torch.bfloat16, causal), EXPONENTIALS)


class TestOnHopper(hopper_checks.OnHopper):
    kernel = KERNEL
    previous = ROOT / "solutions" / "08_pingpong" / "pingpong.py"
