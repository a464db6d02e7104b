"""FP8 attention emulated on any machine: rounded to the kernel's formats at the kernel's places.

Rounded to e4m3: Q, K and V (by the quantiser, before) and P (with its static factor 2^8). Everything else is float32:
scores, softmax, row sums, O. Scales never touch the codes again: those of Q and K are folded into the softmax scale,
V's into the output. The output is rounded to bfloat16. What is not emulated: the few last-bit differences of the GPU's
exp2 and of the order of float32 sums.
"""

import torch
from torch import Tensor

from fa_reference.fp8.online import Arithmetic, online_attention
from fa_reference.fp8.scales import Quantized
from fa_reference.validation import check_attention_inputs

KERNEL = Arithmetic()
"""As the kernel rounds, except that the tensor core's sums are plain float32."""


def attention_fp8(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    *,
    causal: bool = False,
    scale: float | None = None,
    arithmetic: Arithmetic = KERNEL,
    v_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of quantised tensors: q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d), on any device (TF32 off).

    q and k: tensor, head, block or token scales. v: tensor, head or channel scales go into the output; block and token
    scales change along the keys that P V sums over, and are folded into P before it is rounded.
    v_mean (B, H_kv, d), if V was quantised without its mean over the keys, is added back to the output.
    Returns o bfloat16 (B, H_q, N_q, d) and lse float32 (B, H_q, N_q). ValueError for input the kernel would refuse.
    """
    scale = check_attention_inputs(q.data, k.data, v.data, causal=causal, scale=scale, dtypes=(torch.float8_e4m3fn,))
    group = q.data.shape[1] // k.data.shape[1]
    v_scale, p_factor = split_v_scale(v)
    o, lse = online_attention(
        q.data.float(),
        k.data.float(),
        v.data.float(),
        causal=causal,
        scale=scale,
        arithmetic=arithmetic,
        q_scale=q.row_scale,
        k_scale=k.row_scale,
        p_factor=p_factor,
    )
    o = o * v_scale.repeat_interleave(group, 1)
    if v_mean is not None:
        # The weights of a row add up to one, so the mean comes back whole, unless the row sees no key.
        back = v_mean.float()[:, :, None, :].repeat_interleave(group, 1)
        o = torch.where((lse == -torch.inf)[..., None], o, o + back)
    return o.to(torch.bfloat16), lse


def split_v_scale(v: Quantized) -> tuple[Tensor, Tensor | None]:
    """Where V's scales go: (factor of the output (B, H_kv, 1, 1 or d), factor of P (B, H_kv, N_k, 1) or None)."""
    if v.rows is None:
        return v.scale[:, :, None, :], None
    if v.scale.shape[2] == 1:
        return v.scale[:, :, :, None], None
    # Divided by the head's largest scale the factors are at most 1, so that P still fits below 448.
    largest = v.scale.amax(2)[:, :, None, None]
    return largest, v.row_scale / largest


def forward_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 128,
    block_k: int = 128,
    arithmetic: Arithmetic = KERNEL,
) -> tuple[Tensor, Tensor]:
    """The kernel's entry point, emulated: torch.float8_e4m3fn tensors and their float32 scales.

    q_scale (B, H_q) one a head, or (B, H_q, ceil(N_q / block_q)) one a block; k_scale (B, H_kv) or
    (B, H_kv, ceil(N_k / block_k)); v_scale (B, H_kv) or (B, H_kv, d). Returns as attention_fp8. Raises ValueError for
    tensors that are not quantised, and for scales of a wrong shape or dtype, or not positive and finite.
    """
    check_attention_inputs(q, k, v, causal=causal, scale=scale, dtypes=(torch.float8_e4m3fn,))
    operands = []
    for name, x, x_scale, block in (("q", q, q_scale, block_q), ("k", k, k_scale, block_k)):
        blocks = -(-x.shape[2] // block)
        check_scale(f"{name}_scale", x_scale, {x.shape[:2]: "one a head", (*x.shape[:2], blocks): f"one per {block}"})
        per_head = x_scale.dim() == 2
        rows = max(1, x.shape[2]) if per_head else block
        operands.append(Quantized(x, x_scale[:, :, None] if per_head else x_scale, rows))
    check_scale("v_scale", v_scale, {v.shape[:2]: "one a head", (*v.shape[:2], v.shape[3]): "one a channel"})
    per_head = v_scale.dim() == 2
    operands.append(Quantized(v, v_scale[:, :, None] if per_head else v_scale, v.shape[2] if per_head else None))
    return attention_fp8(*operands, causal=causal, scale=scale, arithmetic=arithmetic)


def check_scale(name: str, scale: Tensor, allowed: dict[tuple[int, ...], str], *, values: bool = True) -> None:
    """Raise ValueError unless `scale` is float32 of an allowed shape (shape -> what it means) and, with `values`, all
    positive and finite, which for a tensor on a GPU means waiting for it."""
    choices = " or ".join(f"{tuple(shape)} ({meaning})" for shape, meaning in allowed.items())
    if not isinstance(scale, Tensor):
        raise ValueError(f"{name} is a {type(scale).__name__}; allowed: a float32 tensor of shape {choices}")
    if tuple(scale.shape) not in {tuple(shape) for shape in allowed}:
        raise ValueError(f"{name} has shape {tuple(scale.shape)}; allowed: {choices}")
    if scale.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {scale.dtype}; allowed: torch.float32")
    if not values:
        return
    bad = ~((scale > 0) & scale.isfinite())
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} holds {scale[where].item()} at {where}; allowed: positive finite numbers")
