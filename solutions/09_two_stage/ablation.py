"""What each technique is worth: the kernels of chapters 6 to 9, beside cuda/fa3_forward and the libraries, in one run.

On an H100 or H200:  python solutions/09_two_stage/ablation.py [--out results] [--cells paper,paper-causal,...]
Every kernel first runs in a child process with a time limit, debug build before release build, on inputs that expose
bugs, against float64; one that hangs or is wrong is left out of the race. cuda/ABLATION.md has predictions and results.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

import torch  # noqa: E402

from fa_reference.bench import record as records  # noqa: E402
from fa_reference.bench.contenders import Contender  # noqa: E402
from fa_reference.bench.grid import Cell  # noqa: E402
from fa_reference.bench.timing import ROUNDS, SLICE_MS, SPIN_MS  # noqa: E402
from fa_reference.kernels import cache_folder, compiler_version  # noqa: E402
from fa_reference.kernels.attention_host import AttentionKernel  # noqa: E402
from fa_reference.versions import load_file  # noqa: E402

KERNELS = {  # name -> (chapter, file, title)
    "attention": (6, "06_hopper_engines/attention.py", "one warpgroup"),
    "two_stage_unspecialised": (9, "09_two_stage/two_stage_unspecialised.py", "two stages, no specialisation"),
    "warp_specialised": (7, "07_warp_specialised/warp_specialised.py", "warp specialisation"),
    "pingpong": (8, "08_pingpong/pingpong.py", "+ pingpong"),
    "fa3": (9, "09_two_stage/fa3.py", "+ two stages"),
}
_RELEASE_K = "        if (thread == 0) mbarrier_arrive(&shared.k_empty[slot]);\n"
_PV = "        issue_pv(o, p, wgmma_advance(v_descriptor, slot * kBytesKV));\n"
_HAND_ON = "        named_barrier_arrive(other_turn, 256);\n"
_SYNC = "        named_barrier_sync(my_turn, 256);\n"
_FIRST = "    if (consumer == 1) named_barrier_arrive(other_turn, 256);  // consumer 0 may begin\n"
_WAIT_K = "        mbarrier_wait(&shared.k_full[slot], parity, K_FULL, n);\n        issue_qk"
_PIN = "        if (never) pin(s);\n"
_DEFERRED = (
    (
        _RELEASE_K,
        _RELEASE_K + "        if (thread == 0 && n > 0) mbarrier_arrive(&shared.v_empty[(n - 1) % kStages]);\n",
    ),
    (
        f"{_PV}        wgmma_wait<0>();\n        if (thread == 0) mbarrier_arrive(&shared.v_empty[slot]);\n    }}\n",
        f"{_PV}    }}\n    wgmma_wait<0>();\n",
    ),
)
_ASK_K = "        mbarrier_wait(&shared.k_full[slot], parity, K_FULL, n);\n        named_barrier_sync"
_ASK_V = "        mbarrier_wait(&shared.v_full[slot_v], parity_v, V_FULL, n);\n        issue_pv"
VARIANTS = {  # name -> (title, text to replace and its replacement, in pairs)
    "warp_specialised:deferred": ("7, waits for P V together with the next S", _DEFERRED),
    "pingpong:deferred": ("8, waits for P V together with the next S", _DEFERRED),
    "pingpong:late": (
        "8, turn handed on when S is done",
        ((_HAND_ON + "        wgmma_wait<0>();\n", "        wgmma_wait<0>();\n" + _HAND_ON),),
    ),
    "pingpong:qk_only": (
        "8, turns for Q K^T only",
        (
            ("    named_barrier_sync(my_turn, 256);\n#pragma", "#pragma"),
            (_WAIT_K, _WAIT_K.replace("        issue_qk", _SYNC + "        issue_qk")),
            (_SYNC + "        issue_pv", "        issue_pv"),
            ("    named_barrier_arrive(other_turn, 256);  // the last turn\n", ""),
        ),
    ),
    "fa3:no_pin": ("9, softmax not pinned before the wait", ((_PIN, ""),)),
    "fa3:no_turns": ("9, without pingpong", ((_SYNC, ""), (_HAND_ON, ""), (_FIRST, ""))),
    "fa3:one_asker": (
        "9, only consumer 0 asks the mbarriers",
        tuple(
            (ask, ask.replace("        mbarrier", "        if (consumer == 0) mbarrier")) for ask in (_ASK_K, _ASK_V)
        ),
    ),
    "fa3:176": ("9, blocks of 176 keys", ()),
    "two_stage_unspecialised:no_pin": ("two stages, no specialisation, not pinned", ((_PIN, ""),)),
}
CELLS = {
    "paper": Cell("paper ablation", 4, 16, 16, 8448, 8448, 128, False),
    "paper-causal": Cell("paper ablation", 4, 16, 16, 8448, 8448, 128, True),
} | {
    f"{n}{'-causal' if causal else ''}": Cell("16k tokens", 16384 // n, 16, 16, n, n, 128, causal)
    for n in (2048, 16384)
    for causal in (False, True)
}
# len_q, len_k, batch, heads_q, heads_kv, kind, layout
SHAPES = (
    (128, 128, 1, 1, 1, "normal", "bhnd"),
    (300, 777, 2, 4, 2, "normal", "bnhd"),
    (1000, 200, 1, 2, 1, "normal", "bhnd"),
    (513, 1025, 2, 3, 3, "large", "bhnd"),
    (257, 700, 1, 2, 2, "shifted", "padded"),
    (65, 1, 1, 4, 1, "normal", "bhnd"),
    (1, 999, 2, 2, 1, "normal", "bhnd"),
    (500, 1500, 1, 2, 2, "rising", "bnhd"),
    (400, 450, 1, 2, 2, "outliers", "padded"),
)


def host(name: str) -> AttentionKernel:
    """The host side of a kernel or of a variant "kernel:change"."""
    kernel, _, change = name.partition(":")
    module = load_file(ROOT / "solutions" / KERNELS[kernel][1])
    if change == "176":
        module.BLOCK_K = 176  # which shared_bytes reads
        return dataclasses.replace(module.KERNEL, block_k=176)
    return module.KERNEL


def source(name: str) -> Path:
    """The kernel's file; of a variant a copy in the cache, with its changes made."""
    kernel, _, change = name.partition(":")
    original = (ROOT / "solutions" / KERNELS[kernel][1]).with_suffix(".cu")
    if not change or not VARIANTS[name][1]:
        return original
    text = original.read_text()
    for before, after in VARIANTS[name][1]:
        if text.count(before) != 1:
            raise ValueError(f"{name}: {original.name} has {text.count(before)} times, not once: {before!r}")
        text = text.replace(before, after)
    file = cache_folder() / "ablation" / f"{name.replace(':', '_')}.cu"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


def build(name: str, causal: bool) -> str:
    """Compile one kernel or variant (bf16, d 128) into the cache; returns what is wrong with its code, if anything."""
    if name == "fa3_forward":
        import fa3_forward

        config = fa3_forward.CONFIGS[128, causal]
        report = fa3_forward.compile_config(config, causal=causal, dtype=torch.bfloat16).report
    else:
        report = host(name).build(128, torch.bfloat16, causal, source=source(name)).report
    spills = any(used.spill_store_bytes + used.spill_load_bytes for used in report.kernels.values())
    return f"{name}: {report.describe()}" if spills or report.notes else ""


def check(name: str) -> int:
    """Judge a kernel and its variants by the error rule, debug build first; prints and returns the exit status."""
    from fa_reference.error_rule import judge
    from fa_reference.inputs import Case

    hosts = {label: host(label) for label in (name, *(v for v in VARIANTS if v.startswith(f"{name}:")))}
    for debug in (True, False):
        worst, judged, started = 0.0, 0, time.perf_counter()
        for head_dim, causal, shape in itertools.product((128, 64), (False, True), SHAPES):
            for dtype in ("bfloat16", "float16"):
                if debug and (dtype == "float16") != (head_dim == 64):
                    continue
                len_q, len_k, batch, heads_q, heads_kv, kind, layout = shape
                case = Case(len_q, len_k, batch, heads_q, heads_kv, head_dim, dtype, causal, kind=kind, layout=layout)
                q, k, v = case.make("cuda")
                for label in [name] if debug or head_dim == 64 else hosts:
                    o, lse = hosts[label].forward(q, k, v, causal=causal, debug=debug, source=source(label))
                    report = judge(o, lse, q, k, v, causal=causal)
                    judged += 1
                    worst = max(worst, report.ratio)
                    if not report.passed:
                        print(f"WRONG {label} debug={debug} {case} {report}", flush=True)
                        return 1
        seconds = time.perf_counter() - started
        print(
            f"{name}, debug={debug}: {judged} judged, worst {worst:.2f} of what is allowed, {seconds:.0f} s", flush=True
        )
    q, k, v = Case(1111, 1333, 2, 8, 2, 128, "bfloat16", True).make("cuda")
    first = hosts[name].forward(q, k, v, causal=True)
    again = [hosts[name].forward(q, k, v, causal=True) for _ in range(20)]
    same = all(torch.equal(one, other) for run in again for one, other in zip(first, run, strict=True))
    print(f"{name}, 20 runs give the same bits: {same}", flush=True)
    return 0 if same else 1


def prepare(folder: Path, limit_s: float) -> set[str]:
    """Check all kernels, each in a child process, and compile what will race meanwhile; returns those that failed."""
    command = [sys.executable, __file__, "--check"]
    logs = {name: (folder / f"{name}.txt").open("w+") for name in KERNELS}
    children = {
        name: subprocess.Popen([*command, name], stdout=log, stderr=subprocess.STDOUT) for name, log in logs.items()
    }
    jobs = list(itertools.product((*KERNELS, *VARIANTS, "fa3_forward"), (False, True)))
    end = time.monotonic() + limit_s
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for remark in pool.map(build, *zip(*jobs, strict=True)):
            print(remark, end="\n" if remark else "")
    failed = set()
    for name, child in children.items():
        try:
            status = child.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            status = f"still running after {limit_s:.0f} s"
        logs[name].seek(0)
        print(logs[name].read()[-2000:].strip())
        if status:
            failed.add(name)
            print(f"LEFT OUT: {name} ({status})", flush=True)
    return failed


def contenders(failed: set[str]) -> tuple[list[Contender], list[dict]]:
    """All columns of the race, and the peers that are not there."""
    import fa3_forward

    from fa_reference.bench.peers import peer_contenders

    def bind(forward: Callable, options: dict):
        return lambda q, k, v, causal: (lambda: forward(q, k, v, causal=causal, **options), "")

    columns = []
    for name in (*KERNELS, *VARIANTS):
        kernel = name.partition(":")[0]
        chapter, file, title = KERNELS[kernel]
        if kernel not in failed:
            title, group = (VARIANTS[name][0], "variant") if name in VARIANTS else (title, "course")
            column = bind(host(name).forward, {"source": source(name)})
            columns.append(Contender(name, title, group, column, chapter=chapter, file=Path(file).name))
    columns.append(Contender("fa3_forward", "cuda/fa3_forward", "course", bind(fa3_forward.forward, {})))
    peers, absent = peer_contenders(["torch_fa2", "cudnn", "fa3"])
    official = {"fa3": "fa3_official"}  # chapter 9 is called fa3 here
    columns += [
        Contender(official.get(p.name, p.name), p.title, p.group, p.bind, p.dtypes, p.head_dims, p.mask_top_left)
        for p in peers
    ]
    return columns, absent


def race(folder: Path, cells: list[str], failed: set[str]) -> Path:
    """Time everything, interleaved, cell after cell; writes the record after each cell."""
    from fa_reference.bench.monitor import Monitor
    from fa_reference.bench.run import Race, run_cells
    from fa_reference.bench.timing import CudaClock

    columns, absent = contenders(failed)
    monitor = Monitor()
    settings = {"rounds": ROUNDS, "slice_ms": SLICE_MS, "spin_ms": SPIN_MS, "layout": "bnhd", "monitor": monitor.source}
    record = records.new_record("ablation", settings, ["solutions/09_two_stage/ablation.py", *sys.argv[1:]])
    record["provenance"]["compiler"] = compiler_version()
    record["columns"], record["absent"] = [column.to_json() for column in columns], absent
    path = records.default_path("ablation", record["provenance"]["device"], record["provenance"]["date"], folder=folder)

    def show(cell: Cell, done: dict) -> None:
        official = done["results"].get("fa3_official", {}).get("tflops", float("nan"))
        clock, power = (statistics.median(done[key] or [0]) for key in ("sm_clock_mhz", "power_w"))
        print(f"{cell.name}: {clock:.0f} MHz, {power:.0f} W")
        for name, result in done["results"].items():
            if "tflops" in result:
                of = result["tflops"] / official
                numbers = f"{result['median_ms']:8.3f} ms {result['tflops']:5.0f} TFLOP/s {of:.3f} of the official FA3"
                print(f"  {name:32s}{numbers}, error {result['error']['ratio']:.2f}")
            else:
                print(f"  {name:32s}{result.get('message', result['status'])}")
        sys.stdout.flush()

    race = Race(columns, CudaClock(monitor), monitor=monitor, rng=random.Random(1))
    run_cells(race, [CELLS[cell] for cell in cells], record, path, show)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record")
    parser.add_argument("--cells", default="paper,paper-causal,2048,16384", help=f"of {', '.join(CELLS)}")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for the checks of all kernels")
    parser.add_argument("--check", metavar="KERNEL", choices=KERNELS, help="only judge one kernel and its variants")
    options = parser.parse_args()
    if options.check:
        return check(options.check)
    cells = options.cells.split(",")
    if unknown := set(cells) - set(CELLS):
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; allowed: {', '.join(CELLS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    logs = cache_folder() / "ablation"
    logs.mkdir(parents=True, exist_ok=True)
    failed = prepare(logs, options.limit)
    print(f"Written to {race(options.out, cells, failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
