"""Graded checks of chapter 3, part one: FlashAttention-1 in Python, through the memory accounting."""

from math import ceil

import torch
from torch import Tensor

from fa_reference.counts import fa1_hbm_bytes
from fa_reference.grading import CheckFailed, check, properties
from fa_reference.grading.answer import Answer, Counted
from fa_reference.inputs import Case
from fa_reference.memory import sram_budget

FILE = "fa1_tiled.py"
BLOCKS = {"block_q": 16, "block_k": 16}
FP32 = 4  # bytes


def elements(len_q: int, len_k: int, head_dim: int, block_k: int) -> int:
    """What Algorithm 1 moves, in numbers, from the course's own count of bytes."""
    return fa1_hbm_bytes(len_q, len_k, head_dim, block_k, element=FP32, accumulator=FP32) // FP32


def counted(answer: Answer, case: Case, block_q: int, block_k: int) -> Counted:
    q, k, v = case.make()
    budget = sram_budget(block_q, block_k, case.head_dim)
    result = answer.call_counted(FILE, q, k, v, causal=case.causal, block_q=block_q, block_k=block_k, sram_bytes=budget)
    properties.judged(result.o, result.lse, (q, k, v), case)
    return result


@check("block sizes of the paper", points=1)
def test_block_sizes(answer: Answer) -> None:
    for sram, head_dim in ((1024, 64), (25_600, 64), (25_601, 64), (16_384, 128), (1000, 32), (100, 64)):
        block_k = ceil(sram / (4 * head_dim))
        expected = (min(block_k, head_dim), block_k)
        got = answer.call(FILE, "block_sizes", sram, head_dim)
        if not isinstance(got, tuple | list) or tuple(got) != expected:
            raise CheckFailed(
                f"block_sizes({sram}, {head_dim}) must be (B_r, B_c) = {expected}; it returned {got!r}. "
                "B_c = ceil(M / 4d), B_r = min(B_c, d), with M in numbers"
            )


@check("one block is an ordinary softmax", points=1)
def test_one_block(answer: Answer) -> None:
    cases = [Case(1, 1, head_dim=8), Case(16, 16, head_dim=32), Case(8, 8, head_dim=32, scale=0.4)]
    properties.attention(answer, FILE, cases, **BLOCKS)


@check("block size does not change the answer", points=2)
def test_block_size(answer: Answer) -> None:
    sizes = ((64, 64), (64, 16), (32, 64), (16, 16), (16, 32), (48, 5), (7, 5))
    variants = [{"block_q": bq, "block_k": bk} for bq, bk in sizes]
    properties.same_answer(answer, FILE, Case(64, 64, head_dim=32, seed=properties.fresh_seed()), variants)


@check("ragged tail", points=1)
def test_ragged(answer: Answer) -> None:
    cases = [Case(5, 17, head_dim=16), Case(17, 5, head_dim=16), Case(33, 47, head_dim=32), Case(50, 31, head_dim=64)]
    properties.attention(answer, FILE, cases, bug="the last block is shorter than the others", **BLOCKS)


@check("large scores do not overflow", points=2)
def test_large(answer: Answer) -> None:
    kinds = ("rising", "large", "shifted", "outliers")
    cases = [Case(32, 80, head_dim=32, kind=kind, seed=properties.fresh_seed()) for kind in kinds]
    properties.attention(answer, FILE, cases, bug="m_i, or what is rescaled when it grows", **BLOCKS)


@check("V = I recovers the probabilities", points=1)
def test_probabilities(answer: Answer) -> None:
    case = Case(20, 48, head_dim=48, seed=properties.fresh_seed())
    q, k, _ = case.make()
    v = torch.eye(48).expand(1, 1, 48, 48).contiguous()
    o, lse = answer.call(FILE, "forward", q, k, v, **BLOCKS)
    properties.close(o.sum(-1), torch.ones(1, 1, 20), "the sum of every row of P = O (for V = I)")
    properties.judged(o, lse, (q, k, v), case)


@check("causal mask ends at the bottom right", points=2)
def test_causal(answer: Answer) -> None:
    shapes = ((4, 4), (32, 32), (40, 40), (10, 45), (1, 33))
    cases = [Case(n_q, n_k, head_dim=16, causal=True, seed=properties.fresh_seed()) for n_q, n_k in shapes]
    properties.attention(answer, FILE, cases, bug="query i sees key j if j <= i + N_k - N_q", **BLOCKS)


@check("rows without keys", points=1)
def test_empty_rows(answer: Answer) -> None:
    cases = [Case(3, 0, head_dim=16), Case(8, 3, head_dim=16, causal=True), Case(50, 20, head_dim=16, causal=True)]
    properties.attention(answer, FILE, cases, **BLOCKS)


@check("real activations", points=1)
def test_real(answer: Answer) -> None:
    case = Case(40, 96, heads_q=3, kind="smollm2", causal=True, seed=properties.fresh_seed())
    properties.attention(answer, FILE, [case], block_q=32, block_k=32)


@check("the formula counts every number that moves", points=1)
def test_formula(answer: Answer) -> None:
    for len_q, len_k, head_dim, block_q, block_k in (
        (64, 64, 32, 16, 16),
        (64, 64, 32, 16, 32),
        (64, 64, 32, 32, 16),
        (50, 70, 64, 16, 32),
        (4096, 1000, 128, 128, 96),
    ):
        got = answer.call(FILE, "fa1_hbm_elements", len_q, len_k, head_dim, block_q, block_k)
        expected = elements(len_q, len_k, head_dim, block_k)
        if got != expected:
            raise CheckFailed(
                f"fa1_hbm_elements(len_q={len_q}, len_k={len_k}, head_dim={head_dim}, block_q={block_q}, "
                f"block_k={block_k}) must be {expected}; it returned {got}. K and V once; in each of the "
                f"{ceil(len_k / block_k)} outer steps Q read, and O, l and m read and written"
            )


@check("K and V are read once", points=1)
def test_loop_order(answer: Answer) -> None:
    result = counted(answer, Case(64, 64, head_dim=32), 16, 16)
    for name in ("K", "V"):
        once = 64 * 32 * FP32
        if result.loaded.get(name, 0) != once:
            raise CheckFailed(
                f"{name} has {once} bytes and {result.loaded.get(name, 0)} were loaded: the outer loop of "
                "FlashAttention-1 goes over blocks of K and V, and each is loaded once"
            )


@check("HBM bytes equal the formula", points=2)
def test_traffic(answer: Answer) -> None:
    for len_q, len_k, block_q, block_k in ((32, 32, 32, 32), (64, 64, 16, 16), (50, 70, 16, 32), (40, 90, 32, 16)):
        result = counted(answer, Case(len_q, len_k, head_dim=32), block_q, block_k)
        moved = sum(result.loaded.values()) + sum(result.stored.values())
        expected = FP32 * elements(len_q, len_k, 32, block_k)
        if moved != expected:
            steps = ceil(len_k / block_k)
            once = {"K": FP32 * len_k * 32, "V": FP32 * len_k * 32}
            once |= {"Q": FP32 * len_q * 32, "O": FP32 * len_q * 32, "l": FP32 * len_q, "m": FP32 * len_q}
            lines = [f"  {n}: loaded {_times(result.loaded, n, b)}, stored {_times(result.stored, n, b)} times over"
                     for n, b in once.items()]  # fmt: skip
            raise CheckFailed(
                f"{moved} bytes moved, Algorithm 1 moves {expected} (len_q={len_q}, len_k={len_k}, d=32, "
                f"block_q={block_q}, block_k={block_k}). K and V are loaded once in all; in each of the "
                f"{steps} outer steps Q is loaded once, and O, l and m are loaded once and stored once. Yours:\n"
                + "\n".join(lines)
            )
        most = max(stop - start for action, name, start, stop in result.log if action == "load" and name == "Q")
        if most != min(block_q, len_q):
            raise CheckFailed(f"Q was loaded in blocks of up to {most} rows; block_q is {block_q} and len_q {len_q}")


def _times(counter: dict[str, int], name: str, size: int) -> str:
    return f"{counter.get(name, 0) / size:g}"


@check("fits in SRAM", points=1)
def test_sram(answer: Answer) -> None:
    # Four blocks of K and V alone would fill this SRAM: only a few tiles fit, whatever the length.
    for length in (64, 256):
        counted(answer, Case(length, length, head_dim=32), 16, 16)


@check("writes every output element", points=1)
def test_writes_all(answer: Answer) -> None:
    q, k, v = Case(37, 29, batch=2, heads_q=2, heads_kv=1, head_dim=16, seed=properties.fresh_seed()).make()
    o, lse = answer.call(FILE, "forward", q, k, v, **BLOCKS)
    _nonzero("O", o)
    _nonzero("lse", lse)


def _nonzero(name: str, result: Tensor) -> None:
    unset = (result == 0) | ~result.isfinite()
    if unset.any():
        where = unset.nonzero()[0].tolist()
        raise CheckFailed(f"{name} was left as it came in {int(unset.sum())} places, first at {where}")
