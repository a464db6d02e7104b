"""Host side of fp8.cu: quantise, check the scales, launch.

`forward` is all of FP8 attention, bf16 in and out; `forward_fp8` is the kernel alone, on codes that exist already.
It quantises with the course's own functions, so that the kernel can be graded before quantise.py is written.
"""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from fa_reference.fp8 import quantize, random_signs, rotate
from fa_reference.fp8.attention import check_scale
from fa_reference.kernels.attention_host import AttentionKernel
from fa_reference.validation import check_attention_inputs

SOURCE = Path(__file__).resolve().with_suffix(".cu")
E4M3 = torch.float8_e4m3fn
HEAD_DIM = 128
BLOCK_Q = 128  # two consumer warpgroups of 64 rows
BLOCK_K, STAGES = 128, 2  # keys in a block; slots in each ring
THREADS = 384  # one producer warpgroup, two consumers


class Scales(ctypes.Structure):
    """The kernel's `Scales`, field by field: pointers to float32, and how many scales a head of q and of k has."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "qkv"),
        *((name, ctypes.c_int) for name in ("q_blocks", "k_blocks")),
    ]


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory: Q, the rings of K, of V as it comes and of V turned round, and 1 KiB for the barriers."""
    return head_dim * (BLOCK_Q + 3 * STAGES * BLOCK_K) + 1024


KERNEL = AttentionKernel(
    source=SOURCE,
    barriers=("q_full", "k_full", "k_empty", "v_rows_full", "v_full", "v_empty"),  # as in the kernel's BarrierName
    block_q=BLOCK_Q,
    block_k=BLOCK_K,
    stages=STAGES,
    threads=THREADS,
    shared_bytes=shared_bytes,
    dtypes=(E4M3,),
    head_dims=(HEAD_DIM,),
)
machine_code = KERNEL.machine_code


def _checked(name: str, scale: Tensor, x: Tensor, block: int | None) -> Tensor:
    """The scales, contiguous; ValueError for a wrong type, shape, dtype or device. Values are not looked at."""
    allowed = {tuple(x.shape[:2]): "one a head"}
    if block is not None:
        allowed[*x.shape[:2], math.ceil(x.shape[2] / block)] = f"one for every {block} rows"
    check_scale(name, scale, allowed, values=False)
    if scale.device != x.device:
        raise ValueError(f"{name} is on device {scale.device}; allowed: {x.device}, where its codes are")
    return scale.contiguous()


def forward_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    causal: bool = False,
    scale: float | None = None,
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of codes on an H100 or H200: (o bfloat16, lse float32).

    q (B, Hq, Nq, 128), k and v (B, Hkv, Nk, 128), torch.float8_e4m3fn, strides as in chapter 9 (multiples of 16 bytes).
    Scales float32: q_scale (B, Hq) or (B, Hq, ceil(Nq / 128)), k_scale (B, Hkv) or (B, Hkv, ceil(Nk / 128)), v_scale
    (B, Hkv). Raises ValueError for bad input, KernelUnavailable without such a GPU; debug: KernelDeadlock, not a hang.
    """
    number = KERNEL.check(q, k, v, causal=causal, scale=scale)
    tensors = (
        _checked("q_scale", q_scale, q, BLOCK_Q),
        _checked("k_scale", k_scale, k, BLOCK_K),
        _checked("v_scale", v_scale, v, None),
    )
    blocks = (s.shape[2] if s.dim() == 3 else 1 for s in tensors[:2])
    scales = Scales(*(s.data_ptr() for s in tensors), *blocks)
    o = torch.empty_like(q, dtype=torch.bfloat16)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    KERNEL.launch(q, k, v, o, lse, causal=causal, scale=number, debug=debug, extra=[scales])
    return o, lse


def quantised(q: Tensor, k: Tensor, v: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of `forward_fp8`: Q and K rotated, with a scale for every 128 rows; V with one a head."""
    signs = random_signs(q.shape[-1], seed).to(q.device)
    arguments = {}
    for name, x in (("q", rotate(q, signs)), ("k", rotate(k, signs)), ("v", v)):
        quantised = quantize(x, "head" if name == "v" else "block", BLOCK_K, name)
        arguments[name] = quantised.data
        arguments[f"{name}_scale"] = quantised.scale[..., 0] if name == "v" else quantised.scale
    return arguments


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """FP8 attention of bfloat16 tensors on an H100 or H200, quantised on the way: (o bfloat16, lse float32).

    q (B, Hq, Nq, 128), k and v (B, Hkv, Nk, 128). Quantising in torch, step by step, takes far longer than attention:
    for speed, quantise once and call forward_fp8. Raises as forward_fp8, and ValueError for NaN or infinity.
    """
    check_attention_inputs(
        q, k, v, causal=causal, scale=scale, dtypes=(torch.bfloat16,), head_dims=(HEAD_DIM,), devices=("cuda",)
    )
    if k.shape[2] == 0:
        return torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, device=q.device)
    return forward_fp8(**quantised(q, k, v), causal=causal, scale=scale, debug=debug)


def milliseconds(batch: int, heads: int, length: int, head_dim: int, causal: bool) -> float:
    """Median time of one launch of the kernel alone on quantised random input, in milliseconds."""
    shape = (batch, length, heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    arguments = quantised(q, k, v)
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # the GPU waits here until the launch is queued
        start.record()
        forward_fp8(**arguments, causal=causal)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[4]
