"""Graded checks of chapter 6, tma_tile.cu: load tiles, find every element, parity after parity."""

import torch
from torch import Tensor

from fa_reference.grading import CheckFailed, check, cuda, engines, properties
from fa_reference.grading.answer import Answer

TILE = engines.Tile("tma_tile", ("tma_engine.cuh", "tma_tile.cu"))
ROWS = 64


def offset(row: int, column: int) -> int:
    plain = column // 64 * ROWS * 128 + row * 128 + column % 64 * 2
    return plain ^ (plain // 128 % 8 * 16)


def copied(answer: Answer, *tensors: Tensor, runs: int = 1) -> None:
    """Copy each tensor `runs` times; CheckFailed naming the first element that is wrong, and where it comes from."""
    TILE.require_written(answer)
    results = engines.on_gpu(answer, "copy_tiles", [(x,) for x in tensors], runs)
    for number, got in enumerate(results):
        same(got, tensors[number // runs], f"run {number + 1}: " if runs > 1 else "")


def same(got: object, x: Tensor, run: str) -> None:
    """CheckFailed unless `got` is x with zeros behind its last row."""
    batch, heads, length, head_dim = x.shape
    tiles = -(-length // ROWS)
    right = torch.zeros(batch, heads, tiles * ROWS, head_dim, dtype=x.dtype)
    right[:, :, :length] = x
    if not isinstance(got, Tensor) or got.shape != right.shape:
        raise CheckFailed(f"copy_tiles must return {tuple(right.shape)}: engines.py is given, restore it")
    wrong = got.view(torch.int16) != right.view(torch.int16)
    if not wrong.any():
        return
    b, h, row, column = wrong.nonzero()[0].tolist()
    value, tile = got[b, h, row, column].view(torch.int16), row // ROWS
    equal = right[b, h].view(torch.int16).unflatten(0, (-1, ROWS)) == value
    earlier = [n for n in range(tile) if equal[n, row % ROWS, column]]
    places = equal[tile].nonzero().tolist()
    if got[b, h, row, column].isnan():
        words = "is NaN: it was never written"
    elif earlier:
        words = f"is still that of tile {earlier[-1]}: is the parity of tile n equal to n % 2?"
    elif places:
        words = f"holds the element of row {places[0][0]}, column {places[0][1]} of its tile: is that tile_offset?"
    else:
        words = "holds nothing of its tile: are the coordinates of the load right?"
    where = f"batch {b}, head {h}, row {row}, column {column} of {tuple(x.shape)}"
    raise CheckFailed(f"{run}{where} {words} ({int(wrong.sum())} elements are wrong)")


def numbered(batch: int, heads: int, length: int, head_dim: int, layout: str = "bhnd") -> Tensor:
    """A tensor in which no number occurs twice in a tile: all are finite in bf16, in random order."""
    generator = torch.Generator().manual_seed(properties.fresh_seed())
    tiles = [torch.randperm(32000, generator=generator)[: ROWS * head_dim] + 1 for _ in range(-(-length // ROWS))]
    rows = torch.stack(tiles).view(1, 1, -1, head_dim)[:, :, :length]
    # Other heads hold the same numbers, moved on.
    moved = torch.arange(batch * heads).view(batch, heads, 1, 1) * 37
    x = ((rows + moved) % 32000 + 1).to(torch.int16).view(torch.bfloat16)
    if layout == "bnhd":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        padded = torch.full((batch, heads, length + 3, head_dim + 8), torch.nan, dtype=x.dtype)
        padded[:, :, :length, :head_dim] = x
        x = padded[:, :, :length, :head_dim]
    return x


@check("compiles", points=0, compiled=True)
def test_compiles(answer: Answer) -> None:
    for head_dim in (64, 128):
        TILE.build(answer, head_dim)


@check("tile_offset in C++: every chunk of a tile", points=1)
def test_offset(answer: Answer) -> None:
    for head_dim in (64, 128):
        places = [(row, column) for row in range(ROWS) for column in range(0, head_dim, 8)]
        places += [(row, column) for row in (0, 5, 63) for column in range(head_dim)]
        TILE.computes(answer, head_dim, {f"tile_offset({r}, {c})": offset(r, c) for r, c in places})


@check("TMA, and a barrier that counts bytes", points=1, compiled=True)
def test_instructions(answer: Answer) -> None:
    code = TILE.build(answer)
    wanted = {
        "UTMALDG.5D": "TMA load",
        "SYNCS.EXCH": "mbarrier.init",
        "SYNCS.ARRIVE": "mbarrier.arrive.expect_tx",
        "SYNCS.PHASECHK": "mbarrier.try_wait",
        "BAR": "__syncthreads",
    }
    cuda.has_instructions(code, wanted)
    if code.count("BAR") < 2:
        raise CheckFailed(
            f"{TILE.file} has one __syncthreads: one is needed after the barrier's initialisation, one in the loop, "
            "so that the next tile does not overwrite what a slower thread still reads"
        )
    cuda.within_budget(code, TILE.reference(), threads=128)


@check("one tile on the GPU", points=2, needs="hopper")
def test_one(answer: Answer) -> None:
    copied(answer, *(numbered(1, 1, ROWS, head_dim) for head_dim in (64, 128)))


@check("many tiles through one slot", points=1, needs="hopper")
def test_many(answer: Answer) -> None:
    copied(answer, *(numbered(2, 3, tiles * ROWS, 128) for tiles in (2, 3, 40)))


@check("rows past the end are zeros; strides and NaN around the tensor", points=1, needs="hopper")
def test_ragged(answer: Answer) -> None:
    cases = ((1, "bhnd"), (65, "bnhd"), (127, "padded"), (200, "padded"))
    copied(answer, *(numbered(2, 3, length, d, layout) for length, layout in cases for d in (64, 128)))


@check("the same bits in 20 runs", points=1, needs="hopper")
def test_deterministic(answer: Answer) -> None:
    copied(answer, numbered(4, 16, 1000, 128), runs=20)
