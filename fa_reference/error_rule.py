"""The error rule: when is an attention output right?

An output is right if its error against float64 is at most twice the error of one pinned baseline, which computes the
same attention at the same precision: scores, softmax and accumulation in float32, with P and O rounded to the input's
dtype. Both the RMS and the maximum of the error must pass. The rule adapts to length, scale and dtype by itself, where
a fixed tolerance accepts anything at long lengths (outputs shrink like 1 / sqrt(N)).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fa_reference.gold import baseline_attention, gold_attention

FACTOR = 2.0
# Half a unit in the last place of float32: the rounding that no float32 computation avoids.
ROUNDING = 2.0**-24


@dataclass(frozen=True)
class ErrorReport:
    """Errors of an output against float64 and the largest ones allowed; `ratio` <= 1 means that the rule is kept."""

    rms: float
    rms_allowed: float
    max: float
    max_allowed: float
    lse_error: float
    lse_allowed: float

    @property
    def ratio(self) -> float:
        """Largest of the three errors over what is allowed; nan or inf where the output is not finite."""
        pairs = ((self.rms, self.rms_allowed), (self.max, self.max_allowed), (self.lse_error, self.lse_allowed))
        ratios = torch.tensor([error / allowed for error, allowed in pairs])
        return float(ratios.max())  # torch's max propagates nan

    @property
    def passed(self) -> bool:
        """True if RMS, maximum and lse are all within what is allowed (nan never is)."""
        return self.ratio <= 1.0


def _lse_error(lse: Tensor, gold: Tensor) -> float:
    """Largest |lse - gold|; a row without keys must be -inf in both."""
    empty = gold == -torch.inf
    if not torch.equal(lse.double()[empty], gold[empty]):
        return float("inf")
    errors = (lse.double() - gold)[~empty].abs()
    return float(errors.max()) if errors.numel() else 0.0


@dataclass(frozen=True)
class Yardstick:
    """Gold attention on some inputs, and the errors that the rule allows there."""

    gold_o: Tensor
    gold_lse: Tensor
    rms_allowed: float
    max_allowed: float
    lse_allowed: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        baseline: Callable[..., tuple[Tensor, Tensor]] = baseline_attention,
    ) -> "Yardstick":
        """The yardstick for attention on q, k, v (shapes as in gold_attention), on their device.

        baseline: called like gold_attention; another one than the pinned is for FP8, whose P has a format of its own.
        ValueError if the baseline's output is not finite: such input can judge nobody.
        """
        gold_o, gold_lse = gold_attention(q, k, v, causal=causal, scale=scale)
        base_o, base_lse = baseline(q, k, v, causal=causal, scale=scale)
        base = base_o.double() - gold_o
        if not base.isfinite().all():
            wrong = int((~base.isfinite()).sum())
            raise ValueError(f"{wrong} of {base.numel()} numbers of the baseline are not finite: unfit to judge by")
        # The floor: a float32 score, a sum of d products, is rounded at its own size, and its probability, O and lse
        # with it. On a small case the baseline may be luckier than that.
        finite = gold_lse[gold_lse.isfinite()].abs()
        score_size = 4 + (float(finite.max()) if finite.numel() else 0.0)
        v_max = max(float(v.float().abs().max()) if v.numel() else 0.0, ROUNDING)
        floor, lse_floor = 2 * ROUNDING * score_size * v_max, 32 * ROUNDING * score_size
        return cls(
            gold_o,
            gold_lse,
            rms_allowed=FACTOR * float(base.square().mean().sqrt()) + floor,
            max_allowed=FACTOR * float(base.abs().max()) + floor,
            lse_allowed=FACTOR * _lse_error(base_lse, gold_lse) + lse_floor,
        )

    def judge(self, o: Tensor, lse: Tensor | None) -> ErrorReport:
        """Judge an output; without an lse (library kernels do not return it) that part counts as exact.

        ValueError if o or lse has another shape than attention's.
        """
        for name, got, gold in (("o", o, self.gold_o), ("lse", lse, self.gold_lse)):
            if got is not None and got.shape != gold.shape:
                raise ValueError(f"{name} has shape {tuple(got.shape)}; it must be {tuple(gold.shape)}")
        error = o.double() - self.gold_o
        return ErrorReport(
            rms=float(error.square().mean().sqrt()),
            rms_allowed=self.rms_allowed,
            max=float(error.abs().max()),
            max_allowed=self.max_allowed,
            lse_error=0.0 if lse is None else _lse_error(lse, self.gold_lse),
            lse_allowed=self.lse_allowed,
        )


def judge(
    o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> ErrorReport:
    """Judge an output (o, lse) of attention on q, k, v; all on one device, shapes as in gold_attention."""
    return Yardstick.of(q, k, v, causal=causal, scale=scale).judge(o, lse)
