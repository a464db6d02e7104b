"""Graded checks of chapter 10, fp8.cu: e4m3 products, V turned round by the producer."""

import torch

from fa_reference.course import ROOT
from fa_reference.grading import CheckFailed, check, cuda, hopper
from fa_reference.grading import fp8 as judge
from fa_reference.grading.answer import Answer
from fa_reference.grading.properties import fresh_seed
from fa_reference.inputs import Case

HOST, FILE, THREADS = "fp8.py", "fp8.cu", 384
KERNEL = hopper.Kernel(10, HOST, FILE, THREADS)
E4M3 = torch.float8_e4m3fn
PRODUCT = "QGMMA"  # wgmma on 8-bit numbers


def built(answer: Answer, causal: bool = False) -> cuda.Built:
    return KERNEL.build(answer, 128, E4M3, causal)


def numbers(answer: Answer, cases: list[Case], bug: str = "") -> None:
    """Every case in the debug build first, whose waits end after a second, then in the release build."""
    cuda.require_written(answer, FILE)
    cases = [case.but(head_dim=128, dtype="bfloat16") for case in cases]
    watched = Answer(answer.workshop, answer.folder, hopper.DEBUG_SECONDS)
    try:
        judge.numbers(watched, HOST, cases, bug=bug, device="cuda", debug=True)
    finally:
        watched.close()
    try:
        judge.numbers(answer, HOST, cases, bug=bug, device="cuda")
    except CheckFailed as failure:
        words = "the debug build gives right numbers and the release build does not: a matter of timing"
        raise CheckFailed(f"{failure}\n({words}; a missing wait, fence or barrier?)") from None


@check("compiles", points=0, compiled=True)
def test_compiles(answer: Answer) -> None:
    for causal in (False, True):
        built(answer, causal)


@check("registers within the budget, no local memory", points=1, compiled=True)
def test_budget(answer: Answer) -> None:
    for causal in (False, True):
        code = built(answer, causal)
        cuda.within_budget(code, KERNEL.reference(128, E4M3, causal), THREADS)
        hopper.registers_add_up(code, THREADS)


@check("wgmma stays asynchronous", points=1, compiled=True)
def test_asynchronous(answer: Answer) -> None:
    for causal in (False, True):
        if notes := built(answer, causal).notes:
            words = "\n".join(f"{note.code}: {note.explanation}" for note in notes)
            raise CheckFailed(f"the compiler says about {FILE}:\n{words}")


@check("both products on e4m3, P rounded to it", points=1, compiled=True)
def test_products(answer: Answer) -> None:
    code, right = built(answer), KERNEL.reference(128, E4M3, False)
    _, consumers = hopper.parts(code)
    for name, words in ((PRODUCT, "e4m3 wgmma"), ("F2FP", "conversions (P to e4m3, O to bf16)")):
        mine, wanted = hopper.count(consumers, name), hopper.count(hopper.parts(right)[1], name)
        if mine < wanted:
            raise CheckFailed(
                f"{mine} {words} in the consumers' part of {FILE}, {wanted} in the solution: is every 32 columns of "
                "head_dim (Q K^T), every 32 keys (P V) and every register of P there, in unrolled loops?"
            )


@check("the producer turns V round, and only the producer", points=1, compiled=True)
def test_transposes(answer: Answer) -> None:
    code = built(answer)
    producer, consumers = hopper.parts(code)
    for name, words in (("UTMALDG", "TMA loads"), ("LDSM", "ldmatrix"), ("STSM", "stmatrix"), ("PRMT", "prmt")):
        if not hopper.count(producer, name):
            raise CheckFailed(f"there are no {words} ({name}) in the producer's part of {FILE}")
    for name, words in (("UTMALDG", "TMA loads"), ("LDSM", "ldmatrix"), ("STSM", "stmatrix")):
        if found := hopper.count(consumers, name):
            raise CheckFailed(f"{found} {words} ({name}) in the consumers' part of {FILE}: that is the producer's work")
    if not any("FENCE" in line and "ASYNC" in line for line in producer):
        raise CheckFailed(
            "there is no fence_proxy_async in the producer's part: wgmma reads what stmatrix wrote through the "
            "asynchronous proxy, and no barrier alone makes it see that"
        )
    if not hopper.count(producer, "BAR"):
        raise CheckFailed(
            "the producer's warps never meet at a named barrier: the next V may be copied over rows that a slower warp "
            "has not read yet"
        )


@check("softmax stands beside P V", points=1, compiled=True)
def test_overlap(answer: Answer) -> None:
    hopper.overlaps(built(answer), 64)


@check("one block of keys", points=3, needs="hopper")
def test_one_block(answer: Answer) -> None:
    numbers(answer, [Case(64, 128), Case(128, 128)], "layouts: P's registers, V turned round, steps of 32")


@check("many blocks, each with its scales", points=2, needs="hopper")
def test_blocks(answer: Answer) -> None:
    seed = fresh_seed()
    cases = [Case(128, 256), Case(128, 512), Case(300, 900, heads_q=2, kind="outliers")]
    numbers(answer, [c.but(seed=seed) for c in cases], "block_scale of Q, of K, of V; slots and parities")


@check("ragged lengths", points=1, needs="hopper")
def test_ragged(answer: Answer) -> None:
    cases = [Case(5, 3), Case(70, 150), Case(130, 270), Case(257, 391)]
    numbers(answer, [c.but(seed=fresh_seed()) for c in cases], "rows and keys beyond the ends")


@check("causal, rows without keys, GQA, strides", points=2, needs="hopper")
def test_causal(answer: Answer) -> None:
    shapes = ((64, 64), (70, 300), (300, 70), (1, 200), (400, 400))
    cases = [Case(*s, causal=True, heads_q=4, heads_kv=2, batch=2, layout="bnhd", seed=fresh_seed()) for s in shapes]
    numbers(answer, cases, "bottom-right mask; head / group in the scales' index")


@check("large scores and outliers", points=1, needs="hopper")
def test_large(answer: Answer) -> None:
    kinds = ("large", "shifted", "rising", "outliers")
    numbers(answer, [Case(100, 500, kind=kind, seed=fresh_seed()) for kind in kinds])


@check("the same bits in 20 runs", points=1, needs="hopper")
def test_deterministic(answer: Answer) -> None:
    case = Case(1111, 1333, batch=2, heads_q=4, head_dim=128, dtype="bfloat16", causal=True)
    cuda.deterministic(answer, HOST, FILE, "forward", case)


@check("at least 0.8 of the solution's speed", points=2, needs="hopper", timed=True)
def test_speed(answer: Answer) -> None:
    KERNEL.speed(answer, ROOT / "solutions" / "09_two_stage" / "fa3.py", 0.8)
