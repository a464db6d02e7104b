"""The rules of asynchrony on Hopper that hardware lets you break, each an exception that says who broke it where.

The section names are those of the PTX ISA manual. On the device most of these end as wrong numbers or as a hang.
"""


class RuleBroken(RuntimeError):
    """A kernel broke `rule`; `warpgroup`, `iteration` (None outside loops) and `buffer` say where."""

    rule = ""

    def __init__(
        self, what: str, *, warpgroup: str = "", place: str = "", iteration: int | None = None, buffer: str = ""
    ) -> None:
        self.what, self.warpgroup, self.iteration, self.buffer = what, warpgroup, iteration, buffer
        where = f"{warpgroup}, {place}: " if warpgroup else ""
        super().__init__(f"{where}{what}\n  Rule ({type(self).__name__}): {self.rule}")


class ReadTooEarly(RuleBroken):
    """PTX ISA: Asynchronous copy completion; mbarrier.try_wait."""

    rule = (
        "a tile may be read only after what writes it is known to be complete: after waiting for the phase of the "
        "mbarrier on which its TMA load completes, or for a barrier at which its writer arrived after writing."
    )


class OverwriteInUse(RuleBroken):
    """PTX ISA: memory consistency model, asynchronous operations."""

    rule = (
        "a buffer may be overwritten only after everything that reads or writes it is known to be over: after "
        "wait_group for one's own wgmma, after a barrier at which every other user arrived when it was done."
    )


class RegistersInFlight(RuleBroken):
    """PTX ISA: wgmma.wait_group."""

    rule = (
        "registers of a wgmma (accumulators and A fragments) belong to the tensor core from its issue until a "
        "wgmma.wait_group covers its committed group; reading or writing them before is undefined."
    )


class MissingWgmmaFence(RuleBroken):
    """PTX ISA: wgmma.fence."""

    rule = "wgmma.fence must stand between other accesses to a wgmma's registers and that wgmma."


class MissingProxyFence(RuleBroken):
    """PTX ISA: Proxies; fence.proxy.async."""

    rule = (
        "wgmma and TMA read shared memory through the async proxy: after ordinary stores the writer executes "
        "fence.proxy.async and only then arrives at the barrier for which the reader waits."
    )


class WrongParity(RuleBroken):
    """PTX ISA: mbarrier.test_wait / try_wait, phaseParity."""

    rule = (
        "try_wait.parity(p) returns when the phase with parity p is complete: phase n has parity n % 2, so the parity "
        "flips each time the same barrier is waited for. On a fresh barrier parity 1 passes at once (a producer starts "
        "with 1, a consumer with 0)."
    )


class MissedPhase(RuleBroken):
    """PTX ISA: mbarrier.test_wait / try_wait, phaseParity."""

    rule = (
        "parity tells only the current phase from the one just before it: a waiter must see every phase, and nobody "
        "may complete a second one before it has."
    )


class DoubleArrive(RuleBroken):
    """PTX ISA: mbarrier.arrive, pending count. The model is stricter: it counts arrivals per warpgroup."""

    rule = (
        "one arrival per warpgroup (one elected thread) and phase, and exactly `count` of them: hardware counts "
        "arrivals without looking who they come from, so a second one completes the phase in somebody else's place."
    )


class WrongTxBytes(RuleBroken):
    """PTX ISA: mbarrier, tx-count; cp.async.bulk.tensor."""

    rule = (
        "the bytes of arrive.expect_tx must be exactly those that the TMA loads of that phase bring. Rows outside the "
        "tensor count too: they are filled with zeros."
    )


class BarrierCount(RuleBroken):
    """PTX ISA: bar.sync / bar.arrive."""

    rule = (
        "all who use a named barrier (0 to 15) give the same count of threads, a multiple of 32, and exactly that many "
        "threads arrive each time: 128 for each warpgroup that syncs or arrives."
    )


class SharedMemoryOverBudget(RuleBroken):
    """CUDA programming guide: compute capability 9.0."""

    rule = "a block can use 227 KiB (232448 bytes) of shared memory."


class RegistersOverBudget(RuleBroken):
    """PTX ISA: setmaxnreg."""

    rule = (
        "a thread holds at most as many registers as it has: 64K of them / threads at launch (at most 255), then what "
        "setmaxnreg says (24 to 256, a multiple of 8). What dec gives back, inc can take."
    )


class ExitInFlight(RuleBroken):
    """PTX ISA: cp.async.bulk.wait_group, wgmma.wait_group."""

    rule = "before a warpgroup returns, what it issued must be over: shared memory and registers go to the next block."


class IllegalOperand(RuleBroken):
    """PTX ISA: wgmma.mma_async, cp.async.bulk.tensor."""

    rule = "shapes and types must be ones that the instruction has."


class MissingAwait(RuleBroken):
    """A rule of the model, not of the hardware."""

    rule = "every instruction of a warpgroup is awaited: `await wg.wgmma(...)`. Without `await` it never happens."


class Deadlock(RuleBroken):
    """Nothing can happen any more. `waits` has a line for every warpgroup that waits."""

    rule = "on the device this kernel hangs."

    def __init__(self, what: str, waits: list[str], **where: object) -> None:
        self.waits = waits
        super().__init__(what + "".join(f"\n  {line}" for line in waits), **where)
