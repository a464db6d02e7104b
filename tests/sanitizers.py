"""NVIDIA's compute-sanitizer on the CUDA kernels of chapters 5 to 10 and of cuda/; records what it says.

    python tests/sanitizers.py [--out results]            # on a Hopper GPU with compute-sanitizer, about two minutes

Every tool first has to report a planted bug of its kind; only then does its silence about the real kernels mean
anything. What it means is limited: the tools watch ordinary loads, stores and barriers. They see neither TMA's writes
nor wgmma's reads of shared memory (the "asynchronous proxy"), so a tile that is overwritten while wgmma still reads it
goes unnoticed here; the error rule on many shapes, the debug build and the SM model of chapters 6 to 10 look for those.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

from fa_reference.bench import record as records  # noqa: E402
from fa_reference.fp8 import random_signs  # noqa: E402
from fa_reference.versions import load_file  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck")
LIMIT_S = 240  # a run of one tool
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
HOPPER = {
    6: ("06_hopper_engines", "attention"),
    7: ("07_warp_specialised", "warp_specialised"),
    8: ("08_pingpong", "pingpong"),
    9: ("09_two_stage", "fa3"),
}
# name -> (tool that must report it, folder of solutions/, file, text, its replacement, what is wrong)
_FREE = "        __syncthreads();  // everyone has finished with the tiles of the block before\n"
_ROWS = "        if (r >= problem.len_q) continue;\n"
_TILES = "        __syncthreads();  // everyone's part of the tiles is there\n"
PLANTED = {
    "rows past the end are stored": ("memcheck", "09_two_stage", "fa3.cu", _ROWS, ""),
    "a tile is overwritten while others read it": ("racecheck", "05_cuda", "tiles.cu", _FREE, ""),
    "a barrier that only one warp comes to": (
        "synccheck",
        "05_cuda",
        "tiles.cu",
        _TILES,
        _TILES.replace("        __sync", "        if (threadIdx.x < 32) __sync"),
    ),
    "a warp barrier whose mask leaves out who calls it": (
        "synccheck",
        "05_cuda",
        "tiles.cu",
        _TILES,
        _TILES + "        __syncwarp(threadIdx.x % 32 < 16 ? 0xffff0000u : 0x0000ffffu);\n",
    ),
}


def problems():
    """Small inputs with ragged ends, grouped heads, fewer queries than keys: (q, k, v, causal)."""
    import torch

    torch.manual_seed(0)
    for head_dim, causal, dtype in itertools.product((64, 128), (False, True), (torch.bfloat16, torch.float16)):
        if (dtype == torch.float16) != (head_dim == 64):
            continue
        shape = {"device": "cuda", "dtype": dtype}
        q = torch.randn(1, 2, 200, head_dim, **shape)
        k, v = torch.randn(2, 1, 1, 330, head_dim, **shape)
        yield q, k, v, causal


def launch(which: str) -> None:
    """Run in the child, under the sanitizer: all kernels, or the one with a planted bug in a copy of its folder."""
    import torch

    if which in PLANTED:
        _, folder, file, text, replacement = PLANTED[which]
        copy = Path(tempfile.mkdtemp()) / folder
        shutil.copytree(ROOT / "solutions" / folder, copy)
        source = (copy / file).read_text()
        if source.count(text) != 1:
            raise SystemExit(f"{file} has the text to replace {source.count(text)} times, not once: {text!r}")
        (copy / file).write_text(source.replace(text, replacement))
        host = load_file(copy / ("fa2_cuda.py" if folder == "05_cuda" else Path(file).with_suffix(".py").name))
        forward = host.forward_tiles if file == "tiles.cu" else host.forward
        q, k, v, causal = next(problems())
        forward(q, k, v, causal=causal)
    else:
        import fa3_forward
        import fa3_forward_fp8
        import quantise_fp8

        chapter5 = load_file(ROOT / "solutions" / "05_cuda" / "fa2_cuda.py")
        steps = [chapter5.forward_scalar, chapter5.forward_tiles, chapter5.forward_tensor_cores, chapter5.forward]
        hosts = [load_file(ROOT / "solutions" / folder / f"{name}.py") for folder, name in HOPPER.values()]
        for q, k, v, causal in problems():
            for forward in (*steps, *(host.forward for host in hosts)):
                forward(q, k, v, causal=causal)
            tiles = (fa3_forward.CONFIGS[q.shape[3], causal], fa3_forward.SHORT.get(q.shape[3]))
            for config in filter(None, tiles):
                fa3_forward.forward(q, k, v, causal=causal, config=config)
        chapter10 = load_file(ROOT / "solutions" / "10_fp8" / "fp8.py")
        for head_dim in fa3_forward.HEAD_DIMS:
            q, k, v = torch.randn(3, 1, 2, 200, head_dim, device="cuda", dtype=torch.bfloat16)
            fa3_forward.forward(q, k, v, causal=True)
            signs = random_signs(head_dim).to(q.device)
            for v_transposed in (False, True):
                codes = quantise_fp8.quantise(q, k, v, signs=signs, v_transposed=v_transposed)
                for causal in (False, True):
                    tiles = (fa3_forward_fp8.CONFIGS if v_transposed else fa3_forward_fp8.TURNING_CONFIGS)[
                        head_dim, causal
                    ]
                    short = fa3_forward_fp8.SHORT.get(head_dim) if v_transposed else None
                    for config in filter(None, (tiles, short)):
                        fa3_forward_fp8.forward_fp8(**vars(codes), causal=causal, config=config)
            if head_dim == 128:
                chapter10.forward_fp8(**chapter10.quantised(q, k, v), causal=True)
    torch.cuda.synchronize()


def run(tool: str, which: str) -> dict:
    """One tool on one child: the count it reports, its first lines, and how long it took."""
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--print-limit", "20"]
    # Every tensor gets an allocation of its own, or memcheck would see only torch's large blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, sys.executable, __file__, "--launch", which],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment,
    )
    output = done.stdout + done.stderr
    found = SUMMARY.search(output)
    return {
        "tool": tool,
        "run": which,
        "reports": None if found is None else int(found[1] or found[2]),
        "first_lines": [line for line in output.splitlines() if line.startswith("=========")][:6],
        "trouble": output[-1500:] if found is None else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    """Run everything side by side, print a table, write the record; 0 if planted bugs are reported and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    parser.add_argument("--launch", help="used by the script itself")
    options = parser.parse_args()
    if options.launch:
        launch(options.launch)
        return 0
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on the PATH: it comes with NVIDIA's CUDA toolkit")
    launch("all kernels")  # fills the cache of compiled kernels, which the children then share
    jobs = [(planted[0], name) for name, planted in PLANTED.items()] + [(tool, "all kernels") for tool in TOOLS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        runs = list(pool.map(lambda job: run(*job), jobs))
    record = records.new_record("sanitizers", {"limit_s": LIMIT_S}, ["tests/sanitizers.py"])
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True)
    record["provenance"]["sanitizer"] = version.stdout.strip().splitlines()[-1]
    record |= {"runs": runs, "complete": True}
    right = True
    for one in runs:
        expected = "at least 1" if one["run"] in PLANTED else "0"
        good = one["reports"] is not None and (one["reports"] > 0) == (one["run"] in PLANTED)
        right &= good
        verdict = "ok" if good else "WRONG"
        print(f"{verdict:5} {one['tool']:9} {one['run']:45} {one['reports']} reports, {expected} expected")
        if not good:
            print("\n".join(one["first_lines"]), one["trouble"] or "")
    path = records.default_path(
        "sanitizers", record["provenance"]["device"], record["provenance"]["date"], folder=options.out
    )
    records.save(record, path)
    print(f"Written to {path}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
