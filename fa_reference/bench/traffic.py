"""HBM bytes of the versions in the race: what their loads and stores add up to, by the formulas of counts.py."""

from __future__ import annotations

from dataclasses import dataclass

from fa_reference.bench.grid import Cell
from fa_reference.counts import fa1_hbm_bytes, fa2_hbm_bytes, naive_hbm_bytes

ELEMENT = 2  # bytes of a 16-bit number; the race has no other inputs
# Tiles of the Triton solutions on a Hopper GPU, by head dimension (a test compares them with the solutions).
FA1_BLOCK_K = {64: 128, 128: 256}  # B_c
FA2_BLOCK_Q = {64: 64, 128: 64, 256: 128}  # B_r; the library kernels' tiles are not known: 128 is usual
USUAL_BLOCK_Q = 128
FUSED = ("fa2_triton", "torch_fa2", "cudnn", "fa3", "fa4")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call, all heads and batches; `how` says in words what was counted."""

    bytes: int
    how: str


def counted(name: str, cell: Cell) -> Traffic | None:
    """Bytes that a version asks memory for, reads that L2 may serve included; None where nobody counted. No mask."""
    name = name.removeprefix("mine:")
    heads = cell.batch * cell.heads_q
    shape = (cell.len_q, cell.len_k, cell.head_dim)
    if name == "explicit":
        return Traffic(heads * naive_hbm_bytes(*shape, ELEMENT), "three kernels, 16-bit S and P")
    if name == "naive":
        scores = 4 * 4 * cell.len_q * cell.len_k
        matrices = ELEMENT * 2 * (cell.len_q + cell.len_k) * cell.head_dim
        how = "three kernels, float32 S and P (torch runs more kernels than three, so it moves more)"
        return Traffic(heads * (matrices + scores), how)
    if name == "fa1_triton":
        partial = 4 * (cell.len_q * cell.head_dim + 2 * cell.len_q)
        result = ELEMENT * cell.len_q * cell.head_dim + 4 * cell.len_q
        block_k = FA1_BLOCK_K[cell.head_dim]
        loop = fa1_hbm_bytes(*shape, block_k, ELEMENT, 4)
        return Traffic(heads * (loop + 2 * partial + result), f"Algorithm 1 with B_c = {block_k}, float32 O, l, m")
    if name in FUSED:
        block_q = FA2_BLOCK_Q[cell.head_dim] if name == "fa2_triton" else USUAL_BLOCK_Q
        return Traffic(heads * fa2_hbm_bytes(*shape, block_q, ELEMENT), f"Q outer, B_r = {block_q}")
    return None


def from_hbm(name: str, cell: Cell) -> Traffic | None:
    """Bytes that have to come from or go to HBM itself: in fused kernels L2 serves every re-read of a head's K and V.

    For the versions that keep N x N scores or partial results in HBM this is `counted`: those exceed any L2.
    """
    if name.removeprefix("mine:") not in FUSED:
        return counted(name, cell)
    once = ELEMENT * cell.head_dim * 2 * (cell.heads_q * cell.len_q + cell.heads_kv * cell.len_k)
    return Traffic(cell.batch * (once + 4 * cell.heads_q * cell.len_q), "Q, K, V read once, O and lse written once")
