"""Host side of quantise_fp8.cu: queries, keys and values to e4m3 for fa3_forward_fp8, with the rotation fused in."""

import ctypes
import math
import threading
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
    Maps,
    StreamState,
    TileGeometry,
    compile_kernel,
    require_hopper,
    tile_geometry,
)
from fa_reference.validation import check_attention_inputs

SOURCE = Path(__file__).with_suffix(".cu")
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
BLOCK = 128  # rows of a tile, of Q and K those that share a scale
MAX_PLANS = 1024  # different shapes remembered at a time
STAGES = 3  # slots of the ring of tiles
LAG = 0.75  # first visits of V beyond a head's, for each block of threads; 0.4 and 2 were slower


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
    """The kernel's `Operand`, field by field."""

    _fields_ = [("scale", ctypes.c_void_p), *((name, ctypes.c_int) for name in ("heads", "blocks", "tiles"))]


class Problem(ctypes.Structure):
    """The kernel's `Problem`, field by field."""

    _fields_ = [
        ("operands", Operand * 3),
        *((name, ctypes.c_void_p) for name in ("signs", "state")),
        ("lag", ctypes.c_int),
    ]


def compile_variant(
    head_dim: int, dtype: torch.dtype, *, rotate: bool = True, v_transposed: bool = True
) -> CompiledKernel:
    """Machine code for sm_90a; needs no GPU."""
    defines = {
        "FA_HEAD_DIM": head_dim,
        "FA_BF16": int(dtype == torch.bfloat16),
        "FA_ROTATE": int(rotate),
        "FA_TRANSPOSE_VALUES": int(v_transposed),
        "FA_STAGES": STAGES,
        "FA_BLOCKS_PER_SM": blocks_per_sm(head_dim),
    }
    return compile_kernel(SOURCE, defines=defines, include_dirs=[SOURCE.parent])


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory of a block of threads: the ring of tiles, and 1 KiB for what is small."""
    return STAGES * BLOCK * head_dim * 2 + 1024


def blocks_per_sm(head_dim: int) -> int:
    """Blocks of threads that fit into an SM: 512 threads with 128 registers each."""
    return 256 // head_dim


def visit_lag(v_tiles: int, v_blocks: int, blocks_at_once: int) -> int:
    """How many more tiles of V are visited once before a tile is visited again.

    v_tiles: of all heads; v_blocks: of a head; blocks_at_once: blocks of threads that run at the same time. Not less
    than a head has, as its scale must be known then, and so many more that these are done and not only begun; not more
    than that, so that V is still in the L2 cache.
    """
    return min(v_tiles, v_blocks + math.ceil(LAG * blocks_at_once))


@cache
def _load(head_dim: int, dtype: torch.dtype, rotate: bool, v_transposed: bool) -> LoadedKernel:
    compiled = compile_variant(head_dim, dtype, rotate=rotate, v_transposed=v_transposed)
    return LoadedKernel(compiled, "quantise_fp8", threads=2 * head_dim, shared_bytes=shared_bytes(head_dim))


class _Plan:
    """All that does not change between calls with tensors of the same shapes, strides, dtypes and device."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, rotate: bool, v_transposed: bool) -> None:
        require_hopper(q.device)
        head_dim = q.shape[3]
        self.device, self.v_transposed = q.device.index, v_transposed
        self.kernel = _load(head_dim, q.dtype, rotate, v_transposed)
        geometry, self.problem = describe(q, k, v, v_transposed=v_transposed)
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        at_once = blocks_per_sm(head_dim) * processors
        values = self.problem.operands[2]
        self.problem.lag = visit_lag(values.tiles, values.blocks, at_once)
        jobs = sum(operand.tiles for operand in self.problem.operands) + values.tiles
        self.grid = (min(at_once, jobs),)
        self.maps = Maps(geometry)
        self.arguments = Arguments(self.maps.descriptors, self.problem)
        self.state = StreamState(2 + values.tiles, q.device)  # the kernel's `State`
        self.lock = threading.Lock()

    def run(self, q: Tensor, k: Tensor, v: Tensor, signs: Tensor | None) -> QuantisedInputs:
        """Allocate the outputs and queue the kernel on the current stream; the plan's device must be current."""
        codes = empty_codes(q, k, v, v_transposed=self.v_transposed)
        counts = (*(operand.tiles for operand in self.problem.operands[:2]), v.shape[0] * v.shape[1])
        q_scale, k_scale, v_scale = torch.empty(sum(counts), dtype=torch.float32, device=q.device).split(counts)
        scales = (q_scale.view(*q.shape[:2], -1), k_scale.view(*k.shape[:2], -1), v_scale.view(*v.shape[:2]))
        with self.lock:  # the arguments are shared by all calls, and copied by the driver when it queues the kernel
            self.maps.point_at((q, k, v, *codes))
            for operand, scale in zip(self.problem.operands, scales, strict=True):
                operand.scale = scale.data_ptr()
            self.problem.signs = 0 if signs is None else signs.data_ptr()
            state = self.state.current()
            self.problem.state = state.data_ptr()
            self.kernel.launch(self.device, self.grid, self.arguments)
        return QuantisedInputs(*codes, *scales, self.v_transposed)


def empty_codes(q: Tensor, k: Tensor, v: Tensor, *, v_transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the codes of q, k and v."""
    q_codes, k_codes = (torch.empty_like(x, dtype=torch.float8_e4m3fn) for x in (q, k))
    if not v_transposed:
        return q_codes, k_codes, torch.empty_like(v, dtype=torch.float8_e4m3fn)
    shape = (*v.shape[:2], v.shape[3], math.ceil(v.shape[2] / BLOCK) * BLOCK)
    return q_codes, k_codes, torch.empty(shape, dtype=torch.float8_e4m3fn, device=v.device)


def describe(q: Tensor, k: Tensor, v: Tensor, *, v_transposed: bool) -> tuple[dict[str, TileGeometry], Problem]:
    """How TMA sees q, k, v and their codes, and the kernel's `Problem` without addresses and order. Needs no GPU."""
    head_dim = q.shape[3]
    geometry = {name: tile_geometry(x, name=name, box_rows=BLOCK) for name, x in (("q", q), ("k", k), ("v", v))}
    for name, x in zip("qkv", empty_codes(q, k, v, v_transposed=v_transposed), strict=True):
        turned = v_transposed and name == "v"
        box = {"box_rows": head_dim, "box_columns": BLOCK} if turned else {"box_rows": BLOCK}
        swizzle_bytes = 128 if turned else min(128, head_dim)
        geometry[f"codes of {name}"] = tile_geometry(x, name="codes", **box, swizzle_bytes=swizzle_bytes)
    problem = Problem()
    for operand, x in zip(problem.operands, (q, k, v), strict=True):
        operand.heads, operand.blocks = x.shape[1], math.ceil(x.shape[2] / BLOCK)
        operand.tiles = x.shape[0] * operand.heads * operand.blocks
    return geometry, problem


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
