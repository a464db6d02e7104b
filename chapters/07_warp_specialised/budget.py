"""What a block of threads has to share out: shared memory among the slots of the rings, registers among warpgroups."""

SHARED_LIMIT = 232_448  # bytes of shared memory that a block may ask for on Hopper (227 KiB)
BARRIER_BYTES = 1024  # kept for the mbarriers
ELEMENT_BYTES = 2
CLAIM_LIMIT, CLAIM_STEP = 256, 8  # setmaxnreg takes multiples of 8 up to 256


def stages_that_fit(head_dim: int, block_q: int, block_k: int) -> int:
    """Slots of the ring of K, and of the ring of V, for which there is room beside one tile of Q (16-bit numbers)."""
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "budget.py: what is left of SHARED_LIMIT after BARRIER_BYTES and Q, divided by the bytes of a block of K and V"
    )


def consumer_registers(at_launch: int, consumers: int, producer: int) -> int:
    """The most registers a thread that each of `consumers` warpgroups can claim by setmaxnreg.

    The block is launched with `at_launch` registers for every thread of its consumers and its one producer warpgroup.
    The producer keeps `producer`; the rest is shared out, in steps of CLAIM_STEP and up to CLAIM_LIMIT.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "budget.py: registers of the whole block less the producer's, divided by the consumers and rounded down"
    )
