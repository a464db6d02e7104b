"""What the GPU says when it stops a kernel, in words that help to find the bug."""

FAULTS = {
    "unspecified launch failure": "the GPU stopped the kernel. What does that: more arrivals at an mbarrier than its "
    "count says (does one thread arrive where one is expected, or do all 128?), or a wait at one never initialised",
    "illegal memory access": "the kernel read or wrote an address that belongs to no tensor: which index leaves its "
    "tensor at the ends, or for the last head?",
    "misaligned address": "an access of 4, 8 or 16 bytes at an address that is not a multiple of that",
    "illegal instruction": "the GPU refused an instruction's operands: a wgmma descriptor or a TMA coordinate that it "
    "does not allow, or registers that setmaxnreg could not get",
    "invalid argument": "the launch was refused: the grid, the shared memory, or a parameter's size is not allowed",
}


def in_plain_words(text: str) -> str | None:
    """The message for a CUDA error's text, which torch follows by advice on how to debug torch; None if it is none."""
    for fault, words in FAULTS.items():
        if "CUDA error" in text and fault in text:
            return f"CUDA error, {fault}: {words}"
    return None
