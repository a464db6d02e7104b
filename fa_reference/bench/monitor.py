"""SM clock and power while kernels run: a speed means little without them on a card that is limited by power."""

from __future__ import annotations

import shutil
import subprocess
import time


def nvidia_smi(query: str) -> list[str] | None:
    """Fields of `nvidia-smi --query-gpu=...` for the current GPU; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={_gpu_id()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0 or not done.stdout.strip():
        return None
    return [part.strip() for part in done.stdout.strip().splitlines()[0].split(",")]


def _gpu_id() -> str:
    """An identifier of torch's current GPU that NVML and nvidia-smi understand whatever CUDA_VISIBLE_DEVICES says."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return f"GPU-{uuid}" if uuid is not None else str(torch.cuda.current_device())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Monitor:
    """Samples (SM clock in MHz, power in W), at most once per `every_s` seconds.

    Uses NVML (package nvidia-ml-py) when it is there; without it nvidia-smi, asked far less often as it is slow.
    """

    def __init__(self, every_s: float = 0.1) -> None:
        self.every_s = every_s
        self.samples: list[tuple[float, float]] = []
        self._last = 0.0
        self._handle = self._nvml = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle, self._nvml = self._find(pynvml), pynvml
        except Exception:  # no package, no library, no permission: all mean the slower way
            self.every_s = max(every_s, 10.0)

    @staticmethod
    def _find(pynvml: object) -> object:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(_gpu_id())
        except Exception:
            return pynvml.nvmlDeviceGetHandleByIndex(0)

    @property
    def source(self) -> str:
        return "nvml" if self._handle is not None else "nvidia-smi"

    def __call__(self) -> None:
        """Take a sample if the last one is old enough; never raises."""
        now = time.monotonic()
        if now - self._last < self.every_s:
            return
        self._last = now
        sample = self._read()
        if sample is not None:
            self.samples.append(sample)

    def take(self) -> list[tuple[float, float]]:
        """The samples since the last take."""
        taken, self.samples = self.samples, []
        return taken

    def _read(self) -> tuple[float, float] | None:
        try:
            if self._handle is not None:
                clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
                return float(clock), self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
            fields = nvidia_smi("clocks.sm,power.draw")
            clock, power = (_number(f) for f in fields) if fields else (None, None)
            return (clock, power) if clock is not None and power is not None else None
        except Exception:
            return None


def power_limit_w() -> float | None:
    """The card's enforced power limit in W; None if nobody says."""
    fields = nvidia_smi("enforced.power.limit") or nvidia_smi("power.limit")
    return _number(fields[0]) if fields else None


def driver_version() -> str | None:
    """The NVIDIA driver's version."""
    fields = nvidia_smi("driver_version")
    return fields[0] if fields else None


def max_sm_clock_mhz() -> float | None:
    """The highest SM clock that the card may run at."""
    fields = nvidia_smi("clocks.max.sm")
    return _number(fields[0]) if fields else None
