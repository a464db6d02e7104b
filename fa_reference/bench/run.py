"""The race on a GPU: for each shape make inputs, check every column, then time all columns interleaved."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fa_reference.bench import record as records
from fa_reference.bench.check import Inputs, error_json, make_inputs, run_checked
from fa_reference.bench.contenders import Contender
from fa_reference.bench.grid import Cell
from fa_reference.bench.monitor import Monitor
from fa_reference.bench.timing import ROUNDS, SLICE_MS, SPIN_MS, Clock, Column, interleave, plan, summarize
from fa_reference.error_rule import Yardstick


class DeviceLost(RuntimeError):
    """The CUDA context no longer works: a kernel has crashed, and nothing more can run in this process."""


@dataclass
class Race:
    """Everything a cell needs besides its shape; `clock` and `device` are replaced in the tests."""

    contenders: Sequence[Contender]
    clock: Clock
    device: str = "cuda"
    rounds: int = ROUNDS
    monitor: Monitor | None = None
    best_matmul: dict[str, float] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(0))


def estimate_s(cell: Cell, contenders: Sequence[Contender], rounds: int) -> float:
    """Seconds that a cell will take, roughly: slices, the float64 check and making the inputs on the host."""
    running = sum(1 for c in contenders if c.refuses(cell) is None)
    slices = running * rounds * (SLICE_MS + SPIN_MS + 0.5) / 1e3
    slow = 0.6 * running * min(1.0, cell.score_elements / 8.6e9)
    return slices + slow + 5.0 * cell.score_elements / 8.6e9 + 1.0


def _failure(error: BaseException) -> dict:
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "oom", "message": "out of memory"}
    first = (str(error).strip() or "no message").splitlines()[0]
    return {"status": "failed", "message": f"failed: {type(error).__name__}: {first[:300]}"}


def _recover(device: str, name: str) -> None:
    """Free what a failed column left behind; DeviceLost if the context went with it."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise DeviceLost(f"after {name} the GPU answers nothing but: {first}") from None


def _verdict(contender: Contender, error: dict) -> dict:
    if error["passed"]:
        return {"status": "ok", "error": error}
    if contender.graded:
        return {"status": "wrong", "error": error, "message": "WRONG: error above what the error rule allows"}
    return {"status": "ok", "error": error, "flagged": True}


def _attempt(race: Race, name: str, action: Callable[[], Any]) -> tuple[Any, dict | None]:
    """(value, None), or (None, failure) after freeing what the failed action left behind."""
    try:
        return action(), None
    except (Exception, SystemExit) as error:
        failure = _failure(error)
    # Only now is the traceback gone, whose frames keep tensors alive.
    _recover(race.device, name)
    return None, failure


def run_cell(race: Race, cell: Cell) -> dict:
    """Results of one cell: {"results": {name: {...}}, clocks, power} beside the cell's own fields.

    status of a result: "ok", "wrong" (no times), "oom", "failed" or "n/a"; times in ms per launch.
    """

    def prepare() -> tuple[Inputs, Yardstick]:
        inputs = make_inputs(cell, race.device)
        return inputs, Yardstick.of(*inputs, causal=cell.causal)

    ready, failure = _attempt(race, "making inputs and float64 gold", prepare)
    if failure is not None:
        return cell.to_json() | {"results": {c.name: dict(failure) for c in race.contenders}}
    inputs, usual = ready
    yardsticks = {None: usual}

    def yardstick(contender: Contender) -> Yardstick:
        if contender.baseline not in yardsticks:
            of = Yardstick.of(*inputs, causal=cell.causal, baseline=contender.baseline)
            yardsticks[contender.baseline] = of
        return yardsticks[contender.baseline]

    results: dict[str, dict] = {}
    columns: list[Column] = []
    for contender in race.contenders:
        if reason := contender.refuses(cell):
            results[contender.name] = {"status": "n/a", "message": reason}
            continue
        made, failure = _attempt(race, contender.name, lambda c=contender: _enter(race, cell, c, inputs, yardstick(c)))
        results[contender.name], column = made or (failure, None)
        columns += [column] if column is not None else []
    retries = _allocator_retries(race.device)
    _time(race, columns, results)
    clocks = _clocks(race) | {"allocator_retries": _allocator_retries(race.device) - retries}
    _check_again(race, columns, results, inputs, yardstick)
    for column in columns:
        _add_times(results[column.name], column, cell, race)
    return cell.to_json() | {"results": results} | clocks


def _enter(
    race: Race, cell: Cell, contender: Contender, inputs: Inputs, yardstick: Yardstick
) -> tuple[dict, Column | None]:
    """Check one contender; the column to time it in if it is right (or a peer)."""
    launch, note = contender.bind(*inputs, cell.causal)
    result = _verdict(contender, error_json(run_checked(launch, inputs, yardstick)))
    result |= {"note": note} if note else {}
    if result["status"] != "ok":
        return result, None
    return result, Column(contender.name, launch, *plan(*race.clock.probe(launch), race.rounds))


def _allocator_retries(device: str) -> int:
    """How often torch had to give cached memory back to allocate: it stops the GPU, so it must not be in a slice."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if device == "cuda" else 0


def _time(race: Race, columns: list[Column], results: dict[str, dict]) -> None:
    def drop(column: Column, failure: dict) -> None:
        results[column.name] = failure
        column.launch = lambda: None  # lets go of what the launch holds
        _recover(race.device, column.name)

    for column in columns:  # one round that is not recorded brings clocks to where this mix of kernels holds them
        _, failure = _attempt(race, column.name, lambda c=column: race.clock.slice(c.launch, c.launches, c.spin_ms))
        if failure is not None:
            drop(column, failure)
    if race.monitor is not None:
        race.monitor.take()
    racing = [column for column in columns if results[column.name]["status"] == "ok"]
    interleave(racing, race.clock, rounds=race.rounds, rng=race.rng, describe=_failure, on_error=drop)


def _check_again(
    race: Race,
    columns: list[Column],
    results: dict[str, dict],
    inputs: Inputs,
    yardstick: Callable[[Contender], Yardstick],
) -> None:
    """Judge one more launch after all those timed: a race between threads may show only now and then."""
    graded = {c.name: yardstick(c) for c in race.contenders if c.graded and results[c.name]["status"] == "ok"}
    for column in columns:
        if column.name not in graded:
            continue
        held_to = graded[column.name]
        report, failure = _attempt(race, column.name, lambda c=column, y=held_to: run_checked(c.launch, inputs, y))
        if failure is not None:
            results[column.name] = failure
        elif not report.passed:
            message = "WRONG: right at first, wrong after the timed launches (a race, or state kept between calls)"
            results[column.name] = {"status": "wrong", "error": error_json(report), "message": message}


def _add_times(result: dict, column: Column, cell: Cell, race: Race) -> None:
    if result["status"] != "ok":
        return
    result |= column.summary
    median = summarize(column.samples_ms)["median_ms"]
    result["tflops"] = cell.flops / median / 1e9
    if ceiling := race.best_matmul.get(cell.dtype):
        result["of_best_matmul"] = result["tflops"] / ceiling


def _clocks(race: Race) -> dict:
    samples = race.monitor.take() if race.monitor is not None else []
    return {"sm_clock_mhz": [clock for clock, _ in samples], "power_w": [round(power, 1) for _, power in samples]}


def run_cells(
    race: Race, cells: Sequence[Cell], record: dict, path: Path, after_cell: Callable[[Cell, dict], None]
) -> None:
    """Run all cells, saving the record after each; `after_cell` shows progress."""
    with torch.no_grad():
        for cell in cells:
            try:
                done = run_cell(race, cell)
            except DeviceLost as error:
                record["aborted"] = f"in {cell.name}: {error}"
                records.save(record, path)
                raise
            record["cells"].append(done)
            records.save(record, path)
            after_cell(cell, done)
            if race.device == "cuda":
                torch.cuda.empty_cache()
    record["complete"] = True
    records.save(record, path)
