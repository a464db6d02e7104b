"""HBM bytes as the hardware counts them: Nsight Compute on one call of each version, beside the counted bytes."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fa_reference.bench import record as records
from fa_reference.bench.grid import Cell
from fa_reference.bench.traffic import counted, from_hbm
from fa_reference.course import ROOT

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
VERSIONS = ("naive", "explicit", "fa1_triton", "fa2_triton")
# Q, K, V and O have 64 MB each and the scores 4 GB in 16 bits: far more than the 50 to 60 MB of L2 on a Hopper card.
CELL = Cell("paper", 4, 32, 32, 4096, 4096, 64, False)
UNITS = {"byte": 1.0, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "tbyte": 1e12}
TIMEOUT_S = 300
REMARK = (
    "Caches are neither flushed nor frozen between a version's kernels; before the call a large read evicts L2. "
    "Bytes still dirty in L2 when the last kernel ends are not counted, at most the size of L2."
)


def command(name: str, cell: Cell) -> list[str]:
    """The ncu command line that profiles one call of `name`."""
    shape = f"{cell.batch},{cell.heads_q},{cell.heads_kv},{cell.len_q},{cell.len_k},{cell.head_dim},{int(cell.causal)}"
    return [
        "ncu",
        *("--metrics", ",".join(METRICS)),
        *("--clock-control", "none"),
        *("--cache-control", "none"),
        *("--profile-from-start", "off"),
        *("--csv", "--page", "raw", "--print-units", "base"),
        *(sys.executable, "-m", "fa_reference.bench.profile_child", name, shape, cell.dtype),
    ]


def parse(text: str) -> list[dict]:
    """Kernels in ncu's raw CSV: {"kernel", "read", "write"} in bytes. ValueError if the text holds no such table."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu printed no table of kernels")
    rows = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    head, units, body = rows[0], rows[1], rows[2:]
    if missing := [metric for metric in METRICS if metric not in head]:
        raise ValueError(f"ncu's table lacks {', '.join(missing)}")
    where = [head.index(metric) for metric in METRICS]
    factors = [UNITS[units[i].strip().lower()] for i in where]
    kernels = []
    for row in body:
        read, write = (float(row[i].replace(",", "")) * f for i, f in zip(where, factors, strict=True))
        kernels.append({"kernel": row[head.index("Kernel Name")][:120], "read": read, "write": write})
    return kernels


def profile_version(name: str, cell: Cell, run: Callable[..., subprocess.CompletedProcess] = subprocess.run) -> dict:
    """Measured and counted bytes of one version; {"name", "message"} when it could not be measured."""
    entry: dict = {"name": name}
    for key, traffic in (("counted", counted(name, cell)), ("counted_hbm", from_hbm(name, cell))):
        if traffic is not None:
            entry |= {f"{key}_bytes": traffic.bytes, f"{key}_how": traffic.how}
    try:
        done = run(command(name, cell), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        kernels = parse(done.stdout)
    except subprocess.TimeoutExpired:
        return entry | {"message": f"not measured: ncu took longer than {TIMEOUT_S} s"}
    except (OSError, ValueError, KeyError, IndexError) as error:
        said = [] if isinstance(error, OSError) else (done.stdout + done.stderr).strip().splitlines()[-4:]
        return entry | {"message": f"not measured: {error}" + (f" ({' | '.join(said)})" if said else "")}
    read, write = (sum(kernel[key] for kernel in kernels) for key in ("read", "write"))
    return entry | {"read_bytes": read, "write_bytes": write, "measured_bytes": read + write, "kernels": kernels}


def profile_all(out: Path | None, say: Callable[[str], None], names: Iterable[str] = VERSIONS) -> int:
    """Profile the versions, write results/hbm_bytes_<gpu>_<date>.json; 0 if at least one version was measured."""
    if shutil.which("ncu") is None:
        say("HBM bytes are not measured: ncu (Nsight Compute) is not on the PATH. Counted bytes need no GPU.")
        return 1
    record = records.new_record("hbm_bytes", {"metrics": list(METRICS), "remark": REMARK})
    when = record["provenance"]
    path = out or records.default_path("hbm_bytes", when["device"], when["date"])
    entries: list[dict] = []
    record["cells"] = [CELL.to_json() | {"entries": entries}]
    for name in names:
        entry = profile_version(name, CELL)
        entries.append(entry)
        records.save(record, path)
        say(describe(entry))
    record["complete"] = all("measured_bytes" in entry for entry in entries)
    records.save(record, path)
    say(f"{CELL.name}, batch {CELL.batch}, heads {CELL.heads}. {REMARK}\nWritten to {path}")
    return 0 if any("measured_bytes" in entry for entry in entries) else 1


def describe(entry: dict) -> str:
    """One line per version: measured beside counted."""
    counts = (
        f"counted {entry['counted_bytes'] / 1e9:.3f} GB ({entry['counted_how']})" if "counted_bytes" in entry else ""
    )
    if "measured_bytes" not in entry:
        return f"{entry['name']}: {entry['message']}; {counts}"
    measured = f"measured {entry['measured_bytes'] / 1e9:.3f} GB"
    parts = f"read {entry['read_bytes'] / 1e9:.3f}, written {entry['write_bytes'] / 1e9:.3f}"
    return f"{entry['name']}: {measured} ({parts}) in {len(entry['kernels'])} kernels; {counts}"
