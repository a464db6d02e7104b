"""Host side of fa3_forward.cu: checks the input, picks tiles, describes the tensors to TMA and launches."""

import ctypes
import dataclasses
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fa_reference.kernels import CompiledKernel, LoadedKernel, compile_kernel, require_hopper, tile_geometry
from fa_reference.kernels.persistent import SCHEDULE_FIELDS, PersistentLauncher, schedule
from fa_reference.kernels.tile_choice import Speed, fastest
from fa_reference.validation import check_attention_inputs

SOURCE = Path(__file__).with_suffix(".cu")
BARRIER_NAMES = ("q_full", "q_empty", "k_full", "k_empty", "v_full", "v_empty")  # as in the kernel's BarrierName
DTYPES = (torch.float16, torch.bfloat16)
MAX_PLANS = 1024  # different shapes remembered at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes and register split of one variant of the kernel."""

    head_dim: int
    consumers: int  # warpgroups of 64 query rows
    block_k: int
    producer_registers: int
    consumer_registers: int
    query_stages: int = 2
    stages: int = 2
    blocks_per_sm: int = 1

    @property
    def block_q(self) -> int:
        """Query rows of a tile."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers and one producer warpgroup."""
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: Q, the two rings, O on its way out, and 1 KiB for barriers and the tile in work."""
        rows = self.query_stages * self.block_q + 2 * self.stages * self.block_k
        return 2 * (self.head_dim * rows + self.output_columns * self.block_q) + 1024

    @property
    def output_columns(self) -> int:
        """Columns of O that a consumer hands to TMA at a time."""
        return min(self.head_dim, 128)


# (head_dim, causal) -> tile. Registers: (1 x producer + consumers x consumer) x 128 must not exceed what the block has.
CONFIGS = {
    (64, False): Config(64, 3, 96, 32, 160),
    (64, True): Config(64, 3, 96, 32, 160),
    (128, False): Config(128, 2, 128, 24, 240),
    (128, True): Config(128, 2, 128, 24, 240),
    (256, False): Config(256, 2, 64, 24, 240, query_stages=1),
    (256, True): Config(256, 2, 64, 24, 240, query_stages=1),
}
# Short sequences: three blocks share an SM, each with a small tile, so that one's beginning and end run under the
# others' products. Long ones lose by that, as K and V are loaded for 64 queries instead of 192.
SHORT = {64: Config(64, 1, 64, 24, 136, blocks_per_sm=3)}
SPEEDS = {64: (Speed(1.0, 39_500), Speed(0.95, 10_600))}  # of main and short; fitted on an H100 (LOG.md, section 8)
HEAD_DIMS = tuple(sorted({head_dim for head_dim, _ in CONFIGS}))


def choose_config(head_dim: int, len_q: int, len_k: int, causal: bool) -> Config:
    """The tile sizes that should take the least time for these lengths."""
    main = CONFIGS[head_dim, causal]
    if head_dim not in SHORT:
        return main
    return fastest((main, SHORT[head_dim]), SPEEDS[head_dim], len_q, len_k, causal)


class Problem(ctypes.Structure):
    """The kernel's `Problem`, field by field."""

    _fields_ = [*SCHEDULE_FIELDS, ("scale", ctypes.c_float)]


def compile_config(
    config: Config, *, causal: bool, dtype: torch.dtype, debug: bool = False, source: Path = SOURCE
) -> CompiledKernel:
    """Machine code for one variant; needs no GPU. `debug` bounds every barrier wait."""
    defines = {
        "FA_HEAD_DIM": config.head_dim,
        "FA_CONSUMERS": config.consumers,
        "FA_BLOCK_K": config.block_k,
        "FA_STAGES": config.stages,
        "FA_QUERY_STAGES": config.query_stages,
        "FA_BLOCKS_PER_SM": config.blocks_per_sm,
        "FA_CAUSAL": int(causal),
        "FA_BF16": int(dtype == torch.bfloat16),
        "FA_PRODUCER_REGISTERS": config.producer_registers,
        "FA_CONSUMER_REGISTERS": config.consumer_registers,
    }
    if debug:
        defines["FA_DEBUG"] = 1
    return compile_kernel(source, defines=defines, include_dirs=[SOURCE.parent])


@cache
def _load(config: Config, causal: bool, dtype: torch.dtype, debug: bool, source: Path) -> LoadedKernel:
    compiled = compile_config(config, causal=causal, dtype=dtype, debug=debug, source=source)
    return LoadedKernel(compiled, "fa3_forward", threads=config.threads, shared_bytes=config.shared_bytes)


def _launcher(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, config: Config, debug: bool, source: Path
) -> PersistentLauncher:
    require_hopper(q.device)
    geometry = {
        "q": tile_geometry(q, name="q", box_rows=config.block_q),
        "k": tile_geometry(k, name="k", box_rows=config.block_k),
        "v": tile_geometry(v, name="v", box_rows=config.block_k),
        "o": tile_geometry(torch.empty_like(q), name="o", box_rows=64, box_columns=config.output_columns),
    }
    order = schedule(q, k, block_q=config.block_q, causal=causal, blocks_per_sm=config.blocks_per_sm)
    kernel, problem = _load(config, causal, q.dtype, debug, source), Problem(*order, scale)
    return PersistentLauncher(kernel, geometry, problem, q.device, outputs=1, blocks_per_sm=config.blocks_per_sm)


_plans: dict[tuple, PersistentLauncher] = {}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    config: Config | None = None,
    debug: bool = False,
    source: Path = SOURCE,
) -> tuple[Tensor, Tensor]:
    """FlashAttention-3 forward on an H100 or H200, fp16 or bf16, head_dim 64, 128 or 256.

    q (B, Hq, Nq, d); k, v (B, Hkv, Nk, d), Hq a multiple of Hkv; any strides with a contiguous last dimension that TMA
    can express (multiples of 16 bytes). Returns o with q's shape and dtype and lse (B, Hq, Nq) fp32, natural log; a row
    without visible keys has o = 0 and lse = -inf. `causal` is aligned bottom-right; `scale` defaults to 1/sqrt(d).
    `config` replaces the tile sizes; `debug` uses the build with bounded waits and raises KernelDeadlock instead of
    hanging; `source` replaces the kernel's file. Raises ValueError for bad input, KernelUnavailable without such a GPU.
    """
    plan = key = None
    if all(isinstance(tensor, Tensor) for tensor in (q, k, v)):
        key = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype)
        key += (q.device, k.device, v.device, causal, scale, config, debug, source)
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            plan = _plans.get(key)
    if plan is None:
        number = check_attention_inputs(
            q, k, v, causal=causal, scale=scale, dtypes=DTYPES, head_dims=HEAD_DIMS, devices=("cuda",)
        )
        if k.shape[2] == 0:
            return torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, device=q.device)
        chosen = config or choose_config(q.shape[3], q.shape[2], k.shape[2], causal)
        with torch.cuda.device(q.device):
            plan = _launcher(q, k, v, causal=causal, scale=number, config=chosen, debug=debug, source=source)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    with torch.cuda.device(plan.device):
        o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        plan.launch((q, k, v, o), (lse,))
    if debug:
        plan.check_deadlock(BARRIER_NAMES)
    return o, lse
