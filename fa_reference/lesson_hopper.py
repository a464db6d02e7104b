"""What the lessons of the Hopper chapters share: the recorded ablation, timelines of the model and of the GPU."""

import json
import statistics
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from fa_reference.bench.record import RESULTS, newest
from fa_reference.hopper import Report, plot_trace, read_trace, run_attention
from fa_reference.hopper.trace import Span

if TYPE_CHECKING:
    from IPython.display import Image

PAPER = {"two_stage_unspecialised": 570, "warp_specialised": 582, "fa3": 661}  # TFLOP/s, arXiv 2407.08608, table 2
TITLES = {
    "attention": "6: one warpgroup",
    "two_stage_unspecialised": "two stages, not specialised",
    "warp_specialised": "7: warp specialisation",
    "pingpong": "8: + pingpong",
    "fa3": "9: + two stages",
    "fa3_forward": "cuda/fa3_forward",
    "fa3_official": "FA3 (official)",
    "cudnn": "cuDNN",
    "torch_fa2": "FA2 (torch)",
}
PAPER_CELL = "d 128 full N 8448"


@cache
def ablation() -> dict[str, Any]:
    """The newest recorded ablation; RuntimeError if there is none."""
    if (found := newest("ablation")) is None:
        raise RuntimeError("no ablation is recorded in results/: python solutions/09_two_stage/ablation.py on an H100")
    return found[1]


def titles() -> dict[str, str]:
    """Names of the ablation's kernels and variants for people."""
    return {c["name"]: c["title"] for c in ablation()["columns"]} | TITLES


def speeds(length: int = 8448, causal: bool = False) -> dict[str, float]:
    """TFLOP/s of every kernel of the recorded ablation, bf16, d 128: at the paper's shape, or 16k tokens in all."""
    cell = next(c for c in ablation()["cells"] if (c["len_q"], c["causal"]) == (length, causal))
    return {name: r["tflops"] for name, r in cell["results"].items() if "tflops" in r}


def provenance() -> str:
    """Where the ablation's numbers come from, in one line."""
    p = ablation()["provenance"]
    rounds = ablation()["settings"]["rounds"]
    return f"{p['device']}, {p['date'][:10]}, torch {p['torch']}, {p['compiler']}; bf16, one run, {rounds} rounds"


def table(names: Sequence[str], shapes: Sequence[tuple[int, bool]], paper: bool = True) -> str:
    """Recorded TFLOP/s as a Markdown table: a row a kernel, a column a shape (length, causal)."""
    columns = [f"N {length}{', causal' if causal else ''}" for length, causal in shapes]
    head = ["", *columns, *(["paper, N 8448"] if paper else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        row = [titles()[name], *(f"{speeds(*shape)[name]:.0f}" for shape in shapes)]
        lines.append("| " + " | ".join([*row, *([str(PAPER.get(name, ""))] if paper else [])]) + " |")
    return "\n".join(lines)


def bars(axis: Any, names: Sequence[str], *, highlight: Sequence[str] = (), paper: bool = False) -> None:
    """Draw recorded speeds at the paper's shape as horizontal bars; `paper` marks what the paper measured."""
    values = [speeds()[name] for name in names]
    colours = ["#0072B2" if name in highlight else "#A6C8DD" for name in names]
    axis.barh([titles()[name] for name in names], values, color=colours)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        colour = "white" if name in highlight else "black"
        axis.text(value - 8, place, f"{value:.0f}", va="center", ha="right", fontsize=9, color=colour)
        if paper and name in PAPER:
            axis.plot([PAPER[name]] * 2, [place - 0.4, place + 0.4], color="#D55E00", lw=2)
            axis.text(PAPER[name] + 6, place, f"{PAPER[name]}", color="#D55E00", fontsize=9, va="center")
    axis.set(xlabel="TFLOP/s")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)


def model_run(schedule: ModuleType, key_blocks: int = 16, head_dim: int = 128, **options: object) -> Report:
    """One block of a schedule on the model of an SM, with 128 keys a block and random numbers."""
    generator = torch.Generator().manual_seed(0)
    rows = 64 * schedule.CONSUMERS
    shapes = ((1, 1, rows, head_dim), *[(1, 1, 128 * key_blocks, head_dim)] * 2)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return run_attention(schedule, q, k, v, **options).report


def gpu_trace(chapter: int) -> tuple[list[Span], dict[str, Any]] | None:
    """Spans of a chapter's kernel (d 128) as recorded on a GPU, and facts of the recording; None without one."""
    path = max(RESULTS.glob(f"trace_{chapter:02}_[!d]*.json"), default=None)
    return None if path is None else (read_trace(path), json.loads(path.read_text())["otherData"])


def middle(spans: Sequence[Span], iterations: int = 4) -> tuple[float, float]:
    """From when to when some softmaxes in the middle of a trace lie."""
    softmax = sorted((s for s in spans if s.name.startswith("softmax")), key=lambda s: s.start)
    starts = [s.start for s in softmax if s.track == softmax[0].track]
    first = len(starts) // 2
    return starts[first], starts[min(first + iterations, len(starts) - 1)]


def picture(spans: Sequence[Span], title: str, start: float, stop: float) -> "Image":
    """A part of a trace as a picture for a notebook."""
    from IPython.display import Image

    workers = sorted((s for s in spans if s.kind != "unit"), key=lambda s: s.track)
    figure = plot_trace([*workers, *(s for s in spans if s.kind == "unit")], start=start, stop=stop)
    figure.axes[0].set_title(title, fontsize=10)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=85)
    return Image(png.getvalue())


SHARES = {  # rows of the table below a recorded timeline: entries of the trace that are added up
    "softmax": ("softmax",),
    "rescaling O, rounding P, on their own": ("rescale",),
    "waiting for Q K^T": ("wait wgmma QK",),
    "waiting for P V": ("wait wgmma PV",),
    "issuing products, or held while doing so": ("issue QK", "issue PV", "held"),
    "asking for K and V": ("wait K_full", "wait V_full"),
    "waiting for the turn": ("wait barrier 1", "wait barrier 2"),
    "of the softmax: while the other's products run": ("softmax under other wgmma",),
    "of the softmax: while its own product runs": ("softmax under own wgmma",),
}


def show_gpu_timeline(*chapters: int, iterations: int = 3) -> None:
    """Display the recorded timelines of chapters' kernels, and what their consumers' time went to."""
    from IPython.display import Markdown, display

    found = {chapter: gpu_trace(chapter) for chapter in chapters}
    if missing := [str(chapter) for chapter, trace in found.items() if trace is None]:
        display(
            Markdown(f"Chapter {', '.join(missing)}: **not recorded yet**; `python -m fa_reference.kernels.trace`.")
        )
        return
    for spans, facts in found.values():
        lengths = [s.stop - s.start for s in spans if s.name == "softmax"]
        title = f"{facts['kernel']} on an {facts['source']}; recording made it {facts['slower_by']:.1%} slower"
        display(picture(spans, title, *middle(spans, iterations)))
        print(
            f"chapter {facts['chapter']}: a softmax takes {statistics.median(lengths):,.0f} clocks (median, recorded)"
        )
    head = ["share of a consumer's time", *(f"chapter {chapter}: consumer 0 / 1" for chapter in chapters)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for words, entries in SHARES.items():
        row = []
        for _, facts in found.values():
            shares = [sum(share.get(e, 0.0) for e in entries) for share in facts["shares"].values()]
            row.append(" / ".join(f"{share:.0%}" for share in shares))
        lines.append("| " + " | ".join([words, *row]) + " |")
    row = [f"{facts['cycles_without_marks'] / (facts['shape']['len'] / 128):,.0f}" for _, facts in found.values()]
    lines.append("| " + " | ".join(["clocks for a block of keys, start and end included, not recorded", *row]) + " |")
    display(Markdown("\n".join(lines)))
