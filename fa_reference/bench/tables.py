"""Tables of a record: Markdown for the README, and one table per shape in the terminal while the race runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from fa_reference.bench.record import where_and_when

WORDS = {"oom": "out of memory", "n/a": "n/a", "wrong": "WRONG", "failed": "failed"}


def legend(record: dict) -> str:
    """What the numbers in the tables are and where they were measured."""
    settings = record["settings"]
    parts = [
        f"Measured on {where_and_when(record)}: TFLOP/s, median of {settings['rounds']} interleaved rounds.",
        "In parentheses: error over the largest that the error rule allows, RMS or maximum, whichever is worse (1.00 = "
        "the limit); ! marks a library kernel above it, which is timed but not graded.",
    ]
    for dtype, ceilings in record["ceilings"].items():
        if dtype != "copy" and ceilings:
            best = max(ceilings, key=lambda entry: entry["tflops"])
            size = "x".join(str(best[key]) for key in ("m", "n", "k"))
            parts.append(f"Best {dtype} matmul in the same run: {best['tflops']:.0f} TFLOP/s ({size}).")
    if copy := record["ceilings"].get("copy"):
        parts.append(f"Best copy: {max(entry['tb_s'] for entry in copy):.2f} TB/s.")
    return " ".join(parts)


def error_ratio(result: dict) -> str:
    """Error over allowed error, as text."""
    ratio = (result.get("error") or {}).get("ratio")
    if ratio is None or ratio != ratio:
        return "not finite"
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


def cell_text(result: dict | None) -> str:
    """One entry of a Markdown table."""
    if result is None:
        return ""
    if result["status"] == "ok":
        flag = " !" if result.get("flagged") else ""
        return f"{result['tflops']:.0f} ({error_ratio(result)}{flag})" if "tflops" in result else "not timed"
    if result["status"] == "wrong":
        return f"WRONG ({error_ratio(result)})"
    return WORDS[result["status"]]


def speed_ratio(results: dict, name: str, other: str) -> float | None:
    """Speed of `name` over that of `other` in one cell; None unless both were timed."""
    mine, peer = (results.get(n, {}).get("median_ms") for n in (name, other))
    return peer / mine if mine and peer else None


def used_columns(record: dict, cells: Sequence[dict]) -> list[dict]:
    """Columns that run in at least one of the cells."""
    return [
        column
        for column in record["columns"]
        if any(cell["results"].get(column["name"], {"status": "n/a"})["status"] != "n/a" for cell in cells)
    ]


def groups(record: dict) -> list[tuple[str, str, bool, list[dict]]]:
    """(group, dtype, causal, cells) in the order of the record."""
    found: dict[tuple, list[dict]] = {}
    for cell in record["cells"]:
        found.setdefault((cell["group"], cell["dtype"], cell["causal"]), []).append(cell)
    return [(*key, cells) for key, cells in found.items()]


def markdown(record: dict) -> str:
    """All tables of a forward record as Markdown: one per grid, dtype and mask, a row per head dimension and length."""
    lines = [legend(record), ""]
    if not record["complete"]:
        lines += ["This run did not reach its end; what it had measured is shown.", ""]
    for group, dtype, causal, cells in groups(record):
        columns = used_columns(record, cells)
        real = group == "smollm2"
        ratio = "fa2_triton" in {c["name"] for c in columns} and {"torch_fa2", "cudnn"} & {c["name"] for c in columns}
        head = ["layer" if real else "d", "batch x heads", "N"] + [c["title"] for c in columns]
        peers = [p for p in ("torch_fa2", "cudnn") if ratio and p in {c["name"] for c in columns}]
        titles = {c["name"]: c["title"] for c in columns}
        head += [f"FA2, Triton / {titles[p]}" for p in peers]
        lines += [f"**{group}, {dtype}, {'causal' if causal else 'full'}**", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for cell in cells:
            heads = str(cell["heads_q"]) + ("" if cell["heads_kv"] == cell["heads_q"] else f"/{cell['heads_kv']}")
            row = [str(cell["layer"] if real else cell["head_dim"]), f"{cell['batch']}x{heads}", str(cell["len_q"])]
            row += [cell_text(cell["results"].get(c["name"])) for c in columns]
            ratios = [speed_ratio(cell["results"], "fa2_triton", p) for p in peers]
            row += ["" if r is None else f"{r:.2f}" for r in ratios]
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    for absent in record["absent"]:
        lines.append(f"Absent: {absent['title']} ({absent['reason']}).")
    return "\n".join(lines).rstrip() + "\n"


def cell_table(cell: dict, columns: Sequence[dict], giga: bool = False) -> Table:
    """One shape in the terminal: time with its range, speed, ratios to cuDNN and the best matmul, error.

    `giga` shows GFLOP/s, for CPUs.
    """
    heads = str(cell["heads_q"]) + ("" if cell["heads_kv"] == cell["heads_q"] else f"/{cell['heads_kv']}")
    clocks = cell.get("sm_clock_mhz") or []
    clock = f", SM clock {min(clocks):.0f}-{max(clocks):.0f} MHz" if clocks else ""
    table = Table(title=f"{cell['name']}, batch {cell['batch']}, heads {heads}, {cell['dtype']}{clock}")
    table.title_justify = "left"
    table.add_column("version")
    for title in ("ms: median (min-max)", "GFLOP/s" if giga else "TFLOP/s", "of cuDNN", "of matmul", "error / allowed"):
        table.add_column(title, justify="right")
    for column in columns:
        result = cell["results"].get(column["name"])
        if result is None or result["status"] == "n/a":
            continue
        title = escape(column["title"])
        if result["status"] != "ok" or "median_ms" not in result:
            error = error_ratio(result) if "error" in result else ""
            table.add_row(title, f"[red]{escape(result.get('message', result['status']))}", "", "", "", error)
            continue
        of_cudnn = speed_ratio(cell["results"], column["name"], "cudnn")
        of_matmul = result.get("of_best_matmul")
        table.add_row(
            title,
            f"{result['median_ms']:.3f} ({result['min_ms']:.3f}-{result['max_ms']:.3f})",
            f"{result['tflops'] * (1000 if giga else 1):.1f}",
            "" if of_cudnn is None else f"{of_cudnn:.2f}",
            "" if of_matmul is None else f"{of_matmul:.0%}",
            error_ratio(result) + (" ! above the rule" if result.get("flagged") else ""),
        )
    return table
