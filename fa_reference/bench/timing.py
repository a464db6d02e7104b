"""Interleaved timing: every column of a shape in one run, in an order shuffled every round.

Why so much care: a Hopper card is limited by power, so a kernel that follows a cool one runs at higher clocks. In a
fixed order one and the same kernel reads several percent differently depending on its neighbour; shuffling the order in
every round spreads that evenly. And the first launch after an event waits for the host, so each slice starts behind a
short idle spin, during which the host queues every launch of the slice.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SLICE_MS = 8.0
SPIN_MS = 1.0
MAX_SPIN_MS = 25.0
MAX_LAUNCHES = 256  # stays below the number of launches that a stream queues before the host blocks
ROUNDS = 15
MIN_ROUNDS = 3
SLOW_BUDGET_MS = 600.0  # a column whose launch outlasts a slice gets about this much time per shape
Launch = Callable[[], object]


class Clock(Protocol):
    """What times slices: CUDA events, the host's clock, or a fake in the tests."""

    def probe(self, launch: Launch) -> tuple[float, float]:
        """Warm up; return (device ms per launch, host ms to queue one launch)."""

    def slice(self, launch: Launch, launches: int, spin_ms: float) -> float:
        """Run `launches` launches behind an idle spin; return ms per launch."""


@dataclass
class Column:
    """One version's samples within a shape, in ms per launch, in the order in which they were taken."""

    name: str
    launch: Launch
    launches: int = 1
    spin_ms: float = SPIN_MS
    rounds: int = ROUNDS
    samples_ms: list[float] = field(default_factory=list)

    @property
    def summary(self) -> dict:
        return summarize(self.samples_ms) | {
            "samples_ms": [round(s, 6) for s in self.samples_ms],
            "launches": self.launches,
            "spin_ms": round(self.spin_ms, 3),
        }


def summarize(samples_ms: Sequence[float]) -> dict:
    """Median, minimum and maximum of the samples, in ms."""
    return {
        "median_ms": statistics.median(samples_ms),
        "min_ms": min(samples_ms),
        "max_ms": max(samples_ms),
    }


def plan(device_ms: float, host_ms: float, rounds: int = ROUNDS) -> tuple[int, float, int]:
    """(launches per slice, spin in ms, rounds) for a launch that takes `device_ms`, queued by the host in `host_ms`.

    When queueing takes about as long as running, a 1 ms lead is used up within the slice: the spin then covers
    the whole queueing time.
    """
    device_ms = max(device_ms, 1e-4)
    launches = max(1, min(MAX_LAUNCHES, math.ceil(SLICE_MS / device_ms)))
    spin_ms = SPIN_MS
    if host_ms > 0.8 * device_ms:
        spin_ms = min(MAX_SPIN_MS, max(SPIN_MS, 1.25 * host_ms * launches))
        launches = max(1, min(launches, int(MAX_SPIN_MS / (1.25 * host_ms))))
    if device_ms > SLICE_MS:
        rounds = min(rounds, max(MIN_ROUNDS, int(SLOW_BUDGET_MS / device_ms)))
    return launches, spin_ms, rounds


def round_orders(names: Sequence[str], rounds: int, rng: random.Random) -> list[list[str]]:
    """`rounds` shuffles of `names`; with three names or more no round repeats the order of the one before."""
    orders: list[list[str]] = []
    for _ in range(rounds):
        order = list(names)
        rng.shuffle(order)
        while len(names) > 2 and orders and order == orders[-1]:
            rng.shuffle(order)
        orders.append(order)
    return orders


def takes_part(round_index: int, rounds: int, total: int) -> bool:
    """Whether a column with `rounds` of `total` rounds runs in this one: spread evenly, not bunched at the start."""
    return (round_index + 1) * rounds // total > round_index * rounds // total


def interleave(
    columns: Sequence[Column],
    clock: Clock,
    *,
    rounds: int = ROUNDS,
    rng: random.Random | None = None,
    describe: Callable[[BaseException], dict] | None = None,
    on_error: Callable[[Column, dict], None] | None = None,
) -> None:
    """Fill every column's `samples_ms`; a column that raises is dropped after on_error(column, describe(error))."""
    by_name = {column.name: column for column in columns}
    dropped: set[str] = set()
    for index, order in enumerate(round_orders(list(by_name), rounds, rng or random.Random(0))):
        for name in order:
            column = by_name[name]
            if name in dropped or not takes_part(index, column.rounds, rounds):
                continue
            failure = None
            try:
                column.samples_ms.append(clock.slice(column.launch, column.launches, column.spin_ms))
            except (Exception, SystemExit) as error:
                if on_error is None or describe is None:
                    raise
                failure = describe(error)
            if failure is not None:  # outside the except block, whose traceback keeps the launch's tensors alive
                dropped.add(name)
                on_error(column, failure)


class HostClock:
    """perf_counter around the launches, for a machine without a GPU: there is no queue to hide, so no spin."""

    def probe(self, launch: Launch) -> tuple[float, float]:
        launch()
        return self.slice(launch, 1, 0.0), 0.0

    def slice(self, launch: Launch, launches: int, spin_ms: float) -> float:
        start = time.perf_counter()
        for _ in range(launches):
            launch()
        return (time.perf_counter() - start) * 1e3 / launches


class CudaClock:
    """CUDA events around the launches, behind torch.cuda._sleep, a kernel that idles for a number of clock cycles."""

    def __init__(self, while_running: Callable[[], None] | None = None) -> None:
        import torch

        self.torch = torch
        self.while_running = while_running
        self.cycles_per_ms = 1.8e6
        self.cycles_per_ms = self._calibrate()

    def _events(self) -> tuple:
        return self.torch.cuda.Event(enable_timing=True), self.torch.cuda.Event(enable_timing=True)

    def _calibrate(self) -> float:
        cycles = 10_000_000
        self.torch.cuda._sleep(cycles)
        self.torch.cuda.synchronize()
        start, end = self._events()
        start.record()
        self.torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / start.elapsed_time(end)

    def probe(self, launch: Launch) -> tuple[float, float]:
        launch()
        launch()
        self.torch.cuda.synchronize()
        start, end = self._events()
        self.torch.cuda._sleep(int(3 * self.cycles_per_ms))
        before = time.perf_counter()
        start.record()
        for _ in range(3):
            launch()
        end.record()
        host_ms = (time.perf_counter() - before) * 1e3 / 3
        end.synchronize()
        return start.elapsed_time(end) / 3, host_ms

    def slice(self, launch: Launch, launches: int, spin_ms: float) -> float:
        start, end = self._events()
        self.torch.cuda._sleep(int(spin_ms * self.cycles_per_ms))
        start.record()
        for _ in range(launches):
            launch()
        end.record()
        if self.while_running is not None:
            self.while_running()
        end.synchronize()
        return start.elapsed_time(end) / launches
