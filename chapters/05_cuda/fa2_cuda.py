"""The host's side of the CUDA kernels: check the inputs, compile, say how many threads run, launch.

Four steps, one kernel file each (scalar.cu, tiles.cu, tensor_cores.cu, fa2.cu), all with the same parameters; `forward`
is the last one. Kernels are compiled by NVRTC for the GPU at hand when they are first needed, and kept on disk.
"""

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fa_reference.course import ROOT
from fa_reference.kernels import Arguments, CompiledKernel, KernelUnavailable, LoadedKernel, compile_kernel
from fa_reference.validation import check_attention_inputs

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
GRID_LIMIT = 65535  # blocks along y and z
HERE = Path(__file__).resolve().parent


class Step(NamedTuple):
    """One kernel: its file and how it divides the work."""

    file: str
    block_q: int  # rows of Q that one block of threads computes
    block_k: dict[int, int]  # keys that it visits at once, by head_dim
    warps: int | None = None  # warps of a block; None: one thread a row
    stages: int = 1  # pairs of K and V tiles in shared memory
    vector_loads: bool = True  # reads 16 bytes at once, which must be aligned
    defines: tuple[tuple[str, int], ...] = ()


STEPS = {
    "scalar": Step("scalar.cu", 128, {64: 1, 128: 1}, stages=0, vector_loads=False),
    "tiles": Step("tiles.cu", 64, {64: 16, 128: 16}, vector_loads=False),
    "tensor_cores": Step("tensor_cores.cu", 64, {64: 64, 128: 64}, warps=4),
    "fa2": Step("fa2.cu", 128, {64: 96, 128: 48}, warps=4, stages=2),
    "split_k": Step("split_k.cu", 32, {64: 128, 128: 64}, warps=4, stages=2, defines=(("MERGE_EVERY_BLOCK", 0),)),
    "split_k_fa1": Step("split_k.cu", 32, {64: 128, 128: 64}, warps=4, stages=2, defines=(("MERGE_EVERY_BLOCK", 1),)),
}


def grid(step: Step, batch: int, heads_q: int, len_q: int) -> tuple[int, int, int]:
    """Number of blocks of threads along x (query heads), y (batch) and z (blocks of queries)."""
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "fa2_cuda.py: one per head, one per batch, and enough blocks of step.block_q rows to cover len_q"
    )


def threads(step: Step) -> int:
    """Threads of a block: 32 a warp, or one a row of the block where the step has no warps of its own."""
    # TODO: replace this statement by your code.
    raise NotImplementedError("fa2_cuda.py: one number, from step.warps or step.block_q")


def shared_bytes(step: Step, head_dim: int) -> int:
    """Bytes of shared memory that a block needs for its tiles of Q (one) and of K and V (step.stages pairs).

    scalar has no tiles (stages 0). tiles keeps floats, with one float of padding behind every row of Q; the others keep
    16-bit numbers without padding.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "fa2_cuda.py: rows of all tiles together times head_dim times bytes of a number, plus the padding of step tiles"
    )


# ---- given from here on ----------------------------------------------------------------------------------------------


class TensorArgument(ctypes.Structure):
    """`struct Tensor` of the kernels."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_longlong),
        ("head", ctypes.c_longlong),
        ("row", ctypes.c_int),
    ]


class ProblemArgument(ctypes.Structure):
    """`struct Problem` of the kernels."""

    _fields_ = [(name, TensorArgument) for name in "QKVO"] + [
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("heads_q", "group", "len_q", "len_k")),
        ("scale", ctypes.c_float),
    ]


def defines(step: Step, head_dim: int, dtype: torch.dtype, causal: bool) -> dict[str, int]:
    """The macros that a kernel is compiled with."""
    macros = {
        "HEAD_DIM": head_dim,
        "BLOCK_Q": step.block_q,
        "BLOCK_K": step.block_k[head_dim],
        "BF16": int(dtype == torch.bfloat16),
        "CAUSAL": int(causal),
        **dict(step.defines),
    }
    return macros if step.warps is None else {**macros, "WARPS": step.warps}


def source(step: Step) -> Path:
    """The kernel's file: beside this one, or (split_k.cu, which is given) in the chapter's folder."""
    beside = HERE / step.file
    return beside if beside.exists() else ROOT / "chapters" / "05_cuda" / step.file


def architecture() -> str:
    """What to compile for: the GPU at hand, or Hopper to look at the code where there is none."""
    if not torch.cuda.is_available():
        return "sm_90a"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise KernelUnavailable(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; these kernels need 8.0 or newer "
            "(cp.async, bfloat16)"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def build(name: str, head_dim: int, dtype: torch.dtype, causal: bool, arch: str | None = None) -> CompiledKernel:
    """Compile a step; KernelCompileError names the line of the .cu file that the compiler did not take."""
    step = STEPS[name]
    macros = defines(step, head_dim, dtype, causal)
    return compile_kernel(source(step), defines=macros, arch=arch or architecture())


def machine_code(name: str, head_dim: int, dtype: torch.dtype, causal: bool, arch: str) -> tuple[Tensor, str]:
    """The kernel's machine code as bytes (uint8), and the compiler's log: what the checks look at."""
    compiled = build(name, head_dim, dtype, causal, arch)
    return torch.frombuffer(bytearray(compiled.cubin), dtype=torch.uint8), compiled.log


def milliseconds(name: str, batch: int, heads: int, length: int, head_dim: int, causal: bool) -> float:
    """Median time of a step on random bfloat16 inputs, launches only, in milliseconds."""
    shape = (batch, length, heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # the GPU waits here until the launch is queued
        start.record()
        run(name, q, k, v, causal, None)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[5]


@cache
def _loaded(name: str, head_dim: int, dtype: torch.dtype, causal: bool, device: int) -> LoadedKernel:
    step, memory = STEPS[name], shared_bytes(STEPS[name], head_dim)
    if name.startswith("split_k"):  # room for adding up the warps' outputs, in place of the tiles or behind them
        exchange = 4 * step.warps * step.block_q * (head_dim + 10)
        memory = memory + exchange if dict(step.defines)["MERGE_EVERY_BLOCK"] else max(memory, exchange)
    allowed = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if memory > allowed:
        raise KernelUnavailable(f"{step.file} asks for {memory} bytes of shared memory; this GPU allows {allowed}")
    compiled = build(name, head_dim, dtype, causal)
    return LoadedKernel(compiled, "attention", threads=threads(step), shared_bytes=memory)


def _argument(name: str, x: Tensor, step: Step) -> TensorArgument:
    """The kernel's view of a tensor; ValueError for a layout that the kernel cannot read."""
    strides = x.stride()[:3]
    if step.vector_loads and (x.data_ptr() % 16 or any(s % 8 for s, n in zip(strides, x.shape) if n > 1)):
        raise ValueError(
            f"{name} starts at address {x.data_ptr():#x} and has strides {x.stride()}; allowed: an address that is a "
            f"multiple of 16 and strides that are multiples of 8, as 16 bytes are read at once: {name}.contiguous()"
        )
    if (x.shape[2] - 1) * strides[2] + x.shape[3] >= 2**31:
        raise ValueError(f"{name} has stride {strides[2]} between rows; allowed: one head within 2^31 elements")
    return TensorArgument(x.data_ptr(), *strides)


def run(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Check the arguments, then launch the kernel of a step on torch's current stream."""
    step = STEPS[name]
    scale = check_attention_inputs(
        q, k, v, causal=causal, scale=scale, dtypes=DTYPES, head_dims=HEAD_DIMS, devices=("cuda",)
    )
    batch, heads_q, len_q, head_dim = q.shape
    heads_kv, len_k = k.shape[1:3]
    if batch > GRID_LIMIT or len_q > GRID_LIMIT * step.block_q:
        raise ValueError(
            f"q has batch {batch} and len_q {len_q}; allowed: {GRID_LIMIT} and {GRID_LIMIT * step.block_q}, as a grid "
            f"has at most {GRID_LIMIT} blocks along y and z"
        )
    o = torch.empty_like(q)
    lse = torch.empty(batch, heads_q, len_q, dtype=torch.float32, device=q.device)
    tensors = (_argument(name, x, step) for name, x in (("q", q), ("k", k), ("v", v), ("o", o)))
    group = heads_q // heads_kv
    problem = ProblemArgument(*tensors, lse.data_ptr(), heads_q, group, len_q, len_k, scale)
    with torch.cuda.device(q.device):
        device = torch.cuda.current_device()
        kernel = _loaded(name, head_dim, q.dtype, causal, device)
        kernel.launch(device, grid(step, batch, heads_q, len_q), Arguments(problem))
    return o, lse


def forward_scalar(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Step (a). Arguments and results as `forward`."""
    return run("scalar", q, k, v, causal, scale)


def forward_tiles(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Step (b). Arguments and results as `forward`."""
    return run("tiles", q, k, v, causal, scale)


def forward_tensor_cores(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Step (c). Arguments and results as `forward`."""
    return run("tensor_cores", q, k, v, causal, scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Step (d): attention (o, lse) by fa2.cu.

    q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d): float16 or bfloat16 on a CUDA GPU, d 64 or 128. o has q's shape and
    dtype, lse (B, H_q, N_q) is float32. Raises ValueError for anything else, KernelUnavailable for an unsuitable GPU.
    """
    return run("fa2", q, k, v, causal, scale)
