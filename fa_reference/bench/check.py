"""Errors beside every time: each output is held against float64 by the course's own error rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from fa_reference.bench.grid import DTYPES, Cell
from fa_reference.error_rule import ErrorReport, judge
from fa_reference.gold import gold_attention
from fa_reference.inputs import Case

Inputs = tuple[Tensor, Tensor, Tensor]


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


class Checker:
    """The gold output of one cell's inputs, computed once, and the errors that the error rule allows on them."""

    def __init__(self, inputs: Inputs, causal: bool) -> None:
        self.gold_o, self.gold_lse = gold_attention(*inputs, causal=causal)
        # What is allowed depends on the inputs alone, so judging the gold output itself yields it.
        self.allowed = judge(self.gold_o, self.gold_lse, *inputs, causal=causal)

    def report(self, o: Tensor, lse: Tensor | None) -> ErrorReport:
        """Errors of an output; without an lse (library kernels do not return it) that part counts as exact.

        Raises ValueError when o or lse has another shape than attention's.
        """
        for name, got, gold in (("o", o, self.gold_o), ("lse", lse, self.gold_lse)):
            if got is not None and got.shape != gold.shape:
                raise ValueError(f"{name} has shape {tuple(got.shape)}; it must be {tuple(gold.shape)}")
        square_sum = worst = 0.0
        for head in range(o.shape[1]):  # a head at a time: float64 copies of everything would not fit at 32k
            error = (o[:, head].double() - self.gold_o[:, head]).abs()
            square_sum = square_sum + float(error.square().sum())
            top = float(error.max())
            worst = top if not top <= worst else worst  # keeps a nan
        lse_error = 0.0 if lse is None else float((lse.double() - self.gold_lse).abs().max())
        return replace(self.allowed, rms=(square_sum / o.numel()) ** 0.5, max=worst, lse_error=lse_error)


def poison(inputs: Inputs) -> None:
    """Leave NaN in memory that the allocator hands out next, so that an element nobody writes shows as NaN.

    Best effort: an output of q's shape and an lse are likely to be placed in the blocks that are freed here.
    """
    q = inputs[0]
    blocks = [torch.full_like(q, torch.nan) for _ in range(2)]
    blocks.append(torch.full(q.shape[:3], torch.nan, device=q.device, dtype=torch.float32))
    blocks.append(torch.full(q.shape, torch.nan, device=q.device, dtype=torch.float32))
    del blocks


def run_checked(launch: Callable[[], tuple[Tensor, Tensor | None]], inputs: Inputs, checker: Checker) -> ErrorReport:
    """One launch into poisoned memory, judged."""
    poison(inputs)
    o, lse = launch()
    return checker.report(o, lse)


def error_json(report: ErrorReport) -> dict:
    """An error report as JSON: `rms_ratio` is the RMS error over the allowed one, `ratio` the worst of all parts."""
    data = asdict(report)
    rms_ratio = report.rms / report.rms_allowed
    return data | {"rms_ratio": rms_ratio, "ratio": report.ratio, "passed": report.passed}
