"""The model's answers to cuda/micro/beside.cu: a softmax step beside what other warpgroups do.

Two values of the model (timing.py: lost_together, lost_beside) are set such that these answers come out as they
were measured. Everything else about them follows from measurements of single units, so they also show how well those
add up: `python -m fa_reference.hopper.together` prints both.
"""

import json
from collections.abc import Sequence
from functools import partial

import numpy as np

from fa_reference.hopper.attention import OnlineSoftmax
from fa_reference.hopper.calibrate import BESIDE, BESIDE_FP8, PAIR
from fa_reference.hopper.memory import FP8, Buffer
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.schedules import load_schedule
from fa_reference.hopper.sm import SM
from fa_reference.hopper.timing import RECORD, Timing
from fa_reference.hopper.warpgroup import Warpgroup

KEYS, STEPS = 128, 16
# Jobs of beside.cu: 1 Q K^T, 2 P V, 3 a softmax step, 4 its end alone, 5 Q K^T and P V, 6 turning V round.
SOFTMAX, END, PRODUCTS, TURN = 3, 4, (1, 2, 5), 6
JOBS = BESIDE | BESIDE_FP8
KINDS = {"d64": (64, "float16"), "d128": (128, "float16"), "fp8_d128": (128, FP8)}  # head_dim, dtype
SHARED = [name for name, (jobs, _) in JOBS.items() if jobs.count(SOFTMAX) > 1 and not {1, 2, TURN} & set(jobs)]
SHARED_BESIDE = [name for name, (jobs, _) in JOBS.items() if jobs.count(SOFTMAX) > 1 and {1, 2} & set(jobs)]
Answer = dict[str, float | None]


async def softmax_steps(wg: Warpgroup, job: int, head_dim: int, dtype: str, clocks: list[float]) -> None:
    """STEPS softmax steps, each with its end (rescale, round) behind it as in chapter 9, or those ends alone."""
    S, O = wg.full(KEYS, 0.0), wg.full(head_dim, 0.0)
    softmax = OnlineSoftmax(wg, 0.1, dtype)
    await wg.finish_work()
    start = wg.sm.now
    for _ in range(STEPS):
        _, rescale = softmax.step(S)
        rounding = [work for work in wg.work if work.name in ("convert", "prmt")]
        wg.work = [work for work in wg.work if work not in rounding and job == SOFTMAX]
        await wg.finish_work()
        wg.work = rounding
        O *= rescale if job == SOFTMAX else 1.0
        await wg.finish_work()
        await wg.sleep_until(wg.sm.now + wg.sm.timing.bar_sync_alone)
    clocks.append((wg.sm.now - start) / STEPS)


async def products(wg: Warpgroup, job: int, tiles: Sequence[Buffer], steps: list[float], others: int) -> list[float]:
    """Q K^T, P V, or both together, again and again until `others` have noted their clocks in `steps`.

    Returns the mean clocks until Q K^T is issued, until P V is, until the older of them is done, and both.
    """
    Q, K, V = tiles
    fp8 = Q.dtype == FP8
    S, O = wg.accumulator(KEYS), wg.full(Q.shape[1], 0.0)
    P = wg.full(KEYS, 0.0).to(Q.dtype)
    await wg.finish_work()
    times = []
    while len(steps) < others or len(times) < STEPS:
        times.append([wg.sm.now])
        if job != 2:
            await wg.wgmma_fence()
            await wg.wgmma(S, Q, K, scale_d=False)
            await wg.wgmma_commit_group()
        times[-1].append(wg.sm.now)
        if job != 1:
            await wg.wgmma_fence()
            await wg.wgmma(O, P, V, trans_b=not fp8)
            await wg.wgmma_commit_group()
        times[-1].append(wg.sm.now)
        for pending in (1, 0):
            await wg.wgmma_wait_group(pending)
            times[-1].append(wg.sm.now)
    return list(np.mean([np.array(one[1:]) - one[0] for one in times], axis=0))


async def turns(wg: Warpgroup, rows: Buffer, V: Buffer, steps: list[float], others: int) -> list[float]:
    """Chapter 10's producer without its loads: turns V round, again and again. Returns the mean clocks of a block."""
    turn_round, start, count = load_schedule("fp8").turn_round, wg.sm.now, 0
    while len(steps) < others or count < STEPS:
        await turn_round(wg, rows, V)
        await wg.finish_work()
        await wg.sleep_until(wg.sm.now + wg.sm.timing.bar_sync_alone)
        count += 1
    return [(wg.sm.now - start) / count]


def beside(kind: str, name: str, timing: Timing | None = None) -> Answer:
    """The entry of the record's "together" that has this name, as the model has it; "softmax": mean of all of them."""
    (head_dim, dtype), (jobs, delay) = KINDS[kind], JOBS[name]
    sm = SM(timing)
    turned = (head_dim, KEYS) if dtype == FP8 else (KEYS, head_dim)
    shapes = {"Q": (ROWS, head_dim), "K": (KEYS, head_dim), "V": turned, "rows": (KEYS, head_dim)}
    *tiles, rows = (sm.smem(tile, shape, dtype) for tile, shape in shapes.items())
    loads = [rows] if jobs[0] == TURN else tiles
    full, steps, pair = sm.mbarrier("full", 1), [], []
    others = sum(job in (SOFTMAX, END) for job in jobs)

    async def role(wg: Warpgroup, w: int, job: int) -> None:
        if w == 0:
            await wg.mbarrier_arrive_expect_tx(full, sum(tile.bytes for tile in loads))
            for tile in loads:
                await wg.tma_load(tile, sm.gmem(tile.name, np.zeros(tile.shape, np.float32), dtype), 0, full)
        await wg.mbarrier_wait(full, 0)
        await wg.sleep_until(sm.now + delay * (w == 2))
        if job in (SOFTMAX, END):
            await softmax_steps(wg, job, head_dim, dtype, steps)
        elif job in PRODUCTS:
            pair.extend(await products(wg, job, tiles, steps, others))
        elif job == TURN:
            pair.extend(await turns(wg, rows, tiles[2], steps, others))

    sm.run({f"warpgroup {w}": partial(role, w=w, job=job) for w, job in enumerate(jobs) if job or w == 0})
    return _answer(jobs, steps, pair)


def _answer(jobs: Sequence[int], steps: Sequence[float], pair: Sequence[float]) -> Answer:
    answer: Answer = {"softmax": sum(steps) / len(steps) if steps else None}
    names = {5: PAIR, TURN: ("turning",)}.get(jobs[0], ())
    return answer | dict(zip(names, pair, strict=False))


def measured(kind: str, name: str) -> Answer:
    """The same from the record; KeyError if it was not measured of this kind."""
    entry, jobs = json.loads(RECORD.read_text())["together"][kind][name], JOBS[name][0]
    steps = [entry[key] for key, job in zip(("other", "softmax", "third"), jobs, strict=True) if job in (SOFTMAX, END)]
    return _answer(jobs, steps, [entry["other"]] if jobs[0] == TURN else [entry.get(key) for key in PAIR])


def recorded(names: Sequence[str] = tuple(JOBS)) -> list[tuple[str, str]]:
    """(kind, name) of everything that was measured and has one of these names."""
    record = json.loads(RECORD.read_text())["together"]
    return [(kind, name) for kind in KINDS for name in names if name in record[kind]]


def mean_error(names: Sequence[str], timing: Timing | None = None) -> float:
    """Of the model's softmax steps against the measured ones, relative, over all kinds."""
    cases = recorded(names)
    return float(np.mean([beside(*case, timing)["softmax"] / measured(*case)["softmax"] - 1 for case in cases]))


def main() -> None:
    """Print the model's answers beside the measured ones."""
    print(f"{'clocks of a softmax step':56} measured  model   error")
    for kind, name in recorded():
        model, clocks = beside(kind, name), measured(kind, name)
        for key, value in clocks.items():
            if value is not None:
                title = f"{kind}, {name}" + ("" if key == "softmax" else f": {key}")
                print(f"{title:56} {value:8,.0f} {model[key]:6,.0f} {model[key] / value - 1:+7.1%}")
    print(f"mean error of those that share the units: {mean_error(SHARED):+.1%}, beside products too: ", end="")
    print(f"{mean_error(SHARED_BESIDE):+.1%}")


if __name__ == "__main__":
    main()
