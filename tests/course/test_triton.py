"""Triton without a GPU: the repaired interpreter against torch, and kernels compiled for GPUs that are not here."""

import subprocess
import sys

import pytest
import torch

from fa_reference.course import ROOT, chapter
from fa_reference.triton_cpu import INTERPRETED, compile_forward, tl, triton

interpreted = pytest.mark.skipif(not INTERPRETED, reason="this machine runs Triton on a GPU, not in the interpreter")
FA1 = chapter(3).solution / "fa1_triton.py"
FA2 = chapter(4).solution / "fa2_triton.py"


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    grid = i[:, None] * N + i[None, :]
    tl.store(c_ptr + grid, tl.dot(tl.load(a_ptr + grid), tl.load(b_ptr + grid)))


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, exp_ptr, less_ptr, row_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(sum_ptr + i, a + b)
    tl.store(product_ptr + i, -a * b)
    tl.store(exp_ptr + i, tl.exp2(a.to(tl.float32)).to(tl.bfloat16))
    tl.store(less_ptr + i, tl.where(a < b, a, 1.5))
    tl.store(row_ptr, tl.max(a, axis=0))
    tl.store(row_ptr + 1, tl.sum(b, axis=0))


@triton.jit
def round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def loop_kernel(out_ptr, begin, end, STEP: tl.constexpr):
    # The bounds are run-time numbers, and differ from program to program.
    total = 0
    for x in range(begin + tl.program_id(0), end, STEP):
        total += x
    for x in tl.range(begin, end * (tl.program_id(0) + 1), STEP):
        total += x
    tl.store(out_ptr + tl.program_id(0), total)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).to(dtype)
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@interpreted
def test_elementwise_bf16() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 64).bfloat16()
    total, product, exp, less = (torch.empty(64, dtype=torch.bfloat16) for _ in range(4))
    row = torch.empty(2, dtype=torch.bfloat16)
    elementwise_kernel[(1,)](a, b, total, product, exp, less, row, N=64)
    assert torch.equal(total, a + b)
    assert torch.equal(product, -a * b)
    torch.testing.assert_close(exp, torch.exp2(a.float()).bfloat16(), rtol=2**-8, atol=0)
    assert torch.equal(less, torch.where(a < b, a, 1.5))
    assert row[0] == a.max()
    torch.testing.assert_close(row[1], b.float().sum().bfloat16(), rtol=2**-7, atol=0)


@interpreted
def test_rounds_to_nearest_bf16() -> None:
    torch.manual_seed(0)
    hard = [1.9999, 0.99999, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 1e-40, 0.0, -0.0]
    x = torch.cat([torch.randn(64 - 12), torch.tensor([*hard, torch.inf, -torch.inf, torch.nan])])
    y = torch.empty(64, dtype=torch.bfloat16)
    round_kernel[(1,)](x, y, N=64)
    assert torch.equal(y[:-1], x.bfloat16()[:-1]) and y[-1].isnan()


@interpreted
def test_loop_bounds_at_run_time() -> None:
    out = torch.zeros(3, dtype=torch.int32)
    loop_kernel[(3,)](out, 2, 17, STEP=4)
    assert out.tolist() == [sum(range(2 + p, 17, 4)) + sum(range(2, 17 * (p + 1), 4)) for p in range(3)]


@interpreted
def test_autotune_without_a_gpu() -> None:
    configs = [triton.Config({"STEP": 4}), triton.Config({"STEP": 1})]
    tuned = triton.autotune(configs=configs, key=["end"])(loop_kernel)
    out = torch.zeros(1, dtype=torch.int32)
    tuned[(1,)](out, 2, 17)
    assert out.item() == 2 * sum(range(2, 17, 4))


def test_triton_imported_too_early_is_named() -> None:
    script = "import triton, torch; torch.cuda.is_available = lambda: False; import fa_reference.triton_cpu"
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ.pop('TRITON_INTERPRET', None); {script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "import fa_reference.triton_cpu first" in done.stderr


def test_fa2_compiles_for_gfx942() -> None:
    kernels = compile_forward(FA2, "gfx942", head_dims=(64, 128), causal=(False, True))
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel.count("v_mfma") > 0, "no matrix instruction of AMD's MI300X"


def test_fa2_compiles_for_sm_90() -> None:
    kernels = compile_forward(FA2, "sm_90", head_dims=(64, 128, 256), causal=(False, True))
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel.count("wgmma.mma_async") > 0, "Hopper's matrix instruction is missing"
        assert kernel.count("cp.async.bulk.tensor") > 0, "tiles do not come through Hopper's copy engine"
        assert kernel.shared_bytes <= 227 * 1024, "more shared memory than a block may have"
        assert kernel.spilled_bytes in (None, 0), f"{kernel.spilled_bytes} bytes of registers are spilled"


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_fa1_compiles(target: str) -> None:
    (kernel,) = compile_forward(FA1, target)
    assert kernel.count("wgmma.mma_async" if target == "sm_90" else r"mma\.sync") > 0
    limit = {"sm_90": 227, "sm_80": 163}[target] * 1024
    assert kernel.shared_bytes <= limit


def test_what_does_not_compile_is_told(tmp_path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(FA1.read_text().replace("tl.debug_barrier()", "tl.no_such_function()"))
    with pytest.raises(RuntimeError, match=r"broken.py does not compile for sm_90(.|\n)*no_such_function"):
        compile_forward(broken, "sm_90")
    with pytest.raises(ValueError, match="target is 'sm_50'; allowed: sm_80, sm_90, gfx942"):
        compile_forward(FA1, "sm_50")
