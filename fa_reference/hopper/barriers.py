"""mbarriers and named barriers as state machines, without time: what completes them, and whom they tell what."""

from collections.abc import Callable

from fa_reference.hopper.memory import Fact, still_needed
from fa_reference.hopper.rules import BarrierCount, DoubleArrive, WrongTxBytes


class Mbarrier:
    """A barrier object in shared memory, for arrivals and for bytes that TMA brings.

    Phase n (from 0) completes when `count` arrivals were made and the tx-count is zero: expect_tx adds bytes to it, a
    TMA load that completes takes its bytes off. The next phase starts at once with a fresh count. A waiter sees only
    parities: see `test_parity`.
    """

    BYTES = 8

    def __init__(self, name: str, count: int, users: set[str] | None = None) -> None:
        """users: filled with whoever arrives; the barriers of one ring share it, so that one can say who is missing."""
        if not 1 <= count < 2**20:
            raise ValueError(f"count of mbarrier {name} is {count}; allowed: 1 to 2^20 - 1")
        self.name, self.count = name, count
        self.phase = 0  # the phase in progress; phases 0 .. phase - 1 are complete
        self.pending = count
        self.tx = 0
        self.on_their_way = 0  # bytes of loads that were issued and have not come
        self.arrived: list[str] = []  # in this phase
        self.arrived_before: list[str] = []  # in the phase before
        self.users = set() if users is None else users
        self.observed = -1  # the last phase that any warpgroup has seen complete
        self.released: set[Fact] = set()  # what a waiter learns
        self._gathered: set[Fact] = set()  # what those who arrived in this phase knew
        self.waiters: list[Callable[[], None]] = []

    def test_parity(self, parity: int) -> bool:
        """mbarrier.test_wait.parity: is the phase with this parity, current or just before it, complete?

        While phase n is in progress, phase n - 1, of the other parity, is complete. Before the first phase completes,
        parity 1 is therefore true.
        """
        return self.phase % 2 != parity

    def arrive(self, who: str, facts: set[Fact], tx: int = 0, **where: object) -> None:
        """One arrival, which first adds `tx` to the bytes expected in this phase (mbarrier.arrive.expect_tx)."""
        if who in self.arrived:
            self._refuse(f"second arrival of {who} in phase {self.phase} of mbarrier {self.name}", where)
        if self.pending == 0:
            self._refuse(f"arrival in phase {self.phase} of mbarrier {self.name}, which has all {self.count}", where)
        if who in self.arrived_before and self.observed < self.phase - 1:
            self._refuse(
                f"{who} arrives at mbarrier {self.name} again, before anybody has seen its arrival in phase "
                f"{self.phase - 1}",
                where,
            )
        self.tx += tx
        self.pending -= 1
        self.arrived.append(who)
        self.users.add(who)
        self._gathered |= facts
        self._advance(where)

    def complete_tx(self, size: int, facts: set[Fact], phase: int, **where: object) -> None:
        """A TMA load of `size` bytes, issued during `phase`, has written everything."""
        if phase != self.phase:
            raise WrongTxBytes(
                f"mbarrier {self.name}: {size} bytes of a load issued in phase {phase} arrive in phase {self.phase}: "
                f"phase {phase} completed without waiting for them (arrive.expect_tx named too few bytes, or none)",
                **where,
            )
        self.tx -= size
        self._gathered |= facts
        self._advance(where)

    def _advance(self, where: dict) -> None:
        if self.pending == 0 and self.tx < 0:
            raise WrongTxBytes(
                f"mbarrier {self.name}, phase {self.phase}: the loads brought {-self.tx} bytes more than expected",
                **where,
            )
        if self.pending or self.tx:
            return
        self.phase += 1
        self.pending = self.count
        self.arrived_before, self.arrived = self.arrived, []
        self.released = still_needed(self.released | self._gathered)
        self._gathered = set()
        waiters, self.waiters = self.waiters, []
        for wake in waiters:
            wake()

    def _refuse(self, what: str, where: dict) -> None:
        raise DoubleArrive(what, **where)

    def missing(self) -> str:
        """What the phase in progress still lacks, in words."""
        parts = []
        if self.pending:
            others = sorted(self.users - set(self.arrived))
            who = f"; not yet: {', '.join(others)}" if others else "" if self.arrived else "; nobody ever arrived"
            came = f" ({', '.join(self.arrived)} arrived{who})" if self.arrived else f" ({who[2:]})" if who else ""
            parts.append(f"{self.pending} of {self.count} arrivals{came}")
        if self.tx:
            parts.append(f"{self.tx} bytes")
        return " and ".join(parts)

    def __repr__(self) -> str:
        return f"Mbarrier({self.name}, phase {self.phase}, lacks {self.missing()})"


class NamedBarrier:
    """One of the 16 hardware barriers: completes when `threads` threads have synced or arrived, then starts afresh."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.threads = 0
        self.users: list[str] = []  # who has synced or arrived since the barrier last completed
        self.ever: set[str] = set()
        self.times = 0
        self.released: set[Fact] = set()
        self._gathered: set[Fact] = set()
        self.waiters: list[Callable[[], None]] = []

    def arrive(self, who: str, threads: int, facts: set[Fact], **where: object) -> None:
        """bar.arrive, and the first half of bar.sync: one warpgroup, 128 threads, comes to a barrier of `threads`."""
        if not 0 <= self.id <= 15:
            raise BarrierCount(f"named barrier {self.id} does not exist", **where)
        if threads % 32 or threads <= 0:
            raise BarrierCount(f"named barrier {self.id} with {threads} threads", **where)
        if self.users and threads != self.threads:
            raise BarrierCount(
                f"named barrier {self.id}: {who} says {threads} threads, {self.users[0]} said {self.threads}", **where
            )
        if who in self.users:
            raise BarrierCount(f"{who} comes to named barrier {self.id} again before it completed", **where)
        self.threads = threads
        self.users.append(who)
        self.ever.add(who)
        self._gathered |= facts
        arrived = 128 * len(self.users)
        if arrived > threads:
            raise BarrierCount(
                f"named barrier {self.id}: {arrived} threads ({', '.join(self.users)}) come to one of {threads}",
                **where,
            )
        if arrived == threads:
            self.times += 1
            self.users = []
            self.released = still_needed(self.released | self._gathered)
            self._gathered = set()
            waiters, self.waiters = self.waiters, []
            for wake in waiters:
                wake()

    def missing(self) -> str:
        """What the barrier still lacks, in words."""
        others = sorted(self.ever - set(self.users))
        hint = f"; {', '.join(others)} came earlier, not this time" if others else "; nobody else ever came"
        return f"{self.threads - 128 * len(self.users)} of {self.threads} threads ({', '.join(self.users)} came{hint})"
