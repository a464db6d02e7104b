"""Chapter 1: naive attention, and what it costs.

Attention computes S = scale * Q K^T, P = softmax(S) along every row, O = P V (Vaswani et al. 2017). "Naive" says
that S and P exist as whole matrices in memory. Everything later in the course computes the same O without them.

N_q and N_k are the numbers of queries and keys, d is the head dimension.
"""

import torch
from torch import Tensor

from fa_reference.validation import check_attention_inputs


def stable_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension that cannot overflow, and the logarithm of its denominator.

    scores: (..., n) with n >= 1; an entry may be -inf ("this key is not visible"). It is not changed.
    Returns the probabilities (..., n) and lse (...), both float32: lse = log(sum_j exp(scores_j)), natural logarithm.
    A row that is -inf throughout has probabilities 0 and lse -inf.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError("naive.py: stable_softmax: the lesson's safe softmax, in float32; mind rows of -inf.")


def attention_flops(len_q: int, len_k: int, head_dim: int) -> int:
    """Floating-point operations of one head's forward pass: its two matrix products; a multiply and an add make two.

    The softmax, O(N_q N_k), is left out by convention: so do the papers, and so does every TFLOP/s in this course.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "naive.py: attention_flops: count the multiplications and additions of Q K^T and of P V, and return their sum."
    )


def naive_hbm_bytes(len_q: int, len_k: int, head_dim: int, bytes_per_element: int) -> int:
    """Bytes that one head's naive forward pass moves between HBM and the chip, all matrices in one dtype.

    Three kernels, each of which reads its inputs once and writes its result once:
    S = Q K^T (reads Q, K; writes S), P = softmax(S) (reads S; writes P), O = P V (reads P, V; writes O).
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "naive.py: naive_hbm_bytes: add up the elements that the three kernels read and write, and multiply "
        "by bytes_per_element."
    )


def attainable_tflops(flops_per_byte: float, peak_tflops: float, bandwidth_tb_s: float) -> float:
    """Roofline (Williams, Waterman, Patterson 2009): the highest TFLOP/s possible at an arithmetic intensity.

    flops_per_byte: FLOPs done per byte moved; peak_tflops: the chip's peak; bandwidth_tb_s: HBM bandwidth in TB/s.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "naive.py: attainable_tflops: return the lower of two ceilings: what the arithmetic units can do, "
        "what the memory can feed them."
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Naive attention: o (B, H_q, N_q, d) in q's dtype and lse (B, H_q, N_q) in float32.

    q: (B, H_q, N_q, d); k, v: (B, H_kv, N_k, d) with H_q a multiple of H_kv (grouped-query attention: H_q / H_kv
    consecutive query heads share one KV head). causal: query i sees key j if j <= i + N_k - N_q, so that the last
    query sees all keys ("aligned bottom-right"). scale: factor on Q K^T, 1/sqrt(d) if None. A row without visible
    keys has o = 0 and lse = -inf. Raises ValueError on inputs that do not fit this description.
    """
    scale = check_attention_inputs(q, k, v, causal=causal, scale=scale)
    batch, heads_q, len_q, _ = q.shape
    heads_kv, len_k = k.shape[1], k.shape[2]
    if len_k == 0:  # no keys at all: no row to take a maximum of
        return torch.zeros_like(q), torch.full((batch, heads_q, len_q), float("-inf"), device=q.device)

    # TODO: replace this statement by your code.
    raise NotImplementedError("naive.py: forward: attention as in the docstring; use stable_softmax.")
