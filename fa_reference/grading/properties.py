"""Properties that several chapters grade: each is tried from the smallest case up, and fails with the first."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fa_reference.error_rule import ErrorReport, judge
from fa_reference.grading.answer import Answer, attention_result
from fa_reference.grading.check import CannotRun, CheckFailed, NotWritten
from fa_reference.grading.diagnose import diagnose
from fa_reference.inputs import Case

# Failures of a call that leave open which line is wrong: what the check is about helps.
UNCLEAR = ("killed by", "wrote past the end")


def fresh_seed() -> int:
    """A seed that differs in every run; a failing case prints it."""
    return random.SystemRandom().randrange(10**6)


def close(actual: Tensor, expected: Tensor, what: str, *, tolerance: float = 1e-5) -> None:
    """CheckFailed naming the first wrong element unless |actual - expected| <= tolerance x max(1, |expected|).

    Where `expected` is infinite, so must `actual` be.
    """
    if not isinstance(actual, Tensor):
        raise CheckFailed(f"{what} must be a torch.Tensor; it is a {type(actual).__name__}")
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what} must have shape {tuple(expected.shape)}; it has {tuple(actual.shape)}")
    a, e = actual.double(), expected.double()
    near = e.isfinite() & ((a - e).abs() <= tolerance * e.abs().clamp(min=1))
    wrong = ~((a == e) | near)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        count = f"{int(wrong.sum())} of {wrong.numel()} elements are wrong"
        raise CheckFailed(f"{what}: {count}; at {list(index)} it is {float(a[index]):.6g}, not {float(e[index]):.6g}")


def errors_in_words(report: ErrorReport) -> str:
    """The three errors beside what is allowed, the ones that are too large marked."""
    rows = (
        ("RMS error of O", report.rms, report.rms_allowed),
        ("maximum error of O", report.max, report.max_allowed),
        ("error of lse", report.lse_error, report.lse_allowed),
    )
    return "; ".join(
        f"{name} {error:.2e}, allowed {allowed:.2e}" + ("" if error <= allowed else " (too large)")
        for name, error, allowed in rows
    )


def judged(o: Tensor, lse: Tensor, qkv: Sequence[Tensor], case: Case, bug: str = "") -> None:
    """CheckFailed naming the likely bug unless (o, lse) keeps the error rule on this case."""
    options: dict[str, Any] = {"causal": case.causal, "scale": case.scale}
    report = judge(o, lse, *qkv, **options)
    if report.passed:
        return
    likely = diagnose(o, lse, *qkv, **options)
    lines = [likely] if likely else []
    vague = likely is None or likely.startswith("where: ") or "NaN or infinite" in likely
    if bug and vague:
        lines.append(f"this check is about: {bug}")
    raise CheckFailed("\n".join([*lines, errors_in_words(report), f"smallest failing case: {case}"]))


def attention(
    answer: Answer,
    file: str,
    cases: Iterable[Case],
    *,
    bug: str = "",
    device: str = "cpu",
    function: str = "forward",
    **kwargs: Any,
) -> None:
    """Call `forward` on every case, smallest first, and judge it by the error rule.

    `bug` is what to suspect if nothing better is found; `kwargs` go to the call.
    """
    for case in cases:
        q, k, v = case.make()
        try:
            value = answer.call(file, function, q, k, v, causal=case.causal, scale=case.scale, device=device, **kwargs)
            o, lse = attention_result(value, q, function)
        except (NotWritten, CannotRun):
            raise
        except CheckFailed as failure:
            about = f"\nthis check is about: {bug}" if bug and any(w in str(failure) for w in UNCLEAR) else ""
            raise CheckFailed(f"{failure}{about}\nsmallest failing case: {case}") from None
        judged(o, lse, (q, k, v), case, bug)


def same_answer(
    answer: Answer, file: str, case: Case, variants: Sequence[dict[str, Any]], *, device: str = "cpu"
) -> None:
    """Every set of keyword arguments (block sizes, say) must keep the error rule on the same case."""
    for variant in variants:
        words = ", ".join(f"{k}={v}" for k, v in variant.items() if k != "forbid")
        try:
            attention(answer, file, [case], device=device, **variant)
        except (NotWritten, CannotRun):
            raise
        except CheckFailed as failure:
            raise CheckFailed(f"with {words}: {failure}") from None


def refuses_bad_input(
    answer: Answer, file: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, function: str = "forward"
) -> None:
    """Bad arguments raise a ValueError that names the argument."""
    d = 64

    def make(*shape: int, **options: Any) -> Tensor:
        return torch.ones(*shape, **{"dtype": dtype, **options})

    good = make(1, 2, 8, d)
    answer.call(file, function, good, good, good, device=device)  # a function that is not written refuses everything
    bad: list[tuple[str, str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("q of rank 3", "q", (good[0], good, good), {}),
        ("float64 input", "q", (good.double(), good.double(), good.double()), {}),
        ("k of another dtype", "k", (good, good.double(), good.double()), {}),
        ("3 query heads for 2 KV heads", "heads", (make(1, 3, 8, d), good, good), {}),
        ("k of another head_dim", "head_dim", (good, make(1, 2, 8, d // 2), make(1, 2, 8, d // 2)), {}),
        ("v of another length than k", "v", (good, good, make(1, 2, 7, d)), {}),
        ("len_q = 0", "len_q", (make(1, 2, 0, d), good, good), {}),
        ("batch = 0", "batch", (make(0, 2, 8, d),) * 3, {}),
        ("a negative scale", "scale", (good, good, good), {"scale": -1.0}),
    ]
    for what, name, tensors, options in bad:
        try:
            message = answer.refusal(file, function, *tensors, device=device, **options)
        except CheckFailed as failure:
            raise CheckFailed(f"{what}: {failure}") from None
        if name not in message:
            raise CheckFailed(f"{what}: the ValueError must name the argument ({name}); it says: {message}")
