"""Graded checks of chapter 6, wgmma_engine.cuh: each wrapper is the instruction that it should be."""

from fa_reference.grading import check, engines
from fa_reference.grading.answer import Answer

FILE = "wgmma_engine.cuh"
COURSE = ("hopper/wgmma.cuh",)
# The course's product for every size, under the name of the learner's.
ALIAS = """
__device__ __forceinline__ void wgmma_64x64(float (&d)[32], u64 a, u64 b, int accumulate) {
    Wgmma<64, true>::ss(d, a, b, accumulate);
}
"""
A, B = "0x4000004000010020ull", "0x4000004000010440ull"
LOAD = "float d[32]; for (int i = 0; i < 32; ++i) d[i] = out[i * 128 + threadIdx.x];"
STORE = "for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = d[i];"


def same(answer: Answer, call: str, before: str, after: str, around: bool = True) -> None:
    body = f"{LOAD} {before} {after} {STORE}"
    engines.wrapper(answer, FILE, COURSE, body, call=call, alias=ALIAS, around=around)


@check("wgmma_descriptor: every field in its bits, in C++", points=1)
def test_descriptor(answer: Answer) -> None:
    cases = [(0, 0, 0), (0x8400, 16, 1024), (0x3C800, 22528, 1024), (0x42400, 0x3FFF0, 0x3FFF0)]
    engines.header_computes(
        answer,
        FILE,
        {
            f"wgmma_descriptor({address:#x}u, {leading}, {stride})": (address & 0x3FFFF) >> 4
            | leading // 16 << 16
            | stride // 16 << 32
            | 1 << 62
            for address, leading, stride in cases
        },
    )


@check("wgmma_fence, wgmma_commit and wgmma_wait", points=1, compiled=True)
def test_around(answer: Answer) -> None:
    product = f"Wgmma<64, true>::ss(d, {A}, {B}, 1);"
    call = "wgmma_fence(), a product, wgmma_commit(), wgmma_wait<0>()"
    same(answer, call, f"wgmma_fence(); {product}", "wgmma_commit(); wgmma_wait<0>();")
    call = "two groups, wgmma_wait<1>(), wgmma_wait<0>()"
    two = f"wgmma_fence(); {product} wgmma_commit(); {product} wgmma_commit();"
    same(answer, call, two, "wgmma_wait<1>(); out[0] = 1.0f; wgmma_wait<0>();")


@check("wgmma_64x64", points=2, compiled=True)
def test_product(answer: Answer) -> None:
    for accumulate in ("1", "0", "blockIdx.x"):
        call = f"wgmma_64x64(d, a, b, {accumulate})"
        product = f"wgmma_64x64(d, {A}, {B}, {accumulate});"
        # A number that is known only at run time may become a predicate in more than one way.
        around = accumulate in "01"
        same(answer, call, f"wgmma_fence(); {product}", "wgmma_commit(); wgmma_wait<0>();", around)
