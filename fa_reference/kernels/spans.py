"""From the events of a tracing build to spans: what every warpgroup did from which clock to which.

The kernel's wrappers note only when they begin and end (cuda/hopper/trace.cuh). The rest follows from the order:

- wgmma groups are numbered as they are committed, and wait_group<n> completes all but the n newest: so a group is in
  flight from its fence to the end of the first wait that covers it. That end is an upper bound: a group may have been
  done before anybody asked.
- a group multiplies Q K^T if the mbarrier waited for last was K's, P V if it was V's.
- what a warpgroup does between the end of one wait and the next event is arithmetic: softmax after Q K^T (rescaling O
  and rounding P included, where the kernel does them there), "rescale" after P V, the epilogue after the last one.
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
    MBARRIER_DONE = 4
    BARRIER = 5
    BARRIER_DONE = 6
    WGMMA_FENCE = 7
    WGMMA_COMMIT = 8
    WGMMA_WAIT = 9
    WGMMA_DONE = 10


@dataclass(frozen=True)
class Event:
    """One mark. detail: the barrier's name or number, or how many groups may stay unfinished."""

    clock: int
    kind: Kind
    detail: int = 0
    iteration: int = 0


class TraceBroken(RuntimeError):
    """The events of a warpgroup do not fit together: marks were lost, or the kernel left a wait out."""


SHORT = 60  # clocks: less than this after P V is the loop's own bookkeeping and no arithmetic on a tile


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
        self.counts = {"QK": 0, "PV": 0}
        self.operand = "QK"
        self.fence: int | None = None
        self.wait_since: Event | None = None
        self.idle_since: int | None = None  # nothing noted since then: arithmetic, if it lasts
        self.finished = ""  # the group that the last wait completed

    def add(self, kind: str, name: str, start: int, stop: int, iteration: int | None = None) -> None:
        if stop > start:
            self.spans.append(Span(self.track, kind, name, start, stop, iteration, self.track))

    def take(self, event: Event) -> None:
        self.arithmetic(event.clock, last=event.kind == Kind.END)
        match event.kind:
            case Kind.MBARRIER | Kind.BARRIER | Kind.WGMMA_WAIT:
                if self.wait_since is not None:
                    raise TraceBroken(f"{self.track}: {event} begins inside {self.wait_since}")
                self.wait_since = event
            case Kind.MBARRIER_DONE | Kind.BARRIER_DONE | Kind.WGMMA_DONE:
                began, self.wait_since = self.wait_since, None
                if began is None or (began.kind + 1, began.detail) != (event.kind, event.detail):
                    raise TraceBroken(f"{self.track}: {event} ends a wait that began as {began}")
                self.waited(began, event)
                self.idle_since = event.clock
            case Kind.WGMMA_FENCE:
                self.fence = event.clock
            case Kind.WGMMA_COMMIT:
                if self.fence is None:
                    raise TraceBroken(f"{self.track}: {event} without a fence before it")
                group = _Group(self.operand, self.counts[self.operand], self.fence)
                self.counts[self.operand] += 1
                self.open.append(group)
                self.add("issue", f"issue {group.name}", self.fence, event.clock, group.number)
                self.fence = None
                self.idle_since, self.finished = event.clock, ""
            case Kind.START:
                self.idle_since, self.finished = None, ""

    def waited(self, began: Event, ended: Event) -> None:
        if began.kind == Kind.MBARRIER:
            name = self.barriers[began.detail] if began.detail < len(self.barriers) else f"mbarrier {began.detail}"
            if name.startswith(("K_full", "V_full")):
                self.operand = "QK" if name[0] == "K" else "PV"
            self.add("wait", name, began.clock, ended.clock, began.iteration)
        elif began.kind == Kind.BARRIER:
            self.add("wait", f"barrier {began.detail}", began.clock, ended.clock)
        else:
            done = self.open[: max(0, len(self.open) - began.detail)]
            self.open = self.open[len(done) :]
            for group in done:
                self.spans.append(
                    Span(
                        f"wgmma of {self.track}",
                        "unit",
                        group.name,
                        group.start,
                        ended.clock,
                        group.number,
                        self.track,
                    )
                )
            if done:
                last = done[-1]
                self.finished = last.name
                self.add("wait", f"wgmma {last.name}", began.clock, ended.clock, last.number)

    def arithmetic(self, now: int, *, last: bool) -> None:
        """What lies between the end of the last noted thing and this event."""
        since, self.idle_since = self.idle_since, None
        if since is None or not self.finished:
            return
        name = "epilogue" if last else {"QK": "softmax", "PV": "rescale"}[self.finished]
        if name == "rescale" and now - since < SHORT:
            return
        self.add("math", name, since, now, self.counts["QK"] - 1)
        self.finished = ""


def spans_of(warpgroups: dict[str, Sequence[Event]], barriers: Sequence[str]) -> list[Span]:
    """Spans of one block. warpgroups: events in order by track name; barriers: the kernel's names, in its order.

    Clocks count from the block's first event. Raises TraceBroken if the events contradict each other.
    """
    zero = min((events[0].clock for events in warpgroups.values() if events), default=0)
    spans: list[Span] = []
    for track, events in warpgroups.items():
        one = _Warpgroup(track, barriers)
        for event in events:
            one.take(Event(event.clock - zero, event.kind, event.detail, event.iteration))
        if one.open or one.wait_since:
            raise TraceBroken(f"{track}: ends with {len(one.open)} wgmma groups in flight, in wait {one.wait_since}")
        spans += one.spans
    return spans


def shares(spans: Iterable[Span], track: str) -> dict[str, float]:
    """What a consumer's time went to, as shares of its time from its first span to its last (epilogue included).

    Keys: "softmax", "rescale", "epilogue", "issue", "wait K_full" and the like; and
    "softmax under own wgmma", "softmax under other wgmma", "softmax under wgmma": shares of its softmax time during
    which wgmma groups were in flight; "wgmma in flight": share of the time with any consumer's group in flight.
    """
    spans = list(spans)
    mine = [s for s in spans if s.track == track]
    start, stop = min(s.start for s in mine), max(s.stop for s in mine)
    total: dict[str, float] = {}
    for s in mine:
        key = {"wait": f"wait {s.name}", "issue": s.name}.get(s.kind, s.name)
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
