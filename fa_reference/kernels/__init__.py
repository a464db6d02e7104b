"""CUDA kernels from source at run time: compile, inspect, describe tensors to TMA, launch."""

from fa_reference.kernels.build_log import BuildReport, Note, Resources, parse_build_log
from fa_reference.kernels.compile import CompiledKernel, cache_folder, compile_kernel, compiler_version, included_files
from fa_reference.kernels.errors import KernelCompileError, KernelDeadlock, KernelUnavailable
from fa_reference.kernels.launch import Arguments, LoadedKernel, require_hopper
from fa_reference.kernels.sass import count_instructions, instructions_between, sass_instructions, sass_listing
from fa_reference.kernels.stream_state import StreamState
from fa_reference.kernels.tma import Maps, TileGeometry, encode, tile_geometry

__all__ = [
    "Arguments",
    "BuildReport",
    "CompiledKernel",
    "KernelCompileError",
    "KernelDeadlock",
    "KernelUnavailable",
    "LoadedKernel",
    "Maps",
    "Note",
    "Resources",
    "StreamState",
    "TileGeometry",
    "cache_folder",
    "compile_kernel",
    "compiler_version",
    "count_instructions",
    "encode",
    "included_files",
    "instructions_between",
    "parse_build_log",
    "require_hopper",
    "sass_instructions",
    "sass_listing",
    "tile_geometry",
]
