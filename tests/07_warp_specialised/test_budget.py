"""Graded checks of chapter 7, budget.py: shared memory and registers, exactly."""

from fa_reference.grading import CheckFailed, check
from fa_reference.grading.answer import Answer

FILE = "budget.py"


def equal(answer: Answer, function: str, arguments: tuple[int, ...], right: int, words: str) -> None:
    value = answer.call(FILE, function, *arguments)
    if isinstance(value, bool) or value != right:
        raise CheckFailed(f"{function}{arguments} must be {right}; it is {value!r} ({words})")


@check("how many slots fit into shared memory", points=1)
def test_stages(answer: Answer) -> None:
    for arguments, right in (
        ((128, 128, 128), 3),
        ((64, 128, 128), 6),
        ((128, 128, 176), 2),
        ((256, 128, 128), 1),
        ((256, 128, 64), 2),
        ((256, 512, 128), 0),
    ):
        words = "232,448 bytes less 1024 for barriers and one tile of Q; a slot of each ring takes 2 blocks"
        equal(answer, "stages_that_fit", arguments, right, words)


@check("registers that the consumers can claim", points=1)
def test_registers(answer: Answer) -> None:
    for arguments, right in (
        ((168, 2, 24), 240),
        ((128, 3, 32), 160),
        ((160, 2, 24), 224),
        ((168, 2, 40), 232),
        ((255, 2, 24), 256),
    ):
        launch, consumers, producer = arguments
        words = f"{consumers + 1} x {launch} in all, {producer} stay with the producer; a multiple of 8, at most 256"
        equal(answer, "consumer_registers", arguments, right, words)
