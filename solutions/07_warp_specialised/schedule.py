"""Warp specialisation (Algorithm 1 of the FlashAttention-3 paper): a producer warpgroup loads, consumers compute.

The schedule of warp_specialised.cu, on the model of an SM. Tiles of K and V pass through two rings of `stages` slots.
A slot has two mbarriers: `full`, whose phase completes when its tile is there, and `empty`, whose phase completes when
every consumer has read it. Nobody else is waited for: the producer runs ahead as far as there are free slots.
"""

from dataclasses import dataclass
from functools import partial

from fa_reference.hopper.attention import AttentionBlock, OnlineSoftmax
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.given import CONSUMER_REGISTERS, PRODUCER_REGISTERS, epilogue  # registers: 24 and 240
from fa_reference.hopper.memory import Buffer
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.sm import SM, Role
from fa_reference.hopper.warpgroup import Warpgroup

CONSUMERS = 2


@dataclass(frozen=True)
class Barriers:
    """The mbarriers of a block; those of the rings have one for every slot."""

    Q_full: Mbarrier
    K_full: list[Mbarrier]
    K_empty: list[Mbarrier]
    V_full: list[Mbarrier]
    V_empty: list[Mbarrier]


@dataclass(frozen=True)
class Shared:
    """Shared memory of a block: a tile of Q (64, d) for every consumer, slots of K and of V (block_k, d), mbarriers."""

    Q: list[Buffer]
    K: list[Buffer]
    V: list[Buffer]
    at: Barriers


def kernel(sm: SM, block: AttentionBlock, stages: int = 2) -> dict[str, Role]:
    """Declare shared memory and return the roles: a producer, and consumers with 64 queries each."""
    slots = range(stages)
    shared = Shared(
        [sm.smem(f"Q[{w}]", (ROWS, block.head_dim), block.dtype) for w in range(block.consumers)],
        [sm.smem(f"K[{s}]", (block.block_k, block.head_dim), block.dtype) for s in slots],
        [sm.smem(f"V[{s}]", (block.block_k, block.head_dim), block.dtype) for s in slots],
        make_barriers(sm, stages, block.consumers),
    )
    roles = {f"consumer {w}": partial(consumer, block=block, shared=shared, w=w) for w in range(block.consumers)}
    return {"producer": partial(producer, block=block, shared=shared)} | roles


def make_barriers(sm: SM, stages: int, consumers: int) -> Barriers:
    """The barriers, each with the number of arrivals that completes a phase: sm.mbarrier("K_full[0]", count)."""
    # BEGIN SOLUTION: who arrives at each? At `full` the producer, when it announces the bytes; at `empty` every
    #: consumer
    slots = range(stages)
    return Barriers(
        sm.mbarrier("Q_full", 1),
        [sm.mbarrier(f"K_full[{s}]", 1) for s in slots],
        [sm.mbarrier(f"K_empty[{s}]", consumers) for s in slots],
        [sm.mbarrier(f"V_full[{s}]", 1) for s in slots],
        [sm.mbarrier(f"V_empty[{s}]", consumers) for s in slots],
    )
    # END SOLUTION


def position(j: int, stages: int) -> tuple[int, int]:
    """(slot, parity) of tile j: tiles go to slots 0, 1, ..., stages - 1, 0, ...; the first round has parity 0.

    The tile that fills a slot for the n-th time (n = 0, 1, ...) completes phase n of its `full` barrier, and its
    release completes phase n of `empty`; the parity of phase n is n % 2.
    """
    # BEGIN SOLUTION: the slot repeats every `stages` tiles; the parity flips with every round through the ring
    return j % stages, j // stages % 2
    # END SOLUTION


async def producer(wg: Warpgroup, block: AttentionBlock, shared: Shared) -> None:
    """The producer warpgroup: all tiles of Q once, then K_j and V_j for every key block j, as slots become free."""
    at, stages = shared.at, len(shared.K)
    # BEGIN SOLUTION: give registers back (setmaxnreg_dec). Load all Q tiles on one phase of Q_full, with the bytes of
    #: all of them. For every block, first for K and then for V: wait until the slot is empty (the release of the
    #: round before; in the first round nobody needs to be waited for), announce the bytes, issue the load
    await wg.setmaxnreg_dec(PRODUCER_REGISTERS[block.consumers])
    await wg.mbarrier_arrive_expect_tx(at.Q_full, sum(Q.bytes for Q in shared.Q))
    for w, Q in enumerate(shared.Q):
        await wg.tma_load(Q, block.Q, block.row + ROWS * w, at.Q_full)
    for j in wg.loop(range(block.key_blocks)):
        slot, parity = position(j, stages)
        await wg.mbarrier_wait(at.K_empty[slot], parity ^ 1)
        await wg.mbarrier_arrive_expect_tx(at.K_full[slot], shared.K[slot].bytes)
        await wg.tma_load(shared.K[slot], block.K, j * block.block_k, at.K_full[slot])
        await wg.mbarrier_wait(at.V_empty[slot], parity ^ 1)
        await wg.mbarrier_arrive_expect_tx(at.V_full[slot], shared.V[slot].bytes)
        await wg.tma_load(shared.V[slot], block.V, j * block.block_k, at.V_full[slot])
    # END SOLUTION


async def consumer(wg: Warpgroup, block: AttentionBlock, shared: Shared, w: int) -> None:
    """Consumer w: attention of its 64 queries, from the tiles that the producer loads."""
    at, stages = shared.at, len(shared.K)
    O, softmax = wg.full(block.head_dim, 0.0), OnlineSoftmax(wg, block.scale, block.dtype)
    # BEGIN SOLUTION: take registers (setmaxnreg_inc), wait for Q. For every block: wait for K, S = Q K^T, release K's
    #: slot when the product is over; mask (block.mask(S, w, j)), softmax, rescale O; wait for V, O += P V, release
    #: V's slot
    await wg.setmaxnreg_inc(CONSUMER_REGISTERS[block.consumers])
    await wg.mbarrier_wait(at.Q_full, 0)
    for j in wg.loop(range(block.key_blocks)):
        slot, parity = position(j, stages)
        S = wg.accumulator(block.block_k)
        await wg.mbarrier_wait(at.K_full[slot], parity)
        await wg.wgmma_fence()
        await wg.wgmma(S, shared.Q[w], shared.K[slot], scale_d=False)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        await wg.mbarrier_arrive(at.K_empty[slot])

        P, rescale = softmax.step(block.mask(S, w, j))
        O *= rescale

        await wg.mbarrier_wait(at.V_full[slot], parity)
        await wg.wgmma_fence()
        await wg.wgmma(O, P, shared.V[slot], trans_b=True)
        await wg.wgmma_commit_group()
        await wg.wgmma_wait_group(0)
        await wg.mbarrier_arrive(at.V_empty[slot])
    # END SOLUTION
    await epilogue(wg, w, block, shared.Q[w], O, softmax)
