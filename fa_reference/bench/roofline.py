"""The roofline of a recorded run (Williams, Waterman and Patterson 2009), with the measured versions as points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fa_reference.bench.ceilings import best
from fa_reference.bench.grid import cell_from_json
from fa_reference.bench.plots import caption, style
from fa_reference.bench.traffic import from_hbm
from fa_reference.counts import H100, H200, Device

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One version in one cell: FLOP per counted HBM byte, and measured TFLOP/s."""

    name: str
    title: str
    intensity: float
    tflops: float
    how: str


def data_sheet(record: dict) -> Device | None:
    """The data-sheet row of the card of a record, as far as counts.py has it (SXM parts)."""
    name = record["provenance"]["device"].upper()
    if "PCIE" in name or "NVL" in name:
        return None
    return next((device for key, device in (("H100", H100), ("H200", H200)) if key in name), None)


def ceilings(record: dict, dtype: str = "bf16") -> tuple[float, float]:
    """(TFLOP/s, TB/s): the best matmul and the best copy of the run. ValueError if the run has not measured them."""
    tflops = best(record["ceilings"].get(dtype, []), "tflops")
    tb_s = best(record["ceilings"].get("copy", []), "tb_s")
    if tflops is None or tb_s is None:
        raise ValueError(f"the record has no measured ceilings for {dtype}; recorded: {sorted(record['ceilings'])}")
    return tflops, tb_s


def points(
    record: dict,
    *,
    head_dim: int,
    length: int,
    causal: bool = False,
    group: str = "paper",
    dtype: str = "bf16",
    names: Sequence[str] | None = None,
) -> list[Point]:
    """Timed versions of one cell whose HBM bytes are counted; a causal mask is not in the byte counts."""
    found = []
    for data in record["cells"]:
        key = (data["group"], data["head_dim"], data["len_q"], data["causal"], data["dtype"])
        if key != (group, head_dim, length, causal, dtype):
            continue
        cell = cell_from_json(data)
        for column in record["columns"]:
            result = data["results"].get(column["name"], {})
            traffic = from_hbm(column["name"], cell)
            if "tflops" not in result or traffic is None or (names is not None and column["name"] not in names):
                continue
            intensity = data["flops"] / traffic.bytes
            found.append(Point(column["name"], column["title"], intensity, result["tflops"], traffic.how))
    return found


def draw_roofline(axes: Axes, record: dict, shown: Sequence[Point], dtype: str = "bf16") -> None:
    """Roofs measured in the run (solid) and of the data sheet (dotted), and the points."""
    import numpy as np

    tflops, tb_s = ceilings(record, dtype)
    sheet = data_sheet(record)
    right = max([point.intensity for point in shown], default=1000.0) * 4
    intensity = np.geomspace(2.0, max(right, 4000.0), 400)
    label = f"measured: {tb_s:.2f} TB/s copy, {tflops:.0f} TFLOP/s matmul"
    axes.plot(intensity, np.minimum(tflops, intensity * tb_s), color="#333333", linewidth=2, label=label)
    if sheet is not None:
        label = f"data sheet: {sheet.hbm_tb_s:.2f} TB/s, {sheet.tflops_16bit:.0f} TFLOP/s"
        roof = np.minimum(sheet.tflops_16bit, intensity * sheet.hbm_tb_s)
        axes.plot(intensity, roof, color="#999999", linestyle=":", linewidth=1.5, label=label)
    for point in shown:
        keywords = style(point.name) | {"linestyle": "none"}
        label = f"{point.title}: {point.tflops:.0f} TFLOP/s at {point.intensity:.0f} FLOP/B"
        axes.plot(point.intensity, point.tflops, markersize=9, label=label, **keywords)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per HBM byte (bytes counted)")
    axes.set_ylabel(f"TFLOP/s ({dtype})")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9, loc="lower right")


def roofline_figure(
    record: dict,
    *,
    head_dim: int = 64,
    length: int = 4096,
    causal: bool = False,
    group: str = "paper",
    dtype: str = "bf16",
    names: Sequence[str] | None = None,
) -> Figure:
    """The roofline of a recorded run with the versions of one cell on it. ValueError if that cell has no points."""
    from matplotlib.figure import Figure

    shown = points(record, head_dim=head_dim, length=length, causal=causal, group=group, dtype=dtype, names=names)
    if not shown:
        raise ValueError(
            f"the record has no timed {group} cell with d {head_dim}, N {length}, causal {causal}, {dtype}"
        )
    figure = Figure(figsize=(9, 5.6), dpi=110)
    axes = figure.subplots()
    draw_roofline(axes, record, shown, dtype)
    axes.set_title(f"Roofline: {group} grid, d {head_dim}, N {length}, {'causal' if causal else 'full'}, forward")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    caption(figure, record)
    return figure
