"""The accounting: bytes are exact, SRAM is enforced, HBM cannot be computed on."""

import pytest
import torch

from fa_reference.memory import Memory, OffChipAccess, SramOverflow, Tile


@pytest.fixture
def memory():
    return Memory(sram_bytes=4096)


def test_loads_and_stores_are_counted_by_name(memory):
    data = torch.randn(32, 8)
    X, Y = memory.hbm("X", data), memory.hbm("Y", torch.zeros(32, 8, dtype=torch.float16))
    tile = memory.load(X, slice(0, 16))
    tile = memory.load(X, slice(16, 32))
    memory.store(Y, slice(0, 16), tile)
    assert memory.loaded == {"X": 2 * 16 * 8 * 4} and memory.stored == {"Y": 16 * 8 * 2}
    assert memory.traffic_bytes == 2 * 16 * 8 * 4 + 16 * 8 * 2
    assert memory.log == [("load", "X", 0, 16), ("load", "X", 16, 32), ("store", "Y", 0, 16)]


def test_a_store_writes_through_and_a_load_copies(memory):
    data = torch.zeros(4, 2)
    X = memory.hbm("X", data)
    tile = memory.load(X, slice(0, 2))
    tile += 5
    assert (data == 0).all()
    memory.store(X, slice(2, 4), tile)
    assert data.tolist() == [[0, 0], [0, 0], [5, 5], [5, 5]]


def test_everything_computed_from_tiles_is_on_chip_until_it_is_dropped(memory):
    a = memory.zeros((8, 8))
    b = torch.exp(a) + 1
    assert isinstance(b, Tile) and memory.sram_in_use == 2 * 256
    view = b.T[:4]
    assert memory.sram_in_use == 2 * 256, "views are free"
    del b
    assert memory.sram_in_use == 2 * 256, "a view keeps its tile alive"
    del view, a
    assert memory.sram_in_use == 0
    assert memory.peak_sram_bytes == 3 * 256


def test_several_results_and_reductions_are_tiles(memory):
    values, indices = memory.zeros((8, 8)).max(dim=-1)
    assert isinstance(values, Tile) and isinstance(indices, Tile)
    stacked = torch.cat([values, values])
    assert isinstance(stacked, Tile)


def test_in_place_arithmetic_costs_nothing_new(memory):
    a = memory.zeros((8, 8))
    a *= 2
    a += 1
    assert memory.peak_sram_bytes == 256


def test_overflow_is_refused_and_names_the_tiles(memory):
    a = memory.zeros((16, 32))
    with pytest.raises(SramOverflow, match=r"6144 bytes alive in SRAM, which holds 4096.*\(16, 32\)"):
        a @ torch.ones(32, 64)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda X: X + 1,
        lambda X: 2 * X,
        lambda X: X @ X,
        lambda X: torch.exp(X),
        lambda X: torch.ones(2, 2) @ X,
        lambda X: X[0],
        lambda X: X.__setitem__(0, 1.0),
    ],
)
def test_hbm_cannot_be_computed_on(memory, misuse):
    with pytest.raises(OffChipAccess, match="X"):
        misuse(memory.hbm("X", torch.zeros(4, 4)))


def test_rows_and_shapes_are_checked(memory):
    X = memory.hbm("X", torch.zeros(10, 4))
    with pytest.raises(IndexError, match="rows 8:16 of X, which has 10 rows"):
        memory.load(X, slice(8, 16))
    with pytest.raises(ValueError, match=r"store to X\[0:2\] needs shape \(2, 4\), got \(3, 4\)"):
        memory.store(X, slice(0, 2), memory.zeros((3, 4)))
    with pytest.raises(TypeError, match="slice"):
        memory.load(X, 3)
    with pytest.raises(TypeError, match="HBM"):
        memory.load(torch.zeros(3), slice(0, 1))
