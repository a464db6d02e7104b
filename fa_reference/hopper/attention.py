"""Attention on the model: one block's problem, the online softmax in registers, and a driver for whole tensors."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fa_reference.hopper.memory import FP8, GlobalTensor
from fa_reference.hopper.registers import ROWS, Fragment, exp2, fma, log2, maximum, reciprocal
from fa_reference.hopper.report import Report
from fa_reference.hopper.sm import SM
from fa_reference.hopper.timing import Timing
from fa_reference.hopper.warpgroup import Warpgroup
from fa_reference.validation import check_attention_inputs

LN2 = float(np.log(2.0))
LOG2_E = 1 / LN2
DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
FP8_OFFSET = 8  # P is computed as 2^8 exp(s - m), as e4m3 holds [2^-9, 448]; O and l contain the factor, so it cancels


@dataclass(frozen=True)
class AttentionBlock:
    """What one block computes: 64 queries for each of its consumer warpgroups, of one head.

    Q, O (N_q, d), K, V (N_k, d) and L (N_q, 1), the log-sum-exp in float32, in global memory; row: the first query. O
    has the dtype of Q, or bfloat16 if that is fp8, whose scales are part of `scale`.
    """

    Q: GlobalTensor
    K: GlobalTensor
    V: GlobalTensor
    O: GlobalTensor
    L: GlobalTensor
    row: int
    consumers: int
    block_k: int
    causal: bool
    scale: float

    @property
    def head_dim(self) -> int:
        """d."""
        return self.Q.data.shape[1]

    @property
    def dtype(self) -> str:
        """Of Q, K and V."""
        return self.Q.dtype

    @property
    def key_blocks(self) -> int:
        """How many blocks of keys any query of this block can see."""
        len_q, len_k = len(self.Q.data), len(self.K.data)
        if self.causal:
            last = min(self.row + ROWS * self.consumers, len_q) - 1
            len_k = max(0, min(len_k, last + len_k - len_q + 1))
        return -(-len_k // self.block_k)

    def mask(self, S: Fragment, w: int, j: int) -> Fragment:
        """S of consumer w against key block j, with -inf where there is no key or the query may not see it."""
        len_q, len_k = len(self.Q.data), len(self.K.data)
        row = self.row + ROWS * w
        keys = np.arange(j * self.block_k, (j + 1) * self.block_k)
        last = np.full((ROWS, 1), len_k - 1)
        if self.causal:
            last = np.minimum(last, np.arange(row, row + ROWS)[:, None] + len_k - len_q)
        keep = keys <= last
        return S if keep.all() else S.where(keep, -np.inf)


class OnlineSoftmax:
    """Running maximum m and sum l of 64 rows, both (64, 1) in registers; exponentials to base 2."""

    def __init__(self, wg: Warpgroup, scale: float, dtype: str) -> None:
        self.scale_log2, self.dtype = scale * LOG2_E, dtype
        self.offset = FP8_OFFSET if dtype == FP8 else 0
        self.m, self.l = wg.full(1, -np.inf), wg.full(1, 0.0)

    def step(self, S: Fragment) -> tuple[Fragment, Fragment]:
        """(P rounded to the input's dtype, the factor by which the output so far must be rescaled)."""
        m_new = maximum(self.m, S.row_max())
        shift = -(m_new.finite_or(0.0) * self.scale_log2)
        rescale = exp2(fma(self.m, self.scale_log2, shift))
        P = exp2(fma(S, self.scale_log2, shift + self.offset if self.offset else shift))
        total, rounded = P.row_sum(), P.to(self.dtype)
        self.l = fma(self.l, rescale, total)
        self.m = m_new
        return rounded, rescale

    def finish(self, O: Fragment) -> tuple[Fragment, Fragment]:
        """(O / l, log-sum-exp); 0 and -inf for rows without keys."""
        empty = self.l.values == 0
        O *= reciprocal(self.l).where(~empty, 0.0)
        L = (fma(self.m, self.scale_log2, log2(self.l)) - self.offset) * LN2
        return O, L.where(~empty, -np.inf)


@dataclass(frozen=True)
class AttentionRun:
    """o and lse as `forward` of any version returns them, and a report for every block, in order."""

    o: Tensor
    lse: Tensor
    reports: list[Report]

    @property
    def report(self) -> Report:
        """That of the first block."""
        return self.reports[0]


def run_attention(
    schedule: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_k: int = 128,
    consumers: int | None = None,
    timing: Timing | None = None,
    seed: int | None = None,
    check: bool = True,
    **options: object,
) -> AttentionRun:
    """Run a schedule on whole tensors, one simulated block after the other.

    q (B, H_q, N_q, d); k, v (B, H_kv, N_k, d), CPU, float16, bfloat16 or float8_e4m3fn (codes whose scales, if any, the
    caller folds into `scale`; o is bfloat16 then). `schedule` is a module with CONSUMERS (the default for `consumers`)
    and kernel(sm, block, **options), which returns the roles. Raises ValueError for bad inputs, RuleBroken for a wrong
    schedule.
    """
    consumers = schedule.CONSUMERS if consumers is None else consumers
    scale = check_attention_inputs(q, k, v, causal=causal, scale=scale, dtypes=DTYPES, devices=("cpu",))
    dtype = str(q.dtype).removeprefix("torch.")
    out = "bfloat16" if dtype == FP8 else dtype
    group = q.shape[1] // k.shape[1]
    o, lse = np.full(q.shape, np.nan, np.float32), np.full((*q.shape[:3], 1), np.nan, np.float32)
    Q, K, V = (x.float().numpy() for x in (q, k, v))
    reports = []
    for b, h in np.ndindex(*q.shape[:2]):
        for row in range(0, q.shape[2], ROWS * consumers):
            sm = SM(timing, seed=seed, check=check)
            block = AttentionBlock(
                Q=sm.gmem("Q", Q[b, h], dtype, level="HBM"),
                K=sm.gmem("K", K[b, h // group], dtype),
                V=sm.gmem("V", V[b, h // group], dtype),
                O=sm.gmem("O", o[b, h], out, level="HBM"),
                L=sm.gmem("L", lse[b, h], "float32"),
                row=row,
                consumers=consumers,
                block_k=block_k,
                causal=causal,
                scale=scale,
            )
            reports.append(sm.run(schedule.kernel(sm, block, **options)))
    return AttentionRun(torch.from_numpy(o).to(getattr(torch, out)), torch.from_numpy(lse[..., 0]), reports)
