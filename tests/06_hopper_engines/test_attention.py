"""Graded checks of chapter 6, attention.cu: one warpgroup, TMA and wgmma, no specialisation."""

from fa_reference.course import chapter
from fa_reference.grading import CheckFailed, check, cuda, properties
from fa_reference.grading.answer import Answer
from fa_reference.grading.hopper import Kernel
from fa_reference.inputs import Case

KERNEL = Kernel(6, "attention.py", "attention.cu", threads=128)
FA2, PROBLEM = "fa2_cuda.py", (4, 16, 8192, 128, False)  # batch, heads, N, d, causal


def numbers(answer: Answer, cases: list[Case], bug: str = "") -> None:
    seed = properties.fresh_seed()
    KERNEL.numbers(answer, [case.but(seed=seed) for case in cases], bug)


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


@check("the first rows on the GPU", points=3, needs="hopper")
def test_small(answer: Answer) -> None:
    cases = [Case(64, 128), Case(64, 256), Case(128, 384, heads_q=3), Case(256, 512)]
    numbers(answer, [case.but(dtype="bfloat16") for case in cases])


@check("ragged lengths; the padding is NaN", points=1, needs="hopper")
def test_ragged(answer: Answer) -> None:
    cases = [Case(5, 3), Case(3, 70), Case(70, 150), Case(130, 270), Case(257, 391)]
    numbers(answer, [c.but(dtype="float16", layout="padded") for c in cases], "rows and keys beyond the ends")


@check("causal mask ends at the bottom right", points=1, needs="hopper")
def test_causal(answer: Answer) -> None:
    shapes = ((8, 8), (70, 70), (20, 150), (1, 40), (300, 300), (257, 391))
    cases = [Case(*shape, dtype="bfloat16", causal=True) for shape in shapes]
    numbers(answer, cases, "query i sees key j if j <= i + len_k - len_q")


@check("rows without keys", points=1, needs="hopper")
def test_empty(answer: Answer) -> None:
    numbers(answer, [Case(3, 0, dtype="float16"), Case(150, 20, dtype="float16", causal=True)])


@check("large and shifted scores", points=1, needs="hopper")
def test_large(answer: Answer) -> None:
    kinds = ("rising", "large", "shifted", "outliers")
    numbers(answer, [Case(20, 300, dtype="bfloat16", kind=kind) for kind in kinds])


@check("GQA, any strides, real activations", points=1, needs="hopper")
def test_layouts(answer: Answer) -> None:
    cases = [
        Case(66, 90, batch=2, heads_q=4, heads_kv=2),
        Case(66, 90, batch=2, heads_q=4, heads_kv=2, layout="bnhd"),
        Case(66, 190, batch=2, heads_q=4, heads_kv=1, layout="padded", causal=True, scale=0.3),
        Case(40, 160, heads_q=3, kind="smollm2", causal=True),
    ]
    numbers(answer, [case.but(dtype="bfloat16") for case in cases], "the key head; strides")


@check("right at full size", points=1, needs="hopper")
def test_full_size(answer: Answer) -> None:
    cases = [
        Case(1000, 1000, heads_q=2, causal=True),
        Case(4096, 4096, batch=2, heads_q=8, heads_kv=2),
        # Hundreds of blocks of keys: a factor that is nearly, but not quite 1 adds up.
        Case(128, 32768, head_dim=128),
    ]
    numbers(answer, [case.but(dtype="bfloat16", layout="bnhd") for case in cases])


@check("the same bits in 20 runs", points=1, needs="hopper")
def test_deterministic(answer: Answer) -> None:
    KERNEL.deterministic(answer, Case(1111, 1111, heads_q=8, head_dim=128, dtype="bfloat16", causal=True))


@check("bad input is refused", points=1, needs="hopper")
def test_bad_input(answer: Answer) -> None:
    KERNEL.refuses_bad_input(answer)


@check("at least 0.8 of the solution's speed", points=2, needs="hopper")
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
