"""Recorded runs: JSON with provenance and raw samples, written so that an aborted run keeps what it had."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from fa_reference.course import ROOT

SCHEMA_VERSION = 1
RESULTS = ROOT / "results"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _without_folders(command: list[str]) -> list[str]:
    """A command line with absolute paths cut down to the last name: where they lead is one machine's affair."""
    return [Path(word).name if Path(word).is_absolute() else word for word in command]


def provenance(command: list[str]) -> dict:
    """What one must know to place a measurement: device, limits, software, commit, date and command line."""
    import torch

    data: dict = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(_without_folders(command)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "cuda": torch.version.cuda,
        # A copy of the tree without git's folder can be told its commit.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("GIT_COMMIT"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
    }
    if torch.cuda.is_available():
        from fa_reference.bench import monitor

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        data |= {
            "device": properties.name,
            "sm_count": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": monitor.driver_version(),
            "power_limit_w": monitor.power_limit_w(),
            "max_sm_clock_mhz": monitor.max_sm_clock_mhz(),
            "cudnn": _cudnn(torch.backends.cudnn.version()),
        }
    else:
        data |= {"device": f"CPU ({platform.machine()}, {os.cpu_count()} cores)", "sm_count": None}
    return data


def _cudnn(number: int | None) -> str | None:
    """91900 -> "9.19.0" (since cuDNN 9 the number is major * 10000 + minor * 100 + patch)."""
    if number is None:
        return None
    major = 10000 if number >= 90000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _version_of(module: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None


def slug(device: str) -> str:
    """A device's name as part of a file name: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    name = re.sub(r"^nvidia\s+", "", device.lower().replace("geforce ", ""))
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "device"


def default_path(kind: str, device: str, date: str, suffix: str = "", folder: Path | None = None) -> Path:
    """results/<kind>_<device>_<day>[_suffix].json; with the time of day added rather than replacing an earlier run."""
    folder = RESULTS if folder is None else folder
    stem = f"{kind}_{slug(device)}_{date[:10]}" + (f"_{suffix}" if suffix else "")
    path = folder / f"{stem}.json"
    if path.exists():
        path = folder / f"{stem}_{re.sub(r'[^0-9]', '', date[11:19])}.json"
    return path


def _command_line() -> list[str]:
    program = Path(sys.argv[0]).name
    return ["python", "-m", "fa_reference", *sys.argv[1:]] if program == "__main__.py" else [program, *sys.argv[1:]]


def new_record(kind: str, settings: dict, command: list[str] | None = None) -> dict:
    """An empty record; `complete` becomes True when the run has reached its end."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "complete": False,
        "provenance": provenance(command or _command_line()),
        "settings": settings,
        "columns": [],
        "absent": [],
        "ceilings": {},
        "cells": [],
    }


def save(record: dict, path: Path) -> None:
    """Write atomically: a reader, or a run that is killed, sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(dumps(record) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def dumps(record: dict) -> str:
    """JSON with short lists of numbers on one line; nan and infinity become null, which JSON knows."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False)
    return re.sub(r"\[[\d\s,.eE+-]+\]", lambda match: re.sub(r"\s+", " ", match.group()), text)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def load(path: Path) -> dict:
    """A recorded run. ValueError, in words, for a file that is none or has another schema."""
    try:
        record = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a recorded run: {error}") from None
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        found = record.get("schema_version") if isinstance(record, dict) else None
        raise ValueError(f"{path} has schema_version {found}; this benchmark reads {SCHEMA_VERSION}")
    return record


def newest(kind: str, folder: Path | None = None, columns: Collection[str] = ()) -> tuple[Path, dict] | None:
    """The newest recorded run of a kind that has all these columns.

    Complete runs come first, then the latest day, then the run with the most shapes.
    """
    found = []
    for path in (RESULTS if folder is None else folder).glob(f"{kind}_*.json"):
        try:
            record = load(path)
        except ValueError:
            continue
        names = {column["name"] for column in record["columns"]}
        if record["kind"] == kind and names.issuperset(columns):
            date = record["provenance"]["date"]
            found.append(((record["complete"], date[:10], len(record["cells"]), date), path, record))
    if not found:
        return None
    _, path, record = max(found, key=lambda entry: entry[0])
    return path, record


def where_and_when(record: dict) -> str:
    """ "NVIDIA H100 80GB HBM3, 2026-11-22": what every table and figure says about its numbers."""
    return f"{record['provenance']['device']}, {record['provenance']['date'][:10]}"
