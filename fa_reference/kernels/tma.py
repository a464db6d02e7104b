"""TMA descriptors: what the copy engine must know to fetch tiles of a strided (batch, heads, len, head_dim) tensor.

The descriptor is 5-D, (64 columns, rows, head_dim / 64, heads, batch): 64 16-bit values are the 128 bytes that the
swizzle spans, so one box of `rows` x head_dim lands in shared memory as head_dim / 64 blocks of rows x 128 bytes.
Where rows are shorter than that (8-bit values, head_dim 64) the swizzle may span 64 or 32 bytes instead.
Batch and head are dimensions of their own, so rows past the end read as zeros and never as the next head's first rows.
"""

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from fa_reference.kernels.errors import KernelUnavailable

SWIZZLE_BYTES = 128
MAX_BOX_ROWS = 256
_ELEMENT_BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float8_e4m3fn: 1}

Descriptor = ctypes.c_uint64 * 16  # 128 bytes, copied into the kernel's parameters


@dataclasses.dataclass(frozen=True)
class TileGeometry:
    """Everything about a descriptor but the address: sizes in elements, strides in bytes, innermost first."""

    dtype: torch.dtype
    sizes: tuple[int, ...]  # (columns of a block, len, blocks, heads, batch)
    strides: tuple[int, ...]  # of all but the innermost
    box: tuple[int, ...]
    swizzle_bytes: int = SWIZZLE_BYTES


def tile_geometry(
    tensor: torch.Tensor,
    *,
    name: str,
    box_rows: int,
    box_columns: int | None = None,
    swizzle_bytes: int = SWIZZLE_BYTES,
) -> TileGeometry:
    """Check that TMA can move tiles of `box_rows` x head_dim of `tensor` (B, H, N, d), and describe how.

    `box_columns`, a multiple of the swizzle's bytes, moves only so many columns at a time. swizzle_bytes: 128, 64 or
    32, the bytes of a row that lie together in shared memory.

    Needs no GPU. Raises ValueError naming the argument, its value and what is allowed.
    """
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: (batch, heads, len, head_dim)")
    if tensor.dtype not in _ELEMENT_BYTES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, _ELEMENT_BYTES))}")
    size = _ELEMENT_BYTES[tensor.dtype]
    batch, heads, length, head_dim = tensor.shape
    columns = swizzle_bytes // size
    if head_dim % columns:
        raise ValueError(f"{name} has head_dim = {head_dim}; allowed: a multiple of {columns} for {tensor.dtype}")
    if min(tensor.shape) == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: no size of 0 for a TMA tensor")
    if not 1 <= box_rows <= MAX_BOX_ROWS:
        raise ValueError(f"box_rows is {box_rows}; allowed: 1 to {MAX_BOX_ROWS}")
    if tensor.stride(3) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; allowed: a contiguous last dimension (stride 1)")
    strides = []
    for axis, label in ((2, "len"), (1, "heads"), (0, "batch")):
        stride = tensor.stride(axis) * size
        if tensor.shape[axis] == 1:
            stride = head_dim * size  # never used, but TMA looks at it
        if stride % 16 or not 0 < stride < 2**40:
            raise ValueError(
                f"{name} has a stride of {tensor.stride(axis)} elements ({stride} bytes) over {label}; allowed for "
                f"TMA: a positive multiple of {16 // size} elements (16 bytes). {name}.contiguous() always works"
            )
        strides.append(stride)
    check_address(tensor.data_ptr(), name)
    return TileGeometry(
        tensor.dtype,
        (columns, length, head_dim // columns, heads, batch),
        (strides[0], swizzle_bytes, strides[1], strides[2]),
        (columns, box_rows, (box_columns or head_dim) // columns, 1, 1),
        swizzle_bytes,
    )


def check_address(address: int, name: str) -> None:
    """Raise ValueError unless TMA can start at `address`."""
    if address % 16:
        raise ValueError(
            f"{name} starts at address {address:#x}, {address % 16} bytes past a multiple of 16; allowed for TMA: a "
            f"16-byte aligned start. {name}.clone() is aligned"
        )


@lru_cache(maxsize=1024)
def encode(geometry: TileGeometry, address: int) -> Descriptor:
    """The 128-byte descriptor. Cached: the same tensor again costs a dictionary look-up. Needs the driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelUnavailable(f"TMA descriptors need the package cuda-bindings ({error})") from error
    kinds = driver.CUtensorMapDataType
    data_type = {
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }[geometry.dtype]
    rank = len(geometry.sizes)
    status, encoded = driver.cuTensorMapEncodeTiled(
        data_type,
        rank,
        address,
        [driver.cuuint64_t(size) for size in geometry.sizes],
        [driver.cuuint64_t(stride) for stride in geometry.strides],
        [driver.cuuint32_t(size) for size in geometry.box],
        [driver.cuuint32_t(1)] * rank,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{geometry.swizzle_bytes}B"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"the driver refuses this TMA tensor ({status.name}): {geometry}, address {address:#x}")
    return Descriptor(*(int(word) for word in encoded.opaque))


class Maps:
    """The descriptors of several tensors as kernel parameters, encoded again only when an address changes."""

    def __init__(self, geometry: Mapping[str, TileGeometry]) -> None:
        """geometry: of every tensor by its name, in the order of the parameters."""
        self.geometry = geometry
        self.descriptors = (Descriptor * len(geometry))()
        self.addresses: tuple[int, ...] = ()  # as encoded

    def point_at(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the descriptors those of these tensors. Raises ValueError for one that TMA cannot start at."""
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses == self.addresses:
            return
        for number, ((name, geometry), address) in enumerate(zip(self.geometry.items(), addresses, strict=True)):
            check_address(address, name)
            self.descriptors[number] = encode(geometry, address)
        self.addresses = addresses
