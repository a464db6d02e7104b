"""Graded checks of chapter 4, part one: FlashAttention-2 in Python, through the memory accounting."""

from math import ceil

import torch

from fa_reference.counts import fa2_hbm_bytes
from fa_reference.grading import CheckFailed, check, properties
from fa_reference.grading.answer import Answer, Counted
from fa_reference.inputs import Case
from fa_reference.memory import sram_budget

FILE = "fa2_tiled.py"
BLOCKS = {"block_q": 16, "block_k": 16}
FP32 = 4  # bytes
# (len_q, len_k, block_q, block_k)
SHAPES = ((64, 64, 16, 16), (64, 64, 16, 32), (64, 64, 32, 16), (50, 70, 16, 32), (70, 30, 16, 16), (40, 90, 32, 16))


def sees(len_q: int, len_k: int, causal: bool) -> torch.Tensor:
    """Which key each query sees, (len_q, len_k), from the definition."""
    i, j = torch.arange(len_q)[:, None], torch.arange(len_k)[None, :]
    return j <= i + len_k - len_q if causal else torch.ones(len_q, len_k, dtype=torch.bool)


def blocks_by_definition(rows: slice, len_q: int, len_k: int, block_k: int, causal: bool) -> tuple[int, int]:
    blocks = sees(len_q, len_k, causal)[rows].split(block_k, dim=1) if len_k else ()
    unmasked = sum(bool(b.all()) for b in blocks)  # seen in full: a prefix, as the mask is a staircase
    return unmasked, sum(bool(b.any()) for b in blocks)


def row_blocks(len_q: int, block_q: int) -> list[slice]:
    return [slice(s, min(s + block_q, len_q)) for s in range(0, len_q, block_q)]


def visited_keys(len_q: int, len_k: int, block_q: int, block_k: int, causal: bool) -> int:
    """Rows of K that all the query blocks load, by definition."""
    visited = [blocks_by_definition(r, len_q, len_k, block_k, causal)[1] for r in row_blocks(len_q, block_q)]
    return sum(min(n * block_k, len_k) for n in visited)


def elements(len_q: int, len_k: int, head_dim: int, block_q: int, block_k: int, causal: bool) -> int:
    return 2 * len_q * head_dim + len_q + 2 * head_dim * visited_keys(len_q, len_k, block_q, block_k, causal)


def counted(answer: Answer, case: Case, block_q: int, block_k: int) -> Counted:
    q, k, v = case.make()
    budget = sram_budget(block_q, block_k, case.head_dim)
    result = answer.call_counted(FILE, q, k, v, causal=case.causal, block_q=block_q, block_k=block_k, sram_bytes=budget)
    properties.judged(result.o, result.lse, (q, k, v), case)
    return result


@check("which blocks to visit, which to mask", points=2)
def test_key_blocks(answer: Answer) -> None:
    for len_q, len_k, block_q, block_k in (*SHAPES, (8, 0, 4, 4), (33, 65, 8, 32), (5, 3, 2, 2)):
        for causal in (False, True):
            for rows in row_blocks(len_q, block_q):
                got = answer.call(FILE, "key_blocks", rows.start, rows.stop, len_q, len_k, block_k, causal)
                expected = blocks_by_definition(rows, len_q, len_k, block_k, causal)
                if not isinstance(got, tuple | list) or tuple(got) != expected:
                    first, last = (int(sees(len_q, len_k, causal)[i].sum()) for i in (rows.start, rows.stop - 1))
                    why = f"the first query sees {first} of {len_k} keys, the last one {last}; blocks of {block_k}"
                    if len_k % block_k:
                        whole, rest = divmod(len_k, block_k)
                        seen = "seen in full" if first == len_k else "not seen in full by the first query"
                        why += f": {whole + 1}, of which the last has {rest} and is {seen}"
                    raise CheckFailed(
                        f"key_blocks({rows.start}, {rows.stop}, len_q={len_q}, len_k={len_k}, block_k={block_k}, "
                        f"causal={causal}) must be (unmasked, visited) = {expected}; it returned {got!r}: {why}"
                    )


@check("counts the visited blocks", points=1)
def test_visited(answer: Answer) -> None:
    for shape in SHAPES:
        for causal in (False, True):
            len_q, len_k, block_q, block_k = shape
            expected = sum(
                blocks_by_definition(r, len_q, len_k, block_k, causal)[1] for r in row_blocks(len_q, block_q)
            )
            got = answer.call(FILE, "visited_blocks", *shape, causal)
            if got != expected:
                all_blocks = ceil(len_q / block_q) * ceil(len_k / block_k)
                raise CheckFailed(
                    f"visited_blocks(len_q={len_q}, len_k={len_k}, block_q={block_q}, block_k={block_k}, "
                    f"causal={causal}) must be {expected} of {all_blocks}; it returned {got}"
                )


@check("the formula counts every number that moves", points=1)
def test_formula(answer: Answer) -> None:
    assert elements(96, 64, 32, 16, 16, False) * FP32 == fa2_hbm_bytes(96, 64, 32, 16, element=FP32)
    for len_q, len_k, block_q, block_k in SHAPES:
        for causal in (False, True):
            got = answer.call(FILE, "fa2_hbm_elements", len_q, len_k, 32, block_q, block_k, causal)
            expected = elements(len_q, len_k, 32, block_q, block_k, causal)
            if got != expected:
                raise CheckFailed(
                    f"fa2_hbm_elements(len_q={len_q}, len_k={len_k}, head_dim=32, block_q={block_q}, "
                    f"block_k={block_k}, causal={causal}) must be {expected}; it returned {got}. Q read, O and L "
                    "written once; K and V read for every block of queries, as far as it visits them"
                )


@check("one block is an ordinary softmax", points=1)
def test_one_block(answer: Answer) -> None:
    cases = [Case(1, 1, head_dim=8), Case(16, 16, head_dim=32), Case(8, 8, head_dim=32, scale=0.4)]
    properties.attention(answer, FILE, cases, **BLOCKS)


@check("block size does not change the answer", points=2)
def test_block_size(answer: Answer) -> None:
    sizes = ((64, 64), (64, 16), (32, 64), (16, 16), (16, 32), (48, 5), (7, 5))
    variants = [{"block_q": bq, "block_k": bk} for bq, bk in sizes]
    for causal in (False, True):
        case = Case(64, 64, head_dim=32, causal=causal, seed=properties.fresh_seed())
        properties.same_answer(answer, FILE, case, variants)


@check("ragged tail", points=1)
def test_ragged(answer: Answer) -> None:
    cases = [Case(5, 17, head_dim=16), Case(17, 5, head_dim=16), Case(33, 47, head_dim=32), Case(50, 31, head_dim=64)]
    properties.attention(answer, FILE, cases, bug="the last block is shorter than the others", **BLOCKS)


@check("large scores do not overflow", points=1)
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


@check("causal mask ends at the bottom right", points=1)
def test_causal(answer: Answer) -> None:
    shapes = ((4, 4), (32, 32), (40, 40), (10, 45), (1, 33))
    cases = [Case(n_q, n_k, head_dim=16, causal=True, seed=properties.fresh_seed()) for n_q, n_k in shapes]
    properties.attention(answer, FILE, cases, bug="query i sees key j if j <= i + N_k - N_q", **BLOCKS)


@check("rows without keys", points=1)
def test_empty_rows(answer: Answer) -> None:
    # O and L arrive as NaN: blocks of queries that visit nothing must still be written.
    cases = [Case(3, 0, head_dim=16), Case(8, 3, head_dim=16, causal=True), Case(50, 20, head_dim=16, causal=True)]
    properties.attention(answer, FILE, cases, bug="a block of queries that sees no key still stores O and L", **BLOCKS)


@check("real activations", points=1)
def test_real(answer: Answer) -> None:
    case = Case(40, 96, heads_q=3, kind="smollm2", causal=True, seed=properties.fresh_seed())
    properties.attention(answer, FILE, [case], block_q=32, block_k=32)


@check("Q, O and L move once", points=1)
def test_loop_order(answer: Answer) -> None:
    result = counted(answer, Case(64, 96, head_dim=32), 16, 16)
    wanted = {"Q": (64 * 32, 0), "O": (0, 64 * 32), "L": (0, 64)}
    for name, (loads, stores) in wanted.items():
        got = (result.loaded.get(name, 0) // FP32, result.stored.get(name, 0) // FP32)
        if got != (loads, stores):
            raise CheckFailed(
                f"of {name}, {got[0]} numbers were loaded and {got[1]} stored; FlashAttention-2 loads {loads} and "
                f"stores {stores}: O_i, l_i and m_i stay on chip during the whole inner loop"
            )


@check("skips the blocks above the diagonal", points=1)
def test_skips(answer: Answer) -> None:
    for len_q, len_k in ((64, 64), (32, 80), (80, 32)):
        result = counted(answer, Case(len_q, len_k, head_dim=32, causal=True), 16, 16)
        mask = sees(len_q, len_k, True)
        rows = None
        for action, name, start, stop in result.log:
            if action == "load" and name == "Q":
                rows = (start, stop)
            if action == "load" and name in ("K", "V") and rows and not mask[rows[0] : rows[1], start:stop].any():
                raise CheckFailed(
                    f"queries {rows[0]}..{rows[1] - 1} see none of the keys {start}..{stop - 1} (len_q={len_q}, "
                    f"len_k={len_k}, causal), and still this block of {name} was loaded"
                )


@check("HBM bytes equal the formula", points=1)
def test_traffic(answer: Answer) -> None:
    for len_q, len_k, block_q, block_k in SHAPES:
        for causal in (False, True):
            result = counted(answer, Case(len_q, len_k, head_dim=32, causal=causal), block_q, block_k)
            moved = sum(result.loaded.values()) + sum(result.stored.values())
            expected = FP32 * elements(len_q, len_k, 32, block_q, block_k, causal)
            if moved != expected:
                keys = visited_keys(len_q, len_k, block_q, block_k, causal) * 32 * FP32
                raise CheckFailed(
                    f"{moved} bytes moved, FlashAttention-2 moves {expected} (len_q={len_q}, len_k={len_k}, d=32, "
                    f"block_q={block_q}, block_k={block_k}, causal={causal}). Loaded: {result.loaded}, of K and V "
                    f"{keys} each are needed; stored: {result.stored}"
                )


@check("fits in SRAM", points=1)
def test_sram(answer: Answer) -> None:
    for length in (64, 256):
        counted(answer, Case(length, length, head_dim=32), 16, 16)
