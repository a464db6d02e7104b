"""Times a `forward` on the GPU. Checks call these functions in the child process, whose folder is the graded one."""

from collections.abc import Callable
from pathlib import Path

import torch

from fa_reference.versions import load_file, load_version


def _median_ms(forward: Callable, batch: int, heads: int, length: int, head_dim: int, causal: bool) -> float:
    q, k, v = torch.randn(3, batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(8):  # the first ones compile and warm up
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        forward(q, k, v, causal=causal)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[3:])[2]


def graded_ms(file: str, *problem: int) -> float:
    """Milliseconds of the graded file's forward on (batch, heads, length, head_dim, causal), bf16; a median of five."""
    return _median_ms(load_file(Path.cwd() / file).forward, *problem)


def reference_ms(version: str, *problem: int) -> float:
    """The same for one of the course's own versions."""
    return _median_ms(load_version(version).forward, *problem)
