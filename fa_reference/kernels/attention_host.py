"""The host's side that the Hopper kernels of the chapters share: check the input, describe it to TMA, compile, launch.

A chapter's own file says what differs: tile sizes, threads, names of the barriers, bytes of shared memory. Every kernel
is called `attention`, computes one tile of `block_q` rows a block of threads, and has these parameters:
(map of Q, map of K, map of V, pointer to O, pointer to lse, Problem, then whatever a chapter adds).
"""

import ctypes
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fa_reference.course import ROOT
from fa_reference.kernels.compile import CompiledKernel, compile_kernel
from fa_reference.kernels.launch import Arguments, LoadedKernel, require_hopper
from fa_reference.kernels.tma import encode, tile_geometry
from fa_reference.validation import check_attention_inputs

ENTRY = "attention"  # the kernel's name in every file
GRID_LIMIT = 65535  # heads and batch are the grid's y and z
WARM_UP, TIMED = 2, 9  # launches of a speed measurement


class Problem(ctypes.Structure):
    """The kernels' `Problem`, field by field; strides in elements."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("len_q", "len_k", "queries_per_key_head")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_longlong) for name in ("o_stride_batch", "o_stride_head", "o_stride_row")),
    ]


@dataclass(frozen=True)
class AttentionKernel:
    """One chapter's kernel: its file and everything about it that the host must know.

    source: the .cu file. barriers: the names in its enum BarrierName, in order and in small letters. block_q: rows of a
    tile. block_k, stages: keys in a block, slots in the rings of K and V. threads: of a block. shared_bytes: dynamic
    shared memory in bytes for a head_dim. dtypes, head_dims: what it is compiled for.
    """

    source: Path
    barriers: tuple[str, ...]
    block_q: int
    block_k: int
    stages: int
    threads: int
    shared_bytes: Callable[[int], int]
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    head_dims: tuple[int, ...] = (64, 128)

    def build(
        self,
        head_dim: int,
        dtype: torch.dtype,
        causal: bool,
        *,
        debug: bool = False,
        source: Path | None = None,
        defines: Mapping[str, int] | None = None,
    ) -> CompiledKernel:
        """Machine code of one variant for sm_90a; needs no GPU.

        `debug` bounds every wait at an mbarrier, `source` replaces the kernel's file, `defines` are further macros.
        KernelCompileError names the line that the compiler did not take.
        """
        macros = {
            "FA_HEAD_DIM": head_dim,
            "FA_BLOCK_K": self.block_k,
            "FA_STAGES": self.stages,
            "FA_CAUSAL": int(causal),
            "FA_BF16": int(dtype == torch.bfloat16),
            **({"FA_DEBUG": 1} if debug else {}),
            **(defines or {}),
        }
        return compile_kernel(source or self.source, defines=macros, include_dirs=[ROOT / "cuda"])

    def machine_code(self, head_dim: int, dtype: torch.dtype, causal: bool) -> tuple[Tensor, str]:
        """The variant's machine code as bytes (uint8), and the compiler's log: what the checks look at."""
        compiled = self.build(head_dim, dtype, causal)
        return torch.frombuffer(bytearray(compiled.cubin), dtype=torch.uint8), compiled.log

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        debug: bool = False,
        source: Path | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention (o, lse) on an H100 or H200.

        q (B, Hq, Nq, d); k, v (B, Hkv, Nk, d), Hq a multiple of Hkv; any strides with a contiguous last dimension that
        TMA can express (multiples of 16 bytes). Returns o with q's shape and dtype and lse (B, Hq, Nq) fp32, natural
        log; a row without visible keys has o = 0 and lse = -inf. `causal` is aligned bottom-right; `scale` defaults to
        1/sqrt(d). `debug` uses the build with bounded waits and raises KernelDeadlock instead of hanging; `source`
        replaces the kernel's file. Raises ValueError for bad input, KernelUnavailable without such a GPU.
        """
        number = self.check(q, k, v, causal=causal, scale=scale)
        o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        self.launch(q, k, v, o, lse, causal=causal, scale=number, debug=debug, source=source)
        return o, lse

    def check(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> float:
        """The scale as a number; ValueError for input that the kernel does not take, before any launch."""
        number = check_attention_inputs(
            q, k, v, causal=causal, scale=scale, dtypes=self.dtypes, head_dims=self.head_dims, devices=("cuda",)
        )
        if max(q.shape[:2]) > GRID_LIMIT:
            raise ValueError(
                f"q has batch {q.shape[0]} and heads_q {q.shape[1]}; allowed: at most {GRID_LIMIT} each, as they are "
                "the grid's z and y"
            )
        return number

    def launch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
        debug: bool = False,
        source: Path | None = None,
        extra: Sequence[ctypes._SimpleCData | ctypes.Array | ctypes.Structure] = (),
    ) -> None:
        """Queue the kernel on checked tensors; it writes o and lse. `extra`: parameters behind Problem."""
        batch, heads_q, len_q, head_dim = q.shape
        heads_kv, len_k = k.shape[1:3]
        if len_k == 0:
            o.zero_(), lse.fill_(-math.inf)
            return
        require_hopper(q.device)
        with torch.cuda.device(q.device):
            maps = (
                encode(tile_geometry(tensor, name=name, box_rows=rows), tensor.data_ptr())
                for name, tensor, rows in (("q", q, self.block_q), ("k", k, self.block_k), ("v", v, self.block_k))
            )
            problem = Problem(len_q, len_k, heads_q // heads_kv, scale, *o.stride()[:3])
            pointers = (ctypes.c_void_p(o.data_ptr()), ctypes.c_void_p(lse.data_ptr()))
            kernel = loaded(self, head_dim, q.dtype, causal, debug, source or self.source)
            grid = (math.ceil(len_q / self.block_q), heads_q, batch)
            kernel.launch(q.device.index, grid, Arguments(*maps, *pointers, problem, *extra))
        if debug:
            kernel.check_deadlock(self.barriers)

    def milliseconds(self, batch: int, heads: int, length: int, head_dim: int, causal: bool) -> float:
        """Median time of one launch on random bfloat16 input stored as (batch, len, heads, d), in milliseconds."""
        shape = (batch, length, heads, head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        times = []
        for _ in range(WARM_UP + TIMED):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # the GPU waits here until the launch is queued
            start.record()
            self.forward(q, k, v, causal=causal)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times[WARM_UP:])[TIMED // 2]


@cache
def loaded(
    kernel: AttentionKernel, head_dim: int, dtype: torch.dtype, causal: bool, debug: bool, source: os.PathLike[str]
) -> LoadedKernel:
    """The variant on the GPU, the same one that `launch` uses."""
    compiled = kernel.build(head_dim, dtype, causal, debug=debug, source=Path(source))
    return LoadedKernel(compiled, ENTRY, threads=kernel.threads, shared_bytes=kernel.shared_bytes(head_dim))
