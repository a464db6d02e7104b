"""`python -m fa_reference bench`: options of the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fa_reference.bench import grid as grids
from fa_reference.bench import timing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _numbers(option: str, text: str | None) -> list[int]:
    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a comma-separated list of whole numbers") from None


@app.command()
def bench(
    grid: Annotated[str, typer.Option(help=f"Shapes: {', '.join(grids.GRIDS)}.")] = "all",
    versions: Annotated[str | None, typer.Option(help="Only these course versions, comma-separated.")] = None,
    peers: Annotated[str | None, typer.Option(help="Only these library kernels, comma-separated, or none.")] = None,
    head_dim: Annotated[str | None, typer.Option(help="Only these head dimensions, comma-separated.")] = None,
    length: Annotated[str | None, typer.Option("--len", help="Only these sequence lengths, comma-separated.")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--full", help="Only with, or without, the mask.")] = None,
    impl: Annotated[Path | None, typer.Option(help="Folder with your files: adds them as mine:NAME.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per shape.")] = timing.ROUNDS,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, or both, comma-separated.")] = "bf16",
    layout: Annotated[str, typer.Option(help="Storage: bnhd (as in the paper) or bhnd.")] = "bnhd",
    out: Annotated[Path | None, typer.Option(help="JSON file to write, instead of one in results/.")] = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Write no figures.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Only draw the figures of this JSON file.")] = None,
    table: Annotated[Path | None, typer.Option(help="Only print this JSON file as Markdown tables.")] = None,
    profile_bytes: Annotated[
        bool, typer.Option("--profile-bytes", help="Only measure HBM bytes with Nsight Compute.")
    ] = False,
) -> None:
    """Race the course's versions (the solutions, unless --impl adds yours) against library kernels."""
    from fa_reference.bench import record as records

    console = Console(width=None if sys.stdout.isatty() else 140)
    if table is not None:
        from fa_reference.bench.tables import markdown

        sys.stdout.write(markdown(records.load(table)))
        return
    if plot is not None:
        _draw(console, records.load(plot), plot)
        return
    if impl is not None and not impl.is_dir():
        raise ValueError(f"no such folder: {impl}")
    import torch

    if profile_bytes:
        raise typer.Exit(_profile(console, out, torch.cuda.is_available()))
    cells = grids.select(
        grid,
        head_dims=_numbers("--head-dim", head_dim),
        lengths=_numbers("--len", length),
        causal=causal,
        dtypes=_listed(dtype),
        layout=layout,
    )
    if not torch.cuda.is_available():
        from fa_reference.bench.cpu import CPU_ROUNDS, run_cpu

        record = run_cpu(console, _listed(versions), impl, min(rounds, CPU_ROUNDS))
        if out is not None:
            records.save(record, out)
            console.print(f"Written to {out}")
        return
    subset = grid != "all" or any(x is not None for x in (versions, peers, head_dim, length, causal))
    suffix = "_".join(
        [*([grid if grid != "all" else "subset"] if subset else []), *([] if layout == "bnhd" else [layout])]
    )
    from fa_reference.bench.gpu import run_gpu

    names = None if peers is None else [n for n in _listed(peers) if n != "none"]
    record, path = run_gpu(console, cells, _listed(versions), names, impl, rounds, out, suffix)
    if not no_plots:
        _draw(console, record, path)
    if any(r["status"] in ("wrong", "failed") for c in record["cells"] for r in c["results"].values()):
        raise typer.Exit(1)


def _draw(console: Console, record: dict, path: Path) -> None:
    from fa_reference.bench.plots import plot_record

    if record["kind"] != "forward":
        raise ValueError(f"{path} is of kind {record['kind']!r}; figures are drawn of kind 'forward'")
    for written in plot_record(record, path):
        console.print(f"Figure: {written}", soft_wrap=True)


def _profile(console: Console, out: Path | None, has_gpu: bool) -> int:
    from fa_reference.bench.profile import profile_all

    if not has_gpu:
        console.print("HBM bytes are not measured here: no CUDA GPU. `bench` without options shows counted bytes.")
        return 1
    return profile_all(out, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


def main(argv: list[str]) -> int:
    """Run the benchmark; exit status 0, 1 (a version failed or was wrong), 2 (a wrong call), 130 (Ctrl-C)."""
    from fa_reference.bench.run import DeviceLost

    try:
        status = typer.main.get_command(app).main(argv, prog_name="python -m fa_reference bench", standalone_mode=False)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"{error}\nWhat had been measured is kept. Run again with --versions, without that one.", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("\nStopped; what had been measured is kept.", file=sys.stderr)
        return 130
    except typer.Exit as error:  # raised only by some versions of typer; the others return its code
        return error.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's and click's wrong calls carry one
            raise
        print(error.format_message(), file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0
