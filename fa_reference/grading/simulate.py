"""The child's side of grading a schedule: run the learner's kernel on the model of an SM, and say how it went.

Runs where the learner's code runs. It only computes: outputs and traces go to the grader, which judges them.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fa_reference.grading.worker import describe, line_of
from fa_reference.hopper import RuleBroken, run_attention


def kernel(
    schedule: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: list[dict[str, Any]],
    *,
    dtype: str,
    trace: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Run a schedule on one problem, once for every dict of options in `runs`; stops at the first run that fails.

    q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d) hold values of `dtype` in float32; `options` (causal, scale,
    block_k, ...) are the same for all runs. A result is {"o", "lse", "flop"} (of all wgmmas), with `trace` also the
    JSON of the first block's spans and issued instructions under "trace"; or it is {"failure": {kind, message}} as the
    worker describes one, with the kind "rule" for a broken rule.
    """
    q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
    folder = Path(schedule.__file__).parent
    results: list[dict[str, Any]] = []
    for run in runs:
        try:
            done = run_attention(schedule, q, k, v, **options, **run)
            if any(report.broken for report in done.reports):
                raise done.report.broken[0]
        except NotImplementedError:
            raise
        except RuleBroken as error:
            what, *rule = str(error).split("\n")
            message = "\n".join([what + line_of(error, folder), *rule])
            return [*results, {"failure": {"kind": "rule", "message": message}}]
        except Exception as error:
            return [*results, {"failure": describe(error, folder)}]
        flop = sum(i.amount for report in done.reports for i in report.issued if i.instruction == "wgmma")
        result: dict[str, Any] = {"o": done.o.float(), "lse": done.lse, "flop": flop}
        if trace:
            result["trace"] = json.dumps([done.report.spans, done.report.issued])
        results.append(result)
    return results
