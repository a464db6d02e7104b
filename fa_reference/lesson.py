"""What lessons share: whose code they run, how figures look, and the recorded GPU results."""

import difflib
import html
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from fa_reference.bench.record import newest
from fa_reference.course import chapter
from fa_reference.grading.progress import passes
from fa_reference.versions import load_file

# Okabe and Ito's palette, told apart by colour-blind readers too; one colour a version in every figure of the course.
COLOURS = {
    "naive": "#D55E00",
    "explicit": "#999999",
    "online_softmax": "#CC79A7",
    "fa1": "#E69F00",
    "fa1_triton": "#E69F00",
    "fa2": "#0072B2",
    "fa2_triton": "#0072B2",
    "fa2_cuda": "#999933",
    "one_warpgroup": "#DDCC77",
    "warp_specialised": "#CC6677",
    "pingpong": "#AA4499",
    "two_stage": "#117733",
    "math": "#000000",
    "torch_fa2": "#56B4E9",
    "cudnn": "#009E73",
    "fa3_forward": "#332288",
    "fa3": "#882255",
    "fa4": "#44AA99",
}


def solution(number: int, file: str) -> ModuleType:
    """The reference solution of a file of chapter `number`, as a module."""
    return load_file(chapter(number).solution / file)


def answer(number: int, file: str) -> ModuleType:
    """The learner's file once it has passed all its checks (as it is now), else the solution; prints which."""
    where = chapter(number)
    if passes(where, file):
        print(f"This lesson runs your {where.folder}/{file}: it passes its checks.")
        return load_file(where.room / file)
    print(f"This lesson runs the course's solution of {file}, until yours passes `make check CHAPTER={number}`.")
    return solution(number, file)


def style() -> None:
    """Set matplotlib up for the lessons: readable at notebook width, light grid, colour-blind-safe cycle."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (8, 4.2),
            "figure.dpi": 100,
            "savefig.bbox": "tight",
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.axisbelow": True,
            "axes.prop_cycle": plt.cycler(
                color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
            ),
            "svg.hashsalt": "flash",
        }
    )
    plt.switch_backend(plt.get_backend())  # loads it, so that a notebook shows figures made outside of pyplot, too


def recorded(kind: str, columns: Collection[str] = ()) -> dict[str, Any] | None:
    """The newest recorded results of a kind ("forward", "hbm_bytes", ...) with these columns, or None."""
    found = newest(kind, columns=columns)
    return found[1] if found else None


def difference(old: Path, new: Path) -> Any:
    """A folded, coloured diff of two files for a notebook, without the markers of the exercises (IPython's HTML)."""
    from IPython.display import HTML

    before, after = (
        [x for x in path.read_text().splitlines() if "SOLUTION" not in x and not x.strip().startswith(("//:", "#:"))]
        for path in (old, new)
    )
    changes = list(difflib.unified_diff(before, after, old.name, new.name, lineterm="", n=1))
    count = sum(x[0] in "+-" and x[:3] not in ("+++", "---") for x in changes)
    colours = {"+": "#e6f4ea", "-": "#fce8e6", "@": "#eef1f8"}
    body = "".join(
        f'<div style="background:{colours.get(x[:1], "none")}">{html.escape(x) or "&nbsp;"}</div>' for x in changes
    )
    return HTML(
        f"<details><summary><b>{old.name} &rarr; {new.name}</b>: {count} changed lines, {len(after)} in all</summary>"
        f'<pre style="font-size:11px;line-height:1.25;text-align:left">{body}</pre></details>'
    )
