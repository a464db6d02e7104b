"""Time the steps of chapter 5 beside torch's FlashAttention-2, on this machine's GPU, and record the result.

    python chapters/05_cuda/measure.py [--impl FOLDER] [--rounds 9]

Setting of the FlashAttention papers: 16k tokens in all, hidden size 2048, bf16, stored (batch, len, heads, d). All
columns of a row come from the same rounds: slices of about 8 ms in shuffled order, a spin of about 1 ms before each, so
that the host has queued every launch; medians. Writes results/05_cuda/steps_<GPU>.json: the lesson shows it.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from fa_reference.counts import attention_flops  # noqa: E402
from fa_reference.error_rule import judge  # noqa: E402
from fa_reference.kernels import compiler_version  # noqa: E402
from fa_reference.versions import load_file  # noqa: E402

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (2048, 8192, 16384)
STEPS = ("scalar", "tiles", "tensor_cores", "fa2", "split_k", "split_k_fa1")
SLOW = {"scalar", "tiles"}  # only at the shortest length, and fewer times
SLICE_MS = 8.0
SPIN_CYCLES = 1_700_000  # about 1 ms


def torch_fa2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The yardstick: torch's own build of FlashAttention-2."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def slice_ms(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one call, from `repeats` in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def race(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of every call."""
    repeats = {}
    for name, call in calls.items():
        slice_ms(call, 1)  # compiles, warms up
        repeats[name] = max(1, round(SLICE_MS / slice_ms(call, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        order = [name for name in calls if name not in SLOW or number < 3]
        random.shuffle(order)  # a fixed order favours whoever follows a kernel that draws little power
        for name in order:
            times[name].append(slice_ms(calls[name], repeats[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def compile_step(file: Path, step: str, head_dim: int, causal: bool) -> None:
    """Compile one kernel into the cache; also runs in other processes."""
    load_file(file).build(step, head_dim, torch.bfloat16, causal)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", type=Path, default=ROOT / "solutions" / "05_cuda", help="folder with fa2_cuda.py")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / HERE.name)
    arguments = parser.parse_args()
    module = load_file(arguments.impl / "fa2_cuda.py")
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        builds = [(s, d, c) for s in STEPS for d in (64, 128) for c in (False, True)]
        for build in [pool.submit(compile_step, arguments.impl / "fa2_cuda.py", *b) for b in builds]:
            build.result()
    rows = []
    for length in LENGTHS:
        for head_dim in (64, 128):
            for causal in (False, True):
                batch, heads = TOKENS // length, HIDDEN // head_dim
                q, k, v = (
                    torch.randn(batch, length, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                    for _ in range(3)
                )
                calls = {"torch_fa2": lambda q=q, k=k, v=v, c=causal: torch_fa2(q, k, v, c)}
                for step in STEPS:
                    if step in SLOW and length != min(LENGTHS):
                        continue
                    calls[step] = lambda s=step, q=q, k=k, v=v, c=causal: module.run(s, q, k, v, c, None)
                part = slice(0, 1), slice(0, 2)  # one batch, two heads are judged; all of them are timed
                for step in calls.keys() - {"torch_fa2"}:
                    o, lse = calls[step]()
                    if not judge(o[part], lse[part], q[part], k[part], v[part], causal=causal).passed:
                        raise SystemExit(
                            f"{step} is wrong at N {length}, d {head_dim}, causal {causal}: nothing recorded"
                        )
                ms = race(calls, arguments.rounds)
                flops = attention_flops(batch, heads, length, length, head_dim, causal)
                speed = {name: flops / t / 1e9 for name, t in ms.items()}
                rows.append({"head_dim": head_dim, "causal": causal, "length": length, "tflops": speed})
                words = "  ".join(f"{n} {s:.3g}" for n, s in speed.items())
                print(f"d {head_dim:3} {'causal' if causal else 'full  '} N {length:5}: {words}", flush=True)
    gpu = torch.cuda.get_device_name()
    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "torch": torch.__version__,
        "compiler": compiler_version(),
        "graded": "the solution" if arguments.impl == parser.get_default("impl") else str(arguments.impl),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"steps_{gpu.replace(' ', '_')}.json"
    file.write_text(json.dumps({"provenance": provenance, "unit": "TFLOP/s", "rows": rows}, indent=1) + "\n")
    print(f"recorded in {file}")


if __name__ == "__main__":
    main()
