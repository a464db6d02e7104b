"""Graded checks of chapter 6, tma_engine.cuh: each wrapper is the instruction that it should be."""

import re

from fa_reference.grading import CheckFailed, check, engines
from fa_reference.grading.answer import Answer

FILE = "tma_engine.cuh"
COURSE = ("hopper/mbarrier.cuh", "hopper/tma.cuh")


def same(answer: Answer, *bodies: str) -> None:
    for body in bodies:
        engines.wrapper(answer, FILE, COURSE, body)


@check("mbarrier_init and its fence", points=1, compiled=True)
def test_init(answer: Answer) -> None:
    same(answer, "mbarrier_init(&barrier, 3);", "mbarrier_init(&barrier, 1); mbarrier_init_fence();")


@check("mbarrier_arrive_expect_tx", points=1, compiled=True)
def test_expect(answer: Answer) -> None:
    same(answer, "mbarrier_arrive_expect_tx(&barrier, 24576);")


@check("mbarrier_try_wait", points=1, compiled=True)
def test_wait(answer: Answer) -> None:
    same(answer, "out[0] = mbarrier_try_wait(&barrier, 1) ? 2.0f : 5.0f;")


@check("tma_load_5d", points=1, compiled=True)
def test_load(answer: Answer) -> None:
    same(answer, "if (threadIdx.x == 0) tma_load_5d(tile, &map, &barrier, 10, 11, 12, 13, 14);")


@check("the fence stands in mbarrier_init_fence", points=1)
def test_fence(answer: Answer) -> None:
    """It leaves no instruction behind on Hopper, so only the source can tell."""
    engines.wrappers_written(answer, FILE, "mbarrier_init_fence")
    text = re.sub(r"//.*", "", (answer.folder / FILE).read_text(encoding="utf-8", errors="replace"))
    body = re.search(r"\bmbarrier_init_fence\s*\(\s*\)\s*\{.*?^\}", text, re.M | re.S)
    if not body or not re.search(r"fence\.(mbarrier_init\.release\.cluster|proxy\.async)", body[0]):
        raise CheckFailed(
            f"{FILE}: mbarrier_init_fence holds no fence.mbarrier_init.release.cluster. Without it TMA may find a "
            "barrier that is not there yet, now and then"
        )
