"""FlashAttention-1 in Python: tiles, and a meter on every byte between HBM and SRAM.

Algorithm 1 of "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao, Fu, Ermon, Rudra and
Re, 2022). K and V are cut in blocks of B_c rows, Q and O in blocks of B_r rows; only a handful of blocks is on chip at
once, and the N x N matrix of scores never exists.
"""

from math import ceil

import torch
from torch import Tensor

from fa_reference.memory import HbmTensor, Memory, sram_budget
from fa_reference.validation import check_attention_inputs


def block_sizes(sram_elements: int, head_dim: int) -> tuple[int, int]:
    """Block sizes (B_r, B_c) for an SRAM of M numbers, line 1 of Algorithm 1: B_c = ceil(M / 4d), B_r = min(B_c, d)."""
    # BEGIN SOLUTION: return (B_r, B_c) for M = sram_elements and d = head_dim, rounding M / 4d up
    block_k = ceil(sram_elements / (4 * head_dim))
    return min(block_k, head_dim), block_k
    # END SOLUTION


def fa1_hbm_elements(len_q: int, len_k: int, head_dim: int, block_q: int, block_k: int) -> int:
    """How many numbers `fa1_head` moves between HBM and SRAM for one head, loads and stores together.

    Exact for any length, also where the last block is shorter. Initialising O, l and m is not counted.
    """
    # BEGIN SOLUTION: count the numbers that Algorithm 1 loads and stores: K and V once, and in every step of the
    #: outer loop all of Q (read) and all of O, l and m (read and written)
    outer_steps = ceil(len_k / block_k)
    read_q = len_q * head_dim
    read_and_write_o_l_m = 2 * (len_q * head_dim + len_q + len_q)
    return 2 * len_k * head_dim + outer_steps * (read_q + read_and_write_o_l_m)
    # END SOLUTION


def fa1_head(
    Q: HbmTensor,
    K: HbmTensor,
    V: HbmTensor,
    O: HbmTensor,
    l: HbmTensor,
    m: HbmTensor,
    memory: Memory,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> None:
    """Attention of one head by Algorithm 1, in place: O, l and m in HBM hold the result when it returns.

    Q (N_q, d), K and V (N_k, d), O (N_q, d), l and m (N_q,), all float32. O, l and m arrive as 0, 0 and -inf. On
    return O is the attention output, m the row maxima of the scaled, masked scores, l the row sums of exp(S - m); a row
    that sees no key keeps 0, 0 and -inf. Causal: query i sees key j if j <= i + N_k - N_q.

    In the paper's notation, for each block j of K and V (outer loop) and each block i of Q (inner loop):
        S_ij  = scale * Q_i K_j^T                                               (masked entries become -inf)
        m_new = max(m_i, rowmax(S_ij))
        P_ij  = exp(S_ij - m_new)
        l_new = exp(m_i - m_new) l_i + rowsum(P_ij)
        O_i   = diag(l_new)^-1 (diag(l_i) exp(m_i - m_new) O_i + P_ij V_j)      (O stays normalised, as in the paper)
    """
    # BEGIN SOLUTION: loop over blocks of K and V (outer) and of Q (inner); load K_j, V_j once per outer step and Q_i,
    #: O_i, l_i, m_i in the inner one with memory.load; update O_i, l_i, m_i and memory.store them back. Mind the
    #: shorter last block and rows that see no key at all (m = -inf)
    len_q, len_k = len(Q), len(K)
    for k_start in range(0, len_k, block_k):
        keys = slice(k_start, min(k_start + block_k, len_k))
        K_j, V_j = memory.load(K, keys), memory.load(V, keys)
        for q_start in range(0, len_q, block_q):
            rows = slice(q_start, min(q_start + block_q, len_q))
            Q_i, O_i = memory.load(Q, rows), memory.load(O, rows)
            l_i, m_i = memory.load(l, rows), memory.load(m, rows)

            S_ij = Q_i @ K_j.T * scale
            if causal:
                i = torch.arange(rows.start, rows.stop)[:, None]
                j = torch.arange(keys.start, keys.stop)[None, :]
                S_ij = S_ij.masked_fill(j > i + len_k - len_q, -torch.inf)

            m_new = torch.maximum(m_i, S_ij.amax(dim=1))
            # A row without any key so far has m_new = -inf, and -inf - (-inf) is NaN: subtract 0 there.
            m_sub = torch.where(m_new == -torch.inf, 0.0, m_new)
            P_ij = torch.exp(S_ij - m_sub[:, None])
            kept = torch.exp(m_i - m_sub) * l_i  # what the old sum is worth under the new maximum
            l_new = kept + P_ij.sum(dim=1)
            O_i = (kept[:, None] * O_i + P_ij @ V_j) / torch.where(l_new == 0, 1.0, l_new)[:, None]

            memory.store(O, rows, O_i)
            memory.store(l, rows, l_new)
            memory.store(m, rows, m_new)
            del Q_i, O_i, S_ij, P_ij  # free SRAM for the next blocks
        del K_j, V_j  # or they would still be there while the next ones arrive
    # END SOLUTION


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention (o, lse) with every head computed by `fa1_head` in float32 on the CPU.

    q (B, H_q, N_q, d); k, v (B, H_kv, N_k, d); o like q, lse (B, H_q, N_q) float32. Pass a `Memory` to see what was
    moved; without one, SRAM has room for one step with these block sizes.
    """
    scale = check_attention_inputs(q, k, v, causal=causal, scale=scale, devices=("cpu",))
    batch, heads_q, len_q, head_dim = q.shape
    group = heads_q // k.shape[1]
    memory = Memory(sram_budget(block_q, block_k, head_dim)) if memory is None else memory
    o = torch.zeros(batch, heads_q, len_q, head_dim)
    l = torch.zeros(batch, heads_q, len_q)
    m = torch.full((batch, heads_q, len_q), -torch.inf)
    for b in range(batch):
        for h in range(heads_q):
            fa1_head(
                memory.hbm("Q", q[b, h].float()),
                memory.hbm("K", k[b, h // group].float()),
                memory.hbm("V", v[b, h // group].float()),
                memory.hbm("O", o[b, h]),
                memory.hbm("l", l[b, h]),
                memory.hbm("m", m[b, h]),
                memory,
                block_q=block_q,
                block_k=block_k,
                causal=causal,
                scale=scale,
            )
    return o.to(q.dtype), m + torch.log(l)
