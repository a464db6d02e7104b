"""Host side of fa3.cu: checks the input and launches one block of threads a tile."""

import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fa_reference.course import ROOT
from fa_reference.kernels import (
    Arguments,
    CompiledKernel,
    LoadedKernel,
    compile_kernel,
    encode,
    require_hopper,
    tile_geometry,
)
from fa_reference.validation import check_attention_inputs

SOURCE = Path(__file__).resolve().with_suffix(".cu")
BARRIER_NAMES = ("q_full", "k_full", "k_empty", "v_full", "v_empty")  # as in the kernel's BarrierName
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCK_Q = 128  # two consumer warpgroups of 64 rows
BLOCK_K, STAGES = 128, 2  # keys in a block; slots in the rings of K and V
THREADS = 384  # one producer warpgroup, two consumers
GRID_LIMIT = 65535  # heads and batch are the grid's y and z


class Problem(ctypes.Structure):
    """The kernel's `Problem`, field by field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("len_q", "len_k", "queries_per_key_head")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_longlong) for name in ("o_stride_batch", "o_stride_head", "o_stride_row")),
    ]


def build(
    head_dim: int, dtype: torch.dtype, causal: bool, *, debug: bool = False, source: Path = SOURCE
) -> CompiledKernel:
    """Machine code of one variant; needs no GPU. `debug` bounds every wait at an mbarrier."""
    defines = {
        "FA_HEAD_DIM": head_dim,
        "FA_BLOCK_K": BLOCK_K,
        "FA_STAGES": STAGES,
        "FA_CAUSAL": int(causal),
        "FA_BF16": int(dtype == torch.bfloat16),
    }
    if debug:
        defines["FA_DEBUG"] = 1
    return compile_kernel(source, defines=defines, include_dirs=[ROOT / "cuda"])


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory: Q, the two rings, and 1 KiB for the barriers."""
    return 2 * head_dim * (BLOCK_Q + 2 * STAGES * BLOCK_K) + 1024


@cache
def _loaded(head_dim: int, dtype: torch.dtype, causal: bool, debug: bool, source: Path) -> LoadedKernel:
    compiled = build(head_dim, dtype, causal, debug=debug, source=source)
    return LoadedKernel(compiled, "attention", threads=THREADS, shared_bytes=shared_bytes(head_dim))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    debug: bool = False,
    source: Path = SOURCE,
) -> tuple[Tensor, Tensor]:
    """Attention (o, lse) on an H100 or H200, fp16 or bf16, head_dim 64 or 128.

    q (B, Hq, Nq, d); k, v (B, Hkv, Nk, d), Hq a multiple of Hkv; any strides with a contiguous last dimension that TMA
    can express (multiples of 16 bytes). Returns o with q's shape and dtype and lse (B, Hq, Nq) fp32, natural log; a row
    without visible keys has o = 0 and lse = -inf. `causal` is aligned bottom-right; `scale` defaults to 1/sqrt(d).
    `debug` uses the build with bounded waits and raises KernelDeadlock instead of hanging; `source` replaces the
    kernel's file. Raises ValueError for bad input, KernelUnavailable without such a GPU.
    """
    number = check_attention_inputs(
        q, k, v, causal=causal, scale=scale, dtypes=DTYPES, head_dims=HEAD_DIMS, devices=("cuda",)
    )
    batch, heads_q, len_q, head_dim = q.shape
    heads_kv, len_k = k.shape[1:3]
    if max(batch, heads_q) > GRID_LIMIT:
        raise ValueError(f"q has batch {batch} and heads_q {heads_q}; allowed: at most {GRID_LIMIT} each")
    o, lse = torch.empty_like(q), torch.empty(batch, heads_q, len_q, dtype=torch.float32, device=q.device)
    if len_k == 0:
        return o.zero_(), lse.fill_(-math.inf)
    require_hopper(q.device)
    with torch.cuda.device(q.device):
        maps = (
            encode(tile_geometry(tensor, name=name, box_rows=rows), tensor.data_ptr())
            for name, tensor, rows in (("q", q, BLOCK_Q), ("k", k, BLOCK_K), ("v", v, BLOCK_K))
        )
        problem = Problem(len_q, len_k, heads_q // heads_kv, number, *o.stride()[:3])
        pointers = (ctypes.c_void_p(o.data_ptr()), ctypes.c_void_p(lse.data_ptr()))
        kernel = _loaded(head_dim, q.dtype, causal, debug, source)
        grid = (math.ceil(len_q / BLOCK_Q), heads_q, batch)
        kernel.launch(q.device.index, grid, Arguments(*maps, *pointers, problem))
    if debug:
        kernel.check_deadlock(BARRIER_NAMES)
    return o, lse
