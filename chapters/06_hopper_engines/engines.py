"""Host side of tma_tile.cu and wgmma_tile.cu: compile, describe the tensors to TMA, launch."""

import ctypes
import hashlib
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
    cache_folder,
    compile_kernel,
    encode,
    require_hopper,
    tile_geometry,
)

HERE = Path(__file__).resolve().parent
ROWS = 64  # of every tile
THREADS = 128  # one warpgroup
TILES = {"tma_tile": 1, "wgmma_tile": 3}  # tiles in shared memory, by kernel
BARRIERS = ("full",)  # as in the kernels' BarrierName


def build(name: str, head_dim: int, *, debug: bool = False, more: str = "") -> CompiledKernel:
    """Machine code of `name` ("tma_tile" or "wgmma_tile"); needs no GPU. KernelCompileError names file and line.

    `debug` bounds every wait at an mbarrier. `more` is C++ to compile behind the kernel's file.
    """
    source = HERE / f"{name}.cu"
    if more:
        source = _written(f'#include "{source}"\n{more}')
    defines = {"FA_HEAD_DIM": head_dim, **({"FA_DEBUG": 1} if debug else {})}
    return compile_kernel(source, defines=defines, include_dirs=[HERE, ROOT / "cuda"])


def machine_code(name: str, head_dim: int, more: str = "") -> tuple[Tensor, str]:
    """A kernel's machine code as bytes (uint8), and the compiler's log: what the checks look at."""
    return _code(build(name, head_dim, more=more))


def wrapper_code(headers: tuple[str, ...], text: str) -> tuple[Tensor, str]:
    """The same for a small kernel that calls wrappers out of `headers`."""
    includes = "".join(f'#include "{header}"\n' for header in headers)
    return _code(compile_kernel(_written(includes + text), include_dirs=[HERE, ROOT / "cuda"]))


def _code(compiled: CompiledKernel) -> tuple[Tensor, str]:
    return torch.frombuffer(bytearray(compiled.cubin), dtype=torch.uint8), compiled.log


def _written(text: str) -> Path:
    """A file with this text, under the same name each time, so that the cache of kernels finds it again."""
    file = cache_folder() / "chapter6" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cu"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@cache
def _loaded(name: str, head_dim: int, debug: bool) -> LoadedKernel:
    shared = TILES[name] * 2 * ROWS * head_dim + 1024  # the tiles, and room for a barrier
    return LoadedKernel(build(name, head_dim, debug=debug), name, threads=THREADS, shared_bytes=shared)


def _launch(name: str, inputs: dict[str, Tensor], outputs: list[ctypes._SimpleCData], debug: bool) -> None:
    first = next(iter(inputs.values()))
    require_hopper(first.device)
    with torch.cuda.device(first.device):
        maps = [encode(tile_geometry(x, name=n, box_rows=ROWS), x.data_ptr()) for n, x in inputs.items()]
        kernel = _loaded(name, first.shape[3], debug)
        kernel.launch(first.device.index, (first.shape[1], first.shape[0]), Arguments(*maps, *outputs))
    if debug:
        kernel.check_deadlock(BARRIERS)


def copy_tiles(x: Tensor, *, debug: bool = False) -> Tensor:
    """x (B, H, N, d), 16-bit, d 64 or 128, through tma_tile.cu: (B, H, N rounded up to 64, d), zeros behind x.

    `debug` raises KernelDeadlock where the kernel would hang. Raises KernelUnavailable without an H100 or H200.
    """
    batch, heads, length, head_dim = x.shape
    tiles = math.ceil(length / ROWS)
    out = torch.full((batch, heads, tiles * ROWS, head_dim), math.nan, dtype=x.dtype, device=x.device)
    _launch("tma_tile", {"x": x}, [ctypes.c_void_p(out.data_ptr()), ctypes.c_int(tiles)], debug)
    return out


def multiply_tiles(q: Tensor, k: Tensor, v: Tensor, *, debug: bool = False) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, 64, d) in bf16 through wgmma_tile.cu: S (B, H, 64, 64) and O (B, H, 64, d) in fp32.

    `debug` and errors as in copy_tiles.
    """
    batch, heads, _, head_dim = q.shape
    sizes = ((batch, heads, ROWS, ROWS), (batch, heads, ROWS, head_dim))
    s, o = (torch.full(size, math.nan, dtype=torch.float32, device=q.device) for size in sizes)
    pointers = [ctypes.c_void_p(s.data_ptr()), ctypes.c_void_p(o.data_ptr())]
    _launch("wgmma_tile", {"q": q, "k": k, "v": v}, pointers, debug)
    return s, o
