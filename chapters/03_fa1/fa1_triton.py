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
    # TODO: replace this statement by your code.
    tl.static_assert(
        False,
        "fa1_triton.py: find this program's head from tl.program_id; loop over blocks of K and V, and inside "
        "over blocks of Q: load the block of acc, l and m, do one step of Algorithm 1, store them back; after"
        " the loops write o (in its own dtype) and lse. Mask rows and keys beyond the ends",
    )


def launch_grid(batch: int, heads_q: int) -> tuple[int, ...]:
    """How many programs to launch along each axis of tl.program_id (up to three)."""
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "fa1_triton.py: return a tuple with the number of programs: one per query head of every batch element"
    )


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
