"""Chapter 10: wrong quantisers, layouts, emulations and kernels are caught, correct but different ones pass."""

import difflib
import shutil
from pathlib import Path

import pytest
import torch

from fa_reference import fp8
from fa_reference.course import CHAPTERS, ROOT, chapter
from fa_reference.gold import gold_attention
from fa_reference.grading import CheckFailed
from fa_reference.grading import fp8 as judge
from fa_reference.grading.answer import Answer, Workshop
from fa_reference.grading.check import NotWritten
from fa_reference.inputs import Case
from fa_reference.kernels import KernelUnavailable, compile_kernel, require_hopper
from fa_reference.stubs import write_stubs
from fa_reference.versions import load_file

SOLUTION = ROOT / "solutions" / "10_fp8"
CHECKS = ROOT / "tests" / "10_fp8"
E4M3 = torch.float8_e4m3fn

pytestmark = [
    pytest.mark.skipif(all(c.number != 10 for c in CHAPTERS), reason="chapter 10 is not in the list of chapters yet"),
    # The graded checks carry a mark that only the grader registers.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning"),
]


@pytest.fixture(scope="module")
def workshop():
    workshop = Workshop()
    yield workshop
    workshop.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A learner's folder with the whole solution in it."""
    return Path(shutil.copytree(SOLUTION, tmp_path / "10_fp8", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def answer(workshop: Workshop, folder: Path):
    answer = Answer(workshop, folder)
    yield answer
    answer.close()


def change(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times, not once: {old!r}"
    (folder / file).write_text(text.replace(old, new))


def checks(name: str):
    return load_file(CHECKS / f"test_{name}.py")


def graded(name: str):
    """All checks of a file that run on any machine."""
    marked = ((n, f) for n, f in vars(checks(name)).items() if n.startswith("test_"))
    return [f for _, f in marked if f.pytestmark[0].kwargs["needs"] is None]


WRONG = [
    # file, old, new, the check that must fail, a word of its message
    ("quantise.py", "mantissa * 2.0**-9,", "mantissa * 2.0**-10,", "test_decode", "subnormal|exponent 0"),
    ("quantise.py", "code & 0x7F == 0x7F", "code == 0x7F", "test_decode", "0xff"),
    (
        "quantise.py",
        "torch.round(torch.ldexp(magnitude, 3 - exponent))",
        "torch.floor(torch.ldexp(magnitude, 3 - exponent) + 0.5)",
        "test_encode_rounds",
        "halfway",
    ),
    ("quantise.py", ".clamp(max=LARGEST)  # NaN stays NaN", "", "test_encode_ends", "saturates"),
    ("quantise.py", "torch.signbit(x)", "(x < 0)", "test_encode_ends", "sign"),
    ("quantise.py", "magnitude.clamp(min=2.0**-6)", "magnitude.clamp(min=2.0**-9)", "test_encode_exact", "value"),
    ("quantise.py", "rows = x.float().abs().amax(3)", "rows = x.float().amax(3)", "test_scales", "over what"),
    ("quantise.py", "torch.where(largest == 0, 1.0, ", "(", "test_scales_of_zeros", "zeros must have scale 1"),
    ("quantise.py", ".clamp(min=SMALLEST_SCALE))", ")", "test_scales_of_zeros", "2\\^-126"),
    ("quantise.py", "encode_e4m3(x.float() / spread)", "encode_e4m3(x.float() * spread)", "test_quantise", "codes"),
    (
        "quantise.py",
        "if not bool(x.isfinite().all()):",
        "if bool(x.isnan().any()):",
        "test_quantise_ends",
        "ValueError",
    ),
    ("quantise.py", "return y * head_dim**-0.5", "return y", "test_rotation", "norm"),
    ("quantise.py", "return hadamard(x * signs)", "return hadamard(x) * signs", "test_rotation", "rotate"),
    ("quantise.py", "return hadamard(x) * signs", "return hadamard(x * signs)", "test_inverse", "unrotate"),
    ("layouts.py", "8 * (register % 2), 16", "8 * (register // 2), 16", "test_a_place", "must be"),
    ("layouts.py", "first + 1, first + 4, first + 5", "first + 1, first + 2, first + 3", "test_p_registers", "row"),
    ("layouts.py", "2 * lane + 8 * (byte // 2) + byte % 2", "4 * lane + byte", "test_key_order", "which is key"),
    (
        "layouts.py",
        "v.T[:, [key_at(i) for i in range(v.shape[0])]]",
        "v.T.clone()",
        "test_transpose",
        "order of key_at",
    ),
    ("layouts.py", "if lane < 16 else (odd, even)", "if lane < 16 else (even, odd)", "test_instructions", "channel"),
    ("emulate.py", "encode_e4m3(p))", "encode_e4m3(p / 2))", "test_round_p", "round_p"),
    ("emulate.py", "round_p(p) @ v", "p @ v", "test_one_block", "rounded to e4m3"),
    ("emulate.py", "torch.exp2(s - subtract + OFFSET)", "torch.exp2(s - subtract)", "test_one_block", "OFFSET"),
    ("emulate.py", "torch.log2(l) - OFFSET", "torch.log2(l)", "test_one_block", "OFFSET"),
    ("emulate.py", "k_scale[:, :, block, None, None]", "k_scale[:, :, 0, None, None]", "test_blocks", "scales"),
    ("emulate.py", "acc = acc * alpha + round_p", "acc = acc + round_p", "test_blocks", "alpha"),
    ("emulate.py", "rows + len_k - len_q", "rows", "test_causal", "."),
    ("emulate.py", "quantise.rotate(k.float(), signs)", "k.float()", "test_paper", "rotation"),
]


@pytest.mark.parametrize("file, old, new, failing, word", WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_answer_is_caught(folder: Path, answer: Answer, file, old, new, failing, word):
    change(folder, file, old, new)
    with pytest.raises(CheckFailed, match=word):
        getattr(checks(Path(file).stem), failing)(answer)


def test_a_quantiser_that_leaves_the_work_to_torch_is_caught(folder: Path, answer: Answer):
    cast = "return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)"
    change(folder, "quantise.py", "return torch.where(x.isnan(), 0x7F, code).to(torch.uint8)", cast)
    with pytest.raises(CheckFailed, match="float8"):
        checks("quantise").test_encode_exact(answer)


def test_an_encoder_that_searches_a_table_passes(folder: Path, answer: Answer):
    """Correct, but different: the nearest of 127 values, ties to the even code."""
    source = (folder / "quantise.py").read_text()
    first, last = source.index("    # BEGIN SOLUTION: round the magnitude"), source.index("def block_scales")
    body = """    values = decode_e4m3(torch.arange(127, dtype=torch.uint8))
    middle = (values[1:].double() + values[:-1].double()) / 2
    magnitude = x.abs().double().nan_to_num(posinf=1e300)
    low, high = torch.searchsorted(middle, magnitude), torch.searchsorted(middle, magnitude, right=True)
    code = torch.where(low % 2 == 0, low, high)
    code = code + 128 * torch.signbit(x)
    return torch.where(x.isnan(), 127, code).to(torch.uint8)


"""
    (folder / "quantise.py").write_text(source[:first] + body + source[last:])
    for one in graded("quantise"):
        one(answer)


def test_another_order_of_the_keys_passes(folder: Path, answer: Answer):
    """Correct, but different: bytes 1 and 2 of P's registers exchanged, and prmt and key_at with them."""
    change(
        folder,
        "layouts.py",
        "return first, first + 1, first + 4, first + 5",
        "return first, first + 4, first + 1, first + 5",
    )
    change(folder, "layouts.py", "8 * (byte // 2) + byte % 2", "8 * (byte % 2) + byte // 2")
    change(folder, "layouts.py", "even, odd = 0x6420, 0x7531", "even, odd = 0x6240, 0x7351")
    for one in graded("layouts"):
        one(answer)


def test_the_plain_transposition_is_right_but_has_bank_conflicts(folder: Path, answer: Answer):
    change(folder, "layouts.py", "if lane < 16 else (odd, even)", "if lane < 64 else (odd, even)")
    change(folder, "layouts.py", "(matrix % 2 ^ row // 4)", "matrix % 2")
    checks("layouts").test_instructions(answer)
    with pytest.raises(CheckFailed, match="store"):
        checks("layouts").test_banks(answer)


def test_an_emulation_from_the_first_key_to_the_last_passes(folder: Path, answer: Answer):
    change(
        folder, "emulate.py", "in reversed(range(math.ceil(len_k / BLOCK_K)))", "in range(math.ceil(len_k / BLOCK_K))"
    )
    for one in graded("emulate"):
        one(answer)


KERNELS = [
    # old, new, the check that must fail, a word of its message
    ("            fence_proxy_async();\n", "", "test_transposes", "fence_proxy_async"),
    ("            named_barrier_sync(kProducerBarrier, 128);\n", "", "test_transposes", "never meet"),
    ("step < kHeadDim / 32", "step < kHeadDim / 64", "test_products", "e4m3 wgmma"),
    ("i < kBlockK / 8; ++i)", "i < kBlockK / 16; ++i)", "test_products", "conversions"),
    ("        if (never) pin(s);\n", "", "test_overlap", "pin"),
    ("kConsumerRegisters = 232", "kConsumerRegisters = 240", "test_budget", "setmaxnreg"),
]


@pytest.mark.parametrize("old, new, failing, word", KERNELS, ids=lambda value: str(value).strip()[:30])
def test_a_wrong_kernel_is_caught_by_its_code(folder: Path, answer: Answer, old, new, failing, word):
    change(folder, "fp8.cu", old, new)
    with pytest.raises(CheckFailed, match=word):
        getattr(checks("fp8"), failing)(answer)


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
    case = Case(200, 2000, head_dim=128, kind="outliers", seed=5)
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
