"""Grading Hopper kernels: what is read from machine code, what a deadlock says, and how a report tells ways of grading.

Synthetic machine code stands for kernels here; tests/course/mutants/ has real ones.
"""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fa_reference.course import chapter
from fa_reference.grading import CheckFailed, hopper
from fa_reference.grading.cuda import Built
from fa_reference.grading.report import COMPILED, FAILED, NOT_GRADED, PASSED, Outcome, Report
from fa_reference.grading.runner import Selection
from fa_reference.kernels import KernelDeadlock, LoadedKernel
from fa_reference.kernels.build_log import Resources

PRODUCER = ["USETMAXREG.DEALLOC.CTAPOOL 0x18", "SYNCS.ARRIVE.TRANS64 RZ, [UR9], R0", "UTMALDG.5D [UR8], [UR6]", "EXIT"]
CONSUMERS = [
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
    "BAR.SYNC.DEFER_BLOCKING R2, 0x100",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
    "HGMMA.64x128x16.F32.BF16 R88, R24, gdesc[UR8].tnspB, R88",
    "BAR.ARV R6, 0x100",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "MUFU.EX2 R24, R24",
    "@P0 MUFU.EX2 R25, R25",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "EXIT",
]
SYNCTHREADS = "BAR.SYNC.DEFER_BLOCKING 0x0"


def built(*lines: str, registers: int = 168) -> Built:
    return Built("k.cu", Resources(registers, 0, 0, 0, 0, 0), lines)


GOOD = built(*CONSUMERS, *PRODUCER)


def test_a_kernel_with_everything_passes():
    hopper.registers_add_up(GOOD, 384)
    hopper.specialised(GOOD)
    hopper.turns(GOOD, 1, 1)
    hopper.overlaps(GOOD, 2)
    hopper.specialised(built(SYNCTHREADS, *PRODUCER, *CONSUMERS))
    hopper.specialised(built(*PRODUCER, SYNCTHREADS, *CONSUMERS, SYNCTHREADS))  # both come


@pytest.mark.parametrize(
    ("lines", "check", "words"),
    [
        ([*CONSUMERS, PRODUCER[2], *PRODUCER], hopper.specialised, "1 TMA loads stand in the consumers' part"),
        ([*CONSUMERS, *PRODUCER, CONSUMERS[2]], hopper.specialised, "1 wgmma stand in the producer's part"),
        ([*CONSUMERS, PRODUCER[0]], hopper.specialised, "no TMA load"),
        ([CONSUMERS[0], *PRODUCER], hopper.specialised, "no wgmma"),
        ([*CONSUMERS, SYNCTHREADS, *PRODUCER], hopper.specialised, "__syncthreads stands in the consumers' part"),
        ([*CONSUMERS, *PRODUCER, SYNCTHREADS], hopper.specialised, "__syncthreads stands in the producer's part"),
        (CONSUMERS, hopper.specialised, "1 setmaxnreg instructions"),
        ([*CONSUMERS[:1], *CONSUMERS[2:], *PRODUCER], lambda b: hopper.turns(b, 1, 1), "named_barrier_sync"),
        ([*CONSUMERS[:4], *CONSUMERS[5:], *PRODUCER], lambda b: hopper.turns(b, 1, 1), "named_barrier_arrive"),
        ([*CONSUMERS, *PRODUCER], lambda b: hopper.overlaps(b, 3), "only 2 of 3 exponentials"),
        ([*CONSUMERS[:5], *CONSUMERS[6:], *PRODUCER], lambda b: hopper.overlaps(b, 2), "never waits for S alone"),
        ([*CONSUMERS, *PRODUCER], lambda b: hopper.registers_add_up(b, 512), "waits for ever"),
        ([*CONSUMERS], lambda b: hopper.registers_add_up(b, 384), "one warpgroup keeps 168"),
        ([*PRODUCER], lambda b: hopper.products_of(b, GOOD), "0 wgmma in k.cu, 2 in the solution"),
    ],
)
def test_what_is_missing_is_named(lines, check, words):
    with pytest.raises(CheckFailed, match=words.replace("(", r"\(")):
        check(built(*lines))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            (1, 7, 129, 1, 0, 2),
            "block 7, warpgroup 1, warp 0, lane 1 waited for barrier k_full .* parity 0 .iteration 2",
        ),
        (
            (1, 0, 256, 257, 0, 0),
            "warpgroup 2, .* waited at named barrier 1 for its opening number 1, and too few threads",
        ),
        ((1, 0, 256, 514, 256, 128), "named barrier 2 with a count of 128 threads, others with 256"),
    ],
)
def test_a_deadlock_says_who_waits_for_what(record, words):
    kernel = LoadedKernel.__new__(LoadedKernel)
    kernel.name = "attention"
    kernel.read_global = lambda name, count: list(record) if name == "fa_deadlock_record" else [0] * count
    with pytest.raises(KernelDeadlock, match=words):
        kernel.check_deadlock(("q_full", "k_full"))
    kernel.read_global = lambda name, count: [0] * count
    kernel.check_deadlock(("q_full", "k_full"))


def test_a_deadlock_says_where_the_others_stood():
    kernel = LoadedKernel.__new__(LoadedKernel)
    kernel.name = "attention"
    first = [2, 3, 128, 1, 0, 0]
    others = [*first, 2, 3, 0, 2, 1, 4, 2, 3, 256, 257, 0, 6, *([0] * 6 * 13)]
    kernel.read_global = lambda name, count: first if name == "fa_deadlock_record" else others
    with pytest.raises(KernelDeadlock) as caught:
        kernel.check_deadlock(("q_full", "k_full", "k_empty"))
    second = str(caught.value).splitlines()[1]
    assert second.startswith(
        "At that time warpgroup 0, warp 0 waited for barrier k_empty to complete its phase of parity 1"
    )
    assert "warpgroup 2, warp 0 waited at named barrier 1 for its opening number 7" in second
    assert "k_full" not in second


@pytest.mark.parametrize(("only", "kept"), [("Swizzle", 1), ("layouts.py", 2), ("tma_", 1), (None, 3), ("none", 0)])
def test_only_selects_by_the_name_of_a_check_or_of_its_file(only, kept):
    checks = [("swizzle: every byte", "layouts"), ("descriptor", "layouts"), ("a tile", "tma_tile")]
    items = [
        SimpleNamespace(
            nodeid=name,
            path=Path(f"test_{stem}.py"),
            get_closest_marker=lambda _, name=name: SimpleNamespace(kwargs={"name": name}),
        )
        for name, stem in checks
    ]
    Selection(chapter(6), only).pytest_collection_modifyitems(items)
    assert len(items) == kept


def test_the_same_broken_rule_is_explained_once():
    page = io.StringIO()
    report = Report(chapter(7), chapter(7).room, "your files", console=Console(file=page, width=200))
    rule = "deadlock: consumer 0 waits for K_full[{slot}] since cycle {cycle}\nin a run with {blocks} blocks of 64 keys"
    report.add(Outcome("one block", "k.py", 1, FAILED, rule.format(slot=0, cycle="1,204", blocks=1)))
    report.add(Outcome("any length", "k.py", 1, FAILED, rule.format(slot=1, cycle="980", blocks=3)))
    report.add(Outcome("another", "k.py", 1, FAILED, "deadlock: the producer waits\nin a run with 1 block of 64 keys"))
    text = page.getvalue()
    assert text.count("consumer 0 waits") == 1 and 'the same as for "one block"' in text
    assert "the producer waits" in text


def test_compiled_run_and_not_graded_are_told_apart():
    page = io.StringIO()
    report = Report(chapter(1), chapter(1).room, "your files", console=Console(file=page, width=200))
    gpu = "NVIDIA H100 80GB HBM3"
    report.add(Outcome("compiles", "k.cu", 1, PASSED, how=COMPILED))
    report.add(Outcome("arithmetic", "k.cu", 1, PASSED))
    report.add(Outcome("speed", "k.cu", 2, PASSED, message="631 TFLOP/s", how=gpu))
    report.add(Outcome("numbers", "k.cu", 3, NOT_GRADED, "no Hopper GPU", how=""))
    report.add(Outcome("more numbers", "k.cu", 1, NOT_GRADED, "no Hopper GPU", how=""))
    report.finish()
    text = page.getvalue()
    assert "compiles  1/1  compiled, not run" in text and f"speed  2/2  {gpu}" in text and "631 TFLOP/s" in text
    assert "arithmetic  1/1\n" in text and "numbers · more numbers\n" in text
    assert text.count("not graded here (no Hopper GPU)") == 1
    assert (
        f"1 by their machine code alone (which says nothing about right numbers), 1 on this CPU, 1 on the {gpu}" in text
    )
    assert [check["how"] for check in report.as_dict()["checks"]] == ["compiled", "CPU", gpu, "", ""]
