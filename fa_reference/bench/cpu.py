"""What the benchmark says without a GPU: exact HBM bytes, CPU times of what runs here, and recorded GPU results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fa_reference.bench import record as records
from fa_reference.bench.contenders import Contender, Output, course_contenders
from fa_reference.bench.grid import PAPER_LENGTHS, Cell
from fa_reference.bench.run import Race, run_cell
from fa_reference.bench.tables import cell_table, markdown
from fa_reference.bench.timing import Clock, HostClock
from fa_reference.bench.traffic import counted
from fa_reference.counts import fa1_hbm_bytes, fa2_hbm_bytes, naive_hbm_bytes
from fa_reference.memory import Memory, sram_budget
from fa_reference.versions import VERSIONS, load_version

BLOCK = 128  # rows per block in the table of bytes
COUNTED_LENGTH, COUNTED_BLOCK, COUNTED_HEAD_DIM = 256, 64, 64  # small: every load and store runs in Python
CPU_LENGTHS = (128, 256)
CPU_ROUNDS = 5
INTERPRETED = ("fa1_triton", "fa2_triton")  # Triton's interpreter: its times say nothing about the kernels


def bytes_table(lengths: Sequence[int] = PAPER_LENGTHS, head_dims: Sequence[int] = (64, 128)) -> Table:
    """HBM bytes of one head, exact by formula, for 16-bit inputs, no mask."""
    table = Table(title=f"HBM bytes of one head by formula: 16-bit inputs, blocks of {BLOCK}, no mask (MB)")
    table.title_justify = "left"
    columns = ("d", "N", "naive, 16-bit S, P", "naive, float32 S, P", "FA1 (float32 O, l, m)", "FA2")
    for title in (*columns, "naive float32 / FA1", "FA1 / FA2"):
        table.add_column(title, justify="right")
    for d in head_dims:
        for n in lengths:
            naive16, fa1, fa2 = naive_hbm_bytes(n, n, d), fa1_hbm_bytes(n, n, d, BLOCK), fa2_hbm_bytes(n, n, d, BLOCK)
            naive32 = counted("naive", Cell("cpu", 1, 1, 1, n, n, d, False)).bytes
            row = [f"{d}", f"{n}", *(f"{b / 1e6:.2f}" for b in (naive16, naive32, fa1, fa2))]
            table.add_row(*row, f"{naive32 / fa1:.2f}", f"{fa1 / fa2:.2f}")
    return table


def counted_rows() -> list[tuple[str, int, int]]:
    """(title, bytes counted while the tiled solution ran, bytes by formula), float32, for those that exist.

    The solution goes through memory.py, which counts every load and store; so this is a measurement, of one head.
    """
    n, d, block = COUNTED_LENGTH, COUNTED_HEAD_DIM, COUNTED_BLOCK
    formulas = {
        "fa1_tiled": fa1_hbm_bytes(n, n, d, block, 4, 4),
        "fa2_tiled": fa2_hbm_bytes(n, n, d, block, 4),
    }
    q, k, v = (torch.randn(1, 1, n, d, generator=torch.Generator().manual_seed(i)) for i in range(3))
    rows = []
    for name, formula in formulas.items():
        try:
            forward = load_version(name).forward
        except FileNotFoundError:
            continue
        memory = Memory(sram_budget(block, block, d))
        forward(q, k, v, block_q=block, block_k=block, memory=memory)
        rows.append((VERSIONS[name].title, memory.traffic_bytes, formula))
    return rows


def counted_table() -> Table:
    """Counted bytes beside the formula's."""
    n, d, block = COUNTED_LENGTH, COUNTED_HEAD_DIM, COUNTED_BLOCK
    table = Table(title=f"Counted here while it ran: one head, N {n}, d {d}, blocks of {block}, float32 (bytes)")
    table.title_justify = "left"
    for title in ("version", "counted", "by formula", ""):
        table.add_column(title, justify="right")
    for title, moved, formula in counted_rows():
        table.add_row(title, f"{moved}", f"{formula}", "equal" if moved == formula else "[red]DIFFERENT")
    table.add_row("naive", "", f"{naive_hbm_bytes(n, n, d, 4)}", "")
    return table


def _torch_peer() -> Contender:
    def bind(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[], Output], str]:
        def launch() -> Output:
            sdpa = torch.nn.functional.scaled_dot_product_attention
            return sdpa(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]), None

        return launch, ""

    return Contender("torch_cpu", "torch SDPA (CPU)", "peer", bind, mask_top_left=True)


def cpu_cells() -> list[Cell]:
    """Small float32 shapes that a laptop finishes in seconds."""
    return [Cell("cpu", 1, 2, 2, n, n, 64, causal, "float32") for n in CPU_LENGTHS for causal in (False, True)]


def cpu_contenders(names: Sequence[str], impl: Path | None) -> tuple[list[Contender], list[str]]:
    """Course versions whose time on a CPU means something, and torch's own."""
    contenders, remarks = course_contenders("cpu", names, impl)
    kept = [c for c in contenders if c.name.removeprefix("mine:") not in INTERPRETED]
    if len(kept) < len(contenders):
        remarks.append(
            "Triton versions are not timed: without a GPU they run in an interpreter (make check grades them)"
        )
    return [*kept, _torch_peer()], remarks


def show_recorded(console: Console) -> None:
    """The newest recorded GPU run, named as such."""
    found = records.newest("forward")
    if found is None:
        console.print("No GPU results are recorded in results/ yet.")
        return
    path, record = found
    console.rule(f"Recorded earlier on {records.where_and_when(record)}; NOT measured here")
    console.print(markdown(record), markup=False, highlight=False, soft_wrap=True)
    console.print(f"From {path}. Those are recorded results; nothing in them was measured on this machine.")


def run_cpu(
    console: Console,
    names: Sequence[str] = (),
    impl: Path | None = None,
    rounds: int = CPU_ROUNDS,
    command: list[str] | None = None,
    clock: Clock | None = None,
) -> dict:
    """Show all three parts; returns a record of kind "cpu"."""
    contenders, remarks = cpu_contenders(names, impl)
    console.print(
        "No CUDA GPU here: bytes are counted, CPU times are of small shapes, GPU results are recorded ones.\n"
    )
    console.print(bytes_table())
    console.print(counted_table())
    for remark in remarks:
        console.print(f"- {remark}", markup=False)
    record = records.new_record("cpu", {"rounds": rounds, "layout": "bnhd"}, command)
    record["columns"] = [c.to_json() for c in contenders]
    race = Race(contenders, clock or HostClock(), device="cpu", rounds=rounds, rng=random.Random(0))
    with torch.no_grad():
        for cell in cpu_cells():
            done = run_cell(race, cell)
            record["cells"].append(done)
            console.print(cell_table(done, record["columns"], giga=True))
    record["complete"] = True
    show_recorded(console)
    return record
