"""Graded checks of chapter 6, attention.cu: one warpgroup, TMA and wgmma, no specialisation."""

from fa_reference.course import chapter
from fa_reference.grading import CheckFailed, check, cuda, descriptors, hopper_cases
from fa_reference.grading.answer import Answer
from fa_reference.grading.hopper import Kernel

KERNEL = Kernel(6, "attention.py", "attention.cu", threads=128)
FA2, PROBLEM = "fa2_cuda.py", (4, 16, 8192, 128, False)  # batch, heads, N, d, causal


@check("compiles", points=0, compiled=True)
def test_compiles(answer: Answer) -> None:
    KERNEL.build(answer)
    KERNEL.build(answer, 64, causal=True)


@check("two blocks fit on an SM, no local memory", points=1, compiled=True)
def test_budget(answer: Answer) -> None:
    KERNEL.within_budget(answer)


@check("wgmma stays asynchronous", points=1, compiled=True)
def test_asynchronous(answer: Answer) -> None:
    KERNEL.stays_asynchronous(answer)


@check("TMA brings Q, K and V; both products on wgmma", points=2, compiled=True)
def test_instructions(answer: Answer) -> None:
    for head_dim in (64, 128):
        code, right = KERNEL.build(answer, head_dim), KERNEL.reference(head_dim)
        wanted = {"UTMALDG.5D": "TMA load", "SYNCS": "mbarrier", "HGMMA": "wgmma", "MUFU.EX2": "exponential"}
        cuda.has_instructions(code, wanted)
        if code.count("UTMALDG") < 3:
            raise CheckFailed(f"{code.count('UTMALDG')} TMA loads in {code.file}: Q, K and V need at least one each")
        if code.count("HGMMA") != right.count("HGMMA"):
            raise CheckFailed(
                f"{code.count('HGMMA')} wgmma instead of {right.count('HGMMA')} (d {head_dim}): one for every 16 "
                "columns of head_dim, and one for every 16 keys, in unrolled loops"
            )
        if code.count("WARPGROUP.ARRIVE") < 2 or code.count("WARPGROUP.DEPBAR") < 2:
            raise CheckFailed("each product needs a wgmma_fence before it and a wgmma_wait behind it")
        same_steps(head_dim, *(descriptors.steps(built.instructions) for built in (code, right)))


def same_steps(head_dim: int, found: list[list[int] | None], wanted: list[list[int] | None]) -> None:
    """CheckFailed if the steps of a product read other parts of a tile; not judged where the code does not tell."""
    operands = ("Q in Q K^T", "K in Q K^T", "V in P V")
    for name, got, want in zip(operands, found, wanted) if len(found) == len(operands) else ():
        if got is not None and got != want:
            raise CheckFailed(
                f"d {head_dim}: the steps' descriptors of {name} point to bytes {got} from the first, not {want}: how "
                "far apart are blocks of 64 columns in this tile, and are the bytes added by wgmma_advance (a 1 added "
                f"to a descriptor is {descriptors.BYTES} bytes)?"
            )


@check("whole blocks on the GPU", points=3, needs="hopper")
def test_whole_blocks(answer: Answer) -> None:
    KERNEL.numbers(answer, hopper_cases.whole_blocks(), "the order of wait, product, wait, next load")


@check("ragged lengths; the padding is NaN", points=1, needs="hopper")
def test_ragged(answer: Answer) -> None:
    KERNEL.numbers(answer, hopper_cases.ragged(), "rows and keys beyond the ends")


@check("causal mask ends at the bottom right; rows without keys", points=1, needs="hopper")
def test_causal(answer: Answer) -> None:
    KERNEL.numbers(answer, hopper_cases.causal(), "query i sees key j if j <= i + len_k - len_q")


@check("large and shifted scores", points=1, needs="hopper")
def test_large(answer: Answer) -> None:
    KERNEL.numbers(answer, hopper_cases.large_scores(), "the running maximum, and rescaling by it")


@check("GQA, any strides, real activations", points=1, needs="hopper")
def test_layouts(answer: Answer) -> None:
    KERNEL.numbers(answer, hopper_cases.layouts(), "the key head; strides")


@check("right at full size", points=1, needs="hopper")
def test_full_size(answer: Answer) -> None:
    KERNEL.numbers(answer, hopper_cases.full_size())


@check("the same bits in 20 runs", points=1, needs="hopper")
def test_deterministic(answer: Answer) -> None:
    KERNEL.deterministic(answer, hopper_cases.repeated())


@check("bad input is refused", points=1, needs="hopper")
def test_bad_input(answer: Answer) -> None:
    KERNEL.refuses_bad_input(answer)


@check("at least 0.8 of the solution's speed", points=2, needs="hopper", timed=True)
def test_speed(answer: Answer) -> None:
    cuda.require_written(answer, KERNEL.file)
    mine, solution = cuda.best_times(answer, KERNEL.host, [KERNEL.solution], *PROBLEM)
    before = Answer(answer.workshop, chapter(5).solution)
    try:
        fa2 = min(before.call(FA2, "milliseconds", "fa2", *PROBLEM, device="cuda") for _ in range(3))
    finally:
        before.close()
    batch, heads, length, head_dim, _ = PROBLEM
    work = 4e-9 * batch * heads * length**2 * head_dim  # TFLOP/s times milliseconds
    words = (
        f"{work / mine:.0f} TFLOP/s; the solution {work / solution:.0f}, chapter 5's FlashAttention-2 {work / fa2:.0f} "
        f"(batch {batch}, heads {heads}, N {length}, d {head_dim}, one run)"
    )
    if solution / mine < 0.8:
        raise CheckFailed(f"{words}: {solution / mine:.2f} of the solution's speed; 0.8 is wanted")
    answer.remarks.append(words)
