"""Host side of fa3_forward_fp8.cu: checks codes and scales, picks tiles, describes the tensors to TMA and launches."""

import ctypes
import dataclasses
import math
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fa_reference.fp8.attention import check_scale
from fa_reference.fp8.hadamard import random_signs
from fa_reference.kernels import CompiledKernel, LoadedKernel, compile_kernel, require_hopper, tile_geometry
from fa_reference.kernels.persistent import SCHEDULE_FIELDS, PersistentLauncher, schedule
from fa_reference.kernels.tile_choice import Speed, fastest
from fa_reference.validation import check_attention_inputs
from fa_reference.versions import load_file

SOURCE = Path(__file__).with_suffix(".cu")
# As in the kernel's BarrierName.
BARRIER_NAMES = ("q_full", "q_empty", "k_full", "k_empty", "v_full", "v_empty", "turned_full", "turned_empty")
SCALE_ROWS = 128  # rows of Q or K that share a scale, if a head has more than one
KEY_PADDING = 128  # a transposed V has a multiple of this many keys
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
    pingpong: bool = True
    polynomial: int = 0  # of eight exponentials this many on the FMA units
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
    def turned_span(self) -> int:
        """Keys, and bytes, of a row of V^T that lie together in shared memory."""
        return math.gcd(self.block_k, 128)

    def shared_bytes(self, turns_values: bool) -> int:
        """Dynamic shared memory: Q, the rings (turned V's only where V is turned), and 1 KiB for barriers and tiles."""
        rings = 3 if turns_values else 2
        blocks = self.query_stages * self.block_q + rings * self.stages * self.block_k
        out = 2 * self.block_q * min(self.head_dim, 128)
        return self.head_dim * blocks + out + 1024 + (0 if turns_values else 1024)


# (head_dim, causal) -> tile. Registers: (1 x producer + consumers x consumer) x 128 must not exceed what the block has.
# Without turns: they cost up to 6 % here, unlike in 16 bits. At head_dim 128 without a mask two blocks share an SM: as
# many consumers as in one block with two, but their tiles need not begin and end together.
CONFIGS = {
    (64, False): Config(64, 3, 128, 32, 160, pingpong=False, polynomial=1),
    (64, True): Config(64, 3, 128, 32, 160, pingpong=False, polynomial=1),
    (128, False): Config(128, 1, 128, 24, 232, pingpong=False, blocks_per_sm=2),
    (128, True): Config(128, 2, 128, 24, 240, pingpong=False),
    (256, False): Config(256, 2, 64, 24, 240, query_stages=1, pingpong=False),
    (256, True): Config(256, 2, 64, 24, 240, query_stages=1, pingpong=False),
}
# Short sequences, as in fa3_forward.py.
SHORT = {64: Config(64, 1, 64, 24, 136, pingpong=False, blocks_per_sm=3)}
SPEEDS = {
    64: (Speed(1.0, 81_000), Speed(0.867, 16_000))
}  # of main and short; fitted on an H100 (LOG_FP8.md, section 5)
# Where V is turned in the kernel: the turning warps need registers, and longer blocks hide more of their latency.
TURNING_CONFIGS = {
    (64, False): Config(64, 3, 128, 32, 160, polynomial=1),
    (64, True): Config(64, 3, 128, 32, 160, polynomial=1),
    (128, False): Config(128, 2, 128, 40, 232),
    (128, True): Config(128, 2, 128, 40, 232),
    (256, False): Config(256, 2, 96, 40, 232, query_stages=1),
    (256, True): Config(256, 2, 96, 40, 232, query_stages=1),
}
# A second accumulator as large as O must find room. Not at head_dim 256.
TWO_LEVEL_CONFIGS = {64: Config(64, 2, 128, 24, 240), 128: Config(128, 2, 96, 24, 240)}
HEAD_DIMS = tuple(sorted({head_dim for head_dim, _ in CONFIGS}))


def default_config(head_dim: int, *, causal: bool, v_transposed: bool, two_level: bool) -> Config:
    """The tile sizes for long sequences, unless others are asked for."""
    if two_level:
        return TWO_LEVEL_CONFIGS[head_dim]
    return (CONFIGS if v_transposed else TURNING_CONFIGS)[head_dim, causal]


def choose_config(
    head_dim: int, len_q: int, len_k: int, *, causal: bool, v_transposed: bool, two_level: bool
) -> Config:
    """The tile sizes that should take the least time for these lengths."""
    main = default_config(head_dim, causal=causal, v_transposed=v_transposed, two_level=two_level)
    if head_dim not in SHORT or two_level or not v_transposed:
        return main
    return fastest((main, SHORT[head_dim]), SPEEDS[head_dim], len_q, len_k, causal)


class Problem(ctypes.Structure):
    """The kernel's `Problem`, field by field."""

    _fields_ = [
        *SCHEDULE_FIELDS,
        *((name, ctypes.c_int) for name in ("q_scales", "k_scales", "v_scales")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q_scale", "k_scale", "v_scale")),
    ]


def compile_config(
    config: Config,
    *,
    causal: bool,
    v_transposed: bool = False,
    two_level: bool = False,
    debug: bool = False,
    source: Path = SOURCE,
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
        "FA_TURNS_VALUES": int(not v_transposed),
        "FA_PINGPONG": int(config.pingpong),
        "FA_TWO_LEVEL": int(two_level),
        "FA_POLYNOMIAL": config.polynomial,
        "FA_PRODUCER_REGISTERS": config.producer_registers,
        "FA_CONSUMER_REGISTERS": config.consumer_registers,
    }
    if debug:
        defines["FA_DEBUG"] = 1
    return compile_kernel(source, defines=defines, include_dirs=[SOURCE.parent])


@cache
def _load(config: Config, causal: bool, v_transposed: bool, two_level: bool, debug: bool, source: Path) -> LoadedKernel:
    compiled = compile_config(
        config, causal=causal, v_transposed=v_transposed, two_level=two_level, debug=debug, source=source
    )
    shared_bytes = config.shared_bytes(not v_transposed)
    return LoadedKernel(compiled, "fa3_forward_fp8", threads=config.threads, shared_bytes=shared_bytes)


def channel_order(head_dim: int) -> Tensor:
    """The channel in every row of V^T: of each 16 the even ones first. int64, (head_dim,)."""
    row = torch.arange(head_dim)
    return row // 16 * 16 + 2 * (row % 8) + row // 8 % 2


def padded_keys(len_k: int) -> int:
    """Columns of a transposed V: len_k rounded up to whole blocks."""
    return math.ceil(len_k / KEY_PADDING) * KEY_PADDING


def _launcher(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[int, int, int],
    *,
    causal: bool,
    scale: float,
    config: Config,
    v_transposed: bool,
    two_level: bool,
    debug: bool,
    source: Path,
) -> PersistentLauncher:
    require_hopper(q.device)
    span = min(128, q.shape[3])
    o = torch.empty_like(q, dtype=torch.bfloat16)
    if v_transposed:
        columns = {"box_rows": q.shape[3], "box_columns": config.block_k, "swizzle_bytes": config.turned_span}
    else:
        columns = {"box_rows": config.block_k, "swizzle_bytes": span}
    geometry = {
        "q": tile_geometry(q, name="q", box_rows=config.block_q, swizzle_bytes=span),
        "k": tile_geometry(k, name="k", box_rows=config.block_k, swizzle_bytes=span),
        "v": tile_geometry(v, name="v", **columns),
        "o": tile_geometry(o, name="o", box_rows=64, box_columns=min(q.shape[3], 128)),
    }
    order = schedule(q, k, block_q=config.block_q, causal=causal, blocks_per_sm=config.blocks_per_sm)
    problem = Problem(*order, *scales, scale)
    kernel = _load(config, causal, v_transposed, two_level, debug, source)
    return PersistentLauncher(kernel, geometry, problem, q.device, outputs=1, blocks_per_sm=config.blocks_per_sm)


_plans: dict[tuple, PersistentLauncher] = {}


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
    v_transposed: bool = False,
    two_level: bool = False,
    config: Config | None = None,
    debug: bool = False,
    source: Path = SOURCE,
) -> tuple[Tensor, Tensor]:
    """FlashAttention-3 forward of e4m3 tensors on an H100 or H200, head_dim 64, 128 or 256.

    q (B, Hq, Nq, d); k, v (B, Hkv, Nk, d), Hq a multiple of Hkv, torch.float8_e4m3fn; any strides with a contiguous
    last dimension that TMA can express (multiples of 16 bytes). With v_transposed, v is (B, Hkv, d, padded_keys(Nk)),
    as `quantise_fp8.quantise` writes it: row r holds channel channel_order(d)[r], keys in kv_order, zeros behind them.
    Scales, float32: q_scale (B, Hq) or (B, Hq, ceil(Nq / 128)), k_scale (B, Hkv) or (B, Hkv, ceil(Nk / 128)), v_scale
    (B, Hkv) or (B, Hkv, d); a code means code * scale. Positive and finite: their shape and type are checked in every
    call, their values are not, since that would have to wait for the GPU.
    Returns o (B, Hq, Nq, d) bfloat16 and lse (B, Hq, Nq) fp32, natural log; a row without visible keys has o = 0 and
    lse = -inf. `causal` is aligned bottom-right; `scale` defaults to 1/sqrt(d). `two_level` adds up the blocks' P V in
    fp32 instead of the tensor core's 14 bits (not at head_dim 256: two such sums do not fit into the registers).
    `config` replaces the tile sizes; `debug` uses the build with bounded waits and raises KernelDeadlock instead of
    hanging; `source` replaces the kernel's file. Raises ValueError for bad input, KernelUnavailable without such a GPU.
    """
    plan = key = None
    tensors = (q, k, v, q_scale, k_scale, v_scale)
    if all(isinstance(tensor, Tensor) for tensor in tensors):
        key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors)
        key += (causal, scale, v_transposed, two_level, config, debug, source)
        plan = _plans.get(key)
    if plan is None:
        number = _check(q, k, v, causal=causal, scale=scale, v_transposed=v_transposed, two_level=two_level)
        _check_scales(q, k, q_scale, k_scale, v_scale)
        if k.shape[2] == 0:
            return torch.zeros_like(q, dtype=torch.bfloat16), torch.full(q.shape[:3], -math.inf, device=q.device)
        kind = {"causal": causal, "v_transposed": v_transposed, "two_level": two_level}
        config = config or choose_config(q.shape[3], q.shape[2], k.shape[2], **kind)
        options = {**kind, "scale": number, "config": config, "debug": debug, "source": source}
        with torch.cuda.device(q.device):
            counts = tuple(math.prod(x.shape[2:]) for x in (q_scale, k_scale, v_scale))
            plan = _launcher(q, k, v, counts, **options)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    with torch.cuda.device(plan.device):
        o = torch.empty_like(q, dtype=torch.bfloat16)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        q_scale, k_scale = q_scale.contiguous(), k_scale.contiguous()
        v_scale = v_scale.contiguous()
        if v_scale.dim() == 3 and v_scale.data_ptr() % 16:  # read four at a time
            v_scale = v_scale.clone()
        pointers = {"q_scale": q_scale.data_ptr(), "k_scale": k_scale.data_ptr(), "v_scale": v_scale.data_ptr()}
        plan.launch((q, k, v, o), (lse,), **pointers)
    if debug:
        plan.check_deadlock(BARRIER_NAMES)
    return o, lse


@cache
def _quantiser() -> ModuleType:
    return load_file(SOURCE.with_name("quantise_fp8.py"))


def quantised(q: Tensor, k: Tensor, v: Tensor, *, seed: int = 0) -> dict:
    """Arguments of `forward_fp8` for 16-bit tensors: quantised, and Q and K rotated with the signs of `seed`."""
    return _quantiser().quantise(q, k, v, signs=_signs(q.shape[-1], q.device, seed)).arguments()


@cache
def _signs(head_dim: int, device: torch.device, seed: int) -> Tensor:
    return random_signs(head_dim, seed).to(device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """FP8 attention of fp16 or bf16 tensors, rotated and quantised on the way: (o bfloat16, lse float32).

    Shapes, lse, causal and scale as in `forward_fp8`; raises what that and `quantise_fp8.quantise` raise.
    """
    return forward_fp8(**quantised(q, k, v, seed=seed), causal=causal, scale=scale)


def _check(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None, v_transposed: bool, two_level: bool
) -> float:
    """The scale as a number; ValueError for codes that the kernel does not take."""
    values = v
    if v_transposed and isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 4:
        wanted = (*k.shape[:2], k.shape[3], padded_keys(k.shape[2]))
        if tuple(v.shape) != wanted:
            raise ValueError(
                f"v has shape {tuple(v.shape)} with v_transposed=True; allowed: {wanted}, that is (batch, heads_kv, "
                f"head_dim, len_k rounded up to a multiple of {KEY_PADDING}), as quantise_fp8.quantise makes it"
            )
        values = k  # the rest of v's shape is right
        if v.dtype != k.dtype or v.device != k.device:
            raise ValueError(
                f"v is {v.dtype} on {v.device}, k is {k.dtype} on {k.device}; allowed: one dtype and one device"
            )
    number = check_attention_inputs(
        q,
        k,
        values,
        causal=causal,
        scale=scale,
        dtypes=(torch.float8_e4m3fn,),
        head_dims=HEAD_DIMS,
        devices=("cuda",),
    )
    if two_level and q.shape[3] == 256:
        raise ValueError("two_level is True with head_dim 256; allowed: head_dim 64 and 128 (registers run out)")
    return number


def _check_scales(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
    per_block = f"one per {SCALE_ROWS} rows"
    for name, scale, x in (("q_scale", q_scale, q), ("k_scale", k_scale, k)):
        blocks = math.ceil(x.shape[2] / SCALE_ROWS)
        check_scale(name, scale, {x.shape[:2]: "one a head", (*x.shape[:2], blocks): per_block}, values=False)
    check_scale(
        "v_scale", v_scale, {k.shape[:2]: "one a head", (*k.shape[:2], k.shape[3]): "one a channel"}, values=False
    )
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.device != q.device:
            raise ValueError(f"{name} is on {scale.device} but q is on {q.device}; allowed: one device for all")
