"""Micro-measurements on a Hopper GPU from which the model takes its rates and latencies.

On an H100:  python -m fa_reference.hopper.calibrate [--out results]

writes results/calibration_<device>.json: every number measured, as clocks of one SM, with provenance; and the clocks
that the chapters' kernels took, which the model has to predict (`fa_reference.hopper.predict` compares). Nothing here
is needed to use the model: timing.py reads the committed record.
"""

import argparse
import ctypes
import statistics
from pathlib import Path

import torch

from fa_reference.bench.record import RESULTS, provenance, save, slug
from fa_reference.course import ROOT
from fa_reference.hopper.kernel_clocks import kernel_cycles, prepare, variants
from fa_reference.kernels import Arguments, CompiledKernel, LoadedKernel, compile_kernel, encode, tile_geometry

MICRO = ROOT / "cuda" / "micro"
ROUNDS, CHAINS = 128, 16  # of units.cu
OPERATIONS = (
    "fma",
    "add",
    "mul",
    "max",
    "exp2",
    "exp2_sum",
    "exp2_sum_round",
    "to_bf16",
    "to_fp16",
    "to_e4m3",
    "shuffle",
)
WGMMA_N = (64, 128, 256)
WGMMA_KINDS = ("ss", "rs", "fp8_ss", "fp8_rs")
WGMMA_GROUPS = 64  # of wgmma.cu
BARRIER_ROUNDS = 256  # of barriers.cu
SOFTMAX_ROUNDS = 32
# What is measured together: jobs of three warpgroups (beside.cu has the list), and how much later the third starts.
BESIDE = {
    "alone": ((0, 3, 0), 0),
    "beside QK": ((1, 3, 0), 0),
    "beside PV": ((2, 3, 0), 0),
    "beside QK and PV": ((5, 3, 0), 0),
    "beside softmax": ((3, 3, 0), 0),
    "beside softmax, 300 clocks later": ((0, 3, 3), 300),
    "beside softmax, 600 clocks later": ((0, 3, 3), 600),
    "beside two softmaxes": ((3, 3, 3), 0),
    "beside two softmaxes, 600 clocks later": ((3, 3, 3), 600),
    "beside softmax and QK": ((1, 3, 3), 600),
    "beside softmax and PV": ((2, 3, 3), 600),
    "end alone": ((0, 4, 0), 0),
    "end beside QK": ((1, 4, 0), 0),
    "QK and PV together": ((5, 0, 0), 0),
}
BESIDE_FP8 = {
    "beside turning V round": ((6, 3, 0), 0),
    "beside softmax, 600 clocks later": ((0, 3, 3), 600),
    "beside softmax and turning V round": ((6, 3, 3), 600),
    "turning V round alone": ((6, 0, 0), 0),
}
PAIR = ("QK issued", "PV issued", "QK done", "PV done")
BUSY_BATCHES = 400  # of 512 clocks: longer than any loop of units.cu beside them
BUSY_KINDS = {"SS": 0, "RS": 1, "fp8_SS": 2, "fp8_RS": 3, "exp": 4, "max": 5}  # of units.cu: what goes on beside
DELAYS = (0, 100, 256, 400, 600)
TMA_SLOTS = 4  # of tma.cu
L2_ROWS, HBM_ROWS = 1 << 16, 1 << 23  # of 256 bytes: 16.8 MB, 2.1 GB


def build(name: str, head_dim: int = 128, *, fp8: bool = False) -> CompiledKernel:
    """One of cuda/micro's files; needs no GPU. beside.cu takes its softmax from the kernel of chapter 8, fp8: of 10."""
    defines = {"FA_HEAD_DIM": head_dim, "FA_BLOCK_K": 128, "FA_STAGES": 2, "FA_CAUSAL": 0, "FA_BF16": 1}
    defines |= {"FA_FP8": 1} if fp8 else {}
    return compile_kernel(
        MICRO / f"{name}.cu",
        defines=defines if name == "beside" else {},
        include_dirs=[ROOT / "cuda", *(ROOT / "solutions" / folder for folder in ("08_pingpong", "10_fp8"))],
    )


def _run(
    compiled: CompiledKernel,
    name: str,
    threads: int,
    *parameters: ctypes._SimpleCData | ctypes.Array,
    grid: int = 1,
    shared_bytes: int = 0,
    results: int = 64,
    before: tuple = (),
    times: int = 3,
) -> list[int]:
    """Launch a few times and return the median of every word it wrote. `before`: parameters in front of `out`."""
    kernel = LoadedKernel(compiled, name, threads=threads, shared_bytes=shared_bytes)
    device = torch.cuda.current_device()
    seen = []
    for _ in range(times):
        out = torch.zeros(results, dtype=torch.int32, device="cuda")
        kernel.launch(device, (grid,), Arguments(*before, ctypes.c_void_p(out.data_ptr()), *parameters))
        torch.cuda.synchronize()
        seen.append(out.cpu().tolist())
    return [int(statistics.median(word)) for word in zip(*seen, strict=True)]


def units() -> dict:
    """Clocks of a warp instruction on one of the four sub-cores: issued back to back by 1, 2, 4 warps each; latency;
    and of one or two warps beside wgmmas of another. exp2_sum is three instructions, exp2_sum_round two of them and a
    rounding.
    """
    compiled, found = build("units"), {}
    for name in OPERATIONS:
        rate = {}
        for warps in (1, 2, 4):  # a sub-core
            clocks = _run(compiled, f"rate_{name}", 128 * warps, results=16)[: 4 * warps]
            rate[str(warps)] = round(statistics.median(clocks) / (ROUNDS * CHAINS * warps), 3)
        latency = _run(compiled, f"latency_{name}", 32, results=16)[0] / ROUNDS
        found[name] = {"clocks_by_warps": rate, "latency": round(latency, 2)}
        for kind, number in BUSY_KINDS.items():
            numbers = (ctypes.c_int(number), ctypes.c_int(BUSY_BATCHES))
            clocks = _run(compiled, f"beside_{name}", 256, *numbers, results=16, shared_bytes=65536)[:4]
            found[name][f"clocks_beside_{kind}"] = round(statistics.median(clocks) / (ROUNDS * CHAINS), 3)
            clocks = _run(compiled, f"latency_beside_{name}", 256, *numbers, results=16, shared_bytes=65536)[:4]
            found[name][f"latency_beside_{kind}"] = round(statistics.median(clocks) / ROUNDS, 2)
            clocks = _run(compiled, f"beside2_{name}", 384, *numbers, results=16, shared_bytes=65536)[:8]
            found[name][f"clocks_beside_{kind}_two_warps"] = round(statistics.median(clocks) / (2 * ROUNDS * CHAINS), 3)
    found["quad_max"] = {"latency": round(_run(compiled, "quad_max", 32)[0] / ROUNDS, 1)}
    return found


def wgmma() -> dict:
    """Clocks of one m64nNk16 (e4m3: k32) in long batches, by one and two warpgroups; of short batches alone; and when
    two batches of 512 clocks are done of which the second is issued later, by the delay."""
    compiled, found = build("wgmma"), {}
    for kind in WGMMA_KINDS:
        for n in WGMMA_N:
            one = _run(compiled, f"{kind}_n{n}", 128, shared_bytes=98304)
            two = _run(compiled, f"{kind}_n{n}", 256, shared_bytes=98304)
            total = 8 * WGMMA_GROUPS
            found[f"{kind}_n{n}"] = {
                "clocks": round(one[8] / total, 2),
                "clocks_two_warpgroups": round(max(two[8], two[24]) / (2 * total), 2),
                "batch": {
                    str(size): {"issued": one[2 * i], "done": one[2 * i + 1]} for i, size in enumerate((1, 2, 4, 8))
                },
            }
    found["contend"] = {
        kind: {
            str(delay): _run(compiled, f"contend_{kind}", 256, ctypes.c_int(delay), shared_bytes=98304)[:2]
            for delay in DELAYS
        }
        for kind in ("ss", "rs")
    }
    return found


def barriers() -> dict:
    """Clocks of a hand-over, of a wait that need not wait, of an arrival."""
    out = _run(build("barriers"), "barriers", 256)
    return {
        "mbarrier_hand_over": out[0] / BARRIER_ROUNDS / 2,
        "named_barrier_hand_over": out[1] / BARRIER_ROUNDS / 2,
        "mbarrier_wait_when_complete": out[2] / BARRIER_ROUNDS,
        "mbarrier_arrive": out[3] / BARRIER_ROUNDS,
        "named_barrier_sync_alone": out[4] / BARRIER_ROUNDS,
        "one_arrives_then_sync": out[5] / BARRIER_ROUNDS,
        "mbarrier_arrive_keeps": (out[6] - out[8]) / BARRIER_ROUNDS,
        "named_barrier_arrive_keeps": (out[7] - out[8]) / BARRIER_ROUNDS,
    }


def tma() -> dict:
    """Latency of a small box and of a whole tile, bytes a clock for one SM and for all, from L2 and from HBM."""
    compiled, found = build("tma"), {}
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    tensors = {
        level: torch.randn(1, 1, rows, 128, device="cuda", dtype=torch.bfloat16)
        for level, rows in (("L2", L2_ROWS), ("HBM", HBM_ROWS))
    }

    def loads(level: str, *, box: int, count: int, ahead: int, grid: int, apart: int) -> list[list[int]]:
        x = tensors[level]
        if level == "HBM":
            flush.fill_(1)
        else:
            x.sum()  # into L2
        descriptor = encode(tile_geometry(x, name="x", box_rows=box), x.data_ptr())
        numbers = (count, ahead, box, box * 256, apart, x.shape[2] - box)
        out = _run(
            compiled,
            "loads",
            32,
            *(ctypes.c_int(number) for number in numbers),
            before=(descriptor,),
            grid=grid,
            shared_bytes=TMA_SLOTS * box * 256,
            results=5 * grid,
            times=1 if level == "HBM" else 3,
        )
        return [out[i : i + 5] for i in range(0, len(out), 5)]

    for level in tensors:
        found[level] = {}
        for box in (8, 64, 128):
            _, _, shortest, median, issuing = loads(level, box=box, count=64, ahead=0, grid=1, apart=0)[0]
            latency = {"shortest": shortest, "median": median, "issuing": issuing}
            found[level][f"latency_{box * 256}_bytes"] = latency
        for name, grid, apart, count in (
            ("one_sm", 1, 0, 256),
            ("all_sms_apart", sms, tensors[level].shape[2] // sms // 128 * 128, 256),
            ("all_sms_same_rows", sms, 0, 256),
        ):
            blocks = loads(level, box=128, count=count, ahead=TMA_SLOTS, grid=grid, apart=apart)
            rate = statistics.median(size / clocks for clocks, size, *_ in blocks)
            found[level][f"bytes_per_clk_{name}"] = round(rate, 2)
    return found


def together() -> dict:
    """Clocks of one softmax step of a warpgroup (softmax, rescale, round), and of its end (rescale, round) without the
    rest, alone and beside other warpgroups' work; and of that work, as one batch or step of it. fp8: as chapter 10's.

    QK and PV together are issued one behind the other: clocks until each is issued, and until each is done.
    """
    found: dict = {}
    data = torch.randn(256, device="cuda")
    for key, head_dim, fp8 in (("d64", 64, False), ("d128", 128, False), ("fp8_d128", 128, True)):
        compiled, each = build("beside", head_dim, fp8=fp8), found.setdefault(key, {})
        for name, (jobs, delay) in (BESIDE | BESIDE_FP8 if fp8 else BESIDE).items():
            producer = fp8 and name in BESIDE_FP8
            if head_dim == 128 and jobs[2] and not producer:
                continue  # registers for two warpgroups
            out = _run(
                compiled,
                "beside_producer" if producer else "beside",
                384,
                ctypes.c_void_p(data.data_ptr()),
                *(ctypes.c_int(number) for number in (*jobs, 12 * SOFTMAX_ROUNDS, SOFTMAX_ROUNDS, delay)),
                ctypes.c_float(0.1),
                shared_bytes=2 * head_dim * (128 + 4 * 128) + 1024,
            )
            clocks = [round(out[2 * w] / out[2 * w + 1], 1) if jobs[w] else None for w in range(3)]
            each[name] = {"softmax": clocks[1], "other": clocks[0]} | ({"third": clocks[2]} if jobs[2] else {})
            if jobs[0] == 5:
                counted = SOFTMAX_ROUNDS // 2
                each[name] |= dict(zip(PAIR, (round(total / counted, 1) for total in out[6:10]), strict=True))
    return found


MEASURES = {
    "kernels": kernel_cycles,
    "units": units,
    "wgmma": wgmma,
    "barriers": barriers,
    "together": together,
    "tma": tma,
    "variants": variants,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure the units of one SM, and the chapters' kernels in its clocks."
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    options = parser.parse_args()
    if {"kernels", "variants"} & set(options.only):
        prepare()
    command = ["python", "-m", "fa_reference.hopper.calibrate", "--only", *options.only]
    record = {"kind": "calibration", "provenance": provenance(command)}
    path = options.out / f"calibration_{slug(record['provenance']['device'])}.json"
    for name in options.only:
        try:
            record[name] = MEASURES[name]()
        except Exception as error:  # the others are worth having
            record[name] = {"failed": f"{type(error).__name__}: {error}"}
        save(record, path)
        print(name, record[name], flush=True)
    print(path)


if __name__ == "__main__":
    main()
