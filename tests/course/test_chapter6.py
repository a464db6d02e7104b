"""Chapter 6: its formulas multiply matrices, its checks catch wrong answers and say why, its stubs compile."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fa_reference.course import ROOT, chapter
from fa_reference.grading import CheckFailed
from fa_reference.grading.answer import Answer, Workshop
from fa_reference.grading.check import NotWritten
from fa_reference.kernels import tile_geometry
from fa_reference.stubs import write_stubs
from fa_reference.versions import load_file

SOLUTION = ROOT / "solutions" / "06_hopper_engines"
CHECKS = ROOT / "tests" / "06_hopper_engines"

# The graded checks carry a mark that only the grader registers.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")


def checks(name: str):
    return load_file(CHECKS / f"test_{name}.py")


# ---- the formulas, put together --------------------------------------------------------------------------------------


def bits(descriptor: int) -> tuple[int, int, int]:
    """(address, leading, stride) in bytes."""
    return tuple((descriptor >> low & 0x3FFF) * 16 for low in (0, 16, 32))


def hardware(address: int) -> int:
    """The 128-byte swizzle, bit by bit."""
    chunk = [address >> 4 + bit & 1 ^ address >> 7 + bit & 1 for bit in range(3)]
    return address & ~0x70 | sum(value << 4 + bit for bit, value in enumerate(chunk))


def k_major_operand(memory: dict[int, float], descriptor: int, rows: int) -> Tensor:
    """(rows, 16): what wgmma reads by a K-major descriptor."""
    address, _, stride = bits(descriptor)

    def place(r: int, c: int) -> int:
        return hardware(address + r // 8 * stride + r % 8 * 128 + 2 * c)

    return torch.tensor([[memory[place(r, c)] for c in range(16)] for r in range(rows)])


def mn_major_operand(memory: dict[int, float], descriptor: int, columns: int) -> Tensor:
    """(16, columns): what wgmma reads by an MN-major descriptor."""
    address, leading, stride = bits(descriptor)

    def place(k: int, n: int) -> int:
        return hardware(address + n // 64 * leading + k // 8 * stride + k % 8 * 128 + n % 64 * 2)

    return torch.tensor([[memory[place(k, n)] for n in range(columns)] for k in range(16)])


def test_the_layouts_multiply_matrices():
    """O = (Q K^T) V out of swizzled memory, descriptors and registers, by a model of wgmma that shares no formula."""
    layouts = load_file(SOLUTION / "layouts.py")
    rows, keys, d = 64, 48, 128
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randint(-2, 3, (n, d), generator=generator).double() for n in (rows, keys, keys))
    memory, places = {}, {}
    for name, tile, start in (("Q", Q, 0x400), ("K", K, 0x8000), ("V", V, 0xC400)):
        places[name] = start
        for r in range(tile.shape[0]):
            for c in range(d):
                memory[start + layouts.tile_offset(r, c, tile.shape[0])] = float(tile[r, c])
    assert len(memory) == (rows + 2 * keys) * d, "two elements share a place"

    S = torch.zeros(rows, keys)
    for step in range(d // 16):
        a = k_major_operand(memory, layouts.k_major_descriptor(places["Q"], rows, step), rows)
        b = k_major_operand(memory, layouts.k_major_descriptor(places["K"], keys, step), keys)
        S += a @ b.T
    registers = {(t, i): S[layouts.accumulator_place(t, i)] for t in range(128) for i in range(keys // 2)}
    O = torch.zeros(rows, d)
    for step in range(keys // 16):
        P = torch.full((rows, 16), math.nan)
        for t in range(128):
            for r in range(4):
                for half, i in enumerate(layouts.p_registers(step, r)):
                    P[layouts.a_place(t, r, half)] = registers[t, i]
        O += P @ mn_major_operand(memory, layouts.mn_major_descriptor(places["V"], keys, step), d)
    assert torch.equal(O.double(), Q @ K.T @ V)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_tma_view_is_what_the_host_encodes(layout: str):
    layouts = load_file(SOLUTION / "layouts.py")
    x = torch.empty(2, 3, 100, 128, dtype=torch.bfloat16)
    if layout == "bnhd":
        x = torch.empty(2, 100, 3, 128, dtype=torch.bfloat16).transpose(1, 2)
    geometry = tile_geometry(x, name="x", box_rows=64)
    assert layouts.tma_view(tuple(x.shape), x.stride(), 64) == (geometry.sizes, geometry.strides, geometry.box)


# ---- wrong answers ---------------------------------------------------------------------------------------------------

WRONG = [
    # file, old, new, module of checks, check, what the message must say
    (
        "layouts.py",
        "address >> 3 & 0x70",
        "address >> 3 & 0x30",
        "layouts",
        "test_swizzle",
        r"Wrong address bits: \[6\]",
    ),
    ("layouts.py", "column // 64 * rows * 128 + row", "row", "layouts", "test_tile_offset", "block of 64 columns"),
    ("layouts.py", "leading >> 4 << 16", "leading << 16", "layouts", "test_descriptor", "leading byte offset"),
    (
        "layouts.py",
        "| 1 << 62",
        "| 2 << 62",
        "layouts",
        "test_descriptor",
        "swizzle mode, bits 62-63, must be 1; it is 2",
    ),
    (
        "layouts.py",
        "step % 4 * 32, 16, 1024",
        "step % 4 * 32, 16, 128",
        "layouts",
        "test_k_major",
        "stride byte offset",
    ),
    ("layouts.py", "step // 4 * rows * 128 + step % 4", "step", "layouts", "test_k_major", "address"),
    ("layouts.py", "rows * 128, 1024)", "1024, rows * 128)", "layouts", "test_mn_major", "leading byte offset"),
    (
        "layouts.py",
        "8 * (register // 4) + 2",
        "16 * (register // 4) + 2",
        "layouts",
        "test_accumulator",
        "wrong column",
    ),
    ("layouts.py", "8 * (register % 2), 2", "8 * (register // 2), 2", "layouts", "test_a", "wrong row"),
    ("layouts.py", "first = 8 * step", "first = 4 * step", "layouts", "test_p", "holds row"),
    (
        "layouts.py",
        "(2 * strides[2], 128,",
        "(2 * strides[2], 2 * 128,",
        "layouts",
        "test_tma_view",
        "strides in bytes",
    ),
    ("tma_engine.cuh", '"mbarrier.try_wait.parity', '"mbarrier.test_wait.parity', "tma_engine", "test_wait", "TRYWAIT"),
    ("tma_engine.cuh", "{%3, %4, %5", "{%4, %3, %5", "tma_engine", "test_load", "other operands"),
    ("tma_engine.cuh", '("fence.mbarrier_init.release.cluster;"', '(""', "tma_engine", "test_fence", "holds no fence"),
    ("wgmma_engine.cuh", "%33, p, 1, 1, 0, 0;", "%33, p, 1, 1, 0, 1;", "wgmma_engine", "test_product", "wgmma_64x64"),
    ("wgmma_engine.cuh", "p, %34, 0;", "p, 1, 0;", "wgmma_engine", "test_product", "wgmma_64x64"),
    ("wgmma_engine.cuh", "u64{stride >> 4} << 32", "(stride >> 4) << 31", "wgmma_engine", "test_descriptor", "must be"),
    ("tma_tile.cu", "offset >> 3 & 0x70", "offset >> 4 & 0x70", "tma_tile", "test_offset", "tile_offset"),
    (
        "tma_tile.cu",
        "        __syncthreads();  // all",
        "        // all",
        "tma_tile",
        "test_instructions",
        "__syncthreads",
    ),
    ("wgmma_tile.cu", "kRows * 128, 1024);", "1024, kRows * 128);", "wgmma_tile", "test_descriptors", "mn_major"),
    (
        "wgmma_tile.cu",
        "kHeadDim / 16; ++step",
        "kHeadDim / 32; ++step",
        "wgmma_tile",
        "test_instructions",
        "wgmma instead of",
    ),
    (
        "attention.cu",
        "step < kBlockK / 16",
        "step < kBlockK / 32",
        "attention",
        "test_instructions",
        "wgmma instead of",
    ),
    (
        "attention.cu",
        "issue_qk(s, q_descriptor, k_descriptor);\n        wgmma_wait<0>();",
        "issue_qk(s, q_descriptor, k_descriptor);",
        "attention",
        "test_asynchronous",
        "C75",
    ),
    (
        "attention.cu",
        "wgmma_advance(q_descriptor, step / 4 * kBlockQ * 128 + step % 4 * 32)",
        "q_descriptor + step / 4 * kBlockQ * 128 + step % 4 * 32",
        "attention",
        "test_instructions",
        r"descriptors of Q in Q K\^T point to bytes \[0, 512, .*wgmma_advance",
    ),
    (
        "attention.cu",
        "wgmma_advance(k_descriptor, step / 4 * kBlockK * 128",
        "wgmma_advance(k_descriptor, step / 4 * kBlockQ * 128",
        "attention",
        "test_instructions",
        r"d 128: .*K in Q K\^T point to bytes .*, not \[0, 32, 64, 96, 16384, ",
    ),
    (
        "attention.cu",
        "wgmma_advance(v_descriptor, step * 16 * 128)",
        "v_descriptor + step * 16 * 128",
        "attention",
        "test_instructions",
        "V in P V point to",
    ),
    (
        "wgmma_engine.cuh",
        "u64{stride >> 4} << 32",
        "(stride >> 4 << 32)",
        "wgmma_engine",
        "test_descriptor",
        r"^wgmma_engine.cuh, line \d+: a 32-bit number is shifted .*u64\{x\} << 32\n    descriptor =",
    ),
]


@pytest.mark.parametrize(("file", "old", "new", "module", "check", "words"), WRONG, ids=lambda value: str(value)[:24])
def test_a_wrong_answer_is_caught(folder: Path, answer: Answer, file, old, new, module, check, words):
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(CheckFailed, match=words):
        getattr(checks(module), check)(answer)


@pytest.mark.parametrize(
    ("file", "old", "new", "module", "check"),
    [
        ("layouts.py", "step % 4 * 32, 16, 1024)", "step % 4 * 32, 0, 1024)", "layouts", "test_k_major"),
        ("tma_engine.cuh", "mbarrier_init.release.cluster", "proxy.async", "tma_engine", "test_fence"),
        ("tma_tile.cu", "offset ^= offset >> 3 & 0x70", "offset ^= offset / 128 % 8 * 16", "tma_tile", "test_offset"),
        ("wgmma_tile.cu", "step % 4 * 32, 16,", "step % 4 * 32, 64,", "wgmma_tile", "test_descriptors"),
        (
            "attention.cu",  # a descriptor made anew for every step
            "wgmma_advance(v_descriptor, step * 16 * 128)",
            "wgmma_descriptor(u32(v_descriptor & 0x3fff) * 16 + step * 16 * 128, kBlockK * 128)",
            "attention",
            "test_instructions",
        ),
        ("wgmma_engine.cuh", '"setp.ne.b32 p, %34, 0;', '"setp.ne.u32 p, %34, 0;', "wgmma_engine", "test_product"),
    ],
)
def test_a_correct_variant_passes(folder: Path, answer: Answer, file, old, new, module, check):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    getattr(checks(module), check)(answer)


def test_an_error_in_what_is_written_shows_beside_a_todo(tmp_path: Path, workshop: Workshop):
    write_stubs(chapter(6), tmp_path)
    for name in ("tma_engine.cuh", "tma_tile.cu"):
        shutil.copy(SOLUTION / name, tmp_path / name)
    kernel = tmp_path / "wgmma_tile.cu"
    kernel.write_text(kernel.read_text().replace("u64 descriptor = 0;", "u64 descriptor = 0", 1))
    answer = Answer(workshop, tmp_path)
    with pytest.raises(
        NotWritten, match=r"(?s)not written yet: wgmma_engine.cuh: .*does not compile yet.*wgmma_tile.cu"
    ):
        checks("wgmma_tile").test_compiles(answer)
    answer.close()


def test_an_error_of_the_assembler_names_the_learners_line(folder: Path, answer: Answer):
    header = folder / "tma_engine.cuh"
    text = header.read_text().replace(
        'mbarrier.init.shared::cta.b64 [%0], %1;" ::', 'mbarrier.init.shared::cta.b64 [%0];" ::'
    )
    header.write_text(text)
    line = next(n for n, found in enumerate(text.splitlines(), 1) if 'b64 [%0];" ::' in found)
    with pytest.raises(CheckFailed, match=rf"tma_engine\.cuh.*{line}"):
        checks("tma_tile").test_compiles(answer)


def test_untouched_stubs_compile(tmp_path: Path):
    """So that the first compile error that a learner sees is their own."""
    write_stubs(chapter(6), tmp_path)
    host = load_file(tmp_path / "engines.py")
    for name in host.TILES:
        assert name in host.build(name, 128).report.kernels
    assert "attention" in load_file(tmp_path / "attention.py").KERNEL.build(128, torch.bfloat16, True).report.kernels


# ---- what the checks on the GPU say, about results made here ---------------------------------------------------------


def tiles(x: Tensor) -> Tensor:
    """The right result of copy_tiles."""
    padded = torch.zeros(*x.shape[:2], -(-x.shape[2] // 64) * 64, x.shape[3], dtype=x.dtype)
    padded[:, :, : x.shape[2]] = x
    return padded


def plain_reading(x: Tensor) -> Tensor:
    """What copy_tiles returns if the swizzle is forgotten."""
    copy = tiles(x).unflatten(3, (-1, 8, 8))
    return torch.stack([copy[:, :, r][..., [c ^ r % 8 for c in range(8)], :] for r in range(copy.shape[2])], 2).flatten(
        3
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (plain_reading, "row 1, column 0 .*element of row 1, column 8 .*tile_offset"),
        (lambda x: torch.cat([tiles(x)[:, :, :64], tiles(x)[:, :, :64]], 2), "still that of tile 0.*parity"),
        (lambda x: torch.where(torch.arange(128)[:, None] < 100, tiles(x), math.nan).bfloat16(), "never written"),
    ],
)
def test_what_is_said_about_a_wrong_copy(spoil, words):
    module = checks("tma_tile")
    x = module.numbered(1, 2, 128, 64)
    module.same(tiles(x), x, "")
    with pytest.raises(CheckFailed, match=words):
        module.same(spoil(x), x, "")


def product(q, k, v, columns=slice(None), keys=slice(None)):
    s = (q[..., columns].float() @ k[..., columns].float().transpose(2, 3)) * 1.0
    return s, s.bfloat16()[..., keys].float() @ v[:, :, keys].float()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda q, k, v: product(q, k, v, slice(112, 128)), r"S\[.*last 16 columns alone"),
        (lambda q, k, v: product(8 * q, k, v, slice(0, 16)), r"S\[.*do not move with the step"),
        (lambda q, k, v: product(2 * q, k, v, slice(0, 64)), r"S\[.*first 64 columns are right alone"),
        (lambda q, k, v: (product(k, q, v)[0], product(q, k, v)[1]), r"S\[.*transpose"),
        (lambda q, k, v: (product(q, k, v)[0] * math.nan, v.float()), r"S\[.*not written"),
        (lambda q, k, v: (product(q, k, v)[0], product(q, k, v)[1].roll(1, 2)), r"O\[.*elements are wrong"),
        (
            lambda q, k, v: (product(q, k, v)[0], product(q, k, torch.cat([v[..., :64], v[..., :64]], 3))[1]),
            r"O\[0, 6.*columns 64 and up.*leading",
        ),
        (
            lambda q, k, v: (product(q, k, v)[0], product(q, k, v[:, :, :16].repeat(1, 1, 4, 1))[1]),
            r"O\[.*first 16 keys",
        ),
    ],
)
def test_what_is_said_about_a_wrong_product(spoil, words):
    module = checks("wgmma_tile")
    q, k, v = (module.small(1, 1, 64, 128) for _ in range(3))
    module.exact(product(q, k, v), q, k, v, "d 128")
    with pytest.raises(CheckFailed, match=words):
        module.exact(spoil(q, k, v), q, k, v, "d 128")
