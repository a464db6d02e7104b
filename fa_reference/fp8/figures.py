"""The figures of a recorded FP8 error experiment; all but the picture of the outliers from its JSON alone."""

import math
from pathlib import Path

import torch

from fa_reference.activations import load_activations
from fa_reference.fp8 import tables
from fa_reference.fp8.hadamard import random_signs, rotate
from fa_reference.inputs import KINDS
from fa_reference.lesson import style

_NAMES = {"tensor": "one scale per tensor", "block": "block scales", "token": "token scales", "rotation": "rotation"}
_NAMES |= {"both": "block scales + rotation", "bf16": "BF16"}


def error_table(record: dict):
    """Our RMSE and its spread over seeds, with the paper's value as a mark."""
    import matplotlib.pyplot as plt

    names = list(record["paper"])
    figure, axes = plt.subplots(figsize=(8, 4.4))
    for i, name in enumerate(names):
        mean, low, high = tables.summary(record, name)
        axes.plot([low, high], [i, i], color="#56B4E9", linewidth=6, label="range over seeds" if i == 0 else None)
        axes.plot(mean, i, "o", color="#0072B2", markersize=9, label="this course" if i == 0 else None)
        if paper := record["paper"][name]:
            axes.plot(paper, i, "D", color="#D55E00", label="paper, table 3" if i == 0 else None)
    axes.set_yticks(range(len(names)), [record["titles"][name] for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    shape = record["settings"]["shape"]
    axes.set_xlabel(f"RMSE against float64 (d {shape['head_dim']}, {shape['len_k']} keys)")
    axes.legend(loc="upper center")
    return figure


def outliers():
    """|K| of four inputs' keys (rows) and channels (columns), before and after the rotation."""
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(0)
    inputs = {f"SmolLM2, layer {n}": load_activations(n).k[0, 0, :128].float() for n in (7, 18, 27)}
    inputs["paper's distribution"] = KINDS["outliers"]((128, 64), generator)
    figure, grid = plt.subplots(2, len(inputs), figsize=(11, 5.6), sharex=True, sharey=True, layout="constrained")
    for column, (title, x) in enumerate(inputs.items()):
        largest = float(x.abs().max())
        for axes, tensor, when in zip(
            grid[:, column], (x, rotate(x, random_signs(64))), ("before", "after"), strict=True
        ):
            image = axes.imshow(
                tensor.abs().numpy(), aspect="auto", cmap="magma", vmin=0, vmax=largest, interpolation="nearest"
            )
            axes.set_title(f"{title}\n{when}: largest {float(tensor.abs().max()):.1f}", fontsize=10)
            axes.grid(False)
        figure.colorbar(image, ax=grid[:, column], location="bottom", label="|K|")
    for axes in grid[:, 0]:
        axes.set_ylabel("token")
    for axes in grid[1]:
        axes.set_xlabel("channel")
    return figure


def lengths(record: dict):
    """RMSE over the number of keys (one panel a head dimension), and what 14-bit sums do over it."""
    import matplotlib.pyplot as plt

    dims = sorted({cell["head_dim"] for cell in record["lengths"]})
    figure, panels = plt.subplots(1, len(dims) + 1, figsize=(12, 4), layout="constrained")
    for axes, d in zip(panels, dims, strict=False):
        cells = [cell for cell in record["lengths"] if cell["head_dim"] == d]
        keys = sorted({cell["len_k"] for cell in cells})
        for name, label in _NAMES.items():
            means = []
            for n in keys:
                values = [cell[name] for cell in cells if cell["len_k"] == n]
                means.append(math.sqrt(sum(x * x for x in values) / len(values)))
            axes.plot(keys, means, "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="RMSE", title=f"paper's distribution, d {d}")
    panels[0].legend(fontsize=8, loc="center right")
    for mean, line in ((0.0, "-"), (1.0, "--")):
        cells = [cell for cell in record["accumulation"] if cell["v_mean"] == mean]
        for color, way in zip(
            ("#0072B2", "#D55E00", "#009E73"), ("fp32", "14 bits", "14 bits, two-level"), strict=True
        ):
            relative = [cell[way] / cell["output"] for cell in cells]
            label = f"{way}, V around {mean:g}"
            size = 9 if way == "fp32" else 5  # fp32 and two-level nearly coincide
            panels[-1].plot(
                [c["len_k"] for c in cells], relative, "o" + line, color=color, label=label, markersize=size
            )
    panels[-1].set(xscale="log", yscale="log", xlabel="keys", ylabel="RMSE / RMS of the output")
    panels[-1].set_title("accumulation, normal input, d 128")
    panels[-1].legend(fontsize=8, loc="upper left")
    panels[-1].set_ylim(top=2)
    for axes in panels:
        ticks = sorted({round(x) for line in axes.lines for x in line.get_xdata()})
        axes.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        axes.minorticks_off()
    return figure


def alternatives(record: dict):
    """Error of every alternative relative to one scale per tensor, on both families of inputs."""
    import matplotlib.pyplot as plt

    names = list(record["costs"])
    figure, axes = plt.subplots(figsize=(9, 7.5))
    for i, name in enumerate(names):
        random, real = tables.gain(record, name)
        axes.plot(random, i, "o", color="#D55E00", label="paper's distribution" if i == 0 else None)
        axes.plot(real, i, "s", color="#0072B2", label="SmolLM2, mean of layers" if i == 0 else None)
    axes.axvline(1, color="#000000", linewidth=1)
    axes.set_yticks(range(len(names)), [record["titles"][name] for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("RMSE relative to FP8 with one scale per tensor")
    axes.legend()
    return figure


def save_all(record: dict, folder: Path, dpi: int = 120) -> list[Path]:
    """Write the four PNG figures of a record into a folder; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style()
    made = {"table": error_table(record), "outliers": outliers(), "length": lengths(record)}
    made["alternatives"] = alternatives(record)
    paths = []
    for name, figure in made.items():
        path = folder / f"fp8_error_{name}.png"
        figure.savefig(path, dpi=dpi, metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths
