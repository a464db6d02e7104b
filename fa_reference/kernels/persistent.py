"""Launching the persistent attention kernels in cuda/: the order of their tiles, their counter, their descriptors."""

import ctypes
import math
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fa_reference.kernels.launch import Arguments, LoadedKernel
from fa_reference.kernels.stream_state import StreamState
from fa_reference.kernels.tma import Maps, TileGeometry

L2_BYTES_FOR_KEYS = 32 * 2**20  # K and V of the heads in flight should fit into this much of the 50 MB L2
KEY_HEADS = 16  # heads of K and V in flight at most, for each thread block of an SM

SCHEDULE_FIELDS = [
    (name, ctypes.c_int)
    for name in (
        "len_q",
        "len_k",
        "query_tiles",
        "heads",
        "heads_q",
        "queries_per_key_head",
        "heads_per_section",
    )
]
"""The struct `Schedule` of cuda/attention_tiles.cuh, for the start of a kernel's `Problem`."""


def schedule(q: Tensor, k: Tensor, *, block_q: int, causal: bool, blocks_per_sm: int = 1) -> tuple[int, ...]:
    """The values of SCHEDULE_FIELDS for q (B, Hq, Nq, d) and k (B, Hkv, Nk, d) with tiles of block_q rows."""
    batch, heads_q, len_q, head_dim = q.shape
    heads_kv, len_k = k.shape[1:3]
    heads = batch * heads_q
    # Causal: tiles of several heads run side by side, longest first, as many as keep their K and V in L2; but not more
    # than keep the SMs busy, since the first tiles of a section are those that wait for HBM, and should run beside
    # others that do not. Without a mask all tiles are equally long and the heads come one after the other.
    heads_in_l2 = max(1, L2_BYTES_FOR_KEYS // (2 * len_k * head_dim * q.element_size()))
    per_key_head = heads_q // heads_kv
    key_heads = min(2 ** int(math.log2(heads_in_l2)), KEY_HEADS * blocks_per_sm)
    section = min(heads, key_heads * per_key_head) if causal else 1
    return len_q, len_k, math.ceil(len_q / block_q), heads, heads_q, per_key_head, section


class PersistentLauncher:
    """A loaded kernel for one set of shapes. Its parameters: maps, pointers to outputs, to the counter, and Problem."""

    def __init__(
        self,
        kernel: LoadedKernel,
        geometry: Mapping[str, TileGeometry],
        problem: ctypes.Structure,
        device: torch.device,
        outputs: int = 2,
        blocks_per_sm: int = 1,
    ) -> None:
        """geometry: of what has a map, in order. problem: the kernel's, which starts with SCHEDULE_FIELDS. outputs: how
        many pointers stand between the maps and the counter. blocks_per_sm: thread blocks that fit into an SM."""
        self.kernel, self.maps, self.problem, self.device = kernel, Maps(geometry), problem, device.index
        self.outputs, self.counter = [ctypes.c_void_p() for _ in range(outputs)], ctypes.c_void_p()
        self.arguments = Arguments(*self.maps.descriptors, *self.outputs, self.counter, problem)
        blocks = blocks_per_sm * torch.cuda.get_device_properties(device).multi_processor_count
        self.grid = (min(problem.query_tiles * problem.heads, blocks),)
        self.tiles_drawn = StreamState(1, device)
        self.lock = threading.Lock()

    def launch(self, mapped: Sequence[Tensor], outputs: Sequence[Tensor], **pointers: int) -> None:
        """Queue the kernel on the current stream of the current device; `pointers` are fields of `problem`."""
        with self.lock:  # the arguments are shared by all calls, and copied by the driver when it queues the kernel
            self.maps.point_at(mapped)
            for name, value in pointers.items():
                setattr(self.problem, name, value)
            counter = self.tiles_drawn.current()
            self.counter.value = counter.data_ptr()
            for slot, output in zip(self.outputs, outputs, strict=True):
                slot.value = output.data_ptr()
            self.kernel.launch(self.device, self.grid, self.arguments)

    def check_deadlock(self, barrier_names: Sequence[str]) -> None:
        """After a launch of a debug build: raise KernelDeadlock if a wait ran out of time."""
        self.tiles_drawn.forget()
        self.kernel.check_deadlock(barrier_names)
