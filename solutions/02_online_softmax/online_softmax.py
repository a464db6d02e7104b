"""Chapter 2: online softmax: attention over blocks of keys, one block at a time, in one pass.

A query's row of scores arrives in blocks. Three running quantities per row are enough to continue at any point
(Milakov and Gimelshein 2018; Dao et al. 2022). With x_j the scores seen so far, v_j the value rows that go with them:

    m = max_j x_j        l = sum_j exp(x_j - m)        acc = sum_j exp(x_j - m) v_j

acc is the output before its division by l. FlashAttention-1 keeps the divided O instead; FlashAttention-2 keeps acc,
as we do: one division per row at the end instead of one per row and block, and two states merge by adding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fa_reference.validation import check_attention_inputs


class State(NamedTuple):
    """What is known about every row after some of its keys; all float32. rows may be several sizes, as (B, H, N_q)."""

    m: Tensor  # (*rows)      running maximum of the scores, -inf before the first visible key
    l: Tensor  # (*rows)      running sum of exp(score - m)
    acc: Tensor  # (*rows, d) running sum of exp(score - m) * value row: the output, not yet normalised


def finite(m: Tensor) -> Tensor:
    """m with 0 in place of -inf: a reference that may be subtracted from -inf without giving NaN."""
    return torch.where(m == float("-inf"), 0.0, m)


def empty_state(rows: tuple[int, ...], head_dim: int, device: torch.device | str = "cpu") -> State:
    """The state before any key has been seen; merging it with another state changes nothing."""
    # BEGIN SOLUTION: empty_state: return the State of no keys, float32, on device: what is the maximum of no numbers,
    #: and what is their sum?
    return State(
        m=torch.full(rows, float("-inf"), device=device),
        l=torch.zeros(rows, device=device),
        acc=torch.zeros((*rows, head_dim), device=device),
    )
    # END SOLUTION


def update(state: State, scores_block: Tensor, values_block: Tensor) -> State:
    """The state after one more block of keys; neither the old state nor the blocks are changed.

    scores_block: (*rows, n) with n >= 1, already scaled, -inf where a key is not visible.
    values_block: (n, d), or (..., n, d) with the leading dimensions of rows; float32 or a 16-bit dtype, as may be
    scores_block. The sums are float32 in any case.
    """
    # BEGIN SOLUTION: update: the state after one more block: m, l and acc as in the lesson (also for rows that have
    #: seen no key).
    scores_block = scores_block.float()
    m_new = torch.maximum(state.m, scores_block.amax(dim=-1))
    reference = finite(m_new)
    rescale = torch.exp(state.m - reference)
    weights = torch.exp(scores_block - reference[..., None])
    return State(
        m=m_new,
        l=rescale * state.l + weights.sum(dim=-1),
        acc=rescale[..., None] * state.acc + weights @ values_block.float(),
    )
    # END SOLUTION


def merge(a: State, b: State) -> State:
    """The state of all keys of a and b together, from the two states alone; their sets of keys are disjoint.

    Associative and commutative, and empty_state is its identity: the keys may be split among workers in any way.
    """
    # BEGIN SOLUTION: merge: the lesson's merge; mind rows that are empty in both.
    m = torch.maximum(a.m, b.m)
    reference = finite(m)
    rescale_a = torch.exp(a.m - reference)
    rescale_b = torch.exp(b.m - reference)
    return State(
        m=m,
        l=rescale_a * a.l + rescale_b * b.l,
        acc=rescale_a[..., None] * a.acc + rescale_b[..., None] * b.acc,
    )
    # END SOLUTION


def finalize(state: State) -> tuple[Tensor, Tensor]:
    """Output o (*rows, d) and lse (*rows), natural logarithm, float32; 0 and -inf for a row without visible keys."""
    # BEGIN SOLUTION: finalize: o and lse as in the lesson; mind rows that saw no key.
    l = torch.where(state.l == 0, 1.0, state.l)
    return state.acc / l[..., None], state.m + torch.log(l)
    # END SOLUTION


def softmax_hbm_bytes(rows: int, cols: int, head_dim: int, passes: int, bytes_per_element: int) -> int:
    """Bytes moved between HBM and chip to turn stored scores S (rows, cols) into O = softmax(S) V (rows, head_dim).

    passes = 3: read S for the maxima, read S for the sums, read S and write P; then read P for P V.
    passes = 2: read S for maxima and sums at once (online), read S and write P; then read P for P V.
    passes = 1: read S and accumulate the output on the way; P never exists in HBM.
    In every case V is read once and O is written once. Raises ValueError unless passes is 1, 2 or 3.
    """
    if passes not in (1, 2, 3):
        raise ValueError(f"passes is {passes!r}; allowed: 1, 2 or 3")
    # BEGIN SOLUTION: softmax_hbm_bytes: count how often S is read and P written and read for this number of passes,
    #: add V and O, and multiply by bytes_per_element.
    p_trips = 0 if passes == 1 else 2  # P is written and read again, or never exists
    return bytes_per_element * ((passes + p_trips) * rows * cols + cols * head_dim + rows * head_dim)
    # END SOLUTION


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, block_k: int = 128
) -> tuple[Tensor, Tensor]:
    """Attention in one pass over blocks of block_k keys: never more than (B, H_q, N_q, block_k) scores at a time.

    The other arguments, and the results, are those of chapter 1; block_k changes the rounding and nothing else.
    """
    scale = check_attention_inputs(q, k, v, causal=causal, scale=scale)
    if not isinstance(block_k, int) or block_k < 1:
        raise ValueError(f"block_k is {block_k!r}; allowed: a whole number of at least 1")
    batch, heads_q, len_q, head_dim = q.shape
    len_k = k.shape[2]
    group = heads_q // k.shape[1]  # grouped-query attention as in chapter 1
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    # (N_q, 1): a query sees key j if j <= last_visible (past the end if not causal)
    last_visible = torch.arange(len_q, device=q.device)[:, None] + (len_k - len_q if causal else len_k)

    # BEGIN SOLUTION: forward: attention as in the docstring, one block of keys after another; use the functions
    #: above.
    state = empty_state((batch, heads_q, len_q), head_dim, q.device)
    for start in range(0, len_k, block_k):
        stop = min(start + block_k, len_k)
        s = scale * (q.float() @ k[:, :, start:stop].float().transpose(-1, -2))
        j = torch.arange(start, stop, device=q.device)
        s = s.masked_fill(j > last_visible, float("-inf"))
        state = update(state, s, v[:, :, start:stop])
    o, lse = finalize(state)
    return o.to(q.dtype), lse
    # END SOLUTION
