"""What a run tells: cycles, how busy the units were, what every warpgroup waited for."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fa_reference.hopper.rules import RuleBroken
from fa_reference.hopper.trace import Span, plot_trace, write_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Issued(NamedTuple):
    """An instruction, in the order of issue.

    source: the tensor in global memory that a TMA load reads, or from which TMA loaded the A operand of a wgmma
    ("registers", if A is there; "", if it is a tile written by ordinary stores). amount: bytes or FLOP of those two.
    """

    cycle: float
    warpgroup: str
    instruction: str
    operand: str
    iteration: int | None
    source: str
    amount: int


@dataclass(frozen=True)
class Report:
    """One block on one SM.

    busy: clocks that each unit worked ("wgmma", "exp", "FP32", "ALU", "convert", "smem", "TMA"); registers: the most
    tiles and counters held per thread; broken: rules broken in a run with check=False.
    """

    cycles: float
    busy: dict[str, float]
    spans: list[Span]
    issued: list[Issued]
    registers: dict[str, int]
    smem_bytes: int
    broken: list[RuleBroken]

    def utilisation(self, unit: str) -> float:
        """Share of the cycles in which a unit worked."""
        return self.busy[unit] / self.cycles if self.cycles else 0.0

    def waited(self, warpgroup: str) -> dict[str, float]:
        """Clocks that a warpgroup waited, by what for; the stages of a ring (K_full[0], K_full[1]) are one entry."""
        clocks: dict[str, float] = defaultdict(float)
        for span in self.spans:
            if span.track == warpgroup and span.kind == "wait":
                clocks[span.name.split("[")[0]] += span.stop - span.start
        return dict(clocks)

    def select(self, track: str, name: str = "", owner: str = "") -> list[Span]:
        """Spans of a track (a warpgroup or a unit) whose name begins with `name`, for one warpgroup if given."""
        return [s for s in self.spans if s.track == track and s.name.startswith(name) and owner in ("", s.owner)]

    def table(self) -> str:
        """Units and waits as text."""
        lines = [f"{self.cycles:,.0f} cycles, {self.smem_bytes:,} bytes of shared memory", "", "unit      busy"]
        lines += [f"{unit:8} {self.utilisation(unit):5.1%}" for unit in self.busy]
        lines += ["", "warpgroup    registers  math   issue  waited for"]
        for wg, registers in self.registers.items():
            shares = [covered(s for s in self.spans if s.track == wg and s.kind == k) for k in ("math", "issue")]
            math, issue = (share / self.cycles for share in shares)
            waits = sorted(self.waited(wg).items(), key=lambda item: -item[1])
            causes = ", ".join(f"{what} {clocks / self.cycles:.1%}" for what, clocks in waits) or "nothing"
            lines.append(f"{wg:12} {registers:9} {math:6.1%} {issue:6.1%}  {causes}")
        return "\n".join(lines)

    def plot(self, path: Path | str | None = None, *, start: float = 0, stop: float | None = None) -> "Figure":
        """The timeline between two cycles as a figure; with a path, also as an SVG or PNG file."""
        return plot_trace(self.spans, path, start=start, stop=stop)

    def write_trace(self, path: Path | str) -> Path:
        """The timeline as JSON for ui.perfetto.dev (format: see trace.py)."""
        return write_trace(
            path, self.spans, cycles=self.cycles, utilisation={u: self.utilisation(u) for u in self.busy}
        )


def covered(spans: Iterable[Span]) -> float:
    """Clocks in which at least one of the spans runs."""
    return sum(stop - start for start, stop in _merged(spans))


def overlap(first: Iterable[Span], second: Iterable[Span]) -> float:
    """Clocks in which at least one span of each runs."""
    first, second = list(first), list(second)
    return covered(first) + covered(second) - covered([*first, *second])


def _merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.stop))
        else:
            merged.append((span.start, span.stop))
    return merged
