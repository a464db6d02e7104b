"""What the card reaches at best, measured in the same run: matmul throughput and copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable

from fa_reference.bench.grid import DTYPES
from fa_reference.bench.timing import ROUNDS, Clock, Column, interleave, plan, summarize

# m, n, k: powers of two in several shapes, as no single one is the best on every card.
MATMULS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192), (8192, 8192, 16384), (16384, 16384, 2048))
COPY_BYTES = (2**28, 2**30, 2**32)


def _columns(launches: dict[str, Callable[[], object]], clock: Clock, rounds: int) -> list[Column]:
    columns = []
    for name, launch in launches.items():
        columns.append(Column(name, launch, *plan(*clock.probe(launch), rounds)))
    return columns


def measure_matmul(dtype: str, clock: Clock, device: str = "cuda", rounds: int = ROUNDS) -> list[dict]:
    """One entry per size: m, n, k, samples in ms, median TFLOP/s (2 m n k FLOPs). Random normal operands."""
    import torch

    torch_dtype = getattr(torch, DTYPES[dtype])
    launches = {}
    for m, n, k in MATMULS:
        a = torch.randn(m, k, device=device, dtype=torch_dtype)
        b = torch.randn(k, n, device=device, dtype=torch_dtype)
        out = torch.empty(m, n, device=device, dtype=torch_dtype)
        launches[f"{m}x{n}x{k}"] = lambda a=a, b=b, out=out: torch.matmul(a, b, out=out)
    columns = _columns(launches, clock, rounds)
    interleave(columns, clock, rounds=rounds)
    entries = []
    for (m, n, k), column in zip(MATMULS, columns, strict=True):
        tflops = 2.0 * m * n * k / summarize(column.samples_ms)["median_ms"] / 1e9
        entries.append({"m": m, "n": n, "k": k, "tflops": tflops} | column.summary)
    return entries


def measure_copy(clock: Clock, device: str = "cuda", rounds: int = ROUNDS) -> list[dict]:
    """One entry per size: bytes moved (read plus written), samples in ms, median TB/s."""
    import torch

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**30
    launches, moved = {}, []
    for size in COPY_BYTES:
        if 2 * size > free // 4:
            continue
        source = torch.randint(0, 2**31 - 1, (size // 4,), device=device, dtype=torch.int32)
        target = torch.empty_like(source)
        launches[str(size)] = lambda source=source, target=target: target.copy_(source)
        moved.append(2 * size)
    columns = _columns(launches, clock, rounds)
    interleave(columns, clock, rounds=rounds)
    entries = []
    for size, column in zip(moved, columns, strict=True):
        tb_s = size / summarize(column.samples_ms)["median_ms"] / 1e9
        entries.append({"bytes": size, "tb_s": tb_s} | column.summary)
    return entries


def best(entries: list[dict], key: str) -> float | None:
    """The highest value of `key`; None of nothing."""
    return max((entry[key] for entry in entries), default=None)


def warm_up(seconds: float = 3.0) -> None:
    """Keep the tensor cores busy until clocks and temperature have settled."""
    import time

    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
