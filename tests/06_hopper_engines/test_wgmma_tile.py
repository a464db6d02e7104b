"""Graded checks of chapter 6, wgmma_tile.cu: descriptors, fragments, one tile of each product."""

import torch
from torch import Tensor

from fa_reference.grading import CheckFailed, check, cuda, engines, properties
from fa_reference.grading.answer import Answer

TILE = engines.Tile("wgmma_tile", ("tma_engine.cuh", "wgmma_engine.cuh", "wgmma_tile.cu"))
ROWS = 64


def descriptor(address: int, leading: int) -> int:
    return address // 16 | leading // 16 << 16 | 1024 // 16 << 32 | 1 << 62


def small(*shape: int) -> Tensor:
    """Random whole numbers -1, 0, 1, 2: every product and sum of them is exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(properties.fresh_seed())
    return torch.randint(-1, 3, shape, generator=generator).bfloat16()


def multiplied(answer: Answer, *problems: tuple[Tensor, Tensor, Tensor], runs: int = 1) -> None:
    """Multiply each (q, k, v) `runs` times; CheckFailed for the first wrong element."""
    TILE.require_written(answer)
    results = engines.on_gpu(answer, "multiply_tiles", problems, runs)
    for number, value in enumerate(results):
        q, k, v = problems[number // runs]
        exact(value, q, k, v, f"d {q.shape[3]}" + (f", run {number % runs + 1}" if runs > 1 else ""))


def exact(value: object, q: Tensor, k: Tensor, v: Tensor, what: str) -> None:
    """CheckFailed naming the first wrong element of S or of O, and a likely reason."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise CheckFailed("multiply_tiles must return (S, O): engines.py is given, restore it by make reset CHAPTER=6")
    s, o = value
    right_s = q.double() @ k.double().transpose(2, 3)
    right_o = right_s.bfloat16().double() @ v.double()
    for name, got, right, hints in (("S", s, right_s, S_HINTS), ("O", o, right_o, O_HINTS)):
        wrong = got.double() != right
        if wrong.any():
            b, h, row, column = wrong.nonzero()[0].tolist()
            words = next((words for words, test in hints.items() if test(got, q, k, v, s)), "")
            raise CheckFailed(
                f"{what}: {name}[{row}, {column}] of head {h} is {float(got[b, h, row, column]):g}, not "
                f"{float(right[b, h, row, column]):g} ({int(wrong.sum())} of {wrong.numel()} elements are wrong)"
                + (f": {words}" if words else "")
            )


def _is(got: Tensor, what: Tensor) -> bool:
    return bool(torch.equal(got.double(), what.double()))


def _part(q: Tensor, k: Tensor, columns: slice) -> Tensor:
    return q[..., columns].double() @ k[..., columns].double().transpose(2, 3)


# Likely reasons, tried in order.
S_HINTS = {
    "not written: does store() write every register?": lambda got, q, k, v, s: bool(got.isnan().any()),
    "it is the product of the last 16 columns alone: only the first step may overwrite": lambda got, q, k, v, s: _is(
        got, _part(q, k, slice(-16, None))
    ),
    "it is the product of the first 16 columns, over and over: the descriptors do not move with the step": (
        lambda got, q, k, v, s: _is(got, _part(q, k, slice(0, 16)) * (q.shape[3] // 16))
    ),
    "the first 64 columns are right alone: after four steps comes the next block of 64 columns": (
        lambda got, q, k, v, s: q.shape[3] > 64 and _is(got, 2 * _part(q, k, slice(0, 64)))
    ),
    "it is the transpose": lambda got, q, k, v, s: _is(got, _part(q, k, slice(None)).transpose(2, 3)),
}
O_HINTS = {
    "not written: does store() write every register?": lambda got, q, k, v, s: bool(got.isnan().any()),
    "it is P times the first 16 keys' V, in every step: the descriptor does not move": lambda got, q, k, v, s: _is(
        got, s.bfloat16().double().unflatten(3, (-1, 16)).sum(3) @ v[:, :, :16].double()
    ),
    "columns 64 and up are wrong: the leading byte offset is the distance to the next 64 columns": (
        lambda got, q, k, v, s: q.shape[3] > 64 and _is(got[..., :64], s.bfloat16().double() @ v[..., :64].double())
    ),
}


@check("compiles", points=0, compiled=True)
def test_compiles(answer: Answer) -> None:
    for head_dim in (64, 128):
        TILE.build(answer, head_dim)


@check("descriptors in C++: every step", points=1)
def test_descriptors(answer: Answer) -> None:
    for head_dim in (64, 128):
        values = {}
        for address in (0x400, 0x8C00):
            for step in range(head_dim // 16):
                start = address + step // 4 * ROWS * 128 + step % 4 * 32
                # The leading offset of a K-major operand is not used: any value is right.
                values[f"(k_major_descriptor({address:#x}u, {step}) & ~0x3fff0000ull)"] = descriptor(start, 0)
            for step in range(ROWS // 16):
                right = descriptor(address + step * 2048, ROWS * 128)
                call, mask = f"mn_major_descriptor({address:#x}u, {step})", "" if head_dim > 64 else " & ~0x3fff0000ull"
                values[f"({call}{mask})"] = right if head_dim > 64 else right & ~0x3FFF0000
        TILE.computes(answer, head_dim, values)


@check("both products on wgmma, nothing serialised, registers within the budget", points=2, compiled=True)
def test_instructions(answer: Answer) -> None:
    for head_dim in (64, 128):
        code, right = TILE.build(answer, head_dim), TILE.reference(head_dim)
        if code.notes:
            words = "\n".join(f"{note.code}: {note.explanation}" for note in code.notes)
            raise CheckFailed(f"the compiler says about {TILE.file} (head_dim {head_dim}):\n{words}")
        wanted = {"HGMMA": "wgmma", "WARPGROUP.ARRIVE": "wgmma.fence", "WARPGROUP.DEPBAR": "wgmma.wait_group"}
        cuda.has_instructions(code, wanted)
        steps = f"{head_dim // 16} steps of Q K^T and {ROWS // 16} of P V"
        if code.count("HGMMA") != right.count("HGMMA"):
            raise CheckFailed(f"{code.count('HGMMA')} wgmma instead of {right.count('HGMMA')}: {steps}, unrolled")
        if (rounded := code.count("F2FP")) != right.count("F2FP"):
            raise CheckFailed(
                f"P is rounded by {rounded} instructions instead of {right.count('F2FP')}: two a register"
            )
        cuda.within_budget(code, right, threads=128)


@check("S = Q K^T and O = P V on the GPU, one head", points=3, needs="hopper")
def test_one(answer: Answer) -> None:
    multiplied(answer, *(tuple(small(1, 1, ROWS, head_dim) for _ in range(3)) for head_dim in (64, 128)))


@check("many heads, any strides, 20 runs", points=1, needs="hopper")
def test_many(answer: Answer) -> None:
    multiplied(answer, tuple(small(2, ROWS, 5, 128).transpose(1, 2) for _ in range(3)), runs=20)
