"""Traces: who did what from which cycle to which, as JSON that Perfetto opens, and as a figure.

The format is that of Chrome's trace viewer (ui.perfetto.dev opens it): a JSON object with

    traceEvents   a list of complete events {"ph": "X", "name", "cat", "ts", "dur", "pid", "tid", "args"}
                  and of names for the tracks {"ph": "M", "name": "thread_name", "pid", "tid", "args": {"name"}}
    otherData     {"unit": "cycles", "source": "model" or the device's name, ...}

`ts` and `dur` are SM clock cycles (the viewer calls them microseconds). pid 0 holds a track for every warpgroup, pid 1
one for every unit of the SM. `cat` is the kind of a span: "wait", "math", "issue" on warpgroups, "unit" on units.
args.iteration is the loop iteration or null, args.owner the warpgroup for which a unit works. A trace recorded by a
kernel has the same tracks for warpgroups; start and stop of each span are read from the SM's clock, less the smallest
start of the block. Instead of units it has a track for every consumer, "wgmma of consumer 0", with its wgmma groups in
flight ("QK" or "PV"): from their issue to the end of the wait that covers them, so at most that long.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"wait": "#dddddd", "math": "#e69f00", "issue": "#999999", "wgmma": "#0072b2", "exp": "#d55e00"}
COLORS |= {"QK": "#0072b2", "PV": "#56b4e9"}  # wgmma groups in flight, in recorded traces
COLORS |= {
    "FP32": "#e69f00",
    "ALU": "#f5c242",
    "convert": "#f0e442",
    "TMA": "#009e73",
    "TMA store": "#56b4e9",
    "smem": "#cc79a7",
}


class Span(NamedTuple):
    """Something that took from cycle `start` to cycle `stop` on a track (a warpgroup or a unit)."""

    track: str
    kind: str
    name: str
    start: float
    stop: float
    iteration: int | None = None
    owner: str = ""


def write_trace(path: Path | str, spans: Iterable[Span], **other: object) -> Path:
    """Write spans in the format above; `other` goes to otherData."""
    spans = list(spans)
    tracks = {track: (pid, tid) for pid in (0, 1) for tid, track in enumerate(_tracks(spans, pid))}
    events = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        for pid, name in enumerate(("warpgroups", "units"))
    ]
    for track, (pid, tid) in tracks.items():
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
    for s in spans:
        pid, tid = tracks[s.track]
        event = {"ph": "X", "name": s.name, "cat": s.kind, "ts": s.start, "dur": s.stop - s.start, "pid": pid}
        events.append(event | {"tid": tid, "args": {"iteration": s.iteration, "owner": s.owner}})
    document = {"traceEvents": events, "otherData": {"unit": "cycles", "source": "model"} | other}
    path = Path(path)
    path.write_text(json.dumps(document))
    return path


def read_trace(path: Path | str) -> list[Span]:
    """The spans of a trace in the format above, the model's or a device's."""
    events = json.loads(Path(path).read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [
        Span(
            names[e["pid"], e["tid"]],
            e["cat"],
            e["name"],
            e["ts"],
            e["ts"] + e["dur"],
            e["args"].get("iteration"),
            e["args"].get("owner", ""),
        )
        for e in events
        if e["ph"] == "X"
    ]


def _tracks(spans: list[Span], pid: int) -> list[str]:
    """Names of the tracks of warpgroups (pid 0), a producer first, or of units (1), in the order of COLORS."""
    names = {s.track for s in spans if (s.kind == "unit") == bool(pid)}
    order = {name: i for i, name in enumerate(COLORS)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name != "producer", name))


def plot_trace(
    spans: Iterable[Span], path: Path | str | None = None, *, start: float = 0, stop: float | None = None
) -> "Figure":
    """Draw the spans between two cycles, a row a track; with a path, also to an SVG or PNG file (by its ending).

    Waiting is light grey. Units show by shade for which warpgroup they work. A number is the loop iteration.
    """
    from matplotlib.figure import Figure  # not pyplot: a notebook's choice of backend stays as it is

    spans = list(spans)
    stop = max((s.stop for s in spans), default=1) if stop is None else stop
    spans = [s for s in spans if s.stop > start and s.start < stop and s.stop > s.start]
    workers = _tracks(spans, 0)
    tracks = workers + _tracks(spans, 1)
    figure = Figure(figsize=(12, 0.5 * len(tracks) + 1.2), layout="constrained")
    axes = figure.subplots()
    labelled: dict[int, float] = {}  # up to where a row has text
    for s in sorted(spans, key=lambda s: s.start):
        left, right = max(s.start, start), min(s.stop, stop)
        color = COLORS.get(s.kind) or COLORS.get(s.track) or COLORS.get(s.name.split()[0], "#888888")
        shade = 1 - 0.25 * (workers.index(s.owner) % 3) if s.owner in workers else 1
        row = tracks.index(s.track)
        axes.barh(row, right - left, left=left, height=0.8, color=color, alpha=shade, edgecolor="white", linewidth=0.5)
        if right - left > 0.035 * (stop - start):
            name = s.name.removeprefix(f"{s.track} ")
            text = name if s.iteration is None or s.kind == "wait" else f"{name} {s.iteration}"
            fits = int((right - left) / (stop - start) * 130)
            middle, half = (left + right) / 2, len(text[:fits]) / 260 * (stop - start)
            if middle - half >= labelled.get(row, start):
                labelled[row] = middle + half
                axes.text(middle, row, text[:fits], ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(tracks)), tracks)
    axes.set_xlim(start, stop)
    axes.set_xlabel("SM cycles")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path)
    return figure
