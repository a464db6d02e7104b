"""The tables of a recorded FP8 error experiment, as Markdown, from its JSON alone."""

import math
from collections.abc import Sequence


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def summary(record: dict, name: str) -> tuple[float, float, float]:
    """(root mean square over the seeds, smallest, largest) of a scheme's RMSE on the paper's distribution."""
    values = [cell[name] for cell in record["random"].values()]
    return math.sqrt(sum(x * x for x in values) / len(values)), min(values), max(values)


def relative(record: dict, name: str) -> dict[str, float]:
    """RMSE over the RMS of the output, by layer of SmolLM2."""
    return {layer: cell[name] / cell["output"] for layer, cell in record["smollm2"].items()}


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(math.log(x) for x in values) / len(values))


def gain(record: dict, name: str) -> tuple[float, float]:
    """Error relative to one scale per tensor: (on the paper's distribution, geometric mean over SmolLM2's layers)."""
    plain, mine = relative(record, "tensor"), relative(record, name)
    ratios = [mine[layer] / plain[layer] for layer in plain]
    return summary(record, name)[0] / summary(record, "tensor")[0], geometric_mean(ratios)


def paper_table(record: dict) -> str:
    """Ours beside the paper's."""
    rows = []
    for name, paper in record["paper"].items():
        mean, low, high = summary(record, name)
        rows.append(
            [record["titles"][name], f"{mean:.2e}", f"{low:.1e} to {high:.1e}", f"{paper:.1e}" if paper else "-"]
        )
    return _table(["RMSE, paper's distribution", "ours", "over seeds", "paper"], rows)


def smollm2_table(record: dict) -> str:
    """The same rows on real activations, relative to the size of the output."""
    layers = list(record["smollm2"])
    rows = [
        [record["titles"][name], *(f"{x:.2e}" for x in relative(record, name).values())] for name in record["paper"]
    ]
    return _table(["RMSE / RMS of the output, SmolLM2", *(f"layer {layer}" for layer in layers)], rows)


def alternatives_table(record: dict) -> str:
    """Every alternative: error relative to one scale per tensor, and what it costs."""
    rows = []
    for name, cost in record["costs"].items():
        random, real = gain(record, name)
        layers = [f"{x:.2e}" for x in relative(record, name).values()]
        rows.append([record["titles"][name], cost or "-", f"{random:.2f}", f"{real:.2f}", *layers])
    layers = [f"layer {layer}" for layer in record["smollm2"]]
    return _table(["scheme", "extra cost", "error, random", "error, SmolLM2", *layers], rows)


def sources_table(record: dict) -> str:
    """One rounding at a time, and the FP16 rows without the rounding of their inputs."""
    names = [n for n in next(iter(record["random"].values())) if n.startswith("only") or n.endswith("given")]
    rows = []
    for name in names:
        mean, low, high = summary(record, name)
        layers = [f"{x:.2e}" for x in relative(record, name).values()]
        rows.append([record["titles"].get(name, name), f"{mean:.2e}", f"{low:.1e} to {high:.1e}", *layers])
    return _table(["one rounding alone", "random", "over seeds", *(f"layer {n}" for n in record["smollm2"])], rows)


def lengths_table(record: dict) -> str:
    """RMSE by number of keys and head dimension: the paper does not say which it used."""
    names = [n for n in record["lengths"][0] if n not in ("len_k", "head_dim", "seed")]
    groups: dict[tuple[int, int], list[dict]] = {}
    for cell in record["lengths"]:
        groups.setdefault((cell["head_dim"], cell["len_k"]), []).append(cell)
    rows = []
    for (d, n), cells in groups.items():
        means = [math.sqrt(sum(c[name] ** 2 for c in cells) / len(cells)) for name in names]
        rows.append([f"d {d}, {n} keys", *(f"{x:.2e}" for x in means)])
    return _table(["RMSE", *names], rows)


def accumulation_table(record: dict) -> str:
    """What 14-bit sums add."""
    names = [n for n in record["accumulation"][0] if n not in ("len_k", "v_mean", "output")]
    rows = [
        [f"{c['len_k']} keys, V around {c['v_mean']:g}", *(f"{c[n] / c['output']:.2e}" for n in names)]
        for c in record["accumulation"]
    ]
    return _table(["RMSE / RMS of the output", *names], rows)


def concentration_table(record: dict) -> str:
    """Who carries the squared error, averaged over seeds."""
    cells = [cell["concentration"] for cell in record["random"].values()]
    return _table(["share", "mean"], [[n, f"{sum(c[n] for c in cells) / len(cells):.3f}"] for n in cells[0]])


def outliers_table(record: dict) -> str:
    """Largest magnitude over RMS, before and after rotation."""
    rows = [
        [f"layer {layer}, {name}", f"{x['before']:.1f}", f"{x['after']:.1f}"]
        for layer, cell in record["smollm2"].items()
        for name, x in cell["outliers"].items()
    ]
    return _table(["largest / RMS, SmolLM2", "before", "after rotation"], rows)


def everything(record: dict) -> str:
    """All tables, one after the other."""
    parts = (paper_table, smollm2_table, alternatives_table, sources_table, concentration_table)
    parts += (lengths_table, accumulation_table, outliers_table)
    return "\n\n".join(part(record) for part in parts)
