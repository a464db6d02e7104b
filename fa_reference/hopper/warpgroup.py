"""The instructions of a warpgroup, under the names that PTX gives them: wgmma, barriers, registers.

A warpgroup is four warps, 128 threads, that the model treats as one: what all threads do together (wgmma, arithmetic)
and what one elected thread does for all (TMA, mbarrier arrivals) are the same coroutine. Every instruction is awaited;
only those with "wait" or "sync" in their name (and setmaxnreg_inc) block, the others return once issued.
"""

from typing import TYPE_CHECKING

import numpy as np

from fa_reference.hopper.agent import Group, instruction
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.copies import Copies
from fa_reference.hopper.memory import DTYPE_BYTES, Buffer
from fa_reference.hopper.registers import ROWS, Fragment
from fa_reference.hopper.rules import (
    DoubleArrive,
    IllegalOperand,
    MissedPhase,
    MissingWgmmaFence,
    RegistersOverBudget,
    WrongParity,
)

if TYPE_CHECKING:
    from fa_reference.hopper.sm import SM


def multiply_accumulate(d: np.ndarray, a: np.ndarray, b: np.ndarray, scale_d: bool) -> None:
    """d = a b (+ d if scale_d) in float32, 16 of the inner dimension at a time, as the hardware does it.

    (Products that small also keep BLAS from waking its threads, which would take longer than the work.)
    """
    with np.errstate(all="ignore"):
        if not scale_d:
            d[:] = 0
        for k in range(0, a.shape[1], 16):
            d += a[:, k : k + 16] @ b[k : k + 16]


class Warpgroup(Copies):
    """What a role function gets: `async def consumer(wg): ...`."""

    def __init__(self, sm: "SM", name: str, registers: int) -> None:
        super().__init__(sm, name, registers)
        self.open_wgmmas = Group()
        self.wgmma_groups: list[Group] = []  # committed, not yet waited for
        self.last_wgmma_end = 0.0

    # --- registers

    def full(self, columns: int, value: float) -> Fragment:
        """A new tile (64, columns) of float32 in registers, filled with `value`."""
        return Fragment(self, np.full((ROWS, columns), value, np.float32))

    def accumulator(self, columns: int) -> Fragment:
        """A new tile (64, columns) for wgmma to write. It holds NaN: the first wgmma must not add to it."""
        return self.full(columns, np.nan)

    @instruction
    async def setmaxnreg_dec(self, registers: int) -> None:
        """setmaxnreg.dec: keep only `registers` a thread, give the others back to the block."""
        await self._setmaxnreg(registers, "dec", registers <= self.max_registers)

    @instruction
    async def setmaxnreg_inc(self, registers: int) -> None:
        """setmaxnreg.inc: get `registers` a thread; blocks until others have given back enough."""
        await self._setmaxnreg(registers, "inc", registers >= self.max_registers)

    async def _setmaxnreg(self, registers: int, verb: str, right_way: bool) -> None:
        if not 24 <= registers <= 256 or registers % 8 or not right_way:
            message = f"setmaxnreg.{verb} {registers}, from {self.max_registers}"
            raise RegistersOverBudget(message, **self.where())
        await self.issue(f"setmaxnreg.{verb}", str(registers))
        pool, more = self.sm.registers, (registers - self.max_registers) * 128
        await self.wait_for("setmaxnreg.inc", pool, lambda: pool.free >= more, 0)
        self.max_registers = registers
        pool.take(more)

    # --- mbarriers and named barriers

    @instruction
    async def mbarrier_arrive(self, mbarrier: Mbarrier) -> None:
        """mbarrier.arrive (by one elected thread): tell the waiters all that this warpgroup knows to be over."""
        await self.issue("mbarrier.arrive", mbarrier.name)
        self._arrive(mbarrier, 0)

    @instruction
    async def mbarrier_arrive_expect_tx(self, mbarrier: Mbarrier, size: int) -> None:
        """mbarrier.arrive.expect_tx: arrive, and let this phase also wait for `size` bytes of TMA loads."""
        await self.issue("mbarrier.arrive.expect_tx", mbarrier.name)
        self._arrive(mbarrier, size)

    def _arrive(self, mbarrier: Mbarrier, size: int) -> None:
        where = self.where(mbarrier.name)
        try:
            mbarrier.arrive(self.name, self.known, tx=size, **where)
        except DoubleArrive as error:
            old_news = self.old_news()
            raise (WrongParity(f"{error.what}. {old_news}", **where) if old_news else error) from None

    @instruction
    async def mbarrier_wait(self, mbarrier: Mbarrier, parity: int) -> None:
        """mbarrier.try_wait.parity in a loop: until the phase with this parity, current or previous, is complete."""
        await self.finish_work()
        clocks = self.sm.timing.mbarrier_test if mbarrier.test_parity(parity) else None
        await self.issue("mbarrier.try_wait", mbarrier.name, clocks=clocks)
        seen = self.seen.get(mbarrier, -1)
        if mbarrier.phase - 1 > seen + 1:
            raise MissedPhase(
                f"phases up to {mbarrier.phase - 1} of mbarrier {mbarrier.name} are complete, and {self.name} has not "
                f"seen phase {seen + 1} (completed by {', '.join(sorted(mbarrier.users))})",
                **self.where(mbarrier.name),
            )
        await self.wait_for(
            mbarrier.name, mbarrier, lambda: mbarrier.test_parity(parity), self.sm.timing.mbarrier_latency
        )
        now_seen = mbarrier.phase - 1
        self.told_nothing.pop(mbarrier, None)  # so that the latest wait comes last
        self.told_nothing[mbarrier] = now_seen == seen and mbarrier in self.seen
        self.seen[mbarrier] = now_seen
        mbarrier.observed = max(mbarrier.observed, now_seen)
        self.learn(mbarrier.released)

    @instruction
    async def bar_arrive(self, id: int, threads: int) -> None:
        """bar.arrive: count as 128 of the `threads` of named barrier `id`, without waiting."""
        await self.issue("bar.arrive", str(id))
        self.sm.named_barrier(id).arrive(self.name, threads, self.known, **self.where(f"named barrier {id}"))

    @instruction
    async def bar_sync(self, id: int, threads: int) -> None:
        """bar.sync: count as 128 of the `threads` of named barrier `id` and wait until all have come."""
        await self.issue("bar.sync", str(id))
        barrier = self.sm.named_barrier(id)
        turn = barrier.times
        barrier.arrive(self.name, threads, self.known, **self.where(f"named barrier {id}"))
        latency = self.sm.timing.named_barrier_latency
        await self.wait_for(f"barrier {id}", barrier, lambda: barrier.times > turn, latency)
        self.learn(barrier.released)

    @instruction
    async def fence_proxy_async(self) -> None:
        """fence.proxy.async: let the async proxy (wgmma, TMA) see the ordinary stores known to this warpgroup."""
        await self.issue("fence.proxy.async")
        self.known |= {(access, "fenced") for access, _ in self.known if access.writes and access.generic}

    # --- wgmma

    @instruction
    async def wgmma_fence(self) -> None:
        """wgmma.fence: order accesses to registers before the wgmmas that follow."""
        await self.issue("wgmma.fence")
        self.fences += 1

    @instruction
    async def wgmma(
        self, D: Fragment, A: Fragment | Buffer, B: Buffer, *, scale_d: bool = True, trans_b: bool = False
    ) -> None:
        """The wgmma.mma_async instructions of one product D = A B (+ D if scale_d), issued and not waited for.

        D (64, N) float32 in registers; A (64, K) in registers or shared memory; B in shared memory, stored (N, K), or
        (K, N) with trans_b (16-bit types only). One k step of 16 (fp8: 32) is one PTX instruction; this does all.
        """
        operands = f"{getattr(A, 'name', 'registers')} {B.name}"
        flop = 2 * D.shape[0] * D.shape[1] * A.shape[1]
        await self.issue("wgmma", operands, source=getattr(A, "source", "registers"), amount=flop)
        self._check_wgmma(D, A, B, trans_b)
        registers = [D, A] if isinstance(A, Fragment) else [D]
        for fragment in registers:
            if fragment.touched >= self.fences:
                message = f"wgmma on {fragment}, touched since the last wgmma.fence"
                self.sm.broken(MissingWgmmaFence(message, **self.where(B.name)))
        group = self.open_wgmmas
        buffers = [B] if isinstance(A, Fragment) else [A, B]
        group.facts |= {(self.access(x, "wgmma", writes=False, generic=False), "over") for x in buffers}
        group.fragments += registers
        group.running += 1
        group.last = B.name
        for fragment in registers:
            fragment.in_flight = group
        a_registers = A._values.copy() if isinstance(A, Fragment) else None

        def complete() -> None:
            a = A.data if a_registers is None else a_registers
            multiply_accumulate(D._values, a, B.data if trans_b else B.data.T, scale_d)
            group.one_done()

        timing = self.sm.timing
        size = sum(x.bytes for x in buffers)
        self.sm.units["smem"].count(size)
        fp8 = timing.fp8_factor if DTYPE_BYTES[B.dtype] == 1 else 1
        as_flop = max(flop / fp8, size / timing.smem_bytes_per_clk * timing.tensor_flop_per_clk)
        start, end = self.sm.units["wgmma"].reserve(as_flop, self, f"wgmma {B.name}", self.iteration)
        # wgmmas of one warpgroup complete in order
        self.last_wgmma_end = max(self.last_wgmma_end, end + self.sm.luck.vary(timing.wgmma_latency))
        self.sm.at(self.last_wgmma_end, complete)
        # The tensor cores take a batch when they have started with the last instruction of the one before; until then
        # its issuer is held.
        unit, steps = self.sm.units["wgmma"], A.shape[1] * DTYPE_BYTES[B.dtype] / 32
        issue = timing.wgmma_issue if a_registers is None else timing.wgmma_issue_registers
        issued = self.sm.now
        taken = max(issued, start - unit.last_step)
        unit.last_step = (end - start) / steps
        await self.sleep_until(taken + issue * steps)
        self.span("issue", f"wgmma {operands}", issued, self.iteration)

    def _check_wgmma(self, D: Fragment, A: Fragment | Buffer, B: Buffer, trans_b: bool) -> None:
        k, n = B.shape if trans_b else B.shape[::-1]
        k_step = 32 // DTYPE_BYTES[B.dtype]
        fits = (*D.shape, k) == (64, n, A.shape[1])
        turned = f"; they would with trans_b={not trans_b}" if (*D.shape, n) == (64, k, A.shape[1]) else ""
        mistakes = {
            "D is not a float32 tile in this warpgroup's registers": D.dtype != "float32" or D.wg is not self,
            f"shapes do not match: D {D.shape}, A {A.shape}, B {n, k} as (N, K){turned}": not fits,
            f"N is {n}; allowed: multiples of 8 up to 256": n % 8 or n > 256,
            f"K is {k}; allowed: multiples of {k_step}": k % k_step,
            f"A is {A.dtype} and B {B.dtype}": A.dtype != B.dtype,
            "float32 operands": B.dtype == "float32",
            "fp8 operands must be stored with K contiguous: no trans_b": trans_b and DTYPE_BYTES[B.dtype] == 1,
        }
        for mistake, made in mistakes.items():
            if made:
                raise IllegalOperand(f"wgmma with B = {B.name}: {mistake}", **self.where(B.name))

    @instruction
    async def wgmma_commit_group(self) -> None:
        """wgmma.commit_group: make a group of the wgmmas since the last one."""
        await self.issue("wgmma.commit_group")
        self.open_wgmmas.committed = True
        self.wgmma_groups.append(self.open_wgmmas)
        self.open_wgmmas = Group()

    @instruction
    async def wgmma_wait_group(self, pending: int) -> None:
        """wgmma.wait_group: until at most the newest `pending` groups are in flight; the older ones' registers and
        buffers are free then."""
        await self.issue("wgmma.wait_group", str(pending))
        await self.wait_groups(self.wgmma_groups, pending, "wgmma")
