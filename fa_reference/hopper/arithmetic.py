"""How long a warpgroup's arithmetic takes: in order, unit by unit, slower while the tensor cores work.

Five mechanisms, each measured by itself (cuda/micro, timing.py), not on the attention kernels:

- Units have rates, and warpgroups share them. Two in their softmax at once get half of the exponential unit each.
- A warp executes in order. What it does to one tile value by value (scale, exponentiate, add up, round) flows through
  the units as a pipeline; a maximum over a row must be complete, and reduced over four threads, before anything can use
  it; O is rescaled in place behind the exponentials, where compilers put it.
- An exponential whose result is added up right away does not come every 8 clocks: each addition waits for its
  exponential (`exp_sum`).
- wgmma takes register-file bandwidth, so arithmetic beside it is slower: exponentials a third, maxima to half.
- Warpgroups that calculate at once lose more than their waiting for units explains; the more of them there are, the
  less each loses, as the units are then full. Why was not found; the loss is measured on softmax steps (together.py).

A tile is worked off in slices, so that warpgroups share units fairly and feel the tensor cores start and stop.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fa_reference.hopper.registers import Work

if TYPE_CHECKING:
    from fa_reference.hopper.agent import Agent

SLICES = 4
SMALL = 512  # values: a statistic of each row, two registers a thread, is no tile; its latency counts


async def work_off(wg: "Agent", work: Sequence[Work]) -> None:
    """Spend the time of arithmetic that was written down, in program order."""
    for run in _runs(work):
        if run[0].amount <= SMALL:
            await _statistics(wg, run)
        else:
            wg.calculating = True
            await _tile(wg, run)
            wg.calculating = False


def _runs(work: Sequence[Work]) -> Iterator[list[Work]]:
    """Cut into runs that flow through the units together: neighbours of one size, reductions and updates alone."""
    run: list[Work] = []
    for item in work:
        alone = item.reduces or item.in_place
        if run and (alone or run[-1].reduces or run[-1].in_place or item.amount != run[-1].amount):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


async def _statistics(wg: "Agent", run: Sequence[Work]) -> None:
    """Arithmetic on row statistics: each waits for the one before."""
    for item in run:
        begin, _ = wg.sm.units[item.unit].reserve(item.amount, wg, item.name, item.iteration)
        latency = wg.sm.timing.exp_latency if item.unit == "exp" else wg.sm.timing.math_latency
        await wg.sleep_until(begin + latency)


async def _tile(wg: "Agent", run: Sequence[Work]) -> None:
    """One tile's arithmetic, slice by slice: as long as the slowest unit takes, in its turn, or the additions."""
    timing, units = wg.sm.timing, wg.sm.units
    factors = {"exp": timing.exp_beside, "FP32": timing.fp32_beside}  # those of the others: alu_beside
    names = [item.name for item in run]
    adds_up = "exp2" in names and "sum" in names[names.index("exp2") :]
    for part in range(SLICES):
        begin = end = wg.sm.now
        beside = units["wgmma"].free_at > begin
        others = sum(other.calculating for other in wg.others())
        shared = 1 + (timing.lost_beside if beside else timing.lost_together) / others if others else 1.0
        for item in run:
            slower = shared * (factors.get(item.unit, timing.alu_beside) if beside else 1.0)
            _, finish = units[item.unit].reserve(
                item.amount / SLICES * item.slower, wg, item.name, item.iteration, slower=slower, go_on=part > 0
            )
            end = max(end, finish)
        if adds_up:
            pace = timing.exp_sum * shared * (timing.exp_sum_beside if beside else 1.0)
            end = max(end, begin + wg.sm.luck.vary(pace * run[0].amount / SLICES / 128))
        await wg.sleep_until(end)
    if run[0].reduces:
        factor = timing.alu_beside if units["wgmma"].free_at > wg.sm.now else 1.0
        await wg.sleep_until(wg.sm.now + timing.quad_reduce * factor)
