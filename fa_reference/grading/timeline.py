"""What a schedule did, read from a run on the model: whose loads, which products and softmaxes, in which order."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fa_reference.grading.check import CheckFailed
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.report import Issued
from fa_reference.hopper.trace import Span


@dataclass(frozen=True)
class Step:
    """A load, product or softmax of block n (0, 1, ... in the order in which a warpgroup takes them).

    what: "K" or "V" for loads, "S" or "O" for products, "softmax". issued: the cycle at which it was issued; start and
    stop: when its unit worked on it (of a load: without the latency).
    """

    what: str
    warpgroup: str
    block: int
    issued: float
    start: float
    stop: float


class Timeline:
    """The trace of one run with `block_k` keys of `head_dim` columns in a block."""

    def __init__(
        self, spans: Sequence[Sequence[Any]], issued: Sequence[Sequence[Any]], block_k: int, head_dim: int
    ) -> None:
        self.spans = [Span(*s) for s in spans]
        self.issued = [Issued(*i) for i in issued]
        self.flop = 2 * ROWS * block_k * head_dim
        self.loads = self._steps("TMA load", "TMA")
        self.products = self._steps("wgmma", "wgmma")

    def _steps(self, instruction: str, unit: str) -> list[Step]:
        """Every instruction of a kind with the span of its unit: each warpgroup's come in the same order in both."""
        work = defaultdict(list)
        for s in self.spans:
            if s.track == unit and not s.name.startswith("store"):
                work[s.owner].append(s)
        done: dict[tuple[str, str], int] = defaultdict(int)
        steps = []
        for i in self.issued:
            if i.instruction != instruction:
                continue
            span = work[i.warpgroup].pop(0)
            if instruction == "wgmma":
                what = "S" if i.source == "Q" else "O"
                block = done[i.warpgroup, what] // self.flop
                done[i.warpgroup, what] += i.amount
            else:
                what = i.source
                block = done[i.warpgroup, what]
                done[i.warpgroup, what] += 1
            steps.append(Step(what, i.warpgroup, block, i.cycle, span.start, span.stop))
        return steps

    def of(self, warpgroup: str, what: str) -> list[Step]:
        """A warpgroup's products ("S", "O") or loads ("K", "V"), one a block."""
        steps = self.products if what in ("S", "O") else self.loads
        return list({s.block: s for s in steps if s.warpgroup == warpgroup and s.what == what}.values())

    def softmaxes(self, warpgroup: str) -> list[Step]:
        """A warpgroup's softmaxes, one a block."""
        spans = [s for s in self.spans if (s.track, s.kind, s.name) == (warpgroup, "math", "softmax")]
        return [Step("softmax", warpgroup, n, s.start, s.start, s.stop) for n, s in enumerate(spans)]

    @property
    def consumers(self) -> list[str]:
        """The warpgroups that multiply; CheckFailed if none does."""
        names = sorted({s.warpgroup for s in self.products})
        if not names:
            raise CheckFailed("no warpgroup issues a wgmma")
        return names

    @property
    def loaders(self) -> list[str]:
        """The warpgroups that issue TMA loads; CheckFailed if none does."""
        names = sorted({s.warpgroup for s in self.loads})
        if not names:
            raise CheckFailed("no warpgroup issues a TMA load")
        return names

    def count(self, warpgroup: str, *instructions: str) -> int:
        """How many of these instructions a warpgroup issued."""
        return sum(i.warpgroup == warpgroup and i.instruction in instructions for i in self.issued)

    def in_flight(self, warpgroup: str, cycle: float) -> list[Step]:
        """The products of a warpgroup that are issued and committed, but not waited for, at a cycle of its own time."""
        groups: list[list[Step]] = []
        open_group: list[Step] = []
        products = iter(s for s in self.products if s.warpgroup == warpgroup)
        for i in self.issued:
            if i.warpgroup != warpgroup or i.cycle >= cycle:
                continue
            if i.instruction == "wgmma":
                open_group.append(next(products))
            elif i.instruction == "wgmma.commit_group":
                groups.append(open_group)
                open_group = []
            elif i.instruction == "wgmma.wait_group":
                groups = groups[max(0, len(groups) - int(i.operand)) :]
        return [step for group in groups for step in group]
