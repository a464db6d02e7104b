"""The rules of asynchrony on Hopper that hardware lets you break, each an exception that says who broke it where.

The section names are those of the PTX ISA manual. On the device most of these end as wrong numbers or as a hang.
"""


class RuleBroken(RuntimeError):
    """A kernel broke `rule`; `warpgroup`, `iteration` (None outside loops) and `buffer` say where.

    `likely` names the mistakes that usually lead here.
    """

    rule = ""
    likely = ""

    def __init__(
        self, what: str, *, warpgroup: str = "", place: str = "", iteration: int | None = None, buffer: str = ""
    ) -> None:
        self.what, self.warpgroup, self.iteration, self.buffer = what, warpgroup, iteration, buffer
        where = f"{warpgroup}, {place}: " if warpgroup else ""
        likely = f"\n  Likely: {self.likely}" if self.likely else ""
        super().__init__(f"{where}{what}\n  Rule ({type(self).__name__}): {self.rule}{likely}")


class ReadTooEarly(RuleBroken):
    """PTX ISA: Asynchronous copy completion; mbarrier.try_wait."""

    rule = (
        "a tile may be read only after what writes it is known to be complete: after waiting for the phase of the "
        "mbarrier on which its TMA load completes, or for a barrier at which its writer arrived after writing."
    )
    likely = (
        "a wait is missing before the read: for the mbarrier on which this very tile is loaded (its slot's), or for"
        " the barrier at which its writer arrives."
    )


class OverwriteInUse(RuleBroken):
    """PTX ISA: memory consistency model, asynchronous operations."""

    rule = (
        "a buffer may be overwritten only after everything that reads or writes it is known to be over: after "
        "wait_group for one's own wgmma, after a barrier at which every other user arrived when it was done."
    )
    likely = (
        "the slot was released too early (before wgmma_wait_group said that the product reading it is over), it "
        "is filled without waiting for its release, or its `empty` barrier counts less arrivals than it has "
        "readers."
    )


class RegistersInFlight(RuleBroken):
    """PTX ISA: wgmma.wait_group."""

    rule = (
        "registers of a wgmma (accumulators and A fragments) belong to the tensor core from its issue until a "
        "wgmma.wait_group covers its committed group; reading or writing them before is undefined."
    )
    likely = (
        "a wgmma_wait_group is missing before this access, or its number lets the group that counts stay in flight."
    )


class MissingWgmmaFence(RuleBroken):
    """PTX ISA: wgmma.fence."""

    rule = "wgmma.fence must stand between other accesses to a wgmma's registers and that wgmma."
    likely = "wgmma_fence is missing before this product."


class MissingProxyFence(RuleBroken):
    """PTX ISA: Proxies; fence.proxy.async."""

    rule = (
        "wgmma and TMA read shared memory through the async proxy: after ordinary stores the writer executes "
        "fence.proxy.async and only then arrives at the barrier for which the reader waits."
    )
    likely = (
        "the proxy fence (fence_proxy_async) is missing between the ordinary store and the barrier or TMA store "
        "after it."
    )


class WrongParity(RuleBroken):
    """PTX ISA: mbarrier.test_wait / try_wait, phaseParity."""

    rule = (
        "try_wait.parity(p) returns when the phase with parity p is complete: phase n has parity n % 2, so the parity "
        "flips each time the same barrier is waited for. On a fresh barrier parity 1 passes at once (a producer starts "
        "with 1, a consumer with 0)."
    )
    likely = (
        "the parity never flips, flips at the wrong time, or starts wrong: for round n of a slot wait at `full` "
        "with n % 2, and at `empty` with the opposite."
    )


class MissedPhase(RuleBroken):
    """PTX ISA: mbarrier.test_wait / try_wait, phaseParity."""

    rule = (
        "parity tells only the current phase from the one just before it: a waiter must see every phase, and nobody "
        "may complete a second one before it has."
    )
    likely = "a wait at this mbarrier is missing, or somebody arrives at it who should not."


class DoubleArrive(RuleBroken):
    """PTX ISA: mbarrier.arrive, pending count. The model is stricter: it counts arrivals per warpgroup."""

    rule = (
        "one arrival per warpgroup (one elected thread) and phase, and exactly `count` of them: hardware counts "
        "arrivals without looking who they come from, so a second one completes the phase in somebody else's place."
    )
    likely = (
        "an arrival too many: the same tile released twice, at the wrong slot, or for another warpgroup; or the "
        "wait that belongs before this arrival is missing; or the mbarrier's count is too small."
    )


class WrongTxBytes(RuleBroken):
    """PTX ISA: mbarrier, tx-count; cp.async.bulk.tensor."""

    rule = (
        "the bytes of arrive.expect_tx must be exactly those that the TMA loads of that phase bring, and be announced "
        "before the phase's last arrival, or with it (not necessarily before the load). Rows outside the tensor count "
        "too: they are filled with zeros."
    )
    likely = "arrive_expect_tx names the wrong size, or is missing for a load on that mbarrier."


class BarrierCount(RuleBroken):
    """PTX ISA: bar.sync / bar.arrive."""

    rule = (
        "all who use a named barrier (0 to 15) give the same count of threads, a multiple of 32, and exactly that many "
        "threads arrive each time: 128 for each warpgroup that syncs or arrives."
    )
    likely = "an arrival too many or too few at a named barrier, the wrong barrier, or a wrong count of threads."


class SharedMemoryOverBudget(RuleBroken):
    """CUDA programming guide: compute capability 9.0."""

    rule = "a block can use 227 KiB (232448 bytes) of shared memory."
    likely = "too many stages, or tiles that are too large."


class RegistersOverBudget(RuleBroken):
    """PTX ISA: setmaxnreg."""

    rule = (
        "a thread holds at most as many registers as it has: 64K of them / threads at launch (at most 255), then what "
        "setmaxnreg says (24 to 256, a multiple of 8). What dec gives back, inc can take."
    )
    likely = "setmaxnreg is missing or asks for the wrong number, or a tile is kept longer than it is needed."


class ExitInFlight(RuleBroken):
    """PTX ISA: cp.async.bulk.wait_group, wgmma.wait_group."""

    rule = "before a warpgroup returns, what it issued must be over: shared memory and registers go to the next block."
    likely = "a wait is missing at the end, or a load was issued that nobody needs (after the last block)."


class IllegalOperand(RuleBroken):
    """PTX ISA: wgmma.mma_async, cp.async.bulk.tensor."""

    rule = "shapes and types must be ones that the instruction has."


class MissingAwait(RuleBroken):
    """A rule of the model, not of the hardware."""

    rule = "every instruction of a warpgroup is awaited: `await wg.wgmma(...)`. Without `await` it never happens."


class Deadlock(RuleBroken):
    """Nothing can happen any more. `waits` has a line for every warpgroup that waits."""

    rule = "on the device this kernel hangs."
    likely = (
        "an arrival (a release, a handed-on turn) is missing, goes to another barrier than the one waited for, or "
        "the barrier's count is larger than the number of those who arrive."
    )

    def __init__(self, what: str, waits: list[str], **where: object) -> None:
        self.waits = waits
        super().__init__(what + "".join(f"\n  {line}" for line in waits), **where)
