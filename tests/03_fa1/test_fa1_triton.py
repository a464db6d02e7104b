"""Graded checks of chapter 3, part two: FlashAttention-1 in Triton; in its interpreter where there is no GPU."""

from pathlib import Path

import torch

from fa_reference.grading import CheckFailed, check, properties
from fa_reference.grading.answer import Answer, attention_result
from fa_reference.inputs import Case
from fa_reference.triton_cpu import compile_forward

FILE = "fa1_triton.py"
TIMING = str(Path(__file__).resolve().parent.parent / "gpu_timing.py")


def run(answer: Answer, cases: list[Case], bug: str = "") -> None:
    properties.attention(answer, FILE, cases, bug=bug, device="cuda" if answer.gpu else "cpu")


@check("one block of 16-bit numbers", points=1)
def test_one_block(answer: Answer) -> None:
    run(answer, [Case(16, 16, dtype="float16"), Case(64, 64, dtype="bfloat16", seed=properties.fresh_seed())])


@check("ragged tail", points=2)
def test_ragged(answer: Answer) -> None:
    seed = properties.fresh_seed()
    # More than one block of each kind for any block size up to 128; the padding is NaN.
    cases = [Case(5, 3), Case(3, 70), Case(70, 150), Case(130, 270)]
    run(answer, [c.but(dtype="float16", layout="padded", seed=seed) for c in cases], "rows and keys beyond the ends")


@check("large scores do not overflow", points=1)
def test_large(answer: Answer) -> None:
    kinds = ("rising", "large", "shifted")
    run(answer, [Case(20, 300, dtype="bfloat16", kind=kind, seed=properties.fresh_seed()) for kind in kinds])


@check("causal mask ends at the bottom right", points=1)
def test_causal(answer: Answer) -> None:
    shapes = ((8, 8), (70, 70), (20, 150), (1, 40))
    cases = [Case(*shape, dtype="float16", causal=True, seed=properties.fresh_seed()) for shape in shapes]
    run(answer, cases, "query i sees key j if j <= i + N_k - N_q")


@check("rows without keys", points=1)
def test_empty_rows(answer: Answer) -> None:
    run(answer, [Case(3, 0, dtype="float16"), Case(90, 20, dtype="float16", causal=True)])


@check("GQA: several query heads share a key head", points=1)
def test_gqa(answer: Answer) -> None:
    cases = [Case(16, 16, heads_q=2), Case(20, 20, batch=2, heads_q=4, heads_kv=2)]
    run(answer, [c.but(dtype="float16", seed=properties.fresh_seed()) for c in cases], "key head = head // group")


@check("any strides", points=1)
def test_strides(answer: Answer) -> None:
    cases = [Case(20, 24, heads_q=2, heads_kv=2, layout="bnhd"), Case(20, 24, batch=2, heads_q=2, layout="padded")]
    run(answer, [c.but(dtype="float16") for c in cases], "an offset is index * stride, of q, k, v and o each its own")


@check("fp16 and bf16, d 64 and 128", points=1)
def test_dtypes(answer: Answer) -> None:
    seed = properties.fresh_seed()
    run(answer, [Case(24, 140, head_dim=d, dtype=t, seed=seed) for t in ("float16", "bfloat16") for d in (64, 128)])


@check("sums are kept in float32", points=1)
def test_accumulation(answer: Answer) -> None:
    # Many blocks of keys, and outputs near 3: rounding O to 16 bits in every step adds up.
    case = Case(8, 2048, dtype="float16", seed=properties.fresh_seed())
    q, k, v = case.make()
    v = v + 3
    o, lse = attention_result(answer.call(FILE, "forward", q, k, v, device="cuda" if answer.gpu else "cpu"), q)
    properties.judged(o, lse, (q, k, v), case, "O, l and m are kept in float32 until the end; only P is rounded")


@check("real activations", points=1)
def test_real(answer: Answer) -> None:
    seed = properties.fresh_seed()
    run(answer, [Case(40, 160, heads_q=3, kind="smollm2", dtype="bfloat16", causal=True, seed=seed)])


@check("writes every output element", points=1)
def test_writes_all(answer: Answer) -> None:
    # Memory from torch.empty is full of NaN in a check.
    q, k, v = Case(67, 33, heads_q=2, dtype="float16").make()
    o, lse = attention_result(answer.call(FILE, "forward", q, k, v, device="cuda" if answer.gpu else "cpu"), q)
    for name, result in (("o", o), ("lse", lse)):
        if not result.isfinite().all():
            where = (~result.isfinite()).nonzero()[0].tolist()
            raise CheckFailed(f"{name} is not finite, first at {where}: is every row of every head written?")


@check("compiles for a Hopper GPU", points=1)
def test_compiles(answer: Answer) -> None:
    # The interpreter runs Python, so it forgives what the compiler refuses: `break`, globals that are not constexpr.
    q, k, v = Case(4, 4, dtype="float16").make()
    answer.call(FILE, "forward", q, k, v, device="cuda" if answer.gpu else "cpu")  # written at all?
    try:
        kernels = compile_forward(answer.folder / FILE, "sm_90", head_dims=(64,), causal=(True,))
    except (RuntimeError, TimeoutError) as error:
        raise CheckFailed(str(error)) from None
    if not kernels:
        raise CheckFailed("forward launched no Triton kernel: launch the kernel of this file")


@check("bad input is refused", points=1)
def test_bad_input(answer: Answer) -> None:
    device = "cuda" if answer.gpu else "cpu"
    properties.refuses_bad_input(answer, FILE, device=device, dtype=torch.float16)


@check("right at full size on the GPU", points=1, needs="gpu")
def test_full_size(answer: Answer) -> None:
    sizes = [Case(1000, 1000, heads_q=2, causal=True), Case(4096, 4096, batch=2, heads_q=8, heads_kv=2)]
    run(answer, [c.but(dtype="bfloat16", head_dim=d, layout="bnhd") for c in sizes for d in (64, 128)])


@check("faster than naive on the GPU", points=1, needs="gpu")
def test_faster_than_naive(answer: Answer) -> None:
    problem = (16, 16, 2048, 64, False)  # batch, heads, length, d, causal: a program for every SM
    yours = answer.call(TIMING, "graded_ms", FILE, *problem, device="cuda")
    naive = answer.call(TIMING, "reference_ms", "naive", *problem, device="cuda")
    if yours > naive:
        raise CheckFailed(
            f"256 heads of 2048 tokens take {yours:.2f} ms, and {naive:.2f} ms with chapter 1's attention: is the "
            "grid one program per head, and are all loads of K and V outside the inner loop?"
        )
