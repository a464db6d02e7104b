"""Checks of chapter 2: the state of an online softmax, its update and merge, and attention in one pass."""

import itertools
import math
import random
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fa_reference.grading import CheckFailed, check, properties
from fa_reference.grading.answer import ATTENTION
from fa_reference.grading.check import NotWritten
from fa_reference.grading.properties import close, fresh_seed
from fa_reference.inputs import Case

FILE = "online_softmax.py"
LARGEST = str(Path(__file__).resolve().parent.parent / "largest_tensor.py")
INF = float("inf")
SOFTMAX = ("softmax", "_softmax", "log_softmax", "_log_softmax", "special_softmax", "softmin", "logsumexp")
FORBIDDEN = (*ATTENTION, *SOFTMAX)
# Crosses to the learner's process, where it becomes the State of the learner's file.
State = namedtuple("State", ("m", "l", "acc"))


def as_state(value: Any, function: str, rows: tuple[int, ...], head_dim: int) -> State:
    """The State that a function returned, after checking shapes and dtypes."""
    try:
        state = State(value.m, value.l, value.acc) if hasattr(value, "acc") else State(*value)
    except TypeError:
        raise CheckFailed(f"{function} must return State(m, l, acc)") from None
    for name, tensor, shape in zip(State._fields, state, (rows, rows, (*rows, head_dim))):
        if not isinstance(tensor, Tensor):
            raise CheckFailed(f"{function}: {name} must be a torch.Tensor; it is a {type(tensor).__name__}")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckFailed(f"{function}: {name} must have shape {tuple(shape)}; it has {tuple(tensor.shape)}")
        if tensor.dtype != torch.float32:
            raise CheckFailed(f"{function}: {name} must have dtype torch.float32; it has {tensor.dtype}")
    return state


def empty(rows: tuple[int, ...], head_dim: int) -> State:
    return State(torch.full(rows, -INF), torch.zeros(rows), torch.zeros(*rows, head_dim))


def exact(scores: Tensor, values: Tensor) -> State:
    """The state of these keys by its definition, computed in float64."""
    s, v = scores.double(), values.double()
    m = s.amax(-1) if s.shape[-1] else torch.full(s.shape[:-1], -INF, dtype=torch.float64)
    weights = torch.exp(s - m.nan_to_num(neginf=0.0)[..., None])
    return State(*(x.float() for x in (m, weights.sum(-1), weights @ v)))


def update(answer: Any, state: State, scores: Tensor, values: Tensor) -> State:
    value = answer.call(FILE, "update", state, scores, values, forbid=FORBIDDEN)
    return as_state(value, "update", tuple(scores.shape[:-1]), values.shape[-1])


def merge(answer: Any, a: State, b: State) -> State:
    value = answer.call(FILE, "merge", a, b, forbid=FORBIDDEN)
    return as_state(value, "merge", tuple(a.m.shape), a.acc.shape[-1])


def finalize(answer: Any, state: State) -> tuple[Tensor, Tensor]:
    value = answer.call(FILE, "finalize", state, forbid=FORBIDDEN)
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        raise CheckFailed("finalize must return the pair of tensors (o, lse)")
    return value[0], value[1]


def same(actual: State, expected: State, what: str, bugs: dict[str, State] | None = None) -> None:
    """Compare two states; on a difference name the first of `bugs`, wrong states by name, that fits."""
    try:
        for name, a, e in zip(State._fields, actual, expected):
            if a.isnan().any():
                raise CheckFailed(
                    f"{name} contains NaN: (-inf) - (-inf), or exp(+inf) times 0: "
                    "is the sign of the rescale exponent right?"
                )
            unlike = (a == -INF) != (e == -INF)
            if unlike.any():
                raise CheckFailed(f"{name} is {a[unlike][0]} where it must be {e[unlike][0]}")
            finite = e.isfinite()
            close(torch.where(finite, a, 0), torch.where(finite, e, 0), name, tolerance=2e-5)
    except CheckFailed as failure:
        fits = (
            f"likely bug: {words}\n"
            for words, wrong in (bugs or {}).items()
            if all(torch.allclose(a, w, rtol=1e-4, atol=1e-5) for a, w in zip(actual, wrong))
        )
        raise CheckFailed(f"{next(fits, '')}{failure}\nfor {what}") from None


def rescaling_bugs(old: State, scores: Tensor, values: Tensor) -> dict[str, State]:
    """What update gives with one mistake in its rescaling."""
    block = exact(scores, values)
    m = torch.maximum(old.m, block.m)
    a, b = torch.exp(old.m - m), torch.exp(block.m - m)
    new_l, new_acc = b * block.l, b[..., None] * block.acc
    column = a[..., None]
    stale = torch.exp(old.m - block.m.nan_to_num(neginf=0.0))
    return {
        "l is not rescaled by exp(m - m_new)": State(m, old.l + new_l, column * old.acc + new_acc),
        "acc is not rescaled by exp(m - m_new)": State(m, a * old.l + new_l, old.acc + new_acc),
        "neither l nor acc is rescaled by exp(m - m_new)": State(m, old.l + new_l, old.acc + new_acc),
        "the rescale factor is inverted: exp(m - m_new), which is at most 1, not exp(m_new - m)": State(
            m, old.l / a + new_l, old.acc / column + new_acc
        ),
        "the old state is forgotten": State(m, new_l, new_acc),
        "m_new is the larger of old m and the block's maximum, not the block's alone": State(
            block.m, stale * old.l + block.l, stale[..., None] * old.acc + block.acc
        ),
        "the old state is forgotten, its maximum too": block,
        "acc is divided by l: this state keeps it unnormalised": State(
            m, a * old.l + new_l, (column * old.acc + new_acc) / (a * old.l + new_l)[..., None]
        ),
    }


def random_block(rows: int, keys: int, head_dim: int, seed: int, size: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(rows, keys, generator=generator), torch.randn(keys, head_dim, generator=generator)


def words(state: State) -> str:
    return f"State(m={state.m.tolist()}, l={state.l.tolist()}, acc={state.acc.tolist()})"


@check("the empty state has m = -inf, l = 0, acc = 0", points=1)
def test_empty(answer):
    for rows, d in (((1,), 1), ((3,), 4), ((2, 1, 5), 8)):
        state = as_state(answer.call(FILE, "empty_state", rows, d, forbid=FORBIDDEN), "empty_state", rows, d)
        nothing = empty(rows, d)
        bugs = {
            "m = 0 is no maximum of no numbers: scores below 0 would never exceed it": nothing._replace(m=nothing.l)
        }
        same(state, nothing, f"empty_state({rows}, {d})", bugs)


@check("the first block starts the sums", points=1)
def test_first_block(answer):
    seed = fresh_seed()
    scores, values = torch.tensor([[4.0, 10.0]]), torch.tensor([[1.0], [2.0]])
    expected = exact(scores, values)
    divided = expected._replace(acc=expected.acc / expected.l[..., None])
    bugs = {"acc is divided by l: this state keeps it unnormalised": divided}
    same(update(answer, empty((1,), 1), scores, values), expected, "scores [4, 10], values [1], [2]", bugs)
    for rows, keys, d in ((1, 1, 1), (3, 5, 4)):
        scores, values = random_block(rows, keys, d, seed)
        new = update(answer, empty((rows,), d), scores - 20, values)
        same(new, exact(scores - 20, values), f"{keys} keys with scores near -20, {rows} rows, seed {seed}")


@check("a growing maximum rescales what came before", points=2)
def test_growing_maximum(answer):
    seed = fresh_seed()
    old = exact(torch.tensor([[4.0]]), torch.tensor([[1.0]]))
    scores, values = torch.tensor([[6.0]]), torch.tensor([[2.0]])
    expected = exact(torch.tensor([[4.0, 6.0]]), torch.tensor([[1.0], [2.0]]))
    bugs = rescaling_bugs(old, scores, values)
    same(update(answer, old, scores, values), expected, "score 4 with value 1, then score 6 with value 2", bugs)
    s, v = random_block(3, 8, 4, seed, size=1.0)
    s[:, 5:] += 6
    old, bugs = exact(s[:, :5], v[:5]), rescaling_bugs(exact(s[:, :5], v[:5]), s[:, 5:], v[5:])
    same(update(answer, old, s[:, 5:], v[5:]), exact(s, v), f"5 keys, then 3 with larger scores, seed {seed}", bugs)


@check("a block of smaller scores leaves the maximum", points=1)
def test_falling_maximum(answer):
    seed = fresh_seed()
    s, v = random_block(3, 8, 4, seed, size=1.0)
    s[:, 5:] -= 6
    old = exact(s[:, :5], v[:5])
    bugs = rescaling_bugs(old, s[:, 5:], v[5:])
    same(update(answer, old, s[:, 5:], v[5:]), exact(s, v), f"5 keys, then 3 with smaller scores, seed {seed}", bugs)


@check("blocks without visible keys change nothing", points=1)
def test_hidden_blocks(answer):
    s, v = random_block(2, 3, 4, seed=fresh_seed())
    hidden = torch.full((2, 3), -INF)
    nothing = update(answer, empty((2,), 4), hidden, v)
    same(nothing, empty((2,), 4), "a block of -inf as the first")
    same(update(answer, nothing, s, v), exact(s, v), "a block of -inf, then a block of numbers")
    same(update(answer, exact(s, v), hidden, v), exact(s, v), "a block of numbers, then a block of -inf")
    mixed = s.clone()
    mixed[0], mixed[1, 0] = -INF, -INF
    same(update(answer, empty((2,), 4), mixed, v), exact(mixed, v), "-inf in all of row 0 and some of row 1")


@check("finalize divides by l and returns m + log(l)", points=1)
def test_finalize(answer):
    seed = fresh_seed()
    for rows, keys in ((1, 2), (5, 9)):
        s, v = random_block(rows, keys, 4, seed)
        state = exact(s, v)
        o, lse = finalize(answer, state)
        gold, gold_o = torch.logsumexp(s.double(), -1), torch.softmax(s.double(), -1) @ v.double()
        try:
            close(o, gold_o, f"o (seed {seed})", tolerance=1e-5)
            close(lse, gold, f"lse (seed {seed})", tolerance=1e-6)
        except CheckFailed as failure:
            known = {
                "acc is not divided by l": (state.acc, o),
                "lse is in base 2: use the natural logarithm": (gold * math.log2(math.e), lse),
                "lse lacks the maximum: lse = m + log(l)": (gold - state.m, lse),
                "lse is the maximum alone: add log(l)": (state.m, lse),
                "add log(l), not l": (state.m + state.l, lse),
            }
            near = {"rtol": 1e-4, "atol": 1e-5}
            fits = (w for w, (wrong, got) in known.items() if torch.allclose(got.double(), wrong.double(), **near))
            likely = next(fits, None)
            raise CheckFailed(f"{f'likely bug: {likely}' if likely else ''}\n{failure}".strip()) from None
    o, lse = finalize(answer, State(torch.tensor([-INF, 1.0]), torch.tensor([0.0, 2.0]), torch.tensor([[0.0], [3.0]])))
    if o.isnan().any() or lse.isnan().any():
        raise CheckFailed("a row that saw no key gives NaN: 0 / 0, or (-inf) + inf; o must be 0 there and lse -inf")
    close(o, torch.tensor([[0.0], [1.5]]), "o of a row without keys and of one with l = 2, acc = 3")
    if lse[0] != -INF:
        raise CheckFailed(f"lse of a row without keys (m = -inf, l = 0) must be -inf; it is {float(lse[0])}")
    close(lse[1:], torch.tensor([1 + math.log(2)]), "lse of a row with m = 1, l = 2")


@check("many small updates equal one big one", points=1)
def test_any_split(answer):
    seed = fresh_seed()
    for n, cuts in ((2, (1,)), (9, (2, 3, 8)), (40, (1, 17, 18, 39))):
        s, v = random_block(3, n, 4, seed)
        state = empty((3,), 4)
        for start, stop in zip((0, *cuts), (*cuts, n)):
            state = update(answer, state, s[:, start:stop], v[start:stop])
        same(state, exact(s, v), f"{n} keys in blocks that end at {(*cuts, n)}, seed {seed}")


Pairs = list[tuple[float, float]]  # (score, value) of the keys that one row has seen


def state_of(pairs: Pairs) -> State:
    """The state of one row with d = 1."""
    s = torch.tensor([[score for score, _ in pairs]], dtype=torch.float32).reshape(1, -1)
    v = torch.tensor([[value] for _, value in pairs], dtype=torch.float32).reshape(-1, 1)
    return exact(s, v)


def sets_of_keys(count: int, seed: int) -> list[tuple[Pairs, ...]]:
    """Tuples of `count` sets of keys, fewest keys first: all of the smallest sets, then 200 random ones."""
    chance = random.Random(seed)
    small = [[], *([(score, 1.0)] for score in (0.0, 2.0, -3.0, -INF))]
    scores = (-INF, *(n / 2 for n in range(-60, 61)), 300.0, -300.0)

    def any_set() -> Pairs:
        return [(chance.choice(scores), chance.randint(-4, 4) / 4) for _ in range(chance.randint(0, 5))]

    tuples = [*itertools.product(small, repeat=count), *(tuple(any_set() for _ in range(count)) for _ in range(200))]
    return sorted(tuples, key=lambda sets: sum(map(len, sets)))


def stacked(sets: Iterable[Pairs]) -> State:
    """One row for each set of keys: a property is tried on all of them in one call."""
    return State(*(torch.cat(tensors) for tensors in zip(*map(state_of, sets))))


def same_rows(actual: State, expected: State, what: str, tuples: list[tuple[Pairs, ...]], *wrong: tuple) -> None:
    """`same`, row by row, so that the first failing example, the one with the fewest keys, is the one shown."""
    for row, sets in enumerate(tuples):
        here = [State(*(x[row : row + 1] for x in state)) for state in (actual, expected)]
        bugs = {words: State(*(x[row : row + 1] for x in state)) for words, state in wrong}
        names = ", ".join(f"{name} = {pairs}" for name, pairs in zip("abc", sets))
        same(*here, f"{what}, where the keys' (score, value) pairs are {names}", bugs)


@check("merge equals seeing all keys at once", points=1)
def test_merge(answer):
    tuples = sets_of_keys(2, seed=fresh_seed())
    a, b = (stacked(column) for column in zip(*tuples))
    plain = State(torch.maximum(a.m, b.m), a.l + b.l, a.acc + b.acc)
    wrong = ("l and acc must be brought to the common maximum before adding", plain)
    same_rows(merge(answer, a, b), stacked(x + y for x, y in tuples), "merge(a, b)", tuples, wrong)


@check("merge is commutative, and the empty state is its identity", points=1)
def test_commutative(answer):
    tuples = sets_of_keys(2, seed=fresh_seed())
    a, b = (stacked(column) for column in zip(*tuples))
    same_rows(merge(answer, a, b), merge(answer, b, a), "merge(a, b) against merge(b, a)", tuples)
    nothing = empty(tuple(a.m.shape), 1)
    same_rows(merge(answer, a, nothing), a, "merge(a, empty state) against a", tuples)
    same_rows(merge(answer, nothing, a), a, "merge(empty state, a) against a", tuples)


@check("merge is associative", points=2)
def test_associative(answer):
    tuples = sets_of_keys(3, seed=fresh_seed())
    a, b, c = (stacked(column) for column in zip(*tuples))
    left = merge(answer, merge(answer, a, b), c)
    right = merge(answer, a, merge(answer, b, c))
    same_rows(left, right, "merge(merge(a, b), c) against merge(a, merge(b, c))", tuples)
    same_rows(left, stacked(x + y + z for x, y, z in tuples), "merge(merge(a, b), c)", tuples)


@check("merge works row by row, in any shape", points=1)
def test_merge_rows(answer):
    generator = torch.Generator().manual_seed(seed := fresh_seed())
    s = 5 * torch.randn(2, 3, 4, 10, generator=generator)
    v = torch.randn(2, 3, 10, 6, generator=generator)
    s[0, 1, 2, :7] = -INF
    a, b = exact(s[..., :7], v[..., :7, :]), exact(s[..., 7:], v[..., 7:, :])
    same(merge(answer, a, b), exact(s, v), f"rows (2, 3, 4), d 6, seed {seed}")
    same(update(answer, a, s[..., 7:], v[..., 7:, :]), exact(s, v), f"update, rows (2, 3, 4), d 6, seed {seed}")


@check("large scores do not overflow", points=1)
def test_large(answer):
    seed = fresh_seed()
    for scores in ([[100.0, 90.0]], [[-200.0, -201.0]], [[-3e38, 3e38]], [[1000.0, 999.0, -1000.0, 1001.0]]):
        s = torch.tensor(scores)
        v = torch.ones(s.shape[-1], 1)
        state = empty((1,), 1)
        for j in range(s.shape[-1]):
            state = update(answer, state, s[:, j : j + 1], v[j : j + 1])
        if not all(x.isfinite().all() for x in state):
            raise CheckFailed(
                f"scores {scores}, one key at a time: {words(state)}: are both exponents at most 0 "
                "(score - m_new and m - m_new)?"
            )
        same(state, exact(s, v), f"scores {scores}, one key at a time")
    s, v = random_block(3, 12, 4, seed, size=300)
    same(update(answer, exact(s[:, :5], v[:5]), s[:, 5:], v[5:]), exact(s, v), f"scores of hundreds, seed {seed}")
    same(merge(answer, exact(s[:, :5], v[:5]), exact(s[:, 5:], v[5:])), exact(s, v), f"the same merged, seed {seed}")


@check("outputs merge by their lse", points=1)
def test_merge_by_lse(answer):
    s, v = random_block(4, 11, 3, seed := fresh_seed())
    parts = []
    for part in (slice(0, 6), slice(6, 11)):
        o, lse = finalize(answer, exact(s[:, part], v[part]))
        parts.append(State(lse, torch.ones_like(lse), o))
    o, lse = finalize(answer, merge(answer, *parts))
    what = f"of two halves' (o, lse), merged as State(m=lse, l=1, acc=o), seed {seed}"
    close(lse, torch.logsumexp(s.double(), -1), f"lse {what}")
    close(o, torch.softmax(s.double(), -1) @ v.double(), f"o {what}")


@check("HBM bytes of three passes, two and one", points=1)
def test_bytes(answer):
    for rows, cols, d, size in ((1, 1, 1, 1), (3, 5, 2, 2), (4096, 2048, 64, 2)):
        vo = cols * d + rows * d
        for passes, trips in ((3, 5), (2, 4), (1, 1)):
            moved = answer.call(FILE, "softmax_hbm_bytes", rows, cols, d, passes, size)
            right = size * (trips * rows * cols + vo)
            known = {
                size * (passes * rows * cols + vo): "P is written and read again when there is more than one pass",
                size * ((passes + 1) * rows * cols + vo): "P is written (and, for P V, read again) only if passes > 1",
                size * ((passes + 2) * rows * cols + vo): "with one pass P never exists in HBM",
                size * trips * rows * cols: "V is read and O is written too",
                trips * rows * cols + vo: "this is the number of elements: multiply by bytes_per_element",
            }
            if moved != right:
                likely = f"likely bug: {known[moved]}\n" if moved in known else ""
                raise CheckFailed(
                    f"{likely}softmax_hbm_bytes({rows}, {cols}, {d}, {passes}, {size}) returned {moved!r}, not {right}"
                )


@check("forward: ragged tail", points=1)
def test_ragged_tail(answer):
    seed = fresh_seed()
    cases = [Case(len_q=2, len_k=n, head_dim=8, seed=seed) for n in (16, 17, 23, 5)]
    bug = "the last block holds fewer keys than block_k: they are all needed, and nothing beyond them"
    properties.attention(answer, FILE, cases, bug=bug, block_k=16, forbid=FORBIDDEN)
    cases = [Case(len_q=3, len_k=n, batch=2, heads_q=2, heads_kv=2, layout="padded", seed=seed) for n in (128, 200)]
    properties.attention(answer, FILE, cases, bug=bug, forbid=FORBIDDEN)


@check("forward: block size does not change the answer", points=1)
def test_block_size(answer):
    seed = fresh_seed()
    cases = [
        Case(len_q=3, len_k=37, head_dim=16, seed=seed),
        Case(len_q=9, len_k=70, head_dim=32, kind="rising", causal=True, seed=seed),
    ]
    for block_k in (16, 1, 7, 64, 1000):
        try:
            properties.attention(answer, FILE, cases, block_k=block_k, forbid=FORBIDDEN)
        except NotWritten:
            raise
        except CheckFailed as failure:
            raise CheckFailed(f"with block_k = {block_k}: {failure}") from None


@check("forward: large and shifted scores", points=1)
def test_forward_large(answer):
    seed = fresh_seed()
    bug = "the maximum is not subtracted, or the state starts from m = 0 instead of -inf"
    for kind in ("large", "shifted", "rising"):
        cases = [Case(len_q=2, len_k=n, head_dim=16, kind=kind, seed=seed) for n in (5, 60)]
        properties.attention(answer, FILE, cases, bug=bug, block_k=16, forbid=FORBIDDEN)


@check("forward: causal is aligned bottom-right", points=1)
def test_causal(answer):
    seed = fresh_seed()
    lengths = ((3, 3), (1, 4), (3, 5), (33, 33), (17, 50))
    cases = [Case(len_q=n, len_k=m, head_dim=16, causal=True, seed=seed) for n, m in lengths]
    bug = "which keys the mask hides: with blocks, key numbers start at the block's start"
    properties.attention(answer, FILE, cases, bug=bug, block_k=16, forbid=FORBIDDEN)


@check("forward: rows without keys give 0 and -inf", points=1)
def test_rows_without_keys(answer):
    seed = fresh_seed()
    cases = [
        Case(len_q=5, len_k=2, head_dim=8, causal=True, seed=seed),
        Case(len_q=40, len_k=19, head_dim=16, causal=True, heads_q=2, heads_kv=1, seed=seed),
        Case(len_q=3, len_k=0, head_dim=8, seed=seed),
    ]
    bug = "a row without visible keys in a block, or in any: m stays -inf there"
    properties.attention(answer, FILE, cases, bug=bug, block_k=4, forbid=FORBIDDEN)


@check("forward: float16 and bfloat16, GQA, any strides", points=1)
def test_half(answer):
    seed = fresh_seed()
    case = Case(batch=2, heads_q=4, heads_kv=2, len_q=3, len_k=70, head_dim=32, causal=True, seed=seed)
    cases = [
        case.but(dtype=dtype, layout=layout)
        for dtype, layout in (("float32", "bnhd"), ("float16", "padded"), ("bfloat16", "bnhd"))
    ]
    bug = "the state is float32 whatever the input's dtype; only O is rounded, at the end"
    properties.attention(answer, FILE, cases, bug=bug, block_k=16, forbid=FORBIDDEN)
    # Many blocks of keys, and outputs near 3: rounding to 16 bits in every step adds up.
    case = Case(len_q=4, len_k=2048, head_dim=16, dtype="bfloat16", seed=seed)
    q, k, v = case.make()
    v = v + 3
    value = answer.call(FILE, "forward", q, k, v, block_k=16, forbid=FORBIDDEN)
    properties.judged(*properties.attention_result(value, q), (q, k, v), case, bug)


@check("forward: works block by block", points=1)
def test_blocks_are_used(answer):
    # Each block size rounds differently, so outputs that agree in every bit come from a forward that uses no blocks.
    q, k, v = Case(len_q=64, len_k=300, head_dim=32, seed=fresh_seed()).make()
    outputs = [answer.call(FILE, "forward", q, k, v, block_k=n, forbid=FORBIDDEN)[0] for n in (1, 16, 300)]
    if all(torch.equal(o, outputs[0]) for o in outputs[1:]):
        raise CheckFailed(
            "O is the same in every bit for block_k = 1, 16 and 300, which round differently: "
            "is it computed from all scores at once instead of one update per block of block_k keys?"
        )
    q, k, v = Case(len_q=256, len_k=1024, head_dim=8, seed=fresh_seed()).make()
    largest = answer.call(LARGEST, "largest_elements", FILE, q, k, v, 16)
    if largest > 256 * 1024 / 2:
        raise CheckFailed(
            f"forward makes a tensor of {largest} numbers for 256 queries, 1024 keys, d 8 and block_k 16: are the "
            f"scores of all keys, {256 * 1024}, computed at once? Compute those of one block of keys at a time"
        )


@check("forward: real activations", points=1)
def test_real_activations(answer):
    seed = fresh_seed()
    case = Case(heads_q=3, len_q=8, len_k=40, kind="smollm2", causal=True, seed=seed)
    cases = [case, case.but(len_q=200, len_k=300, seed=seed + 1), case.but(dtype="bfloat16", len_k=700, seed=seed + 2)]
    properties.attention(answer, FILE, cases, bug="what random inputs do not show: outlier channels", forbid=FORBIDDEN)


@check("inputs are left unchanged, bad input is refused", points=1)
def test_inputs(answer):
    # answer.call compares the inputs before and after, and refuses a result that shares memory with one.
    s, v = random_block(2, 3, 4, seed=0)
    other = s.flip(-1) + 1  # not the same maxima: rescaling by 1 in place would not show
    update(answer, exact(s, v), other, v)
    merge(answer, exact(s, v), exact(other, v))
    finalize(answer, exact(s, v))
    q, k, v = Case(len_q=4, len_k=9, head_dim=8, causal=True).make()
    answer.call(FILE, "forward", q, k, v, causal=True, block_k=4, forbid=FORBIDDEN)
    properties.refuses_bad_input(answer, FILE)
    message = answer.refusal(FILE, "forward", q, k, v, block_k=0)
    if "block_k" not in message:
        raise CheckFailed(f"block_k=0: the ValueError must name block_k; it says: {message}")
