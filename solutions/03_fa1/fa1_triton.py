"""FlashAttention-1 in Triton: one program per (batch, head), with the loop order of the paper's Algorithm 1.

The program walks over blocks of K and V (outer loop) and, for each, over all blocks of Q (inner loop). Its partial
results O, l and m live in HBM between visits, as float32. Addresses are spelled out with plain pointer arithmetic.
"""

import math

import torch
from torch import Tensor

from fa_reference.triton_cpu import DEVICES, on_device_of, tl, triton
from fa_reference.validation import check_attention_inputs

HEAD_DIMS = (64, 128)
LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E), and exp2 is what the hardware has
LN_2: tl.constexpr = tl.constexpr(math.log(2.0))


def key_block(head_dim: int, device: torch.device) -> int:
    """B_c: 2 d where shared memory holds K_j and V_j of that size (2 * 2 * 2d * d bytes, and room to work), else d.

    The wider the block of keys, the fewer times O, l and m travel to HBM and back.
    """
    shared = 228 * 1024
    if device.type == "cuda":
        shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024)
    return 2 * head_dim if 10 * head_dim * head_dim <= shared else head_dim


@triton.jit
def fa1_kernel(
    q_ptr,  # (B, H_q, N_q, d), 16 bit
    k_ptr,  # (B, H_kv, N_k, d)
    v_ptr,  # (B, H_kv, N_k, d)
    o_ptr,  # (B, H_q, N_q, d), the result
    acc_ptr,  # (B, H_q, N_q, d) float32, contiguous: O between visits; arrives as 0
    l_ptr,  # (B, H_q, N_q) float32, contiguous: arrives as 0
    m_ptr,  # (B, H_q, N_q) float32, contiguous: arrives as -inf, in units of log2
    lse_ptr,  # (B, H_q, N_q) float32, contiguous
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    o_stride_b,
    o_stride_h,
    o_stride_n,
    heads_q,
    group,  # query heads per key head
    len_q,
    len_k,
    scale_log2,  # scale * log2(e)
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # B_r
    BLOCK_K: tl.constexpr,  # B_c
    HEAD_DIM: tl.constexpr,
):
    # BEGIN SOLUTION(triton): find this program's head from tl.program_id; loop over blocks of K and V, and inside
    #: over blocks of Q: load the block of acc, l and m, do one step of Algorithm 1, store them back; after the loops
    #: write o (in its own dtype) and lse. Mask rows and keys beyond the ends
    # Which head this program works on. 64-bit: offsets of large tensors do not fit in 32 bits.
    batch = (tl.program_id(0) // heads_q).to(tl.int64)
    head = (tl.program_id(0) % heads_q).to(tl.int64)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head // group * k_stride_h
    v_ptr += batch * v_stride_b + head // group * v_stride_h
    o_ptr += batch * o_stride_b + head * o_stride_h
    first_row = (batch * heads_q + head) * len_q
    acc_ptr += first_row * HEAD_DIM
    l_ptr += first_row
    m_ptr += first_row
    lse_ptr += first_row

    d = tl.arange(0, HEAD_DIM)
    for k_start in range(0, len_k, BLOCK_K):
        keys = k_start + tl.arange(0, BLOCK_K)
        # A (BLOCK_K, HEAD_DIM) grid of addresses; keys beyond the end are not read and give zeros.
        K_j = tl.load(k_ptr + keys[:, None] * k_stride_n + d[None, :], mask=keys[:, None] < len_k, other=0.0)
        V_j = tl.load(v_ptr + keys[:, None] * v_stride_n + d[None, :], mask=keys[:, None] < len_k, other=0.0)

        for q_start in range(0, len_q, BLOCK_Q):
            rows = q_start + tl.arange(0, BLOCK_Q)
            in_q = rows < len_q
            acc_ptrs = acc_ptr + rows[:, None] * HEAD_DIM + d[None, :]
            Q_i = tl.load(q_ptr + rows[:, None] * q_stride_n + d[None, :], mask=in_q[:, None], other=0.0)
            O_i = tl.load(acc_ptrs, mask=in_q[:, None], other=0.0)
            l_i = tl.load(l_ptr + rows, mask=in_q, other=0.0)
            m_i = tl.load(m_ptr + rows, mask=in_q, other=float("-inf"))

            # 16-bit tiles in, float32 sums out: tensor cores.
            S_ij = tl.dot(Q_i, tl.trans(K_j)) * scale_log2
            visible = keys[None, :] < len_k
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None] + len_k - len_q)
            S_ij = tl.where(visible, S_ij, float("-inf"))

            m_new = tl.maximum(m_i, tl.max(S_ij, axis=1))
            # A row without any key so far has m_new = -inf, and -inf - (-inf) is NaN: subtract 0 there.
            m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)
            P_ij = tl.exp2(S_ij - m_sub[:, None])
            kept = tl.exp2(m_i - m_sub) * l_i
            l_new = kept + tl.sum(P_ij, axis=1)
            O_i = kept[:, None] * O_i + tl.dot(P_ij.to(V_j.dtype), V_j)
            O_i = O_i / tl.where(l_new == 0.0, 1.0, l_new)[:, None]

            tl.store(acc_ptrs, O_i, mask=in_q[:, None])
            tl.store(l_ptr + rows, l_new, mask=in_q)
            tl.store(m_ptr + rows, m_new, mask=in_q)
        # Other threads of this program may read these rows in the next outer step: let them see the stores first.
        tl.debug_barrier()

    for q_start in range(0, len_q, BLOCK_Q):
        rows = q_start + tl.arange(0, BLOCK_Q)
        in_q = rows < len_q
        O_i = tl.load(acc_ptr + rows[:, None] * HEAD_DIM + d[None, :], mask=in_q[:, None])
        l_i = tl.load(l_ptr + rows, mask=in_q, other=1.0)
        m_i = tl.load(m_ptr + rows, mask=in_q, other=0.0)
        lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(tl.where(l_i == 0.0, 1.0, l_i))) * LN_2)
        tl.store(o_ptr + rows[:, None] * o_stride_n + d[None, :], O_i.to(o_ptr.dtype.element_ty), mask=in_q[:, None])
        tl.store(lse_ptr + rows, lse, mask=in_q)
    # END SOLUTION


def launch_grid(batch: int, heads_q: int) -> tuple[int, ...]:
    """How many programs to launch along each axis of tl.program_id (up to three)."""
    # BEGIN SOLUTION: return a tuple with the number of programs: one per query head of every batch element
    return (batch * heads_q,)
    # END SOLUTION


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention (o, lse) by `fa1_kernel`. q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d).

    float16 or bfloat16, d in HEAD_DIMS; on a GPU, or on the CPU in Triton's interpreter. o has q's shape and dtype,
    lse (B, H_q, N_q) is float32. Raises ValueError for anything else.
    """
    dtypes = (torch.float16, torch.bfloat16)
    scale = check_attention_inputs(
        q, k, v, causal=causal, scale=scale, dtypes=dtypes, head_dims=HEAD_DIMS, devices=DEVICES
    )
    batch, heads_q, len_q, head_dim = q.shape
    o = torch.empty_like(q)
    acc = torch.zeros(batch, heads_q, len_q, head_dim, dtype=torch.float32, device=q.device)
    l = torch.zeros(batch, heads_q, len_q, dtype=torch.float32, device=q.device)
    m = torch.full_like(l, -torch.inf)
    lse = torch.empty_like(l)
    with on_device_of(q):
        fa1_kernel[launch_grid(batch, heads_q)](
            q,
            k,
            v,
            o,
            acc,
            l,
            m,
            lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *o.stride()[:3],
            heads_q,
            heads_q // k.shape[1],
            len_q,
            k.shape[2],
            scale * LOG2_E,
            CAUSAL=causal,
            BLOCK_Q=64,
            BLOCK_K=key_block(head_dim, q.device),
            HEAD_DIM=head_dim,
            num_warps=4 if head_dim == 64 else 8,
            num_stages=2 if head_dim == 64 else 1,
        )
    return o, lse
