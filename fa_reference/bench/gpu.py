"""A run on a GPU from start to end: contenders, ceilings, the race with a progress bar, and the record."""

from __future__ import annotations

import random
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fa_reference.bench import ceilings, timing
from fa_reference.bench import record as records
from fa_reference.bench.contenders import course_contenders
from fa_reference.bench.grid import Cell
from fa_reference.bench.monitor import Monitor
from fa_reference.bench.peers import peer_contenders
from fa_reference.bench.run import Race, estimate_s, run_cells
from fa_reference.bench.tables import cell_table, legend


def run_gpu(
    console: Console,
    cells: list[Cell],
    versions: list[str],
    peers: list[str] | None,
    impl: Path | None,
    rounds: int,
    out: Path | None,
    suffix: str,
    device: str = "cuda",
) -> tuple[dict, Path]:
    """Measure ceilings, then race; returns the record and where it was written."""
    racing, remarks = course_contenders(device, versions, impl)
    library, absent = peer_contenders(peers)
    racing += library
    monitor = Monitor()
    settings = {
        "rounds": rounds,
        "slice_ms": timing.SLICE_MS,
        "spin_ms": timing.SPIN_MS,
        "layout": cells[0].layout,
        "monitor": monitor.source,
        "course_versions": "solutions" + (f", and mine:* from {impl}" if impl else ""),
    }
    record = records.new_record("forward", settings)
    when = record["provenance"]
    path = out or records.default_path("forward", when["device"], when["date"], suffix)
    record["columns"], record["absent"] = [c.to_json() for c in racing], absent
    total = sum(estimate_s(cell, racing, rounds) for cell in cells) + 12
    console.print(
        f"{when['device']}, torch {when['torch']}: {len(cells)} shapes, {len(racing)} columns; "
        f"about {total / 60:.1f} minutes. Course versions: {settings['course_versions']}."
    )
    for line in [*remarks, *(f"{a['title']} is absent: {a['reason']}" for a in absent)]:
        console.print(f"- {line}", markup=False)
    ceilings.warm_up()
    clock = timing.CudaClock(while_running=monitor)  # after warming up: its spin is calibrated in clock cycles
    record["ceilings"]["copy"] = ceilings.measure_copy(clock, device, rounds=rounds)
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        record["ceilings"][dtype] = ceilings.measure_matmul(dtype, clock, device, rounds=rounds)
    best = {d: ceilings.best(e, "tflops") for d, e in record["ceilings"].items() if d != "copy"}
    records.save(record, path)
    race = Race(racing, clock, device, rounds=rounds, monitor=monitor, best_matmul=best, rng=random.Random(0))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("racing", total=sum(estimate_s(c, racing, rounds) for c in cells))

        def after_cell(cell: Cell, done: dict) -> None:
            progress.console.print(cell_table(done, record["columns"]))
            if done.get("allocator_retries"):
                progress.console.print("  Memory was so short that torch stopped to free some: times here may be high.")
            progress.update(task, advance=estimate_s(cell, racing, rounds), description=cell.name)

        try:
            run_cells(race, cells, record, path, after_cell)
        finally:
            progress.console.print(f"Written to {path}", soft_wrap=True)
    console.print(legend(record), markup=False)
    return record, path
