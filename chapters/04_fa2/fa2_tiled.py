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
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "fa2_tiled.py: find how many keys the first query of the block sees, and how many the last one does "
        "(between 0 and len_k); turn the first number into complete blocks (a shorter last block counts as "
        "seen in full if all its keys are) and the second into blocks that are touched"
    )


def visited_blocks(len_q: int, len_k: int, block_q: int, block_k: int, causal: bool) -> int:
    """How many (query block, key block) pairs one head computes; without skipping it would be T_r * T_c."""
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "fa2_tiled.py: add up what key_blocks says for every block of queries; the last one may be shorter"
    )


def fa2_hbm_elements(len_q: int, len_k: int, head_dim: int, block_q: int, block_k: int, causal: bool) -> int:
    """How many numbers `fa2_head` moves between HBM and SRAM for one head, loads and stores together, exactly."""
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "fa2_tiled.py: Q and O move once, L once; K and V move once for every block of queries, as far as it "
        "visits them"
    )


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
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "fa2_tiled.py: loop over blocks of Q (outer) and over the visited blocks of K and V (inner); keep "
        "O_i, l_i and m_i on chip (memory.zeros, memory.full) for the whole inner loop; mask only the blocks "
        "that need it; divide once at the end and store O_i and L_i"
    )


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
