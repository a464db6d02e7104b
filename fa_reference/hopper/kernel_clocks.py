"""How many clocks the chapters' kernels and their variants take on a Hopper GPU: what the model has to predict.

`python -m fa_reference.hopper.calibrate --only kernels variants` runs this.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from fa_reference.bench.monitor import Monitor
from fa_reference.hopper.timing import SMS
from fa_reference.hopper.variants import VARIANTS, Variant
from fa_reference.kernels import trace
from fa_reference.kernels.attention_host import AttentionKernel

KERNELS = [(chapter, head_dim) for chapter in (6, 7, 8, 9) for head_dim in (64, 128)] + [(10, 128)]
BLOCK_LENGTHS = (32, 64)  # in blocks of keys
LAUNCHES = 60


def block_clocks(kernel: AttentionKernel, head_dim: int, key_blocks: int) -> list[int]:
    """Clocks of some blocks from start to end, in the middle of a grid that fills the GPU."""
    return [
        trace.cycles_of(block) for block in trace.record(kernel, head_dim, level=trace.CYCLES, key_blocks=key_blocks)
    ]


def variants() -> dict:
    """Clocks of a block of every variant that compiles as it should."""
    found = {}
    for variant in VARIANTS:
        try:
            clocks = block_clocks(variant.kernel(), variant.head_dim, variant.key_blocks)
            found[variant.name] = {"clocks": clocks, "remark": faults(variant)}
        except Exception as error:  # the others are worth having
            found[variant.name] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def faults(variant: Variant) -> str:
    """What makes a variant another kernel than it seems: spills, or products that the compiler made wait."""
    kernel = variant.kernel()
    report = kernel.build(variant.head_dim, torch.bfloat16, False).report
    used = report.kernels["attention"]
    spills = used.spill_store_bytes + used.spill_load_bytes
    return "; ".join([f"{spills} bytes of spills"] * bool(spills) + [note.code for note in report.notes])


def prepare() -> None:
    """Compile all kernels that `kernels` and `variants` run, side by side. Before the GPU is used."""
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        list(pool.map(_compile, VARIANTS))
        list(pool.map(_compile, [Variant(c, d, key_blocks=n) for c, d in KERNELS for n in BLOCK_LENGTHS]))


def _compile(variant: Variant) -> None:
    try:
        kernel = variant.kernel()
        first = trace.middle_of_grid(kernel, variant.key_blocks, trace.HEADS, SMS)
        for source in (None, trace.traced_source(kernel, trace.CYCLES, first)):
            kernel.build(variant.head_dim, trace.input_type(kernel), False, source=source)
    except Exception:  # whoever runs it will see it again
        pass


def kernel_cycles() -> dict:
    """Clocks a block of the chapters' kernels took, from the SM's clock at its start and end, in the middle of a grid
    that fills the GPU; and milliseconds of the whole grid with the SM clock meanwhile."""
    found = {}
    for chapter, head_dim in KERNELS:
        kernel = trace.kernel_of(chapter)
        entry: dict = {f"block_of_{n}": block_clocks(kernel, head_dim, n) for n in BLOCK_LENGTHS}
        monitor = Monitor(every_s=0.02)
        shape = (4, 8192, 16, head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        launch = trace.launcher(kernel, q, k, v)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for launches in (20, LAUNCHES):
            start.record()
            for _ in range(launches):
                launch(None)
            stop.record()
            monitor.take()
            while not stop.query():
                monitor()
                time.sleep(0.005)
        entry["grid"] = {
            "batch_len_heads": shape[:3],
            "milliseconds": round(start.elapsed_time(stop) / LAUNCHES, 4),
            "sm_clock_mhz": sorted({sample[0] for sample in monitor.samples}),
        }
        found[f"chapter {chapter}, d {head_dim}"] = entry
    return found
