"""FlashAttention-2 in Python: the loops of chapter 3 turned inside out, on the same meter.

Algorithm 1 of "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023). Each
block of Q stays on chip while all the blocks of K and V that it can see pass by; O is divided by the row sums once, at
the end, and written once.
"""

from math import ceil

import torch
from torch import Tensor

from fa_reference.memory import HbmTensor, Memory, sram_budget
from fa_reference.validation import check_attention_inputs


def key_blocks(start: int, stop: int, len_q: int, len_k: int, block_k: int, causal: bool) -> tuple[int, int]:
    """Which blocks of keys the queries start, ..., stop - 1 must visit: (unmasked, visited) with unmasked <= visited.

    Of the blocks 0, 1, 2, ... of keys, the first `unmasked` are seen in full by every one of these queries; the others
    of the first `visited` only in part, so their scores need a mask; the blocks after that are seen by none of them and
    are skipped. Causal: query i sees key j if j <= i + len_k - len_q. Block b holds the keys from b * block_k up to,
    not including, (b + 1) * block_k or len_k.
    """
    # BEGIN SOLUTION: find how many keys the first query of the block sees, and how many the last one does (between 0
    #: and len_k); turn the first number into complete blocks (a shorter last block counts as seen in full if all its
    #: keys are) and the second into blocks that are touched
    if not causal:
        return ceil(len_k / block_k), ceil(len_k / block_k)
    seen_by_first = min(max(start + 1 + len_k - len_q, 0), len_k)
    seen_by_last = min(max(stop + len_k - len_q, 0), len_k)
    visited = ceil(seen_by_last / block_k)
    unmasked = visited if seen_by_first == len_k else seen_by_first // block_k
    return unmasked, visited
    # END SOLUTION


def visited_blocks(len_q: int, len_k: int, block_q: int, block_k: int, causal: bool) -> int:
    """How many (query block, key block) pairs one head computes; without skipping it would be T_r * T_c."""
    # BEGIN SOLUTION: add up what key_blocks says for every block of queries; the last one may be shorter
    starts = range(0, len_q, block_q)
    return sum(key_blocks(s, min(s + block_q, len_q), len_q, len_k, block_k, causal)[1] for s in starts)
    # END SOLUTION


def fa2_hbm_elements(len_q: int, len_k: int, head_dim: int, block_q: int, block_k: int, causal: bool) -> int:
    """How many numbers `fa2_head` moves between HBM and SRAM for one head, loads and stores together, exactly."""
    # BEGIN SOLUTION: Q and O move once, L once; K and V move once for every block of queries, as far as it visits them
    elements = 2 * len_q * head_dim + len_q
    for start in range(0, len_q, block_q):
        stop = min(start + block_q, len_q)
        keys = min(key_blocks(start, stop, len_q, len_k, block_k, causal)[1] * block_k, len_k)
        elements += 2 * keys * head_dim
    return elements
    # END SOLUTION


def fa2_head(
    Q: HbmTensor,
    K: HbmTensor,
    V: HbmTensor,
    O: HbmTensor,
    L: HbmTensor,
    memory: Memory,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> None:
    """Attention of one head by FlashAttention-2: writes O (N_q, d) and the log-sum-exp L (N_q,) once each.

    Q (N_q, d), K and V (N_k, d), O and L in HBM, float32; O and L arrive unset. A row that sees no key gets O = 0 and
    L = -inf. Blocks of keys that no query of the block sees are not loaded.

    In the paper's notation, for each block i of Q (outer loop): O_i = 0, l_i = 0, m_i = -inf on chip, and for each
    block j of K and V that it visits (inner loop):
        S_ij  = scale * Q_i K_j^T                                               (masked entries become -inf)
        m_new = max(m_i, rowmax(S_ij))
        P_ij  = exp(S_ij - m_new)
        l_i   = exp(m_i - m_new) l_i + rowsum(P_ij)
        O_i   = diag(exp(m_i - m_new)) O_i + P_ij V_j                           (no division here)
    then once: O_i = diag(l_i)^-1 O_i and L_i = m_i + log(l_i), both stored.
    """
    # BEGIN SOLUTION: loop over blocks of Q (outer) and over the visited blocks of K and V (inner); keep O_i, l_i and
    #: m_i on chip (memory.zeros, memory.full) for the whole inner loop; mask only the blocks that need it; divide
    #: once at the end and store O_i and L_i
    len_q, head_dim = Q.shape
    len_k = len(K)
    for q_start in range(0, len_q, block_q):
        rows = slice(q_start, min(q_start + block_q, len_q))
        block_rows = rows.stop - rows.start
        Q_i = memory.load(Q, rows)
        O_i = memory.zeros((block_rows, head_dim))
        l_i = memory.zeros((block_rows,))
        m_i = memory.full((block_rows,), -torch.inf)
        unmasked, visited = key_blocks(rows.start, rows.stop, len_q, len_k, block_k, causal)
        for b in range(visited):
            keys = slice(b * block_k, min((b + 1) * block_k, len_k))
            K_j, V_j = memory.load(K, keys), memory.load(V, keys)

            S_ij = Q_i @ K_j.T * scale
            if b >= unmasked:
                i = torch.arange(rows.start, rows.stop)[:, None]
                j = torch.arange(keys.start, keys.stop)[None, :]
                S_ij = S_ij.masked_fill(j > i + len_k - len_q, -torch.inf)

            m_new = torch.maximum(m_i, S_ij.amax(dim=1))
            # A row without any key so far has m_new = -inf, and -inf - (-inf) is NaN: subtract 0 there.
            m_sub = torch.where(m_new == -torch.inf, 0.0, m_new)
            P_ij = torch.exp(S_ij - m_sub[:, None])
            alpha = torch.exp(m_i - m_sub)
            l_i = alpha * l_i + P_ij.sum(dim=1)
            O_i = alpha[:, None] * O_i + P_ij @ V_j
            m_i = m_new
            del K_j, V_j, S_ij, P_ij  # free SRAM for the next blocks
        memory.store(O, rows, O_i / torch.where(l_i == 0, 1.0, l_i)[:, None])
        memory.store(L, rows, m_i + torch.log(l_i))
        del Q_i, O_i
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
    """Attention (o, lse) with every head computed by `fa2_head` in float32 on the CPU.

    q (B, H_q, N_q, d); k, v (B, H_kv, N_k, d); o like q, lse (B, H_q, N_q) float32. Query head h reads key head
    h // (H_q / H_kv), so K and V are not repeated in memory. Pass a `Memory` to see what was moved.
    """
    scale = check_attention_inputs(q, k, v, causal=causal, scale=scale, devices=("cpu",))
    batch, heads_q, len_q, head_dim = q.shape
    group = heads_q // k.shape[1]
    memory = Memory(sram_budget(block_q, block_k, head_dim)) if memory is None else memory
    # NaN, so that whatever fa2_head does not write shows.
    o = torch.full((batch, heads_q, len_q, head_dim), torch.nan)
    lse = torch.full((batch, heads_q, len_q), torch.nan)
    for b in range(batch):
        for h in range(heads_q):
            fa2_head(
                memory.hbm("Q", q[b, h].float()),
                memory.hbm("K", k[b, h // group].float()),
                memory.hbm("V", v[b, h // group].float()),
                memory.hbm("O", o[b, h]),
                memory.hbm("L", lse[b, h]),
                memory,
                block_q=block_q,
                block_k=block_k,
                causal=causal,
                scale=scale,
            )
    return o.to(q.dtype), lse
