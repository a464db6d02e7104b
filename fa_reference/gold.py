"""Gold attention: the definition of attention in float64, against which everything is judged."""

import torch
from torch import Tensor

# Scores held at once: 2^25 doubles are 256 MB, so 32k x 32k attention fits beside a model on any card.
SCORES_AT_ONCE = 2**25


def default_scale(head_dim: int) -> float:
    """The scale of the attention paper (Vaswani et al. 2017, section 3.2.1): 1 / sqrt(d)."""
    return head_dim**-0.5


def visible(query_rows: range, len_q: int, len_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Causal mask, aligned bottom-right: True where query i may see key j, that is j <= i + len_k - len_q.

    Shape (len(query_rows), len_k), bool.
    """
    i = torch.arange(query_rows.start, query_rows.stop, device=device)[:, None]
    j = torch.arange(len_k, device=device)[None, :]
    return j <= i + len_k - len_q


def softmax_times_values(scores: Tensor, v: Tensor, p_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(o, lse) of masked scores (..., len_q, len_k) and values (..., len_k, d); a row of -inf gives 0 and -inf.

    The probabilities are rounded to `p_dtype` (if given) before they multiply the values.
    """
    if scores.shape[-1] == 0:
        rows = scores.shape[:-1]
        return scores.new_zeros(*rows, v.shape[-1]), scores.new_full(rows, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.exp(scores - lse[..., None].nan_to_num(neginf=0.0))
    if p_dtype is not None:
        p = p.to(p_dtype).to(scores.dtype)
    return p @ v, lse


def gold_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in float64, a block of queries of one head at a time.

    q (B, H_q, N_q, d); k, v (B, H_kv, N_k, d) with H_q a multiple of H_kv; any float dtype, any strides, any device.
    Returns o (B, H_q, N_q, d) and lse (B, H_q, N_q), natural logarithm, both float64 on q's device. Rows without a
    visible key give o = 0 and lse = -inf.
    """
    return _attention(q, k, v, causal, scale, torch.float64, None)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    work: torch.dtype,
    p_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    batch, heads_q, len_q, head_dim = q.shape
    heads_kv, len_k = k.shape[1:3]
    scale = default_scale(head_dim) if scale is None else scale
    o = torch.empty(batch, heads_q, len_q, head_dim, dtype=work, device=q.device)
    lse = torch.empty(batch, heads_q, len_q, dtype=work, device=q.device)
    step = max(1, SCORES_AT_ONCE // max(1, len_k))
    for b in range(batch):
        for h in range(heads_q):
            h_kv = h // (heads_q // heads_kv)
            keys, values = k[b, h_kv].to(work), v[b, h_kv].to(work)
            for start in range(0, len_q, step):
                rows = range(start, min(start + step, len_q))
                scores = q[b, h, rows.start : rows.stop].to(work) @ keys.T * scale
                if causal:
                    scores.masked_fill_(~visible(rows, len_q, len_k, q.device), -torch.inf)
                block = softmax_times_values(scores, values, p_dtype)
                o[b, h, rows.start : rows.stop], lse[b, h, rows.start : rows.stop] = block
    return o, lse


def baseline_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The error rule's pinned baseline: float32 scores, softmax and accumulation; P and O rounded to q's dtype.

    Shapes as in gold_attention; returns o in q's dtype and lse in float32.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        o, lse = _attention(q, k, v, causal, scale, torch.float32, q.dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return o.to(q.dtype), lse
