"""Online softmax with every rounding of an attention kernel made explicit: what FP8, FP16 and mixed kernels share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fa_reference.fp8.accumulate import matmul
from fa_reference.fp8.e4m3 import round_e4m3
from fa_reference.gold import visible

P_FORMATS = ("e4m3", "bf16", "fp16", "fp32")
ARITHMETICS = ("fp32", "tensor_core")
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Arithmetic:
    """Where and how an attention kernel rounds."""

    p_format: str = "e4m3"
    """P is rounded to this before it multiplies V."""
    p_offset: int = 8
    """P is computed as 2^p_offset exp(s - m), so in [0, 256] rather than [0, 1]: far fewer values fall below e4m3's
    smallest number 2^-9, and 448 is not reached. The division by the row sum takes the factor out again."""
    block_k: int = 128
    """Keys a tile (B_c): the running maximum, and with it P's rounding, moves once a tile."""
    descending: bool = True
    """Walk the key tiles from the last to the first, as the official kernel does."""
    qk: str = "fp32"
    pv: str = "fp32"
    """How a product accumulates: "fp32", or "tensor_core" for the FP8 tensor core's 14 bits (accumulate.py)."""
    two_level: bool = False
    """Start every tile's P V from zero and add it to O in float32, instead of accumulating through all tiles."""
    sum_rounded: bool = False
    """Sum the rounded P for the normalisation, instead of the float32 P."""

    def __post_init__(self) -> None:
        for name, allowed in (("p_format", P_FORMATS), ("qk", ARITHMETICS), ("pv", ARITHMETICS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.block_k < 1:
            raise ValueError(f"block_k is {self.block_k}; allowed: 1 or more keys a tile")


def round_p(p: Tensor, p_format: str) -> Tensor:
    """P (float32) rounded to one of P_FORMATS, as float32."""
    if p_format == "e4m3":
        return round_e4m3(p)
    return p.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[p_format]).float()


def online_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    arithmetic: Arithmetic,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    p_factor: Tensor | None = None,
    bias: Tensor | None = None,
    bias_rows: int = 1,
) -> tuple[Tensor, Tensor]:
    """(o, lse) float32 of operands that are already rounded; nothing is rounded here but P, and the sums.

    q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d): float32 holding the values of codes. q_scale (B, H_q, N_q, 1) and
    k_scale (B, H_kv, N_k, 1) are folded into the softmax scale; p_factor (B, H_kv, N_k, 1) multiplies P before it is
    rounded (the place for a V scale that changes along the keys). bias (B, H_q, ceil(N_q / bias_rows), N_k) is added to
    the scores before the softmax scale, one row of it for every bias_rows queries.
    Returns o (B, H_q, N_q, d) and lse (B, H_q, N_q), natural logarithm; o = 0 and lse = -inf for a row without keys.
    """
    batch, heads_q, len_q, head_dim = q.shape
    heads_kv, len_k = k.shape[1:3]
    grouped = (batch, heads_kv, heads_q // heads_kv, len_q)
    q = q.reshape(*grouped, head_dim)
    # The kernel multiplies once by scale log2(e) q_scale k_scale, so that exp becomes exp2 of a fused multiply-add.
    row_factor = q.new_full((1, 1, 1, len_q, 1), scale * LOG2E)
    if q_scale is not None:
        row_factor = row_factor * q_scale.reshape(*grouped, 1)

    m = q.new_full((*grouped, 1), -torch.inf)
    l = q.new_zeros(*grouped, 1)
    acc = q.new_zeros(*grouped, head_dim)
    starts = range(0, len_k, arithmetic.block_k)
    for start in reversed(starts) if arithmetic.descending else starts:
        keys = slice(start, min(start + arithmetic.block_k, len_k))
        # Causal: rows above this one see no key of the tile.
        first = max(0, start - (len_k - len_q)) if causal else 0
        rows = (..., slice(first, len_q), slice(None))
        k_tile, v_tile = k[:, :, None, keys], v[:, :, None, keys]
        s = matmul(q[rows], k_tile.mT, None, arithmetic.qk)
        factor = row_factor[..., first:, :] if q_scale is not None else row_factor[..., :1, :]
        if k_scale is not None:
            factor = factor * k_scale[:, :, None, keys].mT
        s = s * factor
        if bias is not None:
            shared = bias.reshape(*grouped[:3], *bias.shape[2:])[..., keys] * (scale * LOG2E)
            s = s + shared.repeat_interleave(bias_rows, dim=3)[:, :, :, first:len_q]
        if causal:
            seen = visible(range(first, len_q), len_q, len_k, q.device)[:, keys]
            s = s.masked_fill(~seen, -torch.inf)

        m_new = torch.maximum(m[rows], s.amax(-1, keepdim=True))
        stabiliser = m_new.nan_to_num(neginf=0.0)
        p = torch.exp2(s - (stabiliser - arithmetic.p_offset))
        alpha = torch.exp2(m[rows] - stabiliser)
        rounded = round_p(p if p_factor is None else p * p_factor[:, :, None, keys].mT, arithmetic.p_format)
        l[rows] = l[rows] * alpha + (rounded if arithmetic.sum_rounded else p).sum(-1, keepdim=True)
        rescaled = acc[rows] * alpha
        if arithmetic.two_level:
            acc[rows] = rescaled + matmul(rounded, v_tile, None, arithmetic.pv)
        else:
            acc[rows] = matmul(rounded, v_tile, rescaled, arithmetic.pv)
        m[rows] = m_new
    empty = l == 0
    o = acc / torch.where(empty, 1.0, l)
    lse = (m + torch.log2(l) - arithmetic.p_offset) / LOG2E
    lse = torch.where(empty, -torch.inf, lse)
    return o.reshape(batch, heads_q, len_q, head_dim), lse.reshape(batch, heads_q, len_q)
