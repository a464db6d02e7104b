"""Errors beside every time: each output is held against float64 by the course's own error rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from fa_reference.bench.grid import DTYPES, Cell
from fa_reference.error_rule import ErrorReport, Yardstick
from fa_reference.inputs import Case

Inputs = tuple[Tensor, Tensor, Tensor]
Output = tuple[Tensor, Tensor | None]


def make_inputs(cell: Cell, device: str) -> Inputs:
    """q, k, v of a cell, each a (batch, heads, len, d) view in the cell's layout."""
    case = Case(
        batch=cell.batch,
        heads_q=cell.heads_q,
        heads_kv=cell.heads_kv,
        len_q=cell.len_q,
        len_k=cell.len_k,
        head_dim=cell.head_dim,
        dtype=DTYPES.get(cell.dtype, cell.dtype),
        causal=cell.causal,
        kind=cell.kind,
        layout=cell.layout,
        seed=cell.layer,
    )
    return case.make(device)


def poison(inputs: Inputs) -> None:
    """Leave NaN in memory that the allocator hands out next, so that an element nobody writes shows as NaN.

    Best effort: an output of q's shape and an lse are likely to be placed in the blocks that are freed here.
    """
    q = inputs[0]
    blocks = [torch.full_like(q, torch.nan) for _ in range(2)]
    blocks.append(torch.full(q.shape[:3], torch.nan, device=q.device, dtype=torch.float32))
    blocks.append(torch.full(q.shape, torch.nan, device=q.device, dtype=torch.float32))
    del blocks


def run_checked(
    launch: Callable[[], tuple[Tensor, Tensor | None]], inputs: Inputs, yardstick: Yardstick
) -> ErrorReport:
    """One launch into poisoned memory, judged."""
    poison(inputs)
    o, lse = launch()
    return yardstick.judge(o, lse)


def error_json(report: ErrorReport) -> dict:
    """An error report as JSON: `ratio` is the worst of its errors over what is allowed."""
    return asdict(report) | {"ratio": report.ratio, "passed": report.passed}
