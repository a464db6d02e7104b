"""The kernel tool chain, on a machine without a GPU: compile, cache, messages, SASS, TMA descriptors."""

from pathlib import Path

import pytest
import torch

from fa_reference.kernels import (
    KernelCompileError,
    compile_kernel,
    compiler_version,
    count_instructions,
    included_files,
    instructions_between,
    parse_build_log,
    tile_geometry,
)
from fa_reference.kernels.sass import opcode

HOPPER = Path(__file__).parents[2] / "cuda" / "hopper"
SIMPLE = 'extern "C" __global__ void twice(float* x) {\n    x[threadIdx.x] *= FACTOR;\n}\n'


@pytest.fixture
def kernel_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "kernel.cu") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_compiles_without_a_gpu_and_reports_resources(kernel_file):
    kernel = compile_kernel(kernel_file(SIMPLE), defines={"FACTOR": "2.0f"})
    used = kernel.report.kernels["twice"]
    assert 4 <= used.registers <= 32
    assert (used.spill_store_bytes, used.spill_load_bytes, used.stack_bytes) == (0, 0, 0)
    assert "no spills" in kernel.report.describe()
    assert kernel.cubin[:4] == b"\x7fELF"
    assert compiler_version().startswith("NVRTC ")


def test_cache_hits_and_notices_every_change(kernel_file):
    header = kernel_file("#define SHIFT 1\n", "shift.cuh")
    source = kernel_file('#include "shift.cuh"\n' + SIMPLE.replace("*= FACTOR", "+= SHIFT * FACTOR"))
    first = compile_kernel(source, defines={"FACTOR": 2})
    again = compile_kernel(source, defines={"FACTOR": 2})
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.cubin == first.cubin
    assert again.report == first.report
    assert not compile_kernel(source, defines={"FACTOR": 3}).from_cache
    assert not compile_kernel(source, defines={"FACTOR": 2}, options={"use_fast_math": True}).from_cache
    header.write_text("#define SHIFT 5\n")
    changed = compile_kernel(source, defines={"FACTOR": 2})
    assert not changed.from_cache
    assert changed.cubin != first.cubin


def test_a_damaged_cache_file_is_compiled_again(kernel_file, tmp_path):
    source = kernel_file(SIMPLE)
    compile_kernel(source, defines={"FACTOR": 2})
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_text('{"cubin": "half a fi')
    assert not compile_kernel(source, defines={"FACTOR": 2}).from_cache
    assert compile_kernel(source, defines={"FACTOR": 2}).from_cache


def test_an_unwritable_cache_is_no_error(kernel_file, tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("FA_CACHE", str(tmp_path / "a_file"))
    assert not compile_kernel(kernel_file(SIMPLE), defines={"FACTOR": 2}).from_cache


def test_compile_error_names_file_and_line(kernel_file):
    source = kernel_file(SIMPLE.replace("threadIdx.x", "thread"))
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel(source, defines={"FACTOR": 2})
    assert (caught.value.file, caught.value.line) == ("kernel.cu", 2)
    assert "kernel.cu(2): error" in str(caught.value)
    assert 'identifier "thread" is undefined' in str(caught.value)


def test_error_in_a_header_names_the_header(kernel_file):
    kernel_file("\n\nint broken(;\n", "mine.cuh")
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel(kernel_file('#include "mine.cuh"\n' + SIMPLE), defines={"FACTOR": 2})
    assert caught.value.line == 3
    assert caught.value.file.endswith("mine.cuh")


def test_missing_header_is_named(kernel_file):
    with pytest.raises(KernelCompileError, match='cannot open source file "nowhere.cuh"'):
        compile_kernel(kernel_file('#include "nowhere.cuh"\n'))


def test_assembler_error_names_the_source_line(kernel_file):
    text = (
        "__device__ __forceinline__ void copy(int* x) {\n"
        '    asm volatile("mov.u32 %0, no_such_register;" : "=r"(*x));\n}\n'
        'extern "C" __global__ void kernel(int* x) {\n    x[1] = 3;\n    copy(x);\n}\n'
    )
    with pytest.raises(KernelCompileError) as caught:
        compile_kernel(kernel_file(text))
    assert "kernel.cu(2)" in str(caught.value)
    assert "no_such_register" in str(caught.value)


def test_included_files_are_found_recursively(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.cuh").write_text('#include "b.cuh"\n#include <cuda_fp16.h>\n')
    (tmp_path / "sub" / "b.cuh").write_text('#include "a.cuh"\n')
    source = tmp_path / "k.cu"
    source.write_text('#include "sub/a.cuh"\n  #  include "missing.cuh"\n')
    assert [file.name for file in included_files(source)] == ["a.cuh", "b.cuh"]


def test_notes_are_explained():
    log = (
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non "
        "wgmma instructions reading accumulator registers in the function 'f'\n"
        "ptxas info    : Compiling entry function 'f' for 'sm_90a'\n"
        "ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 3 barriers, 16 bytes cumulative stack size, 1024 bytes smem\n"
    )
    report = parse_build_log(log)
    assert [note.code for note in report.notes] == ["C7514"]
    assert report.notes[0].costs_overlap
    used = report.kernels["f"]
    assert (used.registers, used.stack_bytes, used.spill_store_bytes, used.spill_load_bytes) == (168, 16, 8, 12)
    assert (used.barriers, used.static_shared_bytes) == (3, 1024)
    assert "20 bytes spilled" in report.describe()
    assert "before the wait" in report.describe()


def test_setmaxnreg_without_launch_bounds_is_reported(kernel_file):
    text = '#include "registers.cuh"\nextern "C" __global__ void k(int* x) { registers_release_to<24>(); *x = 1; }\n'
    report = compile_kernel(kernel_file(text), include_dirs=[HOPPER]).report
    assert [note.code for note in report.notes] == ["C7508"]
    assert "__launch_bounds__(threads, 1)" in report.describe()


@pytest.mark.parametrize("header", sorted(path.name for path in HOPPER.glob("*.cuh")))
def test_every_hopper_header_compiles_alone(kernel_file, header):
    text = f'#include "{header}"\nextern "C" __global__ void k() {{}}\n'
    assert not compile_kernel(kernel_file(text), include_dirs=[HOPPER]).report.warnings


def test_sass_of_a_tma_load(kernel_file):
    text = (
        '#include "mbarrier.cuh"\n#include "tma.cuh"\n'
        'extern "C" __global__ void k(const __grid_constant__ TensorMap map, float* x) {\n'
        "    extern __shared__ __align__(1024) float tile[];\n    __shared__ u64 full;\n"
        "    mbarrier_init(&full, 1);\n    mbarrier_init_fence();\n    mbarrier_arrive_expect_tx(&full, 1024);\n"
        "    tma_load_5d(tile, &map, &full, 0, 0, 0, 0, 0);\n    mbarrier_wait(&full, 0);\n    *x = tile[3];\n}\n"
    )
    kernel = compile_kernel(kernel_file(text), include_dirs=[HOPPER])
    counts = count_instructions(kernel.cubin)
    assert counts["UTMALDG"] == 1
    assert counts["SYNCS"] >= 3
    debug = compile_kernel(kernel_file(text), include_dirs=[HOPPER], defines={"FA_DEBUG": 1})
    assert b"fa_deadlock_record" in debug.cubin
    assert b"fa_deadlock_record" not in kernel.cubin


def test_opcodes_are_read_past_predicates():
    assert opcode("@!UP0 UTMALDG.5D [UR8], [UR4]") == "UTMALDG.5D"
    assert opcode("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT") == "HGMMA.64x128x16.F32.BF16"


def test_instructions_between_looks_only_inside_straight_code(monkeypatch):
    from fa_reference.kernels import sass

    listing = ["HGMMA a", "R2UR b", "HGMMA c", "MOV d", "HGMMA e", "R2UR f", "@P0 BRA g", "HGMMA h"]
    monkeypatch.setattr(sass, "sass_instructions", lambda cubin: listing)
    assert instructions_between(b"", "HGMMA", ("R2UR",)) == ["R2UR b"]


def test_tile_geometry_of_a_transposed_view():
    q = torch.empty(2, 100, 5, 128, dtype=torch.bfloat16).transpose(1, 2)  # stored (batch, len, heads, d)
    geometry = tile_geometry(q, name="q", box_rows=128)
    assert geometry.sizes == (64, 100, 2, 5, 2)
    assert geometry.strides == (5 * 128 * 2, 128, 128 * 2, 100 * 5 * 128 * 2)
    assert geometry.box == (64, 128, 2, 1, 1)


@pytest.mark.parametrize(
    ("tensor", "rows", "words"),
    [
        (torch.empty(1, 1, 8, 64), 64, ("q has dtype torch.float32", "allowed: torch.float16")),
        (torch.empty(8, 64).half(), 64, ("q has shape (8, 64)", "(batch, heads, len, head_dim)")),
        (torch.empty(1, 1, 8, 80).half(), 64, ("q has head_dim = 80", "multiple of 64")),
        (torch.empty(1, 1, 64, 8).half().transpose(2, 3), 64, ("q has strides", "contiguous last dimension")),
        (torch.empty(1, 1, 8, 68).half()[..., :64], 64, ("stride of 68 elements", "multiple of 8 elements")),
        (torch.empty(1, 1, 8, 64).half().expand(1, 3, 8, 64), 64, ("stride of 0 elements", "over heads")),
        (torch.empty(1, 1, 8, 72).half()[..., 4:68], 64, ("q starts at address", "16-byte aligned")),
        (torch.empty(1, 1, 8, 64).half(), 257, ("box_rows is 257", "1 to 256")),
        (torch.empty(1, 1, 0, 64).half(), 64, ("no size of 0",)),
    ],
)
def test_what_tma_cannot_express_is_refused_in_words(tensor, rows, words):
    with pytest.raises(ValueError) as caught:
        tile_geometry(tensor, name="q", box_rows=rows)
    for word in words:
        assert word in str(caught.value)


def test_a_dimension_of_one_may_have_any_stride():
    q = torch.empty(3, 8, 64).half().as_strided((1, 3, 8, 64), (5, 512, 64, 1))
    assert tile_geometry(q, name="q", box_rows=64).strides[3] % 16 == 0


def test_package_imports_without_cuda_packages():
    """Everything but the call that needs them: a laptop without the CUDA packages can still run the CPU chapters."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('cuda', 'cuda.core', 'cuda.bindings'): sys.modules[name] = None\n"
        "import fa_reference.kernels as k\n"
        "try: k.compiler_version()\n"
        "except k.KernelUnavailable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "needs the packages cuda-core" in done.stdout, done.stderr
