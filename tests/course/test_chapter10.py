"""Chapter 10: the kernel without a GPU, its host side, and what judges FP8. Wrong answers: mutants/10_fp8."""

import difflib
from pathlib import Path

import pytest
import torch

from fa_reference import fp8
from fa_reference.course import ROOT, chapter
from fa_reference.gold import gold_attention
from fa_reference.grading import CheckFailed
from fa_reference.grading import fp8 as judge
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import NotWritten
from fa_reference.inputs import Case
from fa_reference.kernels import KernelUnavailable, compile_kernel, require_hopper
from fa_reference.stubs import write_stubs
from fa_reference.versions import load_file

SOLUTION = ROOT / "solutions" / "10_fp8"
CHECKS = ROOT / "tests" / "10_fp8"
E4M3 = torch.float8_e4m3fn

# The graded checks carry a mark that only the grader registers.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")


def change(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times, not once: {old!r}"
    (folder / file).write_text(text.replace(old, new))


def checks(name: str):
    return load_file(CHECKS / f"test_{name}.py")


def test_a_todo_that_is_left_counts_as_not_written(folder: Path, answer: Answer):
    change(folder, "fp8.cu", "constexpr int kConsumers = 2;", "// TODO: first words\nconstexpr int kConsumers = 2;")
    with pytest.raises(NotWritten, match=r"not written yet: fp8\.cu: line \d+: first words"):
        checks("fp8").test_compiles(answer)


def test_the_stub_compiles_and_multiplies_nothing(tmp_path: Path):
    write_stubs(chapter(10), tmp_path)
    report = load_file(tmp_path / "fp8.py").KERNEL.build(128, E4M3, True).report
    assert "attention" in report.kernels and not report.notes


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("debug", [False, True], ids=["release", "debug"])
def test_the_kernel_has_no_spills_and_no_notes(causal: bool, debug: bool):
    compiled = load_file(SOLUTION / "fp8.py").KERNEL.build(128, E4M3, causal, debug=debug)
    used = compiled.report.kernels["attention"]
    assert (used.stack_bytes, used.spill_store_bytes, used.spill_load_bytes) == (0, 0, 0)
    assert compiled.report.notes == () and compiled.report.warnings == ()
    assert (b"fa_deadlock_record" in compiled.cubin) == debug


def test_the_host_knows_the_kernel(tmp_path: Path):
    host = load_file(SOLUTION / "fp8.py")
    text = host.SOURCE.read_text()
    names = text.partition("enum BarrierName {")[2].partition("}")[0]
    assert tuple(name.strip().lower() for name in names.split(",")) == host.KERNEL.barriers
    probe = tmp_path / "probe.cu"
    probe.write_text(
        f'#include "{host.SOURCE}"\nstatic_assert(sizeof(Shared) <= {host.shared_bytes(128)});\n'
        f"static_assert(kThreads == {host.THREADS} && kBlockQ == {host.BLOCK_Q});\n"
    )
    defines = {"FA_HEAD_DIM": 128, "FA_BLOCK_K": host.BLOCK_K, "FA_STAGES": host.STAGES, "FA_CAUSAL": 0}
    compile_kernel(probe, defines=defines, include_dirs=[ROOT / "cuda"])
    assert host.shared_bytes(128) <= 227 * 1024


def test_the_difference_to_chapter_9_is_the_lesson():
    one, other = (
        (ROOT / "solutions" / name).read_text().splitlines() for name in ("09_two_stage/fa3.cu", "10_fp8/fp8.cu")
    )
    changes = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert 100 <= len(changes) <= 280 and len(other) <= 420


def codes(**changes):
    host = load_file(SOLUTION / "fp8.py")
    q, k, v = (torch.randn(1, h, n, 128).bfloat16() for h, n in ((2, 200), (1, 300), (1, 300)))
    return host, host.quantised(q, k, v) | changes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "q is on device cpu; allowed: cuda"),
        ({"q": torch.zeros(1, 2, 200, 128)}, "q has dtype torch.float32; allowed: torch.float8_e4m3fn"),
        ({"q": torch.zeros(2, 200, 128).to(E4M3)}, "q has shape"),
        ({"causal": 1}, "q is on device cpu"),
    ],
)
def test_bad_input_is_refused_before_any_launch(changes, words):
    host, arguments = codes(**changes)
    with pytest.raises(ValueError, match=words):
        host.forward_fp8(**arguments)


@pytest.mark.parametrize(
    "scale, words",
    [
        (torch.ones(1, 2, 3), r"q_scale has shape \(1, 2, 3\); allowed: \(1, 2\) \(one a head\) or \(1, 2, 2\)"),
        (1.0, "q_scale is a float"),
        (torch.ones(1, 2).double(), "q_scale has dtype torch.float64"),
        (torch.ones(1, 2, device="meta"), "q_scale is on device meta"),
    ],
)
def test_bad_scales_are_refused(scale, words):
    host, arguments = codes()
    with pytest.raises(ValueError, match=words):
        host._checked("q_scale", scale, arguments["q"], 128)


def test_the_judge_takes_the_emulation_and_refuses_less():
    """Against itself it passes; without rotation, on the inputs that need it, it fails; so does a wrong lse."""
    case = Case(512, 4096, head_dim=128, kind="outliers", seed=5)
    q, k, v = case.make()
    o, lse = fp8.schemes.attend(fp8.schemes.BOTH, q, k, v)
    judge.judged(o, lse, (q, k, v), case)
    with pytest.raises(CheckFailed, match="2\\^8"):
        judge.judged(o, lse + 5.545, (q, k, v), case)
    with pytest.raises(CheckFailed, match="RMS error of O .* \\(too large\\)"):
        judge.judged(*fp8.schemes.attend(fp8.schemes.BLOCK, q, k, v), (q, k, v), case)
    with pytest.raises(CheckFailed, match="too large"):
        judge.judged(torch.zeros_like(o), lse, (q, k, v), case)


# ---- on a Hopper GPU -------------------------------------------------------------------------------------------------


def no_hopper() -> str | None:
    try:
        require_hopper(torch.device("cuda", 0))
    except KernelUnavailable as error:
        return str(error)
    return None


gpu = pytest.mark.skipif(no_hopper() is not None, reason=f"not checked here: {no_hopper()}")
CASES = [
    Case(128, 128),
    Case(300, 777, 2, 4, 2, kind="outliers"),
    Case(1000, 200, 1, 2, 1),
    Case(257, 700, kind="large"),
]


@gpu
@pytest.mark.parametrize("debug", [True, False], ids=["debug", "release"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: Case, causal: bool, debug: bool):
    """As the emulation of the same codes, up to roundings; nothing that finite input turns into NaN."""
    host = load_file(SOLUTION / "fp8.py")
    q, k, v = case.but(head_dim=128, dtype="bfloat16").make("cuda")
    arguments = host.quantised(q, k, v)
    o, lse = host.forward_fp8(**arguments, causal=causal, debug=debug)
    right, right_lse = fp8.forward_fp8(**arguments, causal=causal)
    gold, _ = gold_attention(q, k, v, causal=causal)
    assert o.isfinite().all() and torch.equal(lse == -torch.inf, right_lse == -torch.inf)
    assert (o - gold).square().mean().sqrt() <= 1.1 * (right - gold).square().mean().sqrt()


@gpu
def test_every_run_gives_the_same_bits():
    host = load_file(SOLUTION / "fp8.py")
    q, k, v = (torch.randn(2, 8, 1111, 128, device="cuda").bfloat16() for _ in range(3))
    arguments = host.quantised(q, k, v)
    first = host.forward_fp8(**arguments, causal=True)
    for _ in range(20):
        for one, other in zip(first, host.forward_fp8(**arguments, causal=True), strict=True):
            assert torch.equal(one, other)
