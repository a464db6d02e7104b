"""What right numbers mean in FP8: the error against fp64 is that of the emulation, which rounds at the same places."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fa_reference.fp8 import schemes
from fa_reference.gold import gold_attention
from fa_reference.grading.answer import Answer, attention_result
from fa_reference.grading.check import CannotRun, CheckFailed, NotWritten
from fa_reference.inputs import Case

MORE_ERROR = 1.1  # of the emulation's RMSE
LARGEST_ERROR = 2.0  # of the emulation's largest error: one rounding more or less moves it
LSE_FLOOR = 1e-2
ROUNDING = 2.0**-9  # of bfloat16: where the emulation happens to be exact


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def judged(o: Tensor, lse: Tensor, qkv: Sequence[Tensor], case: Case, bug: str = "") -> None:
    """CheckFailed unless (o, lse) of float tensors q, k, v is as near to float64 as the emulated kernel's.

    The emulation rotates, and has scales per block of Q and K and per head of V. RMSE at most MORE_ERROR times its own.
    """
    options = {"causal": case.causal, "scale": case.scale}
    gold, gold_lse = gold_attention(*qkv, **options)
    right, right_lse = schemes.attend(schemes.BOTH, *qkv, **options)
    empty = gold_lse == -torch.inf
    words = [f"this check is about: {bug}"] if bug else []
    if not torch.equal(lse == -torch.inf, empty) or (o[empty] != 0).any():
        raise CheckFailed("\n".join([*words, f"a row without keys must have o = 0 and lse = -inf, others not\n{case}"]))
    if not o.isfinite().all():
        raise CheckFailed("\n".join([*words, f"{int((~o.isfinite()).sum())} elements of o are not finite\n{case}"]))
    if empty.all():
        return
    largest = float(qkv[2].abs().max())
    mine, allowed = o.double() - gold, right.double() - gold
    shift = float((lse.double() - gold_lse)[~empty].abs().max())
    rows = (
        ("RMS error of O", _rms(mine), MORE_ERROR * _rms(allowed) + ROUNDING * _rms(gold)),
        (
            "maximum error of O",
            float(mine.abs().max()),
            LARGEST_ERROR * float(allowed.abs().max()) + 2 * ROUNDING * largest,
        ),
        (
            "error of lse",
            shift,
            LARGEST_ERROR * float((right_lse.double() - gold_lse)[~empty].abs().max()) + LSE_FLOOR,
        ),
    )
    if all(error <= limit for _, error, limit in rows):
        return
    if rows[2][1] > rows[2][2] and abs(float((lse.double() - gold_lse)[~empty].median())) > 4:
        words.append("lse is off by about the same in all rows: was the factor 2^8 of P taken out of l again?")
    table = "; ".join(
        f"{name} {error:.2e}, allowed {limit:.2e}" + ("" if error <= limit else " (too large)")
        for name, error, limit in rows
    )
    raise CheckFailed("\n".join([*words, table, f"smallest failing case: {case}"]))


def numbers(answer: Answer, file: str, cases: Sequence[Case], *, bug: str = "", device: str = "cpu", **kwargs) -> None:
    """Call `forward` of a file on every case, smallest first, and judge it as FP8; `kwargs` go to the call."""
    for case in cases:
        q, k, v = case.make()
        try:
            value = answer.call(file, "forward", q, k, v, causal=case.causal, scale=case.scale, device=device, **kwargs)
            o, lse = attention_result(value, q.bfloat16())
        except (NotWritten, CannotRun):
            raise
        except CheckFailed as failure:
            raise CheckFailed(f"{failure}\nsmallest failing case: {case}") from None
        judged(o, lse, (q, k, v), case, bug)
