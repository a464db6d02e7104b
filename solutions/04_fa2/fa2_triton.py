"""FlashAttention-2 in Triton: one program per (block of queries, head, batch).

Against chapter 3's kernel: the loops have changed places, so O, l and m stay on chip; O is divided once, at the end;
blocks above the diagonal are skipped, and only the blocks on it are masked; and there are N_q / B_r times as many
programs. Tiles are loaded through tensor descriptors: on Hopper the copy engine (TMA) does the addressing and fills
what lies beyond the ends with zeros, elsewhere Triton turns them into pointers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fa_reference.triton_cpu import DEVICES, TensorDescriptor, on_device_of, tl, triton
from fa_reference.validation import check_attention_inputs

HEAD_DIMS = (64, 128, 256)
LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E), and exp2 is what the hardware has
LN_2: tl.constexpr = tl.constexpr(math.log(2.0))


class Config(NamedTuple):
    """B_r, B_c, warps per program, and how many blocks of K and V are on their way at once."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


HOPPER = {64: Config(64, 128, 4, 3), 128: Config(64, 64, 4, 3), 256: Config(128, 64, 8, 2)}
OTHER_GPUS = {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 4, 1)}


@triton.jit
def visit_blocks(
    O_i,
    l_i,
    m_i,
    Q_i,
    k_desc,
    v_desc,
    batch,
    head_kv,
    k_begin,
    k_end,
    last_key,  # (BLOCK_Q,), the last key that each row sees; used if MASKED
    scale_log2,
    MASKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Online softmax over the blocks of keys from k_begin to k_end: the new O_i (not yet divided), l_i and m_i."""
    # BEGIN SOLUTION(triton): loop over the blocks of keys: load K_j, S = Q_i K_j^T in units of log2, mask it if MASKED,
    #: new maximum, P, rescale l_i and O_i, load V_j, add P V_j; return (O_i, l_i, m_i)
    for k_start in tl.range(k_begin, k_end, BLOCK_K):
        K_j = k_desc.load([batch, head_kv, k_start, 0]).reshape(BLOCK_K, HEAD_DIM)
        S_ij = tl.dot(Q_i, K_j.T)
        if MASKED:
            keys = k_start + tl.arange(0, BLOCK_K)
            S_ij = tl.where(keys[None, :] <= last_key[:, None], S_ij, float("-inf"))
        # scale_log2 is positive, so it can wait until after the maximum: one multiply-add per score instead of two.
        m_new = tl.maximum(m_i, tl.max(S_ij, axis=1) * scale_log2)
        # Only where there is a mask a row may have seen no key yet: then m_new = -inf, and 0 is subtracted instead.
        m_sub = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        P_ij = tl.exp2(S_ij * scale_log2 - m_sub[:, None])
        alpha = tl.exp2(m_i - m_sub)
        l_i = alpha * l_i + tl.sum(P_ij, axis=1)
        O_i = alpha[:, None] * O_i
        V_j = v_desc.load([batch, head_kv, k_start, 0]).reshape(BLOCK_K, HEAD_DIM)
        O_i = tl.dot(P_ij.to(V_j.dtype), V_j, O_i)
        m_i = m_new
    return O_i, l_i, m_i
    # END SOLUTION


@triton.jit
def fa2_kernel(
    q_desc,  # (B, H_q, N_q, d), tiles of (1, 1, BLOCK_Q, d)
    k_desc,  # (B, H_kv, N_k, d), tiles of (1, 1, BLOCK_K, d)
    v_desc,  # (B, H_kv, N_k, d), tiles of (1, 1, BLOCK_K, d)
    o_ptr,  # (B, H_q, N_q, d), 16 bit
    lse_ptr,  # (B, H_q, N_q) float32, contiguous
    o_stride_b,
    o_stride_h,
    o_stride_n,
    group,  # query heads per key head
    len_q,
    len_k,
    scale_log2,  # scale * log2(e)
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # B_r
    BLOCK_K: tl.constexpr,  # B_c
    HEAD_DIM: tl.constexpr,
):
    # BEGIN SOLUTION(triton): find this program's block of queries and head from tl.program_id; load Q_i once; visit
    #: the blocks of keys that every row sees in full without a mask, then the others that some row sees with one;
    #: divide O_i, and store o and lse for the rows that exist
    # Programs start in the order of their ids, axis 0 fastest. Without a mask, neighbours share a head, so its K and V
    # stay in the L2 cache. With one, the last queries see the most keys: the longest programs of all heads start first.
    batch = tl.program_id(2)
    if CAUSAL:
        head = tl.program_id(0)
        heads_q = tl.num_programs(0)
        block = tl.num_programs(1) - 1 - tl.program_id(1)
    else:
        head = tl.program_id(1)
        heads_q = tl.num_programs(1)
        block = tl.program_id(0)
    q_start = block * BLOCK_Q
    rows = q_start + tl.arange(0, BLOCK_Q)

    # How many keys all rows of the block see, and how many any of them does.
    if CAUSAL:
        last_key = tl.minimum(rows + len_k - len_q, len_k - 1)
        seen_by_first = tl.minimum(tl.maximum(q_start + 1 + len_k - len_q, 0), len_k)
        seen_by_last = tl.minimum(tl.maximum(q_start + BLOCK_Q + len_k - len_q, 0), len_k)
    else:
        last_key = tl.full([BLOCK_Q], len_k - 1, tl.int32)
        seen_by_first = len_k
        seen_by_last = len_k
    unmasked = seen_by_first // BLOCK_K * BLOCK_K

    Q_i = q_desc.load([batch, head, q_start, 0]).reshape(BLOCK_Q, HEAD_DIM)
    O_i = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    m_i = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    O_i, l_i, m_i = visit_blocks(
        O_i, l_i, m_i, Q_i, k_desc, v_desc, batch, head // group, 0, unmasked, last_key, scale_log2,
        False, BLOCK_K, HEAD_DIM,
    )  # fmt: skip
    O_i, l_i, m_i = visit_blocks(
        O_i, l_i, m_i, Q_i, k_desc, v_desc, batch, head // group, unmasked, seen_by_last, last_key, scale_log2,
        True, BLOCK_K, HEAD_DIM,
    )  # fmt: skip

    l_or_1 = tl.where(l_i == 0.0, 1.0, l_i)
    O_i = O_i / l_or_1[:, None]
    lse = (m_i + tl.log2(l_or_1)) * LN_2  # m_i = -inf for a row without keys

    # 64-bit: offsets of large tensors do not fit in 32 bits.
    o_ptr += batch.to(tl.int64) * o_stride_b + head.to(tl.int64) * o_stride_h
    o_ptrs = o_ptr + rows[:, None].to(tl.int64) * o_stride_n + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(o_ptrs, O_i.to(o_ptr.dtype.element_ty), mask=rows[:, None] < len_q)
    lse_ptr += (batch.to(tl.int64) * heads_q + head) * len_q
    tl.store(lse_ptr + rows, lse, mask=rows < len_q)
    # END SOLUTION


def launch_grid(batch: int, heads_q: int, len_q: int, block_q: int, causal: bool) -> tuple[int, ...]:
    """How many programs to launch along each axis of tl.program_id (up to three); axis 0 counts up fastest."""
    # BEGIN SOLUTION: return the number of programs along each axis: one per block of queries, query head and batch
    #: element. If causal, which axis should count fastest, so that the programs with the most keys start first?
    blocks = triton.cdiv(len_q, block_q)
    return (heads_q, blocks, batch) if causal else (blocks, heads_q, batch)
    # END SOLUTION


def descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """A descriptor of x (B, H, N, d) for tiles of `block` rows of one head.

    The copy engine wants the base address and all strides but the last to be multiples of 16 bytes, and no stride of 0:
    a tensor that is not laid out like this is copied first.
    """
    bytes_ok = x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    if not bytes_ok or x.stride(-1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[-1]])


def config_for(head_dim: int, device: torch.device) -> Config:
    """Block sizes and warps: the best that were measured on an H200, or small ones that fit any GPU."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        return OTHER_GPUS[head_dim]
    return HOPPER[head_dim]


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention (o, lse) by `fa2_kernel`. q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d).

    float16 or bfloat16, d in HEAD_DIMS; on a GPU, or on the CPU in Triton's interpreter. o has q's shape and dtype,
    lse (B, H_q, N_q) is float32. Raises ValueError for anything else.
    """
    dtypes = (torch.float16, torch.bfloat16)
    scale = check_attention_inputs(
        q, k, v, causal=causal, scale=scale, dtypes=dtypes, head_dims=HEAD_DIMS, devices=DEVICES
    )
    batch, heads_q, len_q, head_dim = q.shape
    heads_kv, len_k = k.shape[1:3]
    o = torch.empty_like(q)
    lse = torch.empty(batch, heads_q, len_q, dtype=torch.float32, device=q.device)
    if len_k == 0:  # a descriptor cannot describe an empty tensor
        return o.zero_(), lse.fill_(-torch.inf)
    config = config_for(head_dim, q.device)
    with on_device_of(q):
        fa2_kernel[launch_grid(batch, heads_q, len_q, config.block_q, causal)](
            descriptor(q, config.block_q),
            descriptor(k, config.block_k),
            descriptor(v, config.block_k),
            o,
            lse,
            *o.stride()[:3],
            heads_q // heads_kv,
            len_q,
            len_k,
            scale * LOG2_E,
            CAUSAL=causal,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            HEAD_DIM=head_dim,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return o, lse
