"""Launching the persistent attention kernels in cuda/: the order of their tiles, their counter, their descriptors."""

import ctypes
import math
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fa_reference.kernels.launch import Arguments, LoadedKernel
from fa_reference.kernels.tma import Descriptor, TileGeometry, check_address, encode

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
        self.kernel, self.geometry, self.problem, self.device = kernel, geometry, problem, device.index
        self.descriptors = tuple(Descriptor() for _ in geometry)
        self.outputs, self.counter = [ctypes.c_void_p() for _ in range(outputs)], ctypes.c_void_p()
        self.arguments = Arguments(*self.descriptors, *self.outputs, self.counter, problem)
        self.addresses: tuple[int, ...] = ()  # as encoded in the descriptors
        blocks = blocks_per_sm * torch.cuda.get_device_properties(device).multi_processor_count
        self.grid = (min(problem.query_tiles * problem.heads, blocks),)
        self.counters: dict[int, Tensor] = {}  # stream -> the counter that its launches share
        self.lock = threading.Lock()

    def launch(self, mapped: Sequence[Tensor], outputs: Sequence[Tensor], **pointers: int) -> None:
        """Queue the kernel on the current stream of the current device; `pointers` are fields of `problem`."""
        with self.lock:  # the arguments are shared by all calls, and copied by the driver when it queues the kernel
            addresses = tuple(tensor.data_ptr() for tensor in mapped)
            if addresses != self.addresses:
                for (name, geometry), address, slot in zip(
                    self.geometry.items(), addresses, self.descriptors, strict=True
                ):
                    check_address(address, name)
                    ctypes.memmove(slot, encode(geometry, address), ctypes.sizeof(slot))
                self.addresses = addresses
            for name, value in pointers.items():
                setattr(self.problem, name, value)
            counter = self._tile_counter()
            self.counter.value = counter.data_ptr()
            for slot, output in zip(self.outputs, outputs, strict=True):
                slot.value = output.data_ptr()
            self.kernel.launch(self.device, self.grid, self.arguments)

    def check_deadlock(self, barrier_names: Sequence[str]) -> None:
        """After a launch of a debug build: raise KernelDeadlock if a wait ran out of time."""
        self.counters.clear()  # after a deadlock they are not zero
        self.kernel.check_deadlock(barrier_names)

    def _tile_counter(self) -> Tensor:
        """The scheduler's counter, zero before a launch and zero again after it: a stream needs only one."""
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=self.device)  # belongs to the graph
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if stream not in self.counters:
            self.counters[stream] = torch.zeros(1, dtype=torch.int32, device=self.device)
        return self.counters[stream]
