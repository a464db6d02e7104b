"""Graded checks of chapter 10, emulate.py: FP8 attention that rounds where the kernel does, on any machine."""

import torch

from fa_reference import fp8
from fa_reference.fp8.experiment import Shape, paper_input
from fa_reference.gold import gold_attention
from fa_reference.grading import CheckFailed, check
from fa_reference.grading import fp8 as judge
from fa_reference.grading.answer import Answer, attention_result
from fa_reference.grading.properties import close, fresh_seed
from fa_reference.inputs import Case

FILE = "emulate.py"
ONES = {"q_scale": torch.ones(1, 1, 1), "k_scale": torch.ones(1, 1, 1), "v_scale": torch.ones(1, 1, 1)}


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def on_codes(answer: Answer, case: Case, seed: int) -> None:
    """CheckFailed unless attention_fp8 of codes is off by what the rounding of P and of o costs, not more, not less."""
    q, k, v = case.but(seed=seed).make()
    q8, k8, v8 = fp8.quantize(q, "block", 128), fp8.quantize(k, "block", 128), fp8.quantize(v, "head")
    codes = [x.data.view(torch.uint8) for x in (q8, k8, v8)]
    scales = {"q_scale": q8.scale, "k_scale": k8.scale, "v_scale": v8.scale}
    value = answer.call(FILE, "attention_fp8", *codes, **scales, causal=case.causal, scale=case.scale)
    o, lse = attention_result(value, q.bfloat16(), "attention_fp8")
    right, right_lse = fp8.attention_fp8(q8, k8, v8, causal=case.causal, scale=case.scale)
    gold, _ = gold_attention(*(x.dequantized() for x in (q8, k8, v8)), causal=case.causal, scale=case.scale)
    words = f"smallest failing case: {case.but(seed=seed)}"
    empty = right_lse == -torch.inf
    if not torch.equal(lse == -torch.inf, empty) or (o[empty] != 0).any():
        raise CheckFailed(f"rows without keys must have o = 0 and lse = -inf, others not\n{words}")
    if not o.isfinite().all():
        raise CheckFailed(f"o holds NaN or infinity: where a row sees no key yet, -inf minus -inf is NaN\n{words}")
    off = (lse - right_lse)[~empty]
    if off.numel() and off.abs().max() > 1e-3:
        middle = float(off.median())
        known = abs(abs(middle) - 5.545) < 0.1  # ln 2^8
        hint = "was OFFSET taken out of l again?" if known else "scales of each block, mask, maximum, alpha of l?"
        raise CheckFailed(
            f"lse differs from the emulated kernel's by up to {float(off.abs().max()):.3g}: {hint}\n{words}"
        )
    floor = 2.0**-12 * float(v.abs().max())
    mine, rounding = rms(o.double() - gold), rms(right.double() - gold)
    if not 0.7 * rounding - floor <= mine <= 1.3 * rounding + floor:
        guess = "is P rounded to e4m3, after the factor 2^8?" if mine < rounding else "v_scale, alpha of acc, mask?"
        raise CheckFailed(
            f"RMS error of o against float64 attention of the same codes: {mine:.2e}; rounding P and o should cost "
            f"{rounding:.2e}: {guess}\n{words}"
        )


@check("P is rounded to e4m3", points=1)
def test_round_p(answer: Answer) -> None:
    p = torch.cat((torch.linspace(0, 256, 1001), torch.exp2(torch.linspace(-12, 8, 1001))))
    close(answer.call(FILE, "round_p", p), fp8.round_e4m3(p), "round_p(p)", tolerance=0.0)


@check("one block of keys", points=1)
def test_one_block(answer: Answer) -> None:
    for case in (Case(1, 1), Case(5, 3), Case(64, 128, head_dim=128)):
        on_codes(answer, case, fresh_seed())


@check("the factor 2^8 saves small probabilities", points=1)
def test_offset(answer: Answer) -> None:
    # Two keys with scores 0 and -t, values 0 and 1: o is the second key's weight. e4m3 has nothing below 2^-10.
    q, k, v = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 2, 64)
    q[..., 0], k[0, 0, 1, 0], v[0, 0, 1] = 1.0, -1.0, 1.0
    codes = [fp8.encode_e4m3(x) for x in (q, k, v)]
    for t in (1.0, 5.0, 9.0, 11.0):
        o, _ = attention_result(answer.call(FILE, "attention_fp8", *codes, **ONES, scale=t), q.bfloat16())
        weight = torch.exp(torch.tensor(-t))
        right = float(fp8.round_e4m3(weight * 256) / 256 / (1 + weight))
        if abs(float(o[0, 0, 0, 0]) - right) > 2.0**-7 * right:
            exact = float(weight / (1 + weight))
            raise CheckFailed(
                f"a key whose score is {t:g} below the best must weigh {right:.4g} (exactly {exact:.4g}; its P is "
                f"rounded as {float(weight * 256):.4g}); it weighs {float(o[0, 0, 0, 0]):.4g}"
            )


@check("blocks with scales of their own, GQA, ragged lengths", points=2)
def test_blocks(answer: Answer) -> None:
    seed = fresh_seed()
    cases = (
        Case(130, 300, kind="outliers"),
        Case(200, 257, batch=2, heads_q=4, heads_kv=2, head_dim=128, kind="outliers"),
        Case(40, 400, kind="rising", scale=0.2),
        Case(300, 200, kind="large"),
    )
    for case in cases:
        on_codes(answer, case, seed)


@check("causal mask, rows without keys", points=1)
def test_causal(answer: Answer) -> None:
    for case in (Case(8, 8), Case(200, 200), Case(20, 150), Case(150, 20), Case(257, 391, heads_q=2, heads_kv=1)):
        on_codes(answer, case.but(causal=True), fresh_seed())


@check("all together: as near to float64 as the reference, the paper's input", points=2)
def test_paper(answer: Answer) -> None:
    seed = fresh_seed()
    q, k, v = paper_input(Shape(512, 4096, 128), seed)  # enough rows in which outliers meet
    o, lse = attention_result(answer.call(FILE, "forward", q, k, v), q.bfloat16())
    case = Case(512, 4096, head_dim=128, kind="outliers", seed=seed)
    judge.judged(o, lse, (q, k, v), case, "rotation of Q and of K, scales of blocks")


@check("all together, real activations", points=2)
def test_smollm2(answer: Answer) -> None:
    seed = fresh_seed()
    cases = [Case(n, n, heads_q=3, kind="smollm2", causal=True, seed=seed + n) for n in (100, 400)]
    judge.numbers(answer, FILE, cases, bug="rotation of Q and of K, scales of blocks, causal mask")
