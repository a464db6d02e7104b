"""What a warpgroup is to the model: a coroutine with a place in its loop, registers, and knowledge.

`warpgroup.py` adds the instructions.
"""

import functools
import types
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_reference.hopper.arithmetic import work_off
from fa_reference.hopper.memory import FP8, Access, Buffer, Fact, still_needed
from fa_reference.hopper.registers import Fragment, Work
from fa_reference.hopper.report import Issued
from fa_reference.hopper.rules import (
    MissingAwait,
    MissingProxyFence,
    OverwriteInUse,
    ReadTooEarly,
    RegistersInFlight,
    RegistersOverBudget,
    RuleBroken,
    WrongParity,
    WrongTxBytes,
)
from fa_reference.hopper.trace import Span

if TYPE_CHECKING:
    from fa_reference.hopper.barriers import Mbarrier
    from fa_reference.hopper.sm import SM

# Registers a thread needs for addresses, counters and descriptors besides its tiles: assumed.
OTHER_REGISTERS = 24


@types.coroutine
def suspend(arrange: Callable[[Callable[[], None]], None]) -> Generator:
    """Stop here until resume() is called: arrange(resume) sees to it that it will be."""
    yield arrange


class Instruction:
    """What `wg.some_instruction(...)` returns, to be awaited."""

    def __init__(self, wg: "Agent", name: str, body: Coroutine) -> None:
        self.wg, self.name, self.body = wg, name, body
        wg.unawaited = self

    def __await__(self) -> Generator:
        self.wg.unawaited = None
        return self.body.__await__()


def instruction(method: Callable[..., Coroutine]) -> Callable[..., Instruction]:
    """Turn a coroutine method into an instruction, so that a forgotten `await` is noticed."""

    @functools.wraps(method)
    def issue(wg: "Agent", *args: Any, **kwargs: Any) -> Instruction:
        wg.check_awaited()
        return Instruction(wg, method.__name__, method(wg, *args, **kwargs))

    return issue


@dataclass(eq=False)
class Group:
    """Asynchronous instructions that are waited for together: wgmmas, or TMA stores."""

    last: str = ""  # the buffer that the newest of them reads
    committed: bool = False
    running: int = 0
    facts: set[Fact] = field(default_factory=set)  # what holds when they are done
    fragments: list[Fragment] = field(default_factory=list)  # registers they use
    waiters: list[Callable[[], None]] = field(default_factory=list)
    afterwards: list[Work] = field(default_factory=list)  # arithmetic that needs their registers

    def one_done(self) -> None:
        """One of the instructions has finished."""
        self.running -= 1
        if not self.running:
            waiters, self.waiters = self.waiters, []
            for wake in waiters:
                wake()

    def missing(self) -> str:
        """In words."""
        return f"{self.running} instructions in flight"


class Agent:
    """A warpgroup without its instructions: time, registers, and which accesses it knows to be over."""

    def __init__(self, sm: "SM", name: str, registers: int) -> None:
        self.sm, self.name, self.max_registers = sm, name, registers
        self.iteration: int | None = None
        self.known: set[Fact] = set()
        self.work: list[Work] = []
        self.calculating = False  # on a tile, right now
        self.fragments: weakref.WeakSet[Fragment] = weakref.WeakSet()
        self.peak_registers = 0
        self.fences = 0  # wgmma.fence executed so far
        self.unawaited: Instruction | None = None
        self.done = False
        self.waiting: tuple[str, Callable[[], str], float] | None = None  # for what, what it lacks, since when
        self.seen: dict[Mbarrier, int] = {}  # the last phase seen complete; -1 is a fresh barrier
        # whether the last wait returned for a phase seen before; the barrier waited for last comes last
        self.told_nothing: dict[Mbarrier, bool] = {}

    def loop(self, iterations: Iterable[int]) -> Iterator[int]:
        """Go through `iterations`, such that messages and timelines can say in which one something happened."""
        for i in iterations:
            self.iteration = i
            yield i
        self.iteration = None

    def where(self, buffer: str = "") -> dict:
        """For exceptions: this warpgroup, its iteration, a buffer."""
        place = "outside its loop" if self.iteration is None else f"iteration {self.iteration}"
        return {"warpgroup": self.name, "place": place, "iteration": self.iteration, "buffer": buffer}

    def line(self) -> str:
        """Where in the kernel's source, outside of this package, the role now stands: "consume.py, line 12"."""
        frame, coroutine = None, self.role
        while getattr(coroutine, "cr_frame", None):
            if not coroutine.cr_frame.f_globals.get("__name__", "").startswith(__package__):
                frame = coroutine.cr_frame
            coroutine = coroutine.cr_await
        return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}" if frame else ""

    # --- time

    def start(self, role: Coroutine) -> None:
        """Take on a role. `steps` goes through it, stopping where the warpgroup has to wait."""
        if not isinstance(role, Coroutine):
            raise TypeError(f"the role of {self.name} returned {role!r}; a role is an `async def` function of wg")
        self.role, self.steps, self.close = role, role.__await__(), role.close

    async def sleep_until(self, time: float) -> None:
        """Do nothing until then."""
        if time > self.sm.now:
            await suspend(lambda resume: self.sm.at(time, resume))

    async def issue(
        self, name: str, operand: str = "", *, source: str = "", amount: int = 0, clocks: float | None = None
    ) -> None:
        """The beginning of every instruction: finish the arithmetic before it, then take an issue slot, for `clocks`.

        operand, source, amount: for the record of issued instructions (see Issued).
        """
        await self.finish_work()
        self._check_budget()
        start = self.sm.now
        self.sm.issued.append(Issued(start, self.name, name, operand, self.iteration, source, amount))
        await self.sleep_until(start + self.sm.luck.vary(self.sm.timing.issue if clocks is None else clocks))
        self.span("issue", f"{name} {operand}".strip(), start, self.iteration)

    async def wait_for(self, what: str, source: Any, ready: Callable[[], bool], latency: float) -> None:
        """Block until ready(); `source` has a list of waiters and says what is missing."""
        start = self.sm.now
        while not ready():
            self.waiting = (what, source.missing, start)
            await suspend(lambda resume: source.waiters.append(lambda: self.sm.after(latency, resume)))
        self.waiting = None
        self.span("wait", what, start, self.iteration)

    def others(self) -> list["Agent"]:
        """The other warpgroups of this SM."""
        return [wg for wg in self.sm.warpgroups if wg is not self]

    def spend(self, unit: str, tile: Fragment, name: str, *, reduces: bool = False, in_place: bool = False) -> None:
        """Arithmetic on a tile, for which the next instruction will wait."""
        self.work.append(Work(unit, 128 * tile.registers, name, self.iteration, reduces, in_place))

    def spend_on_rounding(self, tile: Fragment, dtype: str) -> None:
        """Rounding to an A fragment: as `spend`, but once no wgmma in flight reads one. Four bytes of e4m3 that belong
        together come from two conversions, and are put together by a third instruction (prmt)."""
        count = 128 * tile.registers
        slower = self.sm.timing.convert_e4m3 if dtype == FP8 else 1
        work = [Work("convert", count, "convert", self.iteration, slower=slower)]
        if dtype == FP8:
            work.append(Work("ALU", count, "prmt", self.iteration, slower=1 / 4))
        reading = [f.in_flight for f in self.fragments if f.in_flight and f.dtype != "float32"]
        (reading[0].afterwards if reading else self.work).extend(work)

    async def finish_work(self) -> None:
        """Spend the time of the arithmetic since the last instruction (arithmetic.py)."""
        work, self.work = self.work, []
        start = self.sm.now
        await work_off(self, work)
        if work:
            name = "softmax" if any(item.name == "exp2" for item in work) else "arithmetic"
            self.span("math", name, start, work[0].iteration)

    async def wait_groups(self, groups: list[Group], pending: int, what: str) -> None:
        """Wait for all but the newest `pending` groups; their registers and buffers are free then."""
        while len(groups) > pending:
            group = groups[0]
            await self.wait_for(what, group, lambda group=group: not group.running, 0)
            groups.pop(0)
            self.learn(group.facts)
            self.work += group.afterwards
            for fragment in group.fragments:
                if fragment.in_flight is group:
                    fragment.in_flight = None

    def span(self, kind: str, name: str, start: float, iteration: int | None) -> None:
        """Record what this warpgroup did from `start` until now, for a loop iteration."""
        if self.sm.now > start:
            self.sm.spans.append(Span(self.name, kind, name, start, self.sm.now, iteration, self.name))

    # --- rules

    def learn(self, facts: set[Fact]) -> None:
        """Take over what somebody knew."""
        self.known = still_needed(self.known | facts)

    def access(
        self, buffer: Buffer, what: str, *, writes: bool, generic: bool, mbarrier: "Mbarrier | None" = None
    ) -> Access:
        """Check and note a read or write of shared memory that starts now."""
        last = buffer.last_write
        old_news = self.old_news(None if writes or last is None else last.mbarrier, reads=not writes)
        unordered = buffer.conflicts(writes, self.known)
        if unordered:
            self.sm.broken(self._race(buffer, what, writes, unordered[-1], old_news))
        elif not writes and last is None:
            rule, message = WrongParity if old_news else ReadTooEarly, f"{what} reads {buffer.name}, never written to"
            self.sm.broken(rule(f"{message}. {old_news}".rstrip(". "), **self.where(buffer.name)))
        elif not writes and not generic and buffer.unfenced(self.known):
            message = f"{what} reads {buffer.name}, written by {last}, with no proxy fence in between"
            self.sm.broken(MissingProxyFence(message, **self.where(buffer.name)))
        access = Access(what, self.where(buffer.name), writes, generic, mbarrier, old_news)
        buffer.add(access)
        return access

    def _race(self, buffer: Buffer, what: str, writes: bool, other: Access, old_news: str) -> RuleBroken:
        """The exception for an access that conflicts with `other`; a wait with the wrong parity may be why."""
        verb = "overwrites" if writes else "reads"
        message = f"{what} {verb} {buffer.name} while nothing says that this is over: {other}"
        if old_news:
            return WrongParity(f"{message}. {old_news}", **self.where(buffer.name))
        if other.mbarrier and other.mbarrier.tx < other.mbarrier.on_their_way:
            message += f". Its bytes were not announced: {other.mbarrier.name} did not wait for them"
            return WrongTxBytes(message, **self.where(buffer.name))
        if other.old_news:  # the other one came too early
            return WrongParity(f"{other.what} of {buffer.name} out of turn. {other.old_news}", **other.where)
        return (OverwriteInUse if writes else ReadTooEarly)(message, **self.where(buffer.name))

    def old_news(self, mbarrier: "Mbarrier | None" = None, *, reads: bool = False) -> str:
        """Says so if the last wait, on `mbarrier` or on any, returned at once for a phase that was seen before.

        For a reader a fresh barrier is no news either: nothing can have been loaded yet.
        """
        mbarrier = mbarrier or next(reversed(self.told_nothing), None)
        if mbarrier not in self.seen or not (self.told_nothing[mbarrier] or (reads and self.seen[mbarrier] < 0)):
            return ""
        phase = self.seen[mbarrier]
        news = f"phase {phase}, which it had seen before" if phase >= 0 else "a fresh barrier"
        return f"Its last wait on {mbarrier.name} asked for parity {phase % 2} and returned at once for {news}"

    def check_registers_free(self, fragment: Fragment) -> None:
        """RegistersInFlight if a wgmma may still use this tile."""
        group = fragment.in_flight
        if group is None:
            return
        state = "no wait_group has covered yet" if group.committed else "was not even committed (commit_group)"
        role = "accumulator" if fragment.dtype == "float32" else "A operand, such as P,"
        message = f"{fragment} is accessed while it is the {role} of a wgmma on {group.last}, which {state}"
        self.sm.broken(RegistersInFlight(message, **self.where(group.last)))

    def _check_budget(self) -> None:
        held = sum(f.registers for f in self.fragments) + OTHER_REGISTERS
        self.peak_registers = max(self.peak_registers, held)
        if held > self.max_registers:
            tiles = ", ".join(f"{f} {f.registers}" for f in sorted(self.fragments, key=lambda f: -f.registers))
            raise RegistersOverBudget(
                f"{held} registers a thread, of {self.max_registers}: {tiles}, and {OTHER_REGISTERS} for addresses and "
                "counters. Drop what is no longer needed (`del`), or compute into the same name",
                **self.where(),
            )

    def check_awaited(self) -> None:
        """MissingAwait if the last instruction was written without `await`."""
        if self.unawaited:
            forgotten, self.unawaited = self.unawaited, None
            forgotten.body.close()
            raise MissingAwait(f"wg.{forgotten.name}(...) was not awaited", **self.where())
