"""Graded checks of chapter 5, fa2.cu: cp.async, split Q, causal skipping."""

import torch

from fa_reference.grading import CheckFailed, check, cuda, properties
from fa_reference.grading.answer import Answer
from fa_reference.inputs import Case

HOST, FILE, STEP, FUNCTION = "fa2_cuda.py", "fa2.cu", "fa2", "forward"


def numbers(answer: Answer, cases: list[Case], bug: str = "") -> None:
    cuda.numbers(answer, HOST, FILE, FUNCTION, cases, bug)


def built(answer: Answer, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, causal: bool = True) -> cuda.Built:
    return cuda.build(answer, HOST, STEP, FILE, head_dim, dtype, causal)


def same_of_solution(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, causal: bool = True) -> cuda.Built:
    return cuda.reference(5, HOST, STEP, FILE, head_dim, dtype, causal)


@check("compiles", points=0, compiled=True)
def test_compiles(answer: Answer) -> None:
    built(answer)
    built(answer, 128, torch.float16, False)


@check("registers within the budget, no local memory", points=1, compiled=True)
def test_budget(answer: Answer) -> None:
    # At d 128 all 255 registers are in use, and equivalent answers spill a few words or none: speed judges those.
    for head_dim, tolerated in ((64, 0), (128, 256)):
        cuda.within_budget(built(answer, head_dim), same_of_solution(head_dim), threads=128, tolerated=tolerated)


@check("copies in the background, products on the tensor cores", points=2, compiled=True)
def test_instructions(answer: Answer) -> None:
    code, right = built(answer), same_of_solution()
    wanted = {"LDGSTS": "cp.async", "DEPBAR": "waiting for it", "HMMA.16816": "mma", "LDSM.16.MT88": "ldmatrix for V"}
    cuda.has_instructions(code, wanted)
    for name, words in (("HMMA", "mma"), ("LDSM", "ldmatrix")):
        if code.count(name) != right.count(name):
            raise CheckFailed(f"{code.count(name)} {words} instructions instead of {right.count(name)} (head_dim 64)")


@check("one barrier a block of keys", points=1, compiled=True)
def test_barriers(answer: Answer) -> None:
    bars, right = built(answer).count("BAR"), same_of_solution().count("BAR")
    if not 1 <= bars <= right:
        raise CheckFailed(
            f"{bars} __syncthreads in the code instead of {right}: with two stages, the barrier after the wait also "
            "says that everyone has finished with the other stage"
        )


@check("the first rows on the GPU", points=3, needs="gpu")
def test_small(answer: Answer) -> None:
    seed = properties.fresh_seed()
    cases = [Case(16, 16), Case(64, 64), Case(64, 192), Case(256, 256, heads_q=3)]
    numbers(answer, [c.but(dtype="bfloat16", seed=seed) for c in cases])


@check("ragged lengths; the padding is NaN", points=1, needs="gpu")
def test_ragged(answer: Answer) -> None:
    seed = properties.fresh_seed()
    cases = [Case(5, 3), Case(3, 70), Case(70, 150), Case(130, 270), Case(257, 391)]
    numbers(
        answer, [c.but(dtype="float16", layout="padded", seed=seed) for c in cases], "rows and keys beyond the ends"
    )


@check("causal mask ends at the bottom right", points=1, needs="gpu")
def test_causal(answer: Answer) -> None:
    shapes = ((8, 8), (70, 70), (20, 150), (1, 40), (300, 300), (257, 391))
    cases = [Case(*shape, dtype="bfloat16", causal=True, seed=properties.fresh_seed()) for shape in shapes]
    numbers(answer, cases, "query i sees key j if j <= i + len_k - len_q")


@check("rows without keys", points=1, needs="gpu")
def test_empty(answer: Answer) -> None:
    numbers(answer, [Case(3, 0, dtype="float16"), Case(150, 20, dtype="float16", causal=True)])


@check("large and shifted scores", points=1, needs="gpu")
def test_large(answer: Answer) -> None:
    kinds = ("rising", "large", "shifted", "outliers")
    numbers(answer, [Case(20, 300, dtype="bfloat16", kind=kind, seed=properties.fresh_seed()) for kind in kinds])


@check("GQA, any strides, real activations", points=1, needs="gpu")
def test_layouts(answer: Answer) -> None:
    cases = [
        Case(66, 90, batch=2, heads_q=4, heads_kv=2),
        Case(66, 90, batch=2, heads_q=4, heads_kv=2, layout="bnhd"),
        Case(66, 190, batch=2, heads_q=4, heads_kv=1, layout="padded", causal=True, scale=0.3),
        Case(40, 160, heads_q=3, kind="smollm2", causal=True),
    ]
    numbers(answer, [c.but(dtype="bfloat16", seed=properties.fresh_seed()) for c in cases], "head // group; strides")


@check("right at full size", points=1, needs="gpu")
def test_full_size(answer: Answer) -> None:
    sizes = [
        Case(1000, 1000, heads_q=2, causal=True),
        Case(4096, 4096, batch=2, heads_q=8, heads_kv=2),
        # Hundreds of blocks of keys: an alpha that is nearly, but not quite 1 adds up.
        Case(128, 32768, head_dim=128),
    ]
    numbers(answer, [c.but(dtype="bfloat16", layout="bnhd") for c in sizes])


@check("the same bits in 20 runs", points=1, needs="gpu")
def test_deterministic(answer: Answer) -> None:
    case = Case(300, 300, heads_q=4, head_dim=128, dtype="bfloat16", causal=True)
    cuda.deterministic(answer, HOST, FILE, FUNCTION, case)


@check("bad input is refused", points=1, needs="gpu")
def test_bad_input(answer: Answer) -> None:
    cuda.require_written(answer, FILE)
    properties.refuses_bad_input(answer, HOST, device="cuda", dtype=torch.float16)


@check("blocks that nobody sees are skipped", points=1, needs="gpu", timed=True)
def test_skips(answer: Answer) -> None:
    cuda.require_written(answer, FILE)
    full, causal = (answer.call(HOST, "milliseconds", STEP, 2, 16, 4096, 128, c, device="cuda") for c in (False, True))
    if causal > 0.75 * full:
        raise CheckFailed(
            f"at N 4096 the causal kernel takes {causal:.2f} ms, without mask {full:.2f} ms: half is skipped?"
        )


@check("at least 0.8 of the solution's speed", points=2, needs="gpu", timed=True)
def test_speed(answer: Answer) -> None:
    cuda.require_written(answer, FILE)
    for head_dim, causal in ((64, False), (128, False), (128, True)):
        share = cuda.relative_speed(answer, 5, HOST, STEP, 4, 2048 // head_dim, 4096, head_dim, causal)
        if share < 0.8:
            words = f"head_dim {head_dim}, {'causal' if causal else 'no mask'}, N 4096"
            raise CheckFailed(f"{share:.2f} of the solution's speed in the same run ({words}); 0.8 is wanted")
