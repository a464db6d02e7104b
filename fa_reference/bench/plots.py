"""Figures of a recorded run, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fa_reference.bench.grid import Cell
from fa_reference.bench.record import where_and_when
from fa_reference.bench.tables import used_columns
from fa_reference.bench.traffic import counted
from fa_reference.lesson import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours are those of every figure of the course; the marker says it once more.
MARKERS = {
    "naive": "o",
    "online_softmax": "v",
    "fa1_triton": "s",
    "fa2_triton": "D",
    "fa2_cuda": "<",
    "one_warpgroup": "1",
    "warp_specialised": ">",
    "pingpong": "p",
    "two_stage": "d",
    "explicit": "x",
    "math": "+",
    "torch_fa2": "^",
    "cudnn": "P",
    "fa3_forward": "h",
    "fa3": "*",
    "fa4": "X",
}


def style(name: str) -> dict:
    """matplotlib keywords of a version: the same in every figure; a learner's has its solution's colour, dashed."""
    base = name.removeprefix("mine:").replace("_tiled", "_triton")
    color, marker = COLOURS.get(base, "#444444"), MARKERS.get(base, ".")
    return {"color": color, "marker": marker, "linestyle": "--" if name.startswith("mine:") else "-"}


def caption(figure: Figure, record: dict, extra: str = "") -> None:
    """Device and date below the figure: a speed without them says nothing."""
    text = f"Measured on {where_and_when(record)}" + (f"; {extra}" if extra else "")
    figure.text(0.5, 0.005, text, ha="center", va="bottom", fontsize=10, color="#333333")


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Lengths on a logarithmic axis, labelled 512, 1k, 2k, ..."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("sequence length N")


def draw_speed(axes: Axes, cells: Sequence[dict], columns: Sequence[dict]) -> None:
    """TFLOP/s over N, one line per version; a version without a time has no point."""
    for column in columns:
        keywords = style(column["name"])
        results = [(c["len_q"], c["results"].get(column["name"], {})) for c in cells]
        timed = [(n, r["tflops"]) for n, r in results if "tflops" in r]
        if timed:
            axes.plot(*zip(*timed, strict=True), label=column["title"], linewidth=1.8, markersize=6, **keywords)
    length_axis(axes, sorted({c["len_q"] for c in cells}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    entries: dict = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="lower center", ncols=5, frameon=False, bbox_to_anchor=(0.5, 0.04)
    )


def speed_figure(record: dict, group: str, dtype: str) -> Figure | None:
    """The paper's layout: masks in rows, head dimensions in columns. None if the record has no such cells."""
    from matplotlib.figure import Figure

    cells = [c for c in record["cells"] if c["group"] == group and c["dtype"] == dtype]
    if not cells:
        return None
    masks, head_dims = sorted({c["causal"] for c in cells}), sorted({c["head_dim"] for c in cells})
    columns = used_columns(record, cells)
    figure = Figure(figsize=(max(9.0, 4.2 * len(head_dims)), 3.4 * len(masks) + 1.5), dpi=110)
    panels = figure.subplots(len(masks), len(head_dims), squeeze=False)
    for row, causal in enumerate(masks):
        for col, head_dim in enumerate(head_dims):
            axes = panels[row][col]
            chosen = [c for c in cells if c["causal"] == causal and c["head_dim"] == head_dim]
            axes.set_title(f"head dimension {head_dim}, {'causal' if causal else 'full'}", fontsize=12)
            if chosen:
                draw_speed(axes, chosen, columns)
            if col == 0:
                axes.set_ylabel(f"forward, {dtype}: TFLOP/s")
    _legend(figure, panels.ravel())
    figure.tight_layout(rect=(0, 0.06 + 0.5 / figure.get_figheight(), 1, 1))
    sizes = {"paper": "16k tokens, hidden size 2048", "llama": "Llama-3-8B prefill: 32/8 heads, batch 1"}
    notes = [sizes.get(group, "")]
    if any(r["status"] == "oom" for c in cells for r in c["results"].values()):
        notes.append("a line that ends early ran out of memory")
    caption(figure, record, "; ".join(note for note in notes if note))
    return figure


def bytes_figure(
    head_dims: Sequence[int] = (64, 128), lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16384)
) -> Figure:
    """HBM bytes of one head over N, counted by formula: naive, FA1, FA2, and Q, K, V, O once."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(head_dims), 4.4), dpi=110)
    panels = figure.subplots(1, len(head_dims), squeeze=False, sharey=True)[0]
    curves = {
        "naive": ("naive, float32 S and P", "--"),
        "explicit": ("naive, 16-bit S and P", "-"),
        "fa1_triton": ("FA1, $B_c$ = 2d", "-"),
        "fa2_triton": ("FA2, $B_r$ = 64", "-"),
    }
    for axes, d in zip(panels, head_dims, strict=True):
        for name, (label, line) in curves.items():
            moved = [counted(name, Cell("bytes", 1, 1, 1, n, n, d, False)).bytes / 1e6 for n in lengths]
            axes.plot(lengths, moved, label=label, **style(name) | {"linestyle": line})
        once = [8 * n * d / 1e6 for n in lengths]
        axes.plot(lengths, once, color="#666666", linestyle=":", label="Q, K, V, O once")
        axes.set_yscale("log")
        axes.set_title(f"head dimension {d}", fontsize=12)
        length_axis(axes, lengths)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("MB moved per head (counted)")
    _legend(figure, panels)
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    figure.text(0.5, 0.005, "Counted by formula, no mask; reads that L2 serves included", ha="center", fontsize=10)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.png and stem.svg; returns both paths."""
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):  # the same data give the same file
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, facecolor="white", metadata=metadata)
    return paths


def plot_record(record: dict, path: Path) -> list[Path]:
    """All figures of a forward record, beside its JSON at `path` (or where it would be)."""
    stem = path.with_suffix("")
    written: list[Path] = []
    for group, dtype in sorted({(c["group"], c["dtype"]) for c in record["cells"]}):
        if group == "smollm2":  # one length: a table says it better
            continue
        figure = speed_figure(record, group, dtype)
        if figure is not None:
            written += save_figure(figure, stem.with_name(f"{stem.name}_{group}_{dtype}"))
    written += save_figure(bytes_figure(), path.parent / "hbm_bytes_counted")
    return written
