"""Chapter 5: its kernels, its stubs, and what the grader says of unfinished ones (mutants/05_cuda holds wrong ones)."""

from pathlib import Path

import pytest
import torch

from fa_reference.course import ROOT, chapter
from fa_reference.grading import CheckFailed, cuda
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import NotWritten
from fa_reference.stubs import write_stubs
from fa_reference.versions import load_file

SOLUTION = ROOT / "solutions" / "05_cuda"
CHECKS = ROOT / "tests" / "05_cuda"
HOST = "fa2_cuda.py"

# The graded checks carry a mark that only the grader registers.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")


def change(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text, f"{file} no longer contains {old!r}"
    (folder / file).write_text(text.replace(old, new))


def checks(name: str):
    return load_file(CHECKS / f"test_{name}.py")


def test_a_compile_error_names_the_learners_line(folder: Path, answer: Answer):
    change(folder, "scalar.cu", "float score = 0.0f;", "float score = zero;")
    line = next(n for n, text in enumerate((folder / "scalar.cu").read_text().splitlines(), 1) if "= zero;" in text)
    with pytest.raises(CheckFailed, match=rf"scalar\.cu\({line}\): error: identifier \"zero\" is undefined"):
        checks("scalar").test_compiles(answer)


def test_a_todo_that_is_left_counts_as_not_written(folder: Path, answer: Answer):
    change(folder, "tiles.cu", "    // END SOLUTION", "    // TODO: first words\n    // go on here\n\n    // not these")
    with pytest.raises(NotWritten, match=r"not written yet: tiles\.cu: line \d+: first words go on here \("):
        checks("tiles").test_compiles(answer)


def test_a_missing_file_is_named(folder: Path, answer: Answer):
    (folder / "fa2.cu").unlink()
    with pytest.raises(CheckFailed, match=r"there is no file fa2\.cu"):
        cuda.build(answer, HOST, "fa2", "fa2.cu", 64, torch.float16, False)


def test_untouched_stubs_compile(tmp_path: Path):
    """So that the first compile error that a learner sees is their own."""
    write_stubs(chapter(5), tmp_path)
    host = load_file(tmp_path / HOST)
    for step in ("scalar", "tiles", "tensor_cores", "fa2"):
        assert "attention" in host.build(step, 64, torch.float16, True, cuda.ARCH).report.kernels


def test_the_given_split_k_kernels_compile_without_spills():
    host = load_file(SOLUTION / HOST)
    for name in ("split_k", "split_k_fa1"):
        used = host.build(name, 128, torch.bfloat16, False, cuda.ARCH).report.kernels["attention"]
        assert used.spill_store_bytes == 0


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_final_kernel_does_not_spill(head_dim: int, causal: bool):
    host = load_file(SOLUTION / HOST)
    for dtype in (torch.float16, torch.bfloat16):
        used = host.build("fa2", head_dim, dtype, causal, cuda.ARCH).report.kernels["attention"]
        assert (used.stack_bytes, used.spill_store_bytes, used.spill_load_bytes) == (0, 0, 0)


def test_bad_input_is_refused_before_any_launch():
    host = load_file(SOLUTION / HOST)
    x = torch.zeros(1, 2, 8, 64, dtype=torch.float16)
    for forward in (host.forward_scalar, host.forward_tiles, host.forward_tensor_cores, host.forward):
        with pytest.raises(ValueError, match="q is on device cpu"):
            forward(x, x, x)
    with pytest.raises(ValueError, match=r"k starts at address .*multiples of 8"):
        host._argument("k", torch.zeros(1, 1, 4, 68, dtype=torch.float16)[..., :64], host.STEPS["fa2"])


def test_layouts_multiply_two_matrices(answer: Answer):
    """The fragments, addresses and registers of layouts.py put together: S = Q K^T and O = S V, lane by lane."""
    layouts = load_file(SOLUTION / "layouts.py")
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randint(-4, 5, (16, 16), generator=generator) for _ in range(3))
    lanes = range(32)

    def ldmatrix(tile: torch.Tensor, address, transposed: bool = False) -> dict:
        """(lane, register, half) -> value, out of a tile of two chunks a row (kept without a swizzle here)."""
        out = {}
        for lane in lanes:
            for register in range(4):
                for half in range(2):
                    r, c = lane // 4, lane % 4 * 2 + half
                    row, chunk = address(8 * register + (c if transposed else r))
                    out[lane, register, half] = tile[row, 8 * chunk + (r if transposed else c)]
        return out

    def mma(A: dict, B: dict, tile: int) -> dict:
        """(lane, register) -> accumulator of columns 8 * tile .. of A times B."""
        a, b = torch.zeros(16, 16, dtype=torch.long), torch.zeros(16, 8, dtype=torch.long)
        for lane in lanes:
            for half in range(2):
                for r in range(4):
                    a[layouts.a_fragment(lane, r, half)] = A[lane, r, half]
                for r in range(2):
                    b[layouts.b_fragment(lane, r, half)] = B[lane, 2 * tile + r, half]
        d = a @ b
        return {(lane, r): d[layouts.c_fragment(lane, r)] for lane in lanes for r in range(4)}

    S = [mma(ldmatrix(Q, layouts.q_address), ldmatrix(K, layouts.k_address), tile) for tile in (0, 1)]
    P = {}
    for lane in lanes:
        for r in range(4):
            tile, first = layouts.p_register(r)
            P[lane, r, 0], P[lane, r, 1] = S[tile][lane, first], S[tile][lane, first + 1]
    O = [mma(P, ldmatrix(V, layouts.v_address, transposed=True), tile) for tile in (0, 1)]
    right = Q @ K.T @ V
    for tile in (0, 1):
        for lane in lanes:
            for r in range(4):
                row, column = layouts.c_fragment(lane, r)
                assert O[tile][lane, r] == right[row, 8 * tile + column]
