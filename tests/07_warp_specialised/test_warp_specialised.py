"""Graded checks of chapter 7, warp_specialised.cu: a producer, two consumers, rings between them."""

from fa_reference.course import ROOT
from fa_reference.grading import CheckFailed, check, hopper, hopper_checks
from fa_reference.grading.answer import Answer

KERNEL = hopper.Kernel(7, "warp_specialised.py", "warp_specialised.cu", threads=384)
BARRIERS = 9  # Q full; full and empty for K and V, two slots each
WAITS = 5  # three in the consumers (Q, K, V), two in the producer


class TestCompiled(hopper_checks.Specialised):
    kernel = KERNEL


@check("every slot is waited for and given back", points=2, compiled=True)
def test_barriers(answer: Answer) -> None:
    built = KERNEL.build(answer)
    _, consumers = hopper.parts(built)
    initialised, waits = built.count("SYNCS.EXCH"), built.count("SYNCS.PHASECHK")
    given_back = sum("SYNCS.ARRIVE" in line for line in consumers)
    if initialised < BARRIERS:
        raise CheckFailed(f"{initialised} mbarriers are initialised; Q's, and full and empty of 2 + 2 slots make 9")
    if given_back < 2:
        raise CheckFailed(f"{given_back} arrivals in the consumers' part: the slots of K and of V must be given back")
    if waits < 2 * WAITS:  # each stands twice in the code: the first try, and the loop around the next ones
        raise CheckFailed(
            f"about {waits // 2} waits at mbarriers; wanted: consumers wait for Q, K and V, the producer for an empty "
            "slot of K and of V"
        )


class TestOnHopper(hopper_checks.OnHopper):
    kernel = KERNEL
    previous = ROOT / "solutions" / "06_hopper_engines" / "attention.py"
