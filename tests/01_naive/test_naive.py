"""Checks of chapter 1: a softmax that cannot overflow, the cost model, and attention by its definition."""

import math
from typing import Any

import torch
from torch import Tensor

from fa_reference.grading import CheckFailed, check, properties
from fa_reference.grading.answer import ATTENTION
from fa_reference.grading.properties import close, fresh_seed
from fa_reference.inputs import Case

FILE = "naive.py"
INF = float("inf")
# What this chapter asks the learner to write.
FORBIDDEN = (
    *ATTENTION,
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "softmin",
    "logsumexp",
    "special_softmax",
)


def softmax(answer: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    """stable_softmax(scores) of the learner's file, after checking what was returned."""
    value = answer.call(FILE, "stable_softmax", scores, forbid=FORBIDDEN)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise CheckFailed("stable_softmax must return the pair (probabilities, lse)")
    for name, tensor, shape in (("probabilities", value[0], scores.shape), ("lse", value[1], scores.shape[:-1])):
        if not isinstance(tensor, Tensor):
            raise CheckFailed(f"{name} must be a torch.Tensor; it is a {type(tensor).__name__}")
        if tensor.shape != shape:
            raise CheckFailed(
                f"{name} must have shape {tuple(shape)} for scores of shape {tuple(scores.shape)}; "
                f"it has {tuple(tensor.shape)}"
            )
        if tensor.dtype != torch.float32:
            raise CheckFailed(f"{name} must have dtype torch.float32; it has {tensor.dtype}")
    return value[0], value[1]


def shown(scores: Tensor) -> str:
    """A small tensor of scores, for a failure message."""
    return "scores " + str(scores.tolist()) if scores.numel() <= 8 else f"scores of shape {tuple(scores.shape)}"


def lse_bug(lse: Tensor, scores: Tensor) -> str | None:
    """The mistake that a wrong lse of these scores shows; None if it is not a known one."""
    exact, m = torch.logsumexp(scores.double(), -1), scores.double().amax(-1)
    known = {
        "lse is in base 2: use the natural logarithm": exact * math.log2(math.e),
        "lse lacks the maximum that was subtracted: lse = m + log(l)": exact - m,
        "lse is the maximum alone: add log(l)": m,
        "this is the denominator: lse is its logarithm": exact.exp(),
        "this is l: lse = m + log(l)": (exact - m).exp(),
    }
    return next((w for w, wrong in known.items() if torch.allclose(lse.double(), wrong, rtol=1e-4, atol=1e-4)), None)


def softmax_is_right(answer: Any, scores: Tensor, bug: str) -> None:
    """Compare with float64, NaN first; `bug` is what to suspect."""
    p, lse = softmax(answer, scores)
    for name, tensor in (("probabilities", p), ("lse", lse)):
        if tensor.isnan().any():
            raise CheckFailed(f"likely bug: {bug}\n{name} contain NaN for {shown(scores)}")
    exact = scores.double()
    nothing = exact.amax(-1) == -INF
    if (lse.isfinite() & nothing).any():
        row = lse[lse.isfinite() & nothing][0]
        raise CheckFailed(
            f"likely bug: -inf became a finite number\nlse of a row of -inf must be -inf; it is {float(row):.6g} "
            f"for {shown(scores)}"
        )
    try:
        close(p, torch.softmax(exact, -1).nan_to_num(nan=0.0), "probabilities")
    except CheckFailed as failure:
        raise CheckFailed(f"likely bug: {bug}\n{failure}\nfor {shown(scores)}") from None
    if not torch.equal(lse == -INF, nothing):
        raise CheckFailed(
            f"likely bug: {bug}\nlse must be -inf exactly in rows of -inf; it is {lse.tolist()} for {shown(scores)}"
        )
    try:
        close(lse[~nothing], torch.logsumexp(exact, -1)[~nothing], "lse", tolerance=1e-6)
    except CheckFailed as failure:
        raise CheckFailed(f"likely bug: {lse_bug(lse, scores) or bug}\n{failure}\nfor {shown(scores)}") from None


def random_scores(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@check("softmax of [4, 10] is [0.00247, 0.99753]", points=1)
def test_worked_example(answer):
    p, lse = softmax(answer, torch.tensor([[4.0, 10.0]]))
    close(p, torch.tensor([[0.0024726, 0.9975274]]), "softmax of [4, 10]")
    close(lse, torch.tensor([10.0024757]), "lse of [4, 10]", tolerance=1e-6)


@check("softmax rows sum to one", points=1)
def test_rows_sum_to_one(answer):
    seed = fresh_seed()
    for shape in ((1, 1), (1, 2), (3, 5), (2, 3, 33)):
        scores = random_scores(*shape, seed=seed, size=3)
        p, _ = softmax(answer, scores)
        close(p.sum(-1), torch.ones(shape[:-1]), f"sum over the last dimension of probabilities {shape}, seed {seed}")
        exact = torch.softmax(scores.double(), -1)
        close(
            p, exact, f"probabilities exp(score) / sum of exp over the last dimension, of {shown(scores)}, seed {seed}"
        )


@check("shifting all scores changes nothing", points=1)
def test_shift(answer):
    # Multiples of 1/8 below 16, so that adding 4096 rounds nothing.
    seed = fresh_seed()
    scores = torch.randint(-128, 128, (4, 9), generator=torch.Generator().manual_seed(seed)) / 8
    p, lse = softmax(answer, scores)
    for shift in (64.0, -64.0, 4096.0, -4096.0):
        shifted_p, shifted_lse = softmax(answer, scores + shift)
        what = f"all scores + {shift:g} (seed {seed})"
        if not shifted_p.isfinite().all():
            way = "overflows" if shift > 0 else "underflows to a sum of 0"
            kind = "NaN" if shifted_p.isnan().any() else "infinity"
            raise CheckFailed(
                f"likely bug: the row maximum is not subtracted, so exp {way}\nprobabilities contain {kind} for {what}"
            )
        close(shifted_p, p, f"probabilities for {what}")
        close(shifted_lse, lse + shift, f"lse for {what}, which must move by {shift:g}", tolerance=1e-6)


@check("softmax of large scores does not overflow", points=1)
def test_softmax_of_large_scores(answer):
    bug = "the maximum of each row (not of the whole tensor) must be subtracted before exp"
    seed = fresh_seed()
    softmax_is_right(answer, torch.tensor([[100.0, 0.0]]), bug)
    softmax_is_right(answer, torch.tensor([[-200.0, -201.0]]), bug)
    softmax_is_right(answer, torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]]), bug)
    softmax_is_right(answer, torch.tensor([[3e38, -3e38, 0.0]]), bug)
    softmax_is_right(answer, random_scores(5, 40, seed=seed, size=300.0), bug + f"; seed {seed}")


@check("softmax of a row without keys is 0, its lse -inf", points=1)
def test_softmax_of_nothing(answer):
    bug = "a row of -inf: (-inf) - (-inf) is NaN, and so is 0 / 0; its probabilities are 0 and its lse is -inf"
    for row in ([-INF], [-INF, -INF]):
        softmax_is_right(answer, torch.tensor([row]), bug)
    bug = "-inf hides single keys: they get probability 0, the others as if they were alone"
    softmax_is_right(answer, torch.tensor([[-INF, 2.0, 1.0]]), bug)
    softmax_is_right(answer, torch.tensor([[-INF, -INF], [0.0, -INF], [3.0, 4.0]]), bug)


@check("lse is the natural logarithm of the denominator", points=1)
def test_lse(answer):
    seed = fresh_seed()
    for shape in ((1, 2), (3, 17)):
        softmax_is_right(answer, random_scores(*shape, seed=seed) + 7, f"lse = m + log(l); seed {seed}")


@check("softmax computes in float32", points=1)
def test_softmax_precision(answer):
    seed = fresh_seed()
    for dtype in (torch.float16, torch.bfloat16):
        for columns in (3, 500):
            scores = random_scores(2, columns, seed=seed).to(dtype)
            softmax_is_right(answer, scores, f"{dtype} scores must be converted to float32 first; seed {seed}")


@check("FLOPs: two matrix products, 4 N^2 d", points=1)
def test_flops(answer):
    for len_q, len_k, d in ((1, 1, 1), (4, 4, 2), (3, 5, 7), (2048, 1024, 128)):
        flops, right = answer.call(FILE, "attention_flops", len_q, len_k, d), 4 * len_q * len_k * d
        if flops == right:
            continue
        known = {
            2 * len_q * len_k * d: "only one of the two products is counted, or a multiply-add as one operation",
            len_q * len_k * d: "each product has N_q N_k d multiplications and as many additions, and there are two",
            2 * len_q * len_k * d + len_q * len_k: "2 N^2 d + N^2 is often printed; it leaves out half of the work",
            4 * len_q * len_q * d: "N_k differs from N_q here",
            4 * len_k * len_k * d: "N_q differs from N_k here",
        }
        words = f"likely bug: {known[flops]}\n" if flops in known else ""
        raise CheckFailed(f"{words}attention_flops({len_q}, {len_k}, {d}) returned {flops!r}, not {right}")


@check("HBM bytes: S and P are each written and read", points=1)
def test_bytes(answer):
    for len_q, len_k, d, size in ((1, 1, 1, 1), (4, 4, 2, 1), (3, 5, 7, 2), (4096, 2048, 64, 4)):
        moved = answer.call(FILE, "naive_hbm_bytes", len_q, len_k, d, size)
        qkvo, s = 2 * len_q * d + 2 * len_k * d, len_q * len_k
        if moved == size * (qkvo + 4 * s):
            continue
        known = {
            size * qkvo: "only Q, K, V and O are counted: S and P live in HBM too",
            size * (qkvo + 2 * s): "S and P are counted once each: each is written by one kernel and read by the next",
            size * (qkvo + 3 * s): "S is written, S is read, P is written, P is read: four times N_q N_k",
            qkvo + 4 * s: "this is the number of elements: multiply by bytes_per_element",
            size * (4 * len_q * d + 4 * s): "K and V have N_k rows, which differs from N_q here",
            size * (qkvo + 4 * len_q**2): "S and P are N_q x N_k, and N_k differs from N_q here",
            size
            * (4 * len_q * d + 4 * len_q**2): "N_k differs from N_q here: K and V have N_k rows, S and P N_k columns",
            size * (qkvo + 4 * len_k**2): "S and P are N_q x N_k, and N_q differs from N_k here",
        }
        words = f"likely bug: {known[moved]}\n" if moved in known else ""
        raise CheckFailed(
            f"{words}naive_hbm_bytes({len_q}, {len_k}, {d}, {size}) returned {moved!r}, not {size * (qkvo + 4 * s)}"
        )


@check("the roofline has two ceilings", points=1)
def test_roofline(answer):
    for intensity, peak, bandwidth, right, where in (
        (1.0, 1000.0, 2.0, 2.0, "left of the ridge memory is the limit"),
        (4000.0, 1000.0, 2.0, 1000.0, "right of the ridge arithmetic is the limit"),
        (500.0, 1000.0, 2.0, 1000.0, "at the ridge both are"),
        (30.0, 989.4, 3.35, 100.5, "left of the ridge memory is the limit"),
    ):
        got = answer.call(FILE, "attainable_tflops", intensity, peak, bandwidth)
        if not isinstance(got, int | float) or abs(got - right) > 1e-6 * right:
            raise CheckFailed(
                f"attainable_tflops({intensity}, {peak}, {bandwidth}) returned {got!r}, not {right}: {where} "
                "(TB/s x FLOP/byte = TFLOP/s)"
            )


@check("V = I recovers the probabilities", points=2)
def test_identity_values(answer):
    seed = fresh_seed()
    for n in (2, 5, 16):
        case = Case(len_q=3, len_k=n, head_dim=n, seed=seed)
        q, k, _ = case.make()
        v = torch.eye(n).expand(1, 1, n, n).contiguous()
        value = answer.call(FILE, "forward", q, k, v, forbid=FORBIDDEN)
        o, lse = properties.attention_result(value, q)
        exact = torch.softmax(q.double() @ k.double().mT / math.sqrt(n), -1)
        if not torch.allclose(o.double(), exact, atol=1e-4):
            properties.judged(o, lse, (q, k, v), case, "O = P V with P = softmax(scale * Q K^T)")
        close(o, exact, f"O with V = I, which is P ({case})", tolerance=1e-5)
        close(o.sum(-1), torch.ones(1, 1, 3), f"row sums of P ({case})")


@check("any lengths and head dimensions", points=1)
def test_shapes(answer):
    seed = fresh_seed()
    cases = [
        Case(len_q=1, len_k=1, head_dim=1, seed=seed),
        Case(len_q=2, len_k=3, head_dim=4, seed=1),
        Case(len_q=7, len_k=5, head_dim=24, batch=2, seed=seed),
        Case(len_q=33, len_k=65, head_dim=64, batch=2, heads_q=3, heads_kv=3, seed=seed),
        Case(len_q=1, len_k=130, head_dim=80, heads_q=2, heads_kv=2, kind="outliers", seed=seed),
    ]
    properties.attention(answer, FILE, cases, bug="one matrix product of the two, or the softmax", forbid=FORBIDDEN)


@check("the scale is 1/sqrt(d) unless given", points=1)
def test_scale(answer):
    seed = fresh_seed()
    for scale in (None, 0.3, 1.0):
        case = Case(len_q=2, len_k=5, head_dim=16, scale=scale, seed=seed)
        properties.attention(answer, FILE, [case], bug="how the scale enters the scores", forbid=FORBIDDEN)


@check("causal is aligned bottom-right", points=2)
def test_causal(answer):
    seed = fresh_seed()
    cases = [
        Case(len_q=len_q, len_k=len_k, head_dim=16, causal=True, seed=seed)
        for len_q, len_k in ((3, 3), (1, 4), (3, 5), (33, 33), (17, 50))
    ]
    properties.attention(answer, FILE, cases, bug="which keys the causal mask hides", forbid=FORBIDDEN)


@check("rows without keys give 0 and -inf", points=1)
def test_rows_without_keys(answer):
    seed = fresh_seed()
    cases = [
        Case(len_q=5, len_k=2, head_dim=8, causal=True, seed=seed),
        Case(len_q=40, len_k=9, head_dim=16, causal=True, heads_q=2, heads_kv=1, seed=seed),
        Case(len_q=3, len_k=0, head_dim=8, seed=seed),
        Case(len_q=3, len_k=0, head_dim=8, causal=True, seed=seed),
    ]
    bug = "with len_q > len_k the first len_q - len_k queries see no key: O is 0 and lse -inf there"
    properties.attention(answer, FILE, cases, bug=bug, forbid=FORBIDDEN)


@check("GQA maps query heads to the right KV head", points=2)
def test_gqa(answer):
    seed = fresh_seed()
    cases = [
        Case(len_q=2, len_k=3, head_dim=8, batch=batch, heads_q=heads_q, heads_kv=heads_kv, seed=seed)
        for batch, heads_q, heads_kv in ((1, 2, 1), (1, 4, 2), (2, 6, 3), (2, 9, 3))
    ]
    bug = "query head h belongs to KV head h // (heads_q / heads_kv): consecutive query heads share"
    properties.attention(answer, FILE, cases, bug=bug, forbid=FORBIDDEN)


@check("large scores do not overflow", points=1)
def test_large_scores(answer):
    seed = fresh_seed()
    bug = "forward must leave exp to stable_softmax, which subtracts the maximum of each row"
    for kind in ("large", "shifted"):
        case = Case(len_q=4, len_k=9, head_dim=16, kind=kind, seed=seed)
        properties.attention(answer, FILE, [case, case.but(len_q=33, len_k=70)], bug=bug, forbid=FORBIDDEN)


@check("float16 and bfloat16 keep the error rule", points=1)
def test_half(answer):
    seed = fresh_seed()
    cases = [
        Case(len_q=5, len_k=len_k, head_dim=64, dtype=dtype, heads_q=2, causal=causal, kind=kind, seed=seed)
        for len_k, causal, kind in ((3, False, "normal"), (200, False, "normal"), (200, True, "shifted"))
        for dtype in ("float16", "bfloat16")
    ]
    bug = "scores and softmax in float32; only P (before P V) and O are rounded to the input's dtype"
    properties.attention(answer, FILE, cases, bug=bug, forbid=FORBIDDEN)


@check("any strides", points=1)
def test_strides(answer):
    seed = fresh_seed()
    cases = [
        Case(batch=2, heads_q=4, heads_kv=2, len_q=3, len_k=7, head_dim=16, layout=layout, causal=True, seed=seed)
        for layout in ("bnhd", "padded")
    ]
    bug = "a transposed or padded tensor is read as if it were contiguous (view, reshape, or its storage)"
    properties.attention(answer, FILE, cases, bug=bug, forbid=FORBIDDEN)


@check("inputs are left unchanged", points=1)
def test_unchanged(answer):
    # answer.call compares the inputs before and after.
    softmax(answer, random_scores(3, 4, seed=0, size=5))
    q, k, v = Case(len_q=4, len_k=4, head_dim=8, causal=True).make()
    answer.call(FILE, "forward", q, k, v, causal=True, forbid=FORBIDDEN)


@check("bad input is refused", points=1)
def test_bad_input(answer):
    properties.refuses_bad_input(answer, FILE)


@check("real activations", points=1)
def test_real_activations(answer):
    seed = fresh_seed()
    case = Case(heads_q=3, len_q=8, len_k=40, kind="smollm2", causal=True, seed=seed)
    cases = [case, case.but(len_q=200, len_k=300, seed=seed + 1), case.but(dtype="bfloat16", len_k=700, seed=seed + 2)]
    properties.attention(answer, FILE, cases, bug="what random inputs do not show: outlier channels", forbid=FORBIDDEN)
