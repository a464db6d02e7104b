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
from fa_reference.hopper.calibrate import BESIDE, PAIR
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.sm import SM
from fa_reference.hopper.timing import RECORD, Timing
from fa_reference.hopper.warpgroup import Warpgroup

KEYS, STEPS = 128, 16
SOFTMAX, END = 3, 4  # jobs of beside.cu: 1 Q K^T, 2 P V, 3 a softmax step, 4 its end alone, 5 Q K^T and P V
SHARED = [name for name in BESIDE if BESIDE[name][0].count(SOFTMAX) > 1 and not set(BESIDE[name][0]) & {1, 2}]
SHARED_BESIDE = [name for name in BESIDE if BESIDE[name][0].count(SOFTMAX) > 1 and set(BESIDE[name][0]) & {1, 2}]


async def softmax_steps(wg: Warpgroup, job: int, head_dim: int, clocks: list[float]) -> None:
    """STEPS softmax steps, each with its end (rescale, round) behind it as in chapter 9, or those ends alone."""
    S, O = wg.full(KEYS, 0.0), wg.full(head_dim, 0.0)
    softmax = OnlineSoftmax(wg, 0.1, "float16")
    await wg.finish_work()
    start = wg.sm.now
    for _ in range(STEPS):
        _, rescale = softmax.step(S)
        rounding = [work for work in wg.work if work.name == "convert"]
        wg.work = [work for work in wg.work if work.name != "convert" and job == SOFTMAX]
        await wg.finish_work()
        wg.work = rounding
        O *= rescale if job == SOFTMAX else 1.0
        await wg.finish_work()
        await wg.sleep_until(wg.sm.now + wg.sm.timing.bar_sync_alone)
    clocks.append((wg.sm.now - start) / STEPS)


async def products(wg: Warpgroup, job: int, Q, K, V, steps: list[float], others: int, pair: list[float]) -> None:
    """Q K^T, P V, or both together, again and again until `others` have noted their clocks in `steps`."""
    S, O = wg.accumulator(KEYS), wg.full(V.shape[1], 0.0)
    P = wg.full(KEYS, 0.0).to("float16")
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
            await wg.wgmma(O, P, V, trans_b=True)
            await wg.wgmma_commit_group()
        times[-1].append(wg.sm.now)
        for pending in (1, 0):
            await wg.wgmma_wait_group(pending)
            times[-1].append(wg.sm.now)
    pair.extend(np.mean([np.array(one[1:]) - one[0] for one in times], axis=0))


def beside(head_dim: int, name: str, timing: Timing | None = None) -> dict[str, float | None]:
    """The entry of the record's "together" that has this name, as the model has it; "softmax": mean of all of them."""
    jobs, delay = BESIDE[name]
    sm = SM(timing)
    Q, K, V = (sm.smem(n, (rows, head_dim), "float16") for n, rows in (("Q", ROWS), ("K", KEYS), ("V", KEYS)))
    tensors = [sm.gmem(tile.name, np.zeros(tile.shape, np.float32), "float16") for tile in (Q, K, V)]
    full, steps, pair = sm.mbarrier("full", 1), [], []
    others = sum(job in (SOFTMAX, END) for job in jobs)

    async def role(wg: Warpgroup, w: int, job: int) -> None:
        if w == 0:
            await wg.mbarrier_arrive_expect_tx(full, Q.bytes + K.bytes + V.bytes)
            for tile, tensor in zip((Q, K, V), tensors, strict=True):
                await wg.tma_load(tile, tensor, 0, full)
        await wg.mbarrier_wait(full, 0)
        await wg.sleep_until(sm.now + delay * (w == 2))
        if job in (SOFTMAX, END):
            await softmax_steps(wg, job, head_dim, steps)
        elif job:
            await products(wg, job, Q, K, V, steps, others, pair)

    sm.run({f"warpgroup {w}": partial(role, w=w, job=job) for w, job in enumerate(jobs) if job or w == 0})
    answer: dict[str, float | None] = {"softmax": sum(steps) / len(steps) if steps else None}
    return answer | (dict(zip(PAIR, pair, strict=True)) if jobs[0] == 5 else {})


def measured(head_dim: int, name: str) -> dict[str, float | None]:
    """The same from the record; KeyError if it was not measured at this head_dim."""
    entry, jobs = json.loads(RECORD.read_text())["together"][f"d{head_dim}"][name], BESIDE[name][0]
    clocks = [entry[key] for key, job in zip(("other", "softmax", "third"), jobs, strict=True) if job in (SOFTMAX, END)]
    answer: dict[str, float | None] = {"softmax": sum(clocks) / len(clocks) if clocks else None}
    return answer | ({key: entry[key] for key in PAIR} if jobs[0] == 5 else {})


def mean_error(names: Sequence[str], timing: Timing | None = None) -> float:
    """Of the model's softmax steps against the measured ones, relative, over both head dimensions."""
    record = json.loads(RECORD.read_text())["together"]
    cases = [(d, name) for d in (64, 128) for name in names if name in record[f"d{d}"]]
    return float(np.mean([beside(d, n, timing)["softmax"] / measured(d, n)["softmax"] - 1 for d, n in cases]))


def main() -> None:
    """Print the model's answers beside the measured ones."""
    record = json.loads(RECORD.read_text())["together"]
    print(f"{'clocks of a softmax step':48} measured  model   error")
    for d, name in ((d, name) for d in (64, 128) for name in BESIDE if name in record[f"d{d}"]):
        model, clocks = beside(d, name), measured(d, name)
        for key, value in clocks.items():
            if value is not None:
                title = f"d {d}, {name}" + ("" if key == "softmax" else f": {key}")
                print(f"{title:48} {value:8,.0f} {model[key]:6,.0f} {model[key] / value - 1:+7.1%}")
    print(f"mean error of those that share the units: {mean_error(SHARED):+.1%}, beside products too: ", end="")
    print(f"{mean_error(SHARED_BESIDE):+.1%}")


if __name__ == "__main__":
    main()
