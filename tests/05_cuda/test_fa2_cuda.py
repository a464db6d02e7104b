"""Graded checks of chapter 5, fa2_cuda.py: how many threads and how much memory a launch asks for."""

from fa_reference.grading import CheckFailed, check
from fa_reference.grading.answer import Answer
from fa_reference.grading.wire import Record

FILE = "fa2_cuda.py"


def step(block_q: int, block_k: int, warps: int | None, stages: int) -> Record:
    """A Step for the learner's functions, made in the child from these fields."""
    fields = {"file": "x.cu", "block_q": block_q, "block_k": {64: block_k, 128: block_k}, "warps": warps}
    return Record("Step", {**fields, "stages": stages, "vector_loads": True, "defines": ()})


SCALAR, TILES = step(128, 1, None, 0), step(64, 16, None, 1)
WARPS, FA2 = step(64, 64, 4, 1), step(128, 48, 4, 2)


def equal(value: object, right: object, call: str) -> None:
    if value != right:
        raise CheckFailed(f"{call} must be {right}; it is {value!r}")


@check("the grid covers every row of every head, and no more", points=1)
def test_grid(answer: Answer) -> None:
    for block_q, length, blocks in ((64, 64, 1), (64, 65, 2), (128, 1000, 8), (128, 1, 1), (32, 96, 3)):
        value = answer.call(FILE, "grid", step(block_q, 16, 4, 1), 3, 5, length)
        equal(value, (5, 3, blocks), f"grid of {block_q} rows a block for 3 batches, 5 heads, {length} rows")


@check("threads of a block", points=1)
def test_threads(answer: Answer) -> None:
    for which, right in ((SCALAR, 128), (TILES, 64), (WARPS, 128), (step(256, 64, 8, 2), 256)):
        words = f"block_q {which.block_q}, warps {which.warps}"
        equal(answer.call(FILE, "threads", which), right, f"threads of a step with {words}")


@check("bytes of shared memory", points=1)
def test_shared_bytes(answer: Answer) -> None:
    for name, which, d, right in (
        ("scalar", SCALAR, 64, 0),
        ("tiles", TILES, 64, 24832),
        ("tiles", TILES, 128, 49408),
        ("tensor_cores", WARPS, 64, 24576),
        ("fa2", FA2, 64, 40960),
        ("fa2", FA2, 128, 81920),
    ):
        words = f"{which.block_q} rows of Q, {which.stages} x {which.block_k[d]} keys"
        equal(answer.call(FILE, "shared_bytes", which, d), right, f"shared_bytes for {name} ({words}), head_dim {d}")
