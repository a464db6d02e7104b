"""The graded checks that all Hopper attention kernels share.

A chapter's test module subclasses them and says which kernel: `class TestOnHopper(hopper_checks.OnHopper): ...`.
"""

from pathlib import Path

import torch

from fa_reference.grading import cuda, hopper, hopper_cases
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import check

WANTED = {
    hopper.TMA_LOAD: "a TMA load",
    hopper.MBARRIER: "mbarriers",
    hopper.PRODUCT: "wgmma",
    hopper.REGISTERS: "setmaxnreg",
}


class Compiled:
    """What the machine code of any of them must show; nothing runs."""

    kernel: hopper.Kernel

    @check("compiles", points=0, compiled=True)
    def test_compiles(self, answer: Answer) -> None:
        """Two variants, as templates hide errors in the code that is left out."""
        self.kernel.build(answer)
        self.kernel.build(answer, 64, torch.float16, True)

    @check("registers within the budget; setmaxnreg adds up", points=1, compiled=True)
    def test_budget(self, answer: Answer) -> None:
        """No local memory, no more registers than the block has."""
        self.kernel.within_budget(answer)

    @check("wgmma stays asynchronous", points=1, compiled=True)
    def test_asynchronous(self, answer: Answer) -> None:
        """No note of the compiler about wgmma or setmaxnreg."""
        self.kernel.stays_asynchronous(answer)


class Specialised(Compiled):
    """The same for kernels with a producer and two consumers."""

    @check("the producer copies, the consumers multiply", points=2, compiled=True)
    def test_roles(self, answer: Answer) -> None:
        """TMA only in the one, wgmma only in the other, and all of it."""
        built = self.kernel.build(answer)
        cuda.has_instructions(built, WANTED)
        hopper.specialised(built)
        hopper.products_of(built, self.kernel.reference())


class OnHopper:
    """What only an H100 or H200 can tell. `previous`: the host file of the kernel to race against."""

    kernel: hopper.Kernel
    previous: Path
    share_of_the_solution = 0.85

    @check("whole blocks, from one to more than the ring has slots", points=3, needs="hopper")
    def test_whole_blocks(self, answer: Answer) -> None:
        """The loop itself."""
        self.kernel.numbers(answer, hopper_cases.whole_blocks(), "slots and parities; Q K^T, softmax, P V of a block")

    @check("ragged lengths; the padding is NaN", points=1, needs="hopper")
    def test_ragged(self, answer: Answer) -> None:
        """Ends of tiles and blocks."""
        self.kernel.numbers(answer, hopper_cases.ragged(), "keys and rows beyond the ends")

    @check("causal; rows without keys", points=1, needs="hopper")
    def test_causal(self, answer: Answer) -> None:
        """Masks, and tiles without a block."""
        self.kernel.numbers(answer, hopper_cases.causal(), "which blocks are masked; a tile without any block")

    @check("large and shifted scores", points=1, needs="hopper")
    def test_large(self, answer: Answer) -> None:
        """The running maximum."""
        self.kernel.numbers(answer, hopper_cases.large_scores(), "rescaling of O when the maximum grows")

    @check("GQA, any strides, real activations", points=1, needs="hopper")
    def test_layouts(self, answer: Answer) -> None:
        """Which head, which address."""
        self.kernel.numbers(answer, hopper_cases.layouts(), "which head of K and V is loaded")

    @check("right at full size, the same bits in 20 runs", points=2, needs="hopper")
    def test_full_size(self, answer: Answer) -> None:
        """Races show when all SMs are busy."""
        self.kernel.numbers(answer, hopper_cases.full_size(), watched=False)
        self.kernel.deterministic(answer, hopper_cases.repeated())

    @check("bad input is refused", points=1, needs="hopper")
    def test_bad_input(self, answer: Answer) -> None:
        """Before any launch."""
        self.kernel.refuses_bad_input(answer)

    @check("speed beside the chapter before and the solution", points=2, needs="hopper", timed=True)
    def test_speed(self, answer: Answer) -> None:
        """Reported; graded as a share of the solution's."""
        self.kernel.speed(answer, self.previous, self.share_of_the_solution)
