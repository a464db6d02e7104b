"""Random attention problems for every version of the course, judged by the error rule.

One recipe draws the problem; hypothesis drives it in tests/course/test_fuzz.py (and shrinks what fails), a seeded
random generator drives it here:

    python -m fa_reference.fuzz --cases 500 --json results/fuzz_DEVICE.json

on the GPU at hand. Outputs come from memory full of NaN, and a third of the inputs lies in a larger buffer of NaN.
"""

import argparse
import json
import multiprocessing
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fa_reference.error_rule import judge
from fa_reference.grading.worker import poison_new_tensors, refuse_overruns
from fa_reference.inputs import KINDS, LAYOUTS, Case
from fa_reference.versions import VERSIONS, Version, load_version

Pick = Callable[[Sequence[Any]], Any]
# Block sizes of the course's kernels, and their neighbours: where tails begin.
EDGES = sorted({n + d for n in (16, 32, 48, 64, 96, 128, 176, 192, 256) for d in (-1, 0, 1)} | {1, 2, 3, 5})
LONGER = (383, 384, 500, 511, 513, 777, 1000, 1024, 1537, 2048)


def draw_case(pick: Pick, version: Version, longest: int, heads: Sequence[int] = (1, 2, 3)) -> Case:
    """A problem that `version` accepts, with lengths up to `longest`; `pick` chooses one of several values."""
    lengths = [n for n in (*EDGES, *LONGER) if n <= longest]
    heads_kv = pick(heads)
    return Case(
        len_q=pick(lengths),
        len_k=pick([*lengths, 0]),
        batch=pick((1, 2)),
        heads_q=heads_kv * pick((1, 2, 3)),
        heads_kv=heads_kv,
        head_dim=pick(version.head_dims or (1, 8, 24, 64, 80, 128)),
        dtype=pick(version.dtypes),
        causal=pick((False, True)),
        scale=pick((None, 0.05, 0.3, 1.0)),
        kind=pick(tuple(KINDS)),
        layout=pick(LAYOUTS),
        seed=pick(range(10**6)),
    )


def run_case(forward: Callable, case: Case, device: str, **options: Any) -> str | None:
    """What is wrong with a forward on a case by the error rule, or with what it left of its inputs; None if right."""
    q, k, v = case.make(device)
    before = [x.clone() for x in (q, k, v)]
    try:
        o, lse = forward(q, k, v, causal=case.causal, scale=case.scale, **options)
        refuse_overruns()
    except Exception as error:  # noqa: BLE001 - whatever it raises is a finding
        return f"{type(error).__name__}: {str(error)[:300]}"
    if (o.shape, o.dtype, lse.shape, lse.dtype) != (q.shape, q.dtype, q.shape[:3], torch.float32):
        return f"o {o.dtype} {tuple(o.shape)}, lse {lse.dtype} {tuple(lse.shape)}"
    if not all(torch.equal(x, y) for x, y in zip((q, k, v), before)):
        return "an input was changed"
    report = judge(o, lse, q, k, v, causal=case.causal, scale=case.scale)
    return None if report.passed else f"{report.ratio:.3g} times what the error rule allows: {report}"


def forwards(version: Version) -> dict[str, Callable]:
    """The forward of a version, or all steps' of chapter 5, by name."""
    module = load_version(version.name)
    names = [n for n in dir(module) if n == "forward" or n.startswith("forward_")]
    return {f"{version.name}.{n}" if len(names) > 1 else version.name: getattr(module, n) for n in names}


def fuzz(names: Sequence[str], cases: int, seconds: float, seed: int, longest: int) -> dict[str, Any]:
    """Try random problems on these kernels (names as `forwards` gives them) in turns; the counts and what failed."""
    poison_new_tensors()
    kernels = [(v, name, f) for v in candidates() for name, f in forwards(v).items() if name in names]
    chance, began = random.Random(seed), time.monotonic()
    counts = {name: {"cases": 0, "failed": 0} for _, name, _ in kernels}
    failures = []
    for number in range(cases):
        version, name, forward = kernels[number % len(kernels)]
        case = draw_case(chance.choice, version, longest)
        wrong = run_case(forward, case, "cuda")
        counts[name]["cases"] += 1
        if wrong:
            counts[name]["failed"] += 1
            failures.append({"version": name, "case": str(case), "wrong": wrong})
            print(f"{name}: {case}\n    {wrong}", flush=True)
        if time.monotonic() - began > seconds:
            break
    return {"versions": counts, "failures": failures}


def candidates() -> list[Version]:
    """The versions from chapter 3 on that run on this GPU."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    return [
        v for v in VERSIONS.values() if "cuda" in v.devices and (hopper or not v.hopper) and 3 <= (v.chapter or 9) <= 9
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if no case breaks the rule, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Random problems for every version that runs on the GPU.")
    parser.add_argument("--cases", type=int, default=500, help="over all versions together")
    parser.add_argument("--seconds", type=float, default=600, help="stop after so long")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--versions", nargs="*", help=f"of {', '.join(VERSIONS)}")
    parser.add_argument("--apart", action="store_true", help="a process for each kernel, all at once")
    parser.add_argument("--json", type=Path, help="write a record here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA GPU on this machine: tests/course/test_fuzz.py covers the versions that run without one")
        return 1
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    chosen = [v for v in candidates() if options.versions is None or v.name in options.versions]
    names = [name for v in chosen for name in forwards(v)]
    began = time.monotonic()
    if options.apart:
        share = -(-options.cases // len(names))
        with ProcessPoolExecutor(len(names), mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [
                pool.submit(fuzz, [name], share, options.seconds, seed + n, options.longest)
                for n, name in enumerate(names)
            ]
            parts = [job.result() for job in jobs]
    else:
        parts = [fuzz(names, options.cases, options.seconds, seed, options.longest)]
    counts = {name: c for part in parts for name, c in part["versions"].items()}
    failures = [f for part in parts for f in part["failures"]]
    tried = sum(c["cases"] for c in counts.values())
    for name, c in counts.items():
        print(f"{name:<32} {c['cases']:>4} cases, {c['failed']} wrong")
    device = torch.cuda.get_device_name()
    print(f"{tried} cases, {len(failures)} wrong, seed {seed}, {time.monotonic() - began:.0f} s, {device}")
    if options.json:
        record = {"schema_version": 1, "date": datetime.now(UTC).date().isoformat(), "device": device, "seed": seed}
        record |= {"torch": torch.__version__, "python": platform.python_version(), "longest": options.longest}
        record |= {"cases": tried, "versions": counts, "failures": failures}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
