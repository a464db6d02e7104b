"""Host side of quantise_fp8.cu: queries, keys and values to e4m3 for fa3_forward_fp8, with the rotation fused in."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fa_reference.fp8.hadamard import check_signs
from fa_reference.fp8.scales import check_finite
from fa_reference.kernels import (
    Arguments,
    CompiledKernel,
    LoadedKernel,
    check_address,
    compile_kernel,
    require_hopper,
    tile_geometry,
)
from fa_reference.validation import check_attention_inputs

SOURCE = Path(__file__).with_suffix(".cu")
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
BLOCK = 128  # rows of Q or K that share a scale; keys of V that one block of threads takes
MAX_PLANS = 1024  # different shapes remembered at a time
FIRST, SECOND = "quantise_fp8", "quantise_fp8_values"  # the kernels


@dataclass(frozen=True)
class QuantisedInputs:
    """Codes (torch.float8_e4m3fn) and float32 scales as `fa3_forward_fp8.forward_fp8` takes them."""

    q: Tensor
    """(B, Hq, Nq, d), with q's strides if those leave no gaps."""
    k: Tensor
    """(B, Hkv, Nk, d)."""
    v: Tensor
    """(B, Hkv, Nk, d), or transposed (B, Hkv, d, Nk rounded up to a multiple of 128)."""
    q_scale: Tensor
    """(B, Hq, ceil(Nq / 128))."""
    k_scale: Tensor
    """(B, Hkv, ceil(Nk / 128))."""
    v_scale: Tensor
    """(B, Hkv)."""
    v_transposed: bool

    def arguments(self) -> dict:
        """Everything but causal and scale, for forward_fp8(**...)."""
        return dict(vars(self))


class Operand(ctypes.Structure):
    """The kernels' `Operand`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "amax")),
        *((name, ctypes.c_int) for name in ("heads", "len", "blocks")),
        *((f"x_stride_{axis}", ctypes.c_longlong) for axis in ("batch", "head", "row")),
        *((f"codes_stride_{axis}", ctypes.c_longlong) for axis in ("batch", "head", "row")),
    ]


def compile_variant(
    head_dim: int, dtype: torch.dtype, *, rotate: bool = True, v_transposed: bool = True
) -> CompiledKernel:
    """Machine code of both kernels for sm_90a; needs no GPU."""
    defines = {
        "FA_HEAD_DIM": head_dim,
        "FA_BF16": int(dtype == torch.bfloat16),
        "FA_ROTATE": int(rotate),
        "FA_TRANSPOSE_VALUES": int(v_transposed),
    }
    return compile_kernel(SOURCE, defines=defines, include_dirs=[SOURCE.parent])


@cache
def _load(head_dim: int, dtype: torch.dtype, rotate: bool, v_transposed: bool) -> tuple[LoadedKernel, LoadedKernel]:
    compiled = compile_variant(head_dim, dtype, rotate=rotate, v_transposed=v_transposed)
    return tuple(LoadedKernel(compiled, name, threads=2 * head_dim) for name in (FIRST, SECOND))


class _Plan:
    """All that does not change between calls with tensors of the same shapes, strides, dtypes and device."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, rotate: bool, v_transposed: bool) -> None:
        require_hopper(q.device)
        head_dim = q.shape[3]
        for name, x in (("q", q), ("k", k), ("v", v)):
            tile_geometry(x, name=name, box_rows=BLOCK)  # 16-byte loads need what TMA needs
        self.device = q.device.index
        self.kernels = _load(head_dim, q.dtype, rotate, v_transposed)
        self.blocks = [x.shape[0] * x.shape[1] * math.ceil(x.shape[2] / BLOCK) for x in (q, k, v)]
        v_codes = (*v.shape[:2], head_dim, math.ceil(v.shape[2] / BLOCK) * BLOCK) if v_transposed else None
        self.code_shapes = (None, None, v_codes)
        self.operands = [self._operand(x, shape) for x, shape in zip((q, k, v), self.code_shapes, strict=True)]
        self.signs = ctypes.c_void_p()
        counts = [ctypes.c_int(n) for n in self.blocks[:2]]
        self.first = Arguments(*self.operands, self.signs, *counts)
        self.second = Arguments(self.operands[2])
        self.v_transposed = v_transposed

    @staticmethod
    def _codes(x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        if shape is None:
            return torch.empty_like(x, dtype=torch.float8_e4m3fn)
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)

    def _operand(self, x: Tensor, code_shape: tuple[int, ...] | None) -> Operand:
        codes = self._codes(x, code_shape)
        tile_geometry(codes, name="codes", box_rows=1, swizzle_bytes=min(128, codes.shape[3]))
        blocks = math.ceil(x.shape[2] / BLOCK)
        return Operand(None, None, None, None, x.shape[1], x.shape[2], blocks, *x.stride()[:3], *codes.stride()[:3])

    def run(self, q: Tensor, k: Tensor, v: Tensor, signs: Tensor | None) -> QuantisedInputs:
        """Allocate the outputs and queue both kernels on the current stream; the plan's device must be current."""
        inputs = (q, k, v)
        codes = [self._codes(x, shape) for x, shape in zip(inputs, self.code_shapes, strict=True)]
        counts = (*self.blocks, v.shape[0] * v.shape[1])  # scales of Q and K, amax and scales of V
        room = torch.empty(sum(counts), dtype=torch.float32, device=q.device)
        q_scale, k_scale, amax, v_scale = room.split(counts)
        scales = (
            q_scale.view(*q.shape[:2], -1),
            k_scale.view(*k.shape[:2], -1),
            v_scale.view(*v.shape[:2]),
        )
        for name, operand, x, code, scale in zip("qkv", self.operands, inputs, codes, scales, strict=True):
            check_address(x.data_ptr(), name)
            operand.x, operand.codes, operand.scale = x.data_ptr(), code.data_ptr(), scale.data_ptr()
        self.operands[2].amax = amax.data_ptr()
        self.signs.value = 0 if signs is None else signs.data_ptr()
        self.kernels[0].launch(self.device, (sum(self.blocks),), self.first)
        self.kernels[1].launch(self.device, (self.blocks[2],), self.second)
        return QuantisedInputs(*codes, *scales, self.v_transposed)


_plans: dict[tuple, _Plan] = {}
_checked_signs: dict[tuple[int, torch.device], Tensor] = {}


def quantise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    signs: Tensor | None,
    v_transposed: bool = True,
    check: bool = False,
) -> QuantisedInputs:
    """Rotate and quantise the inputs of an attention on an H100 or H200; head_dim 64, 128 or 256.

    q (B, Hq, Nq, d); k, v (B, Hkv, Nk, d), float16 or bfloat16, any strides with a contiguous last dimension and the
    others multiples of 16 bytes. signs (d,), float32 of +1 and -1 on the same device (`random_signs`): Q and K are
    rotated by them, V is not; None: no rotation. With v_transposed V's codes come in the layout that forward_fp8 needs
    no turning for. The codes and scales are bit for bit those of fa_reference.fp8: `rotate`, then `quantize(x,
    "block", 128)` for Q and K, `quantize(v, "head")` for V.
    Finite input never gives NaN: a block of zeros has scale 1. A block (of V: a head) that holds NaN or infinity gets
    such a scale, and every output that depends on it is NaN. `check` raises ValueError instead, naming the first bad
    position, which waits for the GPU. Raises ValueError for other bad input, KernelUnavailable without such a GPU.
    """
    key = None
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        key = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype)
        key += (q.device, k.device, v.device, signs is None, v_transposed)
    plan = _plans.get(key)
    if plan is None:
        check_attention_inputs(q, k, v, dtypes=DTYPES, head_dims=HEAD_DIMS, devices=("cuda",))
        if k.shape[2] == 0:
            raise ValueError(f"k has shape {tuple(k.shape)}; allowed: at least one key to quantise")
        with torch.cuda.device(q.device):
            plan = _Plan(q, k, v, rotate=signs is not None, v_transposed=v_transposed)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    if signs is not None:
        signs = _signs_of(signs, q)
    if check:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_finite(x, name)
    with torch.cuda.device(plan.device):
        return plan.run(q, k, v, signs)


def _signs_of(signs: Tensor, q: Tensor) -> Tensor:
    """The signs as the kernel reads them; checking their values waits for the GPU, so it is done once a tensor."""
    known = _checked_signs.get((id(signs), signs.device)) if isinstance(signs, Tensor) else None
    if known is not signs:
        if not isinstance(signs, Tensor) or signs.device != q.device or signs.dtype != torch.float32:
            what = f"{signs.dtype} on {signs.device}" if isinstance(signs, Tensor) else type(signs).__name__
            raise ValueError(
                f"signs is {what}; allowed: a float32 tensor on {q.device}, random_signs(head_dim).to(...)"
            )
        check_signs(q, signs)
        if len(_checked_signs) >= MAX_PLANS:
            _checked_signs.clear()
        _checked_signs[id(signs), signs.device] = signs
    if signs.shape[0] != q.shape[3]:
        raise ValueError(f"signs has shape {tuple(signs.shape)}; allowed: ({q.shape[3]},), one sign a channel of q")
    return signs if signs.is_contiguous() and signs.data_ptr() % 16 == 0 else signs.clone()  # read four at a time
