"""Load a compiled kernel and start it on torch's current stream with little work on the host."""

import ctypes
import threading
from collections.abc import Sequence

import torch

from fa_reference.kernels.compile import CompiledKernel
from fa_reference.kernels.errors import KernelDeadlock, KernelUnavailable

# In the record of a deadlock, added to the number of a named barrier (cuda/hopper/deadlock.cuh).
NAMED_BARRIER, TWO_COUNTS = 256, 512
WARPS = 16  # of a block at most, in that record


def _driver():
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelUnavailable(f"launching kernels needs the package cuda-bindings ({error})") from error
    return driver


def _check(status, what: str) -> None:
    if int(status) != 0:
        raise KernelUnavailable(f"{what}: {getattr(status, 'name', status)}")


def require_hopper(device: torch.device) -> None:
    """Raise KernelUnavailable unless `device` can run code for sm_90a (compute capability 9.0 exactly)."""
    if not torch.cuda.is_available():
        raise KernelUnavailable("no CUDA GPU is visible: this kernel needs an H100 or H200")
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        raise KernelUnavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; this kernel "
            "is sm_90a code and runs on 9.0 only (H100, H200), not on older or newer GPUs"
        )


class Arguments:
    """Kernel parameters as ctypes objects and the array of pointers to them that the driver wants, built once.

    Give one ctypes object per parameter, in order; change their contents freely between launches: the driver copies
    them when the kernel is launched.
    """

    def __init__(self, *values: ctypes._SimpleCData | ctypes.Array | ctypes.Structure) -> None:
        self.values = values
        self._pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.address = ctypes.addressof(self._pointers)


class LoadedKernel:
    """One kernel of a cubin, ready to be launched on any Hopper GPU of this machine."""

    def __init__(self, compiled: CompiledKernel, name: str, *, threads: int, shared_bytes: int = 0) -> None:
        """`threads` a block; `shared_bytes` of dynamic shared memory (up to 232,448)."""
        driver = _driver()
        torch.cuda.init()
        self.compiled, self.name, self.threads, self.shared_bytes = compiled, name, threads, shared_bytes
        self._driver = driver
        status, self._library = driver.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0)
        _check(status, f"loading {compiled.source.name}")
        status, kernel = driver.cuLibraryGetKernel(self._library, name.encode())
        _check(status, f"finding the kernel {name} in {compiled.source.name}")
        self._kernel = kernel
        self._functions: dict[int, object] = {}
        self._lock = threading.Lock()

    def _function(self, device: int) -> object:
        """The kernel on one GPU, allowed to use its shared memory. The device must be torch's current one."""
        driver = self._driver
        with self._lock:
            if device not in self._functions:
                torch.cuda.current_stream(device).synchronize()  # makes sure that the context exists
                status, function = driver.cuKernelGetFunction(self._kernel)
                _check(status, f"loading {self.name} onto GPU {device}")
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = driver.cuFuncSetAttribute(function, attribute, self.shared_bytes)
                _check(status, f"asking for {self.shared_bytes} bytes of shared memory for {self.name}")
                self._functions[device] = function
        return self._functions[device]

    def launch(self, device: int, grid: Sequence[int], arguments: Arguments) -> None:
        """Queue the kernel on torch's current stream of `device`, which must be the current device.

        Returns at once; may be captured into a CUDA graph after a first ordinary launch.
        """
        function = self._functions.get(device) or self._function(device)
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        (status,) = self._driver.cuLaunchKernel(
            function, x, y, z, self.threads, 1, 1, self.shared_bytes, stream, arguments.address, 0
        )
        _check(status, f"launching {self.name} with grid {tuple(grid)}")

    def _global(self, name: str) -> tuple[object, int]:
        """Address and size in bytes of a __device__ variable of the kernel's file; waits for the GPU."""
        torch.cuda.synchronize()
        status, address, size = self._driver.cuLibraryGetGlobal(self._library, name.encode())
        _check(status, f"finding the variable {name}")
        return address, int(size)

    def clear_global(self, name: str) -> None:
        """Fill a __device__ variable of the kernel's file with zero bytes."""
        address, size = self._global(name)
        (status,) = self._driver.cuMemsetD8(address, 0, size)
        _check(status, f"clearing the variable {name}")

    def read_global(self, name: str, count: int) -> list[int]:
        """The first `count` 32-bit words of a __device__ variable of the kernel's file; waits for the GPU."""
        address, size = self._global(name)
        words = (ctypes.c_uint32 * count)()
        (status,) = self._driver.cuMemcpyDtoH(ctypes.addressof(words), address, min(size, ctypes.sizeof(words)))
        _check(status, f"reading the variable {name}")
        return list(words)

    def check_deadlock(self, barrier_names: Sequence[str]) -> None:
        """After a launch of a debug build (FA_DEBUG): raise KernelDeadlock if a barrier wait ran out of time."""
        happened, block, thread, barrier, parity, iteration = self.read_global("fa_deadlock_record", 6)
        if not happened:
            return
        who = f"block {block}, {_place(thread)}, lane {thread % 32}"
        if barrier >= TWO_COUNTS:
            raise KernelDeadlock(
                f"{self.name}: {who} came to named barrier {barrier - TWO_COUNTS} with a count of {iteration} threads, "
                f"others with {parity}. All who sync or arrive at a barrier must give the same count, or it never opens"
            )
        what = _wait(barrier, parity, iteration, barrier_names)
        missing = "too few threads came" if barrier >= NAMED_BARRIER else "nobody completed it"
        others = self._others_in_deadlock(thread // 128, barrier, barrier_names)
        raise KernelDeadlock(
            f"{self.name} did not finish: {who} waited {what} and {missing}. Who should arrive there, how often, and "
            f"did it?{others}"
        )

    def _others_in_deadlock(self, warpgroup: int, barrier: int, barrier_names: Sequence[str]) -> str:
        """Where the block's other warpgroups stood then, as a sentence; "" if nobody else waited."""
        words = self.read_global("fa_deadlock_others", 6 * WARPS)
        waits = {}  # the same wait of several warps of a warpgroup once
        for happened, _, thread, name, parity, iteration in zip(*[iter(words)] * 6):
            if happened and name < TWO_COUNTS and (thread // 128, name) != (warpgroup, barrier):
                waits.setdefault((thread // 128, name, parity, iteration), _place(thread))
        said = [f"{place} waited {_wait(*wait, barrier_names)}" for (_, *wait), place in waits.items()]
        return f"\nAt that time {'; '.join(said)}." if said else ""


def _place(thread: int) -> str:
    return f"warpgroup {thread // 128}, warp {thread % 128 // 32}"


def _wait(barrier: int, parity: int, iteration: int, barrier_names: Sequence[str]) -> str:
    """What a record of a wait says, to follow "waited"."""
    if barrier >= NAMED_BARRIER:
        return f"at named barrier {barrier - NAMED_BARRIER} for its opening number {iteration + 1},"
    name = barrier_names[barrier] if barrier < len(barrier_names) else f"number {barrier}"
    return f"for barrier {name} to complete its phase of parity {parity} (iteration {iteration})"
