"""Graded checks of chapter 5, scalar.cu: one thread a row."""

import torch

from fa_reference.grading import CheckFailed, check, cuda, properties
from fa_reference.grading.answer import Answer
from fa_reference.inputs import Case

HOST, FILE, STEP, FUNCTION = "fa2_cuda.py", "scalar.cu", "scalar", "forward_scalar"


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
    cuda.within_budget(built(answer), same_of_solution(), threads=128)


@check("computes in floats and stores 16 bits", points=1, compiled=True)
def test_instructions(answer: Answer) -> None:
    wanted = {"FFMA": "multiply-add", "LDG": "load from global memory", "MUFU.EX2": "exponential", "STG": "store"}
    code = built(answer)
    cuda.has_instructions(code, wanted)
    doubles = sum(code.count(name) for name in ("DFMA", "DMUL", "DADD"))
    if doubles:
        raise CheckFailed(
            f"{doubles} instructions compute in double, slowly: is a constant without f, or a double, in it?"
        )


@check("the first rows on the GPU", points=2, needs="gpu")
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
