"""One SM: memory, units, the clock, and the event loop that runs warpgroups against each other."""

import heapq
import itertools
from collections.abc import Callable, Coroutine

import numpy as np

from fa_reference.hopper.agent import Agent
from fa_reference.hopper.barriers import Mbarrier, NamedBarrier
from fa_reference.hopper.memory import Buffer, GlobalTensor, SharedMemory
from fa_reference.hopper.report import Issued, Report
from fa_reference.hopper.rules import (
    BarrierCount,
    Deadlock,
    ExitInFlight,
    RegistersOverBudget,
    RuleBroken,
    WrongParity,
    WrongTxBytes,
)
from fa_reference.hopper.timing import Luck, Timing
from fa_reference.hopper.trace import Span
from fa_reference.hopper.warpgroup import Warpgroup

REGISTER_FILE = 64 * 1024
Role = Callable[[Warpgroup], Coroutine]


class Unit:
    """A part of the SM that works for one warpgroup at a time, first come first served, at `rate` units a clock."""

    def __init__(self, sm: "SM", name: str, rate: float) -> None:
        self.sm, self.name, self.rate = sm, name, rate
        self.free_at = 0.0
        self.busy = 0.0
        self.last_step = 0.0  # clocks of one instruction of the newest batch of wgmmas
        self._newest: dict[tuple[str, str], int] = {}  # the index of a warpgroup's last span of some work

    def reserve(
        self,
        amount: float,
        wg: Agent,
        what: str,
        iteration: int | None,
        *,
        slower: float = 1.0,
        go_on: bool = False,
    ) -> tuple[float, float]:
        """The next free time for `amount` units of work for a warpgroup's loop iteration: (start, end).

        slower: it takes that many times as long as it would alone; `busy` counts it as if it did not. go_on: this is
        the next slice of the warpgroup's work before, and one span with it.
        """
        start = max(self.sm.now, self.free_at)
        clocks = self.sm.luck.vary(amount / self.rate)
        self.free_at = start + clocks * slower
        self.busy += clocks
        key, spans = (wg.name, what), self.sm.spans
        if go_on:
            spans[self._newest[key]] = spans[self._newest[key]]._replace(stop=self.free_at)
        else:
            self._newest[key] = len(spans)
            spans.append(Span(self.name, "unit", what, start, self.free_at, iteration, wg.name))
        return start, self.free_at

    def count(self, amount: float) -> None:
        """Work that goes on beside another unit's and never has to queue here."""
        self.busy += amount / self.rate


class RegisterPool:
    """What setmaxnreg.dec gives back and setmaxnreg.inc takes."""

    def __init__(self) -> None:
        self.free = 0
        self.waiters: list[Callable[[], None]] = []

    def take(self, registers: int) -> None:
        """Take registers (a negative number gives them back, and wakes whoever waits)."""
        self.free -= registers
        waiters, self.waiters = self.waiters, []
        for wake in waiters:
            wake()

    def missing(self) -> str:
        """In words."""
        return f"more registers than the {self.free} that setmaxnreg.dec has given back"


class SM:
    """Declare memory and barriers, then `run` one block:

        sm = SM()
        Q, O = sm.gmem("Q", q, "float16"), sm.gmem("O", o, "float16")
        tile, full = sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", 1)
        async def producer(wg): await wg.tma_load(tile, Q, 0, full) ...
        report = sm.run({"producer": producer, "consumer": consumer})

    seed: randomise latencies (None: nominal ones). check=False: go on where the hardware would, with wrong numbers;
    what was broken is then in report.broken.
    """

    def __init__(self, timing: Timing | None = None, *, seed: int | None = None, check: bool = True) -> None:
        self.timing = timing or Timing()
        self.luck = Luck(seed)
        self.check = check
        self.now = 0.0
        self.shared = SharedMemory()
        self.mbarriers: list[Mbarrier] = []
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.registers = RegisterPool()
        self.units = {
            name: Unit(self, name, rate)
            for name, rate in {
                "wgmma": self.timing.tensor_flop_per_clk,
                "exp": self.timing.exp_per_clk,
                "FP32": self.timing.fp32_per_clk,
                "ALU": self.timing.alu_per_clk,
                "convert": self.timing.convert_per_clk,
                "smem": self.timing.smem_bytes_per_clk,
                "TMA": self.timing.l2_bytes_per_clk,
            }.items()
        }
        self.spans: list[Span] = []
        self.issued: list[Issued] = []
        self.violations: list[RuleBroken] = []
        self._events: list[tuple[float, float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()  # of two events in one cycle, the older comes first
        self.warpgroups: list[Warpgroup] = []

    # --- declarations

    def gmem(self, name: str, data: np.ndarray, dtype: str, level: str = "L2") -> GlobalTensor:
        """A matrix in global memory; stores write through to `data`, a float32 array of values of `dtype`."""
        return GlobalTensor(name, data, dtype, level)

    def smem(self, name: str, shape: tuple[int, int], dtype: str) -> Buffer:
        """A tile in shared memory, full of NaN."""
        return self.shared.allocate(name, shape, dtype)

    def mbarrier(self, name: str, count: int) -> Mbarrier:
        """mbarrier.init with an arrival count. Barriers of one ring are named full[0], full[1], ..."""
        self.shared.take(Mbarrier.BYTES, name)
        users = next((m.users for m in self.mbarriers if m.name.split("[")[0] == name.split("[")[0]), None)
        self.mbarriers.append(Mbarrier(name, count, users))
        return self.mbarriers[-1]

    def named_barrier(self, id: int) -> NamedBarrier:
        """Hardware barrier `id`; they need no declaration."""
        return self.named_barriers.setdefault(id, NamedBarrier(id))

    # --- time

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (time, self.luck.order(), next(self._numbers), action))

    def after(self, clocks: float, action: Callable[[], None]) -> None:
        """Do something in that many clocks, give or take some luck."""
        self.at(self.now + self.luck.vary(clocks), action)

    # --- running

    def run(self, roles: dict[str, Role], *, registers_at_launch: int | None = None) -> Report:
        """Run one block, a warpgroup for each role by name; returns when all have. Raises RuleBroken.

        registers_at_launch: what the kernel was compiled for, per thread; by default all that 64K registers allow.
        """
        threads = 128 * len(roles)
        most = min(255, REGISTER_FILE // threads // 8 * 8)
        registers = most if registers_at_launch is None else registers_at_launch
        if not 0 < registers <= most:
            raise RegistersOverBudget(f"{registers} registers at launch for {threads} threads; allowed: up to {most}")
        self.warpgroups = [Warpgroup(self, name, registers) for name in roles]
        for wg in self.warpgroups:
            wg.start(roles[wg.name](wg))
            self.at(self.luck.delay(), lambda wg=wg: self._step(wg))
        try:
            while self._events:
                self.now, _, _, action = heapq.heappop(self._events)
                action()
            if any(not wg.done for wg in self.warpgroups):
                self._explain_deadlock()
        finally:
            for wg in self.warpgroups:
                wg.close()
        self._check_barriers_empty()
        self._check_loads_seen()
        return Report(
            cycles=self.now,
            busy={name: unit.busy for name, unit in self.units.items()},
            spans=self.spans,
            issued=self.issued,
            registers={wg.name: wg.peak_registers for wg in self.warpgroups},
            smem_bytes=self.shared.used,
            broken=self.violations,
        )

    def _step(self, wg: Warpgroup) -> None:
        """Let a warpgroup go on until it next has to wait for something."""
        arrange = next(wg.steps, None)
        if arrange:
            arrange(lambda: self._step(wg))
        else:
            self._finish(wg)

    def _finish(self, wg: Warpgroup) -> None:
        wg.check_awaited()
        wg.done = True
        wg.iteration = None
        for what, groups in (
            ("wgmma", [*wg.wgmma_groups, wg.open_wgmmas]),
            ("TMA store", [*wg.store_groups, wg.open_stores]),
        ):
            if any(group.facts for group in groups):
                raise ExitInFlight(f"returns without waiting for a {what} it issued", **wg.where())

    def broken(self, error: RuleBroken) -> None:
        """Raise, or only note if check=False."""
        if self.check:
            raise error
        self.violations.append(error)

    # --- endings

    def _explain_deadlock(self) -> None:
        """Nothing will happen any more: who waits for what, and is there a simple reason?"""
        stuck = [wg for wg in self.warpgroups if not wg.done]
        waits = []
        for wg in stuck:
            what, missing, since = wg.waiting
            place = wg.where()["place"]
            mbarrier = next((m for m in self.mbarriers if m.missing == missing), None)
            phase = f" phase {mbarrier.phase} (parity {mbarrier.phase % 2})" if mbarrier else ""
            line = wg.line() and f" ({wg.line()})"
            wait = f"waits since cycle {since:.0f} for {what}{phase}{line}, lacking {missing()}"
            waits.append(f"{wg.name}, {place}: {wait}")
        first = min(stuck, key=lambda wg: wg.waiting[2])
        where = first.where(first.waiting[0])
        returned = [wg.name for wg in self.warpgroups if wg.done]
        if returned:
            waits.append(f"{', '.join(returned)}: returned")
        for mbarrier in self.mbarriers:
            if mbarrier.pending == 0:
                what = f"mbarrier {mbarrier.name}, phase {mbarrier.phase}: {mbarrier.tx} expected bytes never come"
                raise WrongTxBytes("\n  ".join([what, *waits]), **where)
        for wg in stuck:
            for mbarrier in self.mbarriers:
                waits_here = wg.waiting[1] == mbarrier.missing
                if waits_here and mbarrier.phase - 1 > wg.seen.get(mbarrier, -1):
                    phase = mbarrier.phase
                    what = f"asks mbarrier {mbarrier.name} for parity {phase % 2}, which is that of phase {phase}, and "
                    what += f"has not seen phase {phase - 1} (parity {(phase - 1) % 2}), which is complete"
                    raise WrongParity("\n  ".join([what, *waits]), **wg.where(mbarrier.name))
        for mbarrier in self.mbarriers:
            if first.waiting[1] == mbarrier.missing and mbarrier not in first.seen and not mbarrier.users:
                waits.append(
                    f"{first.name} has never waited at {mbarrier.name} before, and nobody ever arrived there. If it "
                    "may go on the first time (a slot that was never filled is free), it must ask for parity 1"
                )
        raise Deadlock("deadlock: nobody can go on", waits, **where)

    def _check_loads_seen(self) -> None:
        for buffer in self.shared.buffers:
            load = buffer.last_write
            if load and load.mbarrier and not any((load, "over") in wg.known for wg in self.warpgroups):
                what = f"the block ends though nobody has waited for the load of {buffer.name}, which may be in flight"
                self.broken(ExitInFlight(what, **load.where))

    def _check_barriers_empty(self) -> None:
        for mbarrier in self.mbarriers:
            if mbarrier.tx:
                raise WrongTxBytes(
                    f"at the end mbarrier {mbarrier.name}, phase {mbarrier.phase}, has a tx-count of {mbarrier.tx}: "
                    "bytes that were expected never came, or came unexpected",
                    buffer=mbarrier.name,
                )
        for barrier in self.named_barriers.values():
            if barrier.users:
                raise BarrierCount(
                    f"at the end named barrier {barrier.id} is left half full: the last arrival of "
                    f"{', '.join(barrier.users)} there was for nobody (it lacks {barrier.missing()})",
                    buffer=f"named barrier {barrier.id}",
                )
