"""From the events of a tracing build to spans: what every warpgroup did from which clock to which.

The kernel's wrappers note how long waits took and when wgmmas were committed (cuda/hopper/trace.cuh). The rest follows
from the order:

- wgmma groups are numbered as they are committed, and wait_group<n> completes all but the n newest. A group is in
  flight from when its issue began to the end of the first wait that covers it. That end is an upper bound: the group
  may have been done before anybody asked.
- a group multiplies Q K^T if the mbarrier waited for last was K's, P V if it was V's.
- what lies between the end of a wait and a commit is the issue of a group; between the end of a wait for wgmma and the
  next wait it is arithmetic: softmax after Q K^T (with rescaling O and rounding P, where the kernel does them there),
  "rescale" after P V (in chapter 6, which has no producer, "sync, load"), and the epilogue at the end. Between a
  commit and the next wait there is nothing to do: if that takes long, the warps were "held", unable to go on until
  the tensor cores had taken what they issued.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from fa_reference.hopper.report import covered, overlap
from fa_reference.hopper.trace import Span


class Kind(IntEnum):
    """What happened: the TraceEvent of cuda/hopper/trace.cuh, name for name."""

    START = 1
    END = 2
    MBARRIER = 3
    BARRIER = 4
    COMMIT = 5
    WGMMA = 6


@dataclass(frozen=True)
class Event:
    """One mark, from clock `start` to `stop`. detail: the barrier's name or number, or groups left unfinished."""

    start: int
    stop: int
    kind: Kind
    detail: int = 0


class TraceBroken(RuntimeError):
    """The events of a warpgroup do not fit together: marks were lost, or the kernel left a wait out."""


SHORT = 100  # clocks: less than this after P V or a commit is the loop's own bookkeeping


@dataclass
class _Group:
    name: str  # "QK" or "PV"
    number: int  # among those of its name
    start: int


class _Warpgroup:
    """Goes through the events of one warpgroup and collects spans."""

    def __init__(self, track: str, barriers: Sequence[str]) -> None:
        self.track, self.barriers = track, [name[0].upper() + name[1:] for name in barriers]
        self.spans: list[Span] = []
        self.open: list[_Group] = []
        self.committed = {"QK": 0, "PV": 0}
        self.waits: dict[str, int] = {}
        self.operand = "QK"  # what the next group multiplies
        self.waited = ""  # the mbarrier, if the last event was a wait at one
        self.finished = ""  # the group that the last wait completed, if nothing has happened since
        self.last = 0  # end of the event before
        self.committing = False  # whether that was a commit

    def take(self, event: Event) -> None:
        if event.start < self.last:
            raise TraceBroken(f"{self.track}: {event} begins before the event before it ends, at {self.last}")
        held = event.start - self.last
        if self.committing and held >= SHORT:
            self.spans.append(Span(self.track, "issue", "held", self.last, event.start, None, self.track))
        self.committing = event.kind == Kind.COMMIT
        if event.kind == Kind.COMMIT:
            self._commit(event)
        elif event.kind != Kind.START:
            self._arithmetic(event)
        if event.kind == Kind.MBARRIER:
            name = self.barriers[event.detail] if event.detail < len(self.barriers) else f"mbarrier {event.detail}"
            if name in ("K_full", "V_full"):
                self.operand = "QK" if name == "K_full" else "PV"
            self._wait(name, event, self._count(name))
        elif event.kind == Kind.BARRIER:
            if self.waited == "V_empty":
                number = self._count("turn V round")
                self.spans.append(Span(self.track, "math", "turn V round", self.last, event.start, number, self.track))
            self._wait(f"barrier {event.detail}", event, self._count(f"barrier {event.detail}"))
        elif event.kind == Kind.WGMMA:
            self._wgmma(event)
        self.waited = name if event.kind == Kind.MBARRIER else ""
        self.last = event.stop

    def _count(self, name: str) -> int:
        self.waits[name] = self.waits.get(name, -1) + 1
        return self.waits[name]

    def _wait(self, name: str, event: Event, iteration: int) -> None:
        self.spans.append(Span(self.track, "wait", name, event.start, event.stop, iteration, self.track))

    def _commit(self, event: Event) -> None:
        group = _Group(self.operand, self.committed[self.operand], self.last)
        self.committed[group.name] += 1
        self.open.append(group)
        name = f"issue {group.name}"
        self.spans.append(Span(self.track, "issue", name, self.last, event.start, group.number, self.track))
        self.finished = ""

    def _wgmma(self, event: Event) -> None:
        done = self.open[: max(0, len(self.open) - event.detail)]
        if not done:
            raise TraceBroken(f"{self.track}: {event} waits for no group: a commit was lost")
        self.open = self.open[len(done) :]
        for group in done:
            flight = (group.name, group.start, event.stop, group.number, self.track)
            self.spans.append(Span(f"wgmma of {self.track}", "unit", *flight))
        self._wait(f"wgmma {done[-1].name}", event, done[-1].number)
        self.finished = done[-1].name

    def _arithmetic(self, event: Event) -> None:
        """What lies between a wait for wgmma and this event."""
        after_pv = "rescale" if self.track.startswith("consumer") else "sync, load"
        name = "epilogue" if event.kind == Kind.END else {"QK": "softmax", "PV": after_pv, "": ""}[self.finished]
        clocks = event.start - self.last
        self.finished = ""
        tiles = self.committed["QK"] > 0  # a producer has no epilogue
        if clocks > 0 and name and tiles and not (name == after_pv and clocks < SHORT):
            number = self.committed["QK"] - 1
            self.spans.append(Span(self.track, "math", name, self.last, event.start, number, self.track))


def spans_of(warpgroups: dict[str, Sequence[Event]], barriers: Sequence[str]) -> list[Span]:
    """Spans of one block. warpgroups: events in order by track name; barriers: the kernel's names, in its order.

    Clocks count from the block's first event. Raises TraceBroken if the events contradict each other.
    """
    zero = min((events[0].start for events in warpgroups.values() if events), default=0)
    spans: list[Span] = []
    for track, events in warpgroups.items():
        one = _Warpgroup(track, barriers)
        for event in events:
            one.take(Event(event.start - zero, event.stop - zero, event.kind, event.detail))
        if one.open:
            raise TraceBroken(f"{track}: ends with {len(one.open)} wgmma groups in flight: a wait was lost")
        spans += one.spans
    return spans


def shares(spans: Iterable[Span], track: str) -> dict[str, float]:
    """What a consumer's time went to, as shares of its time from its first span to its last (epilogue included).

    Keys: "softmax", "rescale", "epilogue", "issue QK", "issue PV", "held", "wait K_full" and the like; and
    "softmax under own wgmma", "softmax under other wgmma", "softmax under wgmma": shares of its softmax time during
    which wgmma groups were in flight; "wgmma in flight": share of the time with any consumer's group in flight. The
    last four are upper bounds, as the flights are.
    """
    spans = list(spans)
    mine = [s for s in spans if s.track == track]
    start, stop = min(s.start for s in mine), max(s.stop for s in mine)
    total: dict[str, float] = {}
    for s in mine:
        key = f"wait {s.name}" if s.kind == "wait" else s.name
        total[key] = total.get(key, 0.0) + (s.stop - s.start) / (stop - start)
    softmax = [s for s in mine if s.name == "softmax"]
    flying = [s for s in spans if s.kind == "unit"]
    own = [s for s in flying if s.owner == track]
    other = [s for s in flying if s.owner != track]
    clocks = covered(softmax)
    for name, groups in (("own ", own), ("other ", other), ("", flying)):
        total[f"softmax under {name}wgmma"] = overlap(softmax, groups) / clocks if clocks else 0.0
    total["wgmma in flight"] = covered(s for s in flying if s.stop > start and s.start < stop) / (stop - start)
    return total
