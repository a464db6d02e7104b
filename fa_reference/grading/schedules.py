"""Grade a schedule.py on the model of an SM: right numbers, at every ring depth and length, whatever the timing.

The learner's kernel runs in the child process (simulate.py); inputs are made and outputs judged here.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fa_reference.error_rule import Yardstick
from fa_reference.fp8 import Arithmetic, forward_fp8
from fa_reference.gold import baseline_attention, gold_attention
from fa_reference.grading import properties
from fa_reference.grading.answer import FAILURES, Answer
from fa_reference.grading.check import CheckFailed
from fa_reference.grading.diagnose import diagnose
from fa_reference.grading.timeline import Timeline
from fa_reference.inputs import Case

FILE = "schedule.py"
FP8 = "float8_e4m3fn"
BLOCK_K = 64  # small, so that many runs take little time
SEEDS = 224  # random timings: 7 for each of 4 ring depths and 8 lengths
LENGTHS = range(1, 9)  # in blocks of keys


def case(len_q: int, len_k: int, dtype: str = "bfloat16", **options: Any) -> Case:
    """A case with fresh numbers."""
    return Case(len_q, len_k, dtype=dtype, **{"seed": properties.fresh_seed()} | options)


def fp8_baseline(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """What the error rule compares with in FP8: the emulated kernel, on codes without scales.

    Where P is rounded depends on the keys seen before, so on the block size and on which end of the keys comes first.
    Both are the learner's choice: of the emulations that make either, the one with the largest error counts.
    """
    one = [torch.ones(x.shape[:2]) for x in (q, k, v)]
    scales = {"q_scale": one[0], "k_scale": one[1], "v_scale": one[2]}
    codes = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    gold, _ = gold_attention(q, k, v, causal=causal, scale=scale)
    emulated = [
        forward_fp8(*codes, causal=causal, scale=scale, arithmetic=Arithmetic(block_k=rows, descending=last), **scales)
        for rows in (BLOCK_K, 2 * BLOCK_K)
        for last in (False, True)
    ]
    return max(emulated, key=lambda result: float((result[0].double() - gold).abs().max()) if gold.numel() else 0.0)


def yardstick(qkv: Sequence[Tensor], problem: Case) -> Yardstick:
    """Gold attention of one problem and the errors allowed."""
    fp8 = problem.dtype == FP8
    tensors = [x.float() for x in qkv] if fp8 else qkv
    baseline = fp8_baseline if fp8 else baseline_attention
    return Yardstick.of(*tensors, causal=problem.causal, scale=problem.scale, baseline=baseline)


def flop_needed(problem: Case) -> int:
    """FLOP of Q K^T and P V where a query sees a key; whole tiles take more."""
    shift = problem.len_k - problem.len_q
    seen = (i + shift + 1 if problem.causal else problem.len_k for i in range(problem.len_q))
    pairs = sum(max(0, min(keys, problem.len_k)) for keys in seen)
    return 4 * problem.head_dim * pairs * problem.heads_q * problem.batch


@dataclass(frozen=True)
class Run:
    """One run on the model: which it was, in words, and the trace of its first block if asked for."""

    words: str
    timeline: Timeline | None


def _words(problem: Case, block_k: int, options: dict[str, Any]) -> str:
    """Which run it was."""
    blocks = -(-problem.len_k // block_k)
    parts = [f"{blocks} block{'s' * (blocks != 1)} of {block_k} keys"]
    parts += [f"{options['stages']} stage{'s' * (options['stages'] != 1)}"] if "stages" in options else []
    parts += [f"random timing {options['seed']}"] if options.get("seed") is not None else []
    return f"in a run with {', '.join(parts)}: {problem}"


def simulate(
    answer: Answer, problem: Case, runs: Iterable[dict[str, Any]], *, block_k: int = BLOCK_K, trace: bool = False
) -> list[Run]:
    """Run the learner's kernel on one problem, once for every set of options (stages, seed), and judge the numbers.

    CheckFailed names the broken rule or the wrong numbers, and the run.
    """
    runs, qkv = list(runs), problem.make()
    options: dict[str, Any] = {"causal": problem.causal, "scale": problem.scale, "block_k": block_k}
    results = answer.call(
        FILE,
        "kernel",
        *(x.float() for x in qkv),
        runs,
        driver="fa_reference.grading.simulate",
        dtype=problem.dtype,
        trace=trace,
        **options,
    )
    measure = yardstick(qkv, problem)
    done, right = [], None
    for run, result in zip(runs, results):
        words = _words(problem, block_k, run)
        failure = result.get("failure")
        if failure:
            kind = FAILURES.get(failure["kind"], CheckFailed)
            raise kind(f"{failure['message']}\n{words}")
        o, lse = result["o"], result["lse"]
        if right is None or not all(map(torch.equal, (o, lse), right)):
            _judge(o, lse, qkv, problem, measure, words)
            right = o, lse
        if result["flop"] < flop_needed(problem):
            raise CheckFailed(
                f"the tensor cores did {result['flop']:.3g} of the {flop_needed(problem):.3g} FLOP that the scores and "
                f"outputs need: compute S and O with wgmma\n{words}"
            )
        timeline = Timeline(*json.loads(result["trace"]), block_k, problem.head_dim) if trace else None
        done.append(Run(words, timeline))
    return done


def _judge(o: Tensor, lse: Tensor, qkv: Sequence[Tensor], problem: Case, measure: Yardstick, words: str) -> None:
    report = measure.judge(o, lse)
    if report.passed:
        return
    floats = [x.float() for x in qkv] if problem.dtype == FP8 else qkv
    likely = diagnose(o, lse, *floats, causal=problem.causal, scale=problem.scale)
    if not o.isfinite().all():
        likely = (
            "the output holds NaN or infinities: did a product add to a fresh accumulator (the first one needs "
            "scale_d=False), or was something read that no load or store had written?"
        )
    raise CheckFailed("\n".join([*([likely] if likely else []), properties.errors_in_words(report), words]))


def numbers(answer: Answer, problems: Iterable[Case], *, block_k: int = BLOCK_K, **options: Any) -> None:
    """The right numbers on every problem, smallest first, with the model's nominal timing."""
    for problem in problems:
        simulate(answer, problem, [options], block_k=block_k)


def awkward(queries: int, dtype: str = "bfloat16") -> list[Case]:
    """Problems that expose bugs, for blocks of `queries` queries: no key, one, ragged, masks, rows without keys."""
    make = [
        case(queries, 0, dtype),
        case(3, 1, dtype),
        case(queries, 70, dtype),
        case(queries + 22, 333, dtype, kind="rising"),
        case(queries, 200, dtype, causal=True),
        case(queries + 2, 300, dtype, causal=True, kind="large"),
        case(queries + 72, 100, dtype, causal=True),
        case(40, 130, dtype, heads_q=4, heads_kv=2, kind="shifted"),
    ]
    return make


def every_depth(answer: Answer, queries: int, dtype: str = "bfloat16", depths: Sequence[int] = (1, 2, 3, 4)) -> None:
    """The right numbers for every number of stages and 1 to 8 blocks, also fewer blocks than stages."""
    for blocks in LENGTHS:
        simulate(answer, case(queries, BLOCK_K * blocks - 3, dtype), [{"stages": stages} for stages in depths])


def any_timing(
    answer: Answer,
    queries: int,
    dtype: str = "bfloat16",
    depths: Sequence[int] = (1, 2, 3, 4),
    *,
    seeds: int = SEEDS,
    trace: bool = False,
) -> list[Run]:
    """No broken rule, and the right numbers, under `seeds` random timings, shared by all depths and 1 to 8 blocks.

    depths: () for a schedule without stages.
    """
    options = [{"stages": n} for n in depths] or [{}]
    each = -(-seeds // (len(options) * len(LENGTHS)))
    numbers, done = count(), []
    for blocks in LENGTHS:
        runs = [o | {"seed": next(numbers)} for o in options for _ in range(each)]
        done += simulate(answer, case(queries, BLOCK_K * blocks - 3, dtype), runs, trace=trace)
    return done


def traced(
    answer: Answer, queries: int, dtype: str = "bfloat16", *, block_k: int = 128, head_dim: int = 128, **options: Any
) -> Timeline:
    """The timeline of 12 blocks of keys, with the model's nominal timing."""
    problem = case(queries, 12 * block_k, dtype, head_dim=head_dim)
    return simulate(answer, problem, [options], block_k=block_k, trace=True)[0].timeline


def warpgroups(names: list[str], expected: int, who: str) -> list[str]:
    """`names`, if there are as many as expected; CheckFailed otherwise. `who`: what they do."""
    if len(names) != expected:
        raise CheckFailed(f"{', '.join(names)} {who}; it should be {expected} warpgroup{'s' * (expected > 1)}")
    return names


def runs_ahead(answer: Answer, queries: int, dtype: str = "bfloat16", depths: Sequence[int] = (1, 2, 3, 4)) -> None:
    """When the first P V begins, a tile of K and of V is under way for every slot: nobody had to release one."""
    for stages in depths:
        timeline = traced(answer, queries, dtype, block_k=BLOCK_K, head_dim=64, stages=stages)
        begin = min(s.start for s in timeline.products if s.what == "O")
        for tile in "KV":
            early = sum(load.what == tile and load.issued < begin for load in timeline.loads)
            if early < stages:
                raise CheckFailed(
                    f"with {stages} stages only {early} tiles of {tile} are under way when the first P V begins: the "
                    "producer waits before slots that nobody has used yet. Which release does it wait for before tile "
                    "j, and what parity passes at once on a fresh barrier?"
                )


def alternates(answer: Answer, queries: int, *, two_stages: bool = False) -> None:
    """The consumers' S products, and their O products, alternate in every one of 48 random timings.

    two_stages: the first S and the last O stand alone, and need no turn.
    """
    for run in any_timing(answer, queries, depths=(1, 2, 3), seeds=48, trace=True):
        consumers = warpgroups(run.timeline.consumers, 2, "multiply")
        last = max(s.block for s in run.timeline.products)
        for what, alone in (("S", 0), ("O", last)):
            order = [(s.warpgroup, s.block) for s in run.timeline.products if s.what == what]
            order = [(wg, n) for wg, n in order if not (two_stages and n == alone)]
            expected = [(wg, n) for n in sorted({n for _, n in order}) for wg in consumers]
            wrong = next((pair for pair in zip(order, expected) if pair[0] != pair[1]), None)
            if wrong is not None:
                (got, n), (wg, m) = wrong
                raise CheckFailed(
                    f"{got} issues {what} of block {n} when it is the turn of {wg} ({what} of block {m}): a turn ends "
                    f"where it is handed on, and begins with a wait for it\n{run.words}"
                )


def softmax_under_own_product(answer: Answer, queries: int, dtype: str = "bfloat16") -> None:
    """Softmax of block j begins when S of j is there and O of j - 1 is issued, and ends before O is waited for."""
    timeline = traced(answer, queries, dtype)
    for wg in warpgroups(timeline.consumers, 2, "multiply"):
        outputs = timeline.of(wg, "O")
        for softmax in timeline.softmaxes(wg)[1:]:
            n = softmax.block
            during = timeline.in_flight(wg, softmax.stop)
            if any(s.what == "O" and s.block == n - 1 for s in during):
                continue
            why = "is issued only after it" if outputs[n - 1].issued > softmax.start else "is waited for before it"
            raise CheckFailed(
                f"{wg}, softmax of block {n}: nothing runs under it, as O += P V of block {n - 1} {why}. Issue S of "
                f"block {n} and then O of block {n - 1}, and wait for S alone: wait_group(1) lets the newer of two "
                "groups run on"
            )
