"""The error experiment of the FlashAttention-3 paper, and what else can be learned with it, on two CPU cores.

    python -m fa_reference.fp8.experiment [--quick]

writes results/fp8_error_cpu.json and its figures, and prints the tables. The paper (section 4.3, table 3) draws the
entries of Q, K and V from N(0, 1) + N(0, 100) x Bernoulli(0.001) and gives the root mean square error against float64.
It does not state the shape. Ours is in SHAPE, picked among several because its errors are nearest to the paper's;
`lengths` shows the others (one scale per tensor: from half of the paper's error to 1.4 times). Inputs are drawn in
float32, and the float64 reference sees those, so that rounding the inputs counts as error too (the paper's FP16 numbers
fit only so). 512 queries stand for a longer sequence: without a causal mask, queries do not meet each other.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fa_reference.activations import LAYERS, load_activations
from fa_reference.bench import record as recording
from fa_reference.fp8.diagnosis import accumulation_errors, concentration, outliers
from fa_reference.fp8.schemes import ALTERNATIVES, BLOCK, BOTH, ROTATION, SOURCES, attend
from fa_reference.fp8.sixteen_bit import baseline_fp8, flash_fp16, standard_fp16
from fa_reference.gold import gold_attention
from fa_reference.inputs import KINDS


@dataclass(frozen=True)
class Shape:
    """Batch 1, one head."""

    len_q: int = 512
    len_k: int = 8192
    head_dim: int = 128


SHAPE = Shape()
SEEDS = tuple(range(8))
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LENGTH_SEEDS = (100, 101, 102, 103)
HEAD_DIMS = (64, 128)
ACCUMULATION_LENGTHS = (1024, 4096, 16384)

# Row: (name, title, the paper's RMSE or None where the paper has no such row).
PAPER_ROWS: tuple[tuple[str, str, float | None], ...] = (
    ("fp16 standard", "FP16, standard attention", 3.2e-4),
    ("fp16 fa2", "FP16, FlashAttention-2", 1.9e-4),
    ("fp16 fa3", "FP16, FlashAttention-3", 1.9e-4),
    ("fp8 baseline", "FP8, one scale per tensor, softmax in FP16", 2.4e-2),
    ("tensor", "FP8, one scale per tensor", None),
    ("block", "FP8, block scales", 2.4e-2),
    ("rotation", "FP8, rotation", 9.3e-3),
    ("both", "FP8, block scales and rotation", 9.1e-3),
)
_OTHERS = {
    "fp16 standard": standard_fp16,
    "fp16 fa2": lambda q, k, v, causal: flash_fp16(q, k, v, causal=causal, version=2),
    "fp16 fa3": flash_fp16,
    "fp8 baseline": baseline_fp8,
}


def rms(x: Tensor) -> float:
    """Root mean square over all elements."""
    return float(x.double().square().mean().sqrt())


def paper_input(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, 1, N_q, d), k and v (1, 1, N_k, d), float32, from the paper's distribution."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (shape.len_q, shape.len_k, shape.len_k)
    return tuple(KINDS["outliers"]((1, 1, n, shape.head_dim), generator) for n in lengths)


def errors(q: Tensor, k: Tensor, v: Tensor, causal: bool, names: Sequence[str], seed: int = 0) -> dict[str, float]:
    """RMSE against float64 of every named way to compute attention; "output" is the RMS of the output itself."""
    schemes = {scheme.name: scheme for scheme in (*ALTERNATIVES, *SOURCES, BLOCK, ROTATION, BOTH)}
    gold, _ = gold_attention(q, k, v, causal=causal)
    found = {"output": rms(gold)}
    for name in names:
        if name in _OTHERS:
            o = _OTHERS[name](q, k, v, causal=causal)
        else:
            o, _ = attend(schemes[name], q, k, v, causal=causal, seed=seed)
        found[name] = rms(o.double() - gold)
    if "fp16 fa3" in names:
        # Against a reference that sees the inputs already rounded: what the algorithm itself adds.
        halves = [x.half() for x in (q, k, v)]
        gold16, _ = gold_attention(*halves, causal=causal)
        found["fp16 fa3, inputs given"] = rms(flash_fp16(*halves, causal=causal).double() - gold16)
        found["fp16 standard, inputs given"] = rms(standard_fp16(*halves, causal=causal).double() - gold16)
    return found


ALL_NAMES = tuple(dict.fromkeys([row[0] for row in PAPER_ROWS] + [s.name for s in (*ALTERNATIVES, *SOURCES)]))
MAIN_NAMES = ("tensor", "block", "token", "rotation", "both", "bf16")


def _job(job: tuple) -> tuple[tuple, object]:
    kind, *rest = job
    if kind == "paper":
        shape, seed = rest
        q, k, v = paper_input(shape, seed)
        return job, errors(q, k, v, False, ALL_NAMES, seed) | {"concentration": concentration(q, k, v, seed)}
    if kind == "length":
        shape, seed = rest
        return job, errors(*paper_input(shape, seed), False, MAIN_NAMES, seed)
    if kind == "smollm2":
        layer, tokens = rest
        a = load_activations(layer)
        q, k, v = (x[:, :, :tokens].float() for x in (a.q, a.k, a.v))
        return job, errors(q, k, v, True, ALL_NAMES) | {"outliers": outliers({"q": q, "k": k, "v": v})}
    if kind == "accumulate":
        return job, accumulation_errors(*rest)
    raise ValueError(f"unknown job {kind!r}")


def run(quick: bool = False, processes: int | None = None) -> dict:
    """The whole experiment as a record (see bench/record.py); quick: tiny shapes, to test the machinery only."""
    shape = Shape(32, 256, 64) if quick else SHAPE
    seeds, length_seeds = (SEEDS[:2], LENGTH_SEEDS[:1]) if quick else (SEEDS, LENGTH_SEEDS)
    lengths, sums = ((128, 256), (128,)) if quick else (LENGTHS, ACCUMULATION_LENGTHS)
    tokens = 128 if quick else 2048
    jobs: list[tuple] = [("accumulate", n) for n in reversed(sums)]
    jobs += [("smollm2", layer, tokens) for layer in LAYERS]
    jobs += [("paper", shape, seed) for seed in seeds]
    jobs += [
        ("length", Shape(shape.len_q, n, d), s) for n in reversed(lengths) for d in HEAD_DIMS for s in length_seeds
    ]
    found = dict(_in_parallel(jobs, processes))

    settings = {"shape": asdict(shape), "seeds": list(seeds), "length_seeds": list(length_seeds)}
    settings |= {"distribution": "N(0,1) + N(0,100) x Bernoulli(0.001), Q, K and V", "smollm2_tokens": tokens}
    settings |= {"block_q": 128, "block_k": 128, "reference": "float64 on the float32 inputs", "quick": quick}
    record = recording.new_record("fp8_error", settings, [*"python -m fa_reference.fp8.experiment".split()])
    record["titles"] = {s.name: s.title for s in (*ALTERNATIVES, *SOURCES)} | {row[0]: row[1] for row in PAPER_ROWS}
    record["costs"] = {s.name: s.cost for s in ALTERNATIVES}
    record["paper"] = {row[0]: row[2] for row in PAPER_ROWS}
    record["random"] = {str(seed): found["paper", shape, seed] for seed in seeds}
    record["smollm2"] = {str(layer): found["smollm2", layer, tokens] for layer in LAYERS}
    record["lengths"] = [
        {"len_k": n, "head_dim": d, "seed": s} | found["length", Shape(shape.len_q, n, d), s]
        for d in HEAD_DIMS
        for n in lengths
        for s in length_seeds
    ]
    record["accumulation"] = [row for n in sums for row in found["accumulate", n]]
    record["complete"] = True
    return record


def _in_parallel(jobs: list[tuple], processes: int | None) -> list[tuple[tuple, object]]:
    """Processes of one thread each: torch's own threads lose far more on tiles as small as these."""
    processes = min(2, os.cpu_count() or 1) if processes is None else processes
    if processes <= 1:
        return [_job(job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        return list(pool.imap_unordered(_job, jobs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fa_reference.fp8.experiment", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written: does it run?")
    quick = parser.parse_args(arguments).quick
    from fa_reference.fp8 import figures, tables

    record = run(quick)
    print(tables.everything(record))
    if not quick:
        recording.save(record, recording.RESULTS / "fp8_error_cpu.json")
        figures.save_all(record, recording.RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
