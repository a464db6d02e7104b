"""FP8: the schedule of chapter 9 on e4m3 numbers, with a producer that turns V round.

The schedule of fp8.cu, on the model of an SM. An fp8 wgmma wants its B operand with the summed dimension contiguous.
For S = Q K^T that is how K is stored; for O += P V it is not how V is. So V passes through shared memory twice: TMA
loads it as it is stored, (keys, d), into `V_rows`; the producer's warps read it, turn it round, and write it to `V`,
(d, keys), from where the consumers multiply. The consumers do not notice: they are those of chapter 9.

A warpgroup is one agent in the model. So one arrival at V_full stands for those of its 128 threads, and the barrier at
which its four warps meet before the next load may overwrite what they read does not exist. Nor does the order of the
keys, which fp8 fragments permute (layouts.py).
"""

from dataclasses import dataclass
from functools import partial

from fa_reference.hopper.attention import AttentionBlock
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.memory import Buffer
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.ring import Ring, Tiles, load_queries
from fa_reference.hopper.sm import SM, Role
from fa_reference.hopper.two_stage import consume
from fa_reference.hopper.warpgroup import Warpgroup

CONSUMERS = 2
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


@dataclass(frozen=True)
class Rows:
    """V as it is stored: a tile (block_k, d) for every slot, and the mbarrier at which TMA reports it."""

    tiles: list[Buffer]
    full: list[Mbarrier]


def kernel(sm: SM, block: AttentionBlock, stages: int = 2) -> dict[str, Role]:
    """Declare shared memory and return the roles. ValueError for other dtypes or less than two slots."""
    if block.dtype != "float8_e4m3fn" or stages < 2:
        raise ValueError(f"dtype {block.dtype}, stages {stages}; allowed: float8_e4m3fn, and at least 2 stages")
    d, slots = block.head_dim, range(stages)
    full, empty, rows_full = make_barriers(sm, stages, block.consumers)
    V = Ring(block.V, [sm.smem(f"V[{s}]", (d, block.block_k), block.dtype) for s in slots], full, empty)
    rows = Rows([sm.smem(f"V_rows[{s}]", (block.block_k, d), block.dtype) for s in slots], rows_full)
    tiles = Tiles(
        [sm.smem(f"Q[{w}]", (ROWS, d), block.dtype) for w in range(block.consumers)],
        sm.mbarrier("Q_full", 1),
        Ring.make(sm, block.K, block.block_k, stages, block.consumers),
        V,
    )
    outputs = [sm.smem(f"O[{w}]", (ROWS, d), block.O.dtype) for w in range(block.consumers)]

    async def consumer(wg: Warpgroup, w: int) -> None:
        await wg.setmaxnreg_inc(CONSUMER_REGISTERS)
        await consume(wg, block, tiles, outputs[w], w, trans_b=False)

    roles = {f"consumer {w}": partial(consumer, w=w) for w in range(block.consumers)}
    return {"producer": partial(producer, block=block, tiles=tiles, rows=rows)} | roles


def make_barriers(sm: SM, stages: int, consumers: int) -> tuple[list[Mbarrier], list[Mbarrier], list[Mbarrier]]:
    """(V_full, V_empty, V_rows_full), one of each for every slot. Who reads V_rows needs no barrier to release it."""
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "schedule.py: V_full: the producer arrives when V is turned round; V_empty: every consumer; "
        "V_rows_full: the producer, when it announces the bytes"
    )


async def turn_round(wg: Warpgroup, rows: Buffer, V: Buffer) -> None:
    """Write the transpose of `rows` (keys, d) to `V` (d, keys), such that a wgmma may read it after the next barrier.

    A tile in registers has 64 rows: `wg.load_shared_transposed(rows, c)` gives columns c .. c + 63 of `rows` as its
    rows; `wg.store_shared(V, tile, row)` writes it to rows row .. row + 63 of V.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "schedule.py: 64 columns after the other; then a fence: these are ordinary stores, and wgmma reads "
        "through the async proxy"
    )


async def producer(wg: Warpgroup, block: AttentionBlock, tiles: Tiles, rows: Rows) -> None:
    """The producer warpgroup: loads Q, K_j, and V_j into `rows`; turns V_j round into its slot of tiles.V.

    `await tiles.K.load(wg, j)` waits for the slot and loads K_j. tiles.V has tiles, full and empty, but no load of its
    own; `tiles.V.position(j)` is (slot, parity of the round) of V_j.
    """
    await wg.setmaxnreg_dec(PRODUCER_REGISTERS)
    await load_queries(wg, block, tiles.Q, tiles.Q_full)
    V = tiles.V
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "schedule.py: one iteration more than there are blocks. In iteration j load V_j into its slot of "
        "`rows` (read by this warpgroup itself some iterations ago) and K_j, as long as there are such "
        "blocks; then turn V_(j-1) round: wait until its rows are there, and until the consumers have "
        "released its slot; arrive at `full` when it is done"
    )
