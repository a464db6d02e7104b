"""Ways to compute attention in FP8, each a small description that one function can run: what is compared."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fa_reference.fp8.attention import split_v_scale
from fa_reference.fp8.hadamard import random_signs, rotate, unrotate
from fa_reference.fp8.online import Arithmetic, online_attention
from fa_reference.fp8.scales import Quantized, amax_scale, quantize_with
from fa_reference.gold import default_scale

BLOCK_Q = BLOCK_K = 128


@dataclass(frozen=True)
class Scheme:
    """One way to compute attention; the defaults are the plain FP8 kernel with one scale per tensor."""

    name: str
    title: str
    cost: str = ""
    """What it costs a kernel beyond that, in words: argued, not measured here."""
    qk: str = "e4m3"
    v: str = "e4m3"
    """Format of Q and K, and of V: "e4m3", "bf16" or "fp32". P's is in `arithmetic`."""
    qk_scales: str = "tensor"
    v_scales: str = "tensor"
    """Granularity of the scales (scales.GRANULARITIES)."""
    rule: str = "amax"
    """How a scale is chosen: "amax", "mse" (clipped where that lowers the error) or "static" (from the first rows)."""
    rotate_qk: bool = False
    rotate_v: bool = False
    smooth_q: bool = False
    smooth_k: bool = False
    smooth_v: bool = False
    """Quantise without the mean over the rows. The scores of Q's mean (one of each block of rows: one vector over the
    keys) are added in float32; K's mean changes nothing but lse; V's is added back to the output."""
    arithmetic: Arithmetic = field(default_factory=lambda: Arithmetic(block_k=BLOCK_K))

    def but(self, name: str, title: str, cost: str = "", **changes: object) -> "Scheme":
        """The same scheme with some fields changed."""
        return replace(self, name=name, title=title, cost=cost, **changes)


def mse_scale(x: Tensor, granularity: str, block: int | None) -> tuple[Tensor, int | None]:
    """amax_scale, shrunk per group by the factor of a short grid that gives the smallest squared error (clipping)."""
    amax, rows = amax_scale(x, granularity, block)
    best, best_error = amax, None
    for factor in (1.0, 0.85, 0.7, 0.55, 0.4):
        scale = (amax * factor).contiguous()
        error = (quantize_with(x, scale, rows).dequantized() - x.float()).square()
        if rows is None:
            error = error.sum(2)
        else:
            groups = amax.shape[2]
            error = torch.nn.functional.pad(error.sum(3), (0, groups * rows - x.shape[2]))
            error = error.reshape(*x.shape[:2], groups, rows).sum(3)
        if granularity == "tensor":
            error = error.sum().expand_as(amax)
        if best_error is None:
            best_error = error
            continue
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best, rows


def static_scale(x: Tensor) -> tuple[Tensor, int]:
    """One scale per head, fixed beforehand: from the first eighth of the rows, as a calibration run would see them."""
    seen = x[:, :, : max(1, x.shape[2] // 8)]
    return amax_scale(seen, "head")[0], x.shape[2]


def _quantize(x: Tensor, granularity: str, block: int, rule: str) -> Quantized:
    if rule == "static":
        return quantize_with(x, *static_scale(x))
    choose = {"amax": amax_scale, "mse": mse_scale}[rule]
    return quantize_with(x, *choose(x, granularity, block))


def _block_means(q: Tensor) -> Tensor:
    """Mean of every block of BLOCK_Q rows, (B, H, ceil(N / BLOCK_Q), d)."""
    return torch.stack([block.mean(2) for block in q.split(BLOCK_Q, dim=2)], dim=2)


def attend(
    scheme: Scheme, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(o bfloat16, lse float32) of float tensors q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d) under a scheme.

    seed chooses the rotation's signs.
    """
    head_dim, group = q.shape[-1], q.shape[1] // k.shape[1]
    scale = default_scale(head_dim) if scale is None else scale
    q, k, v = q.float(), k.float(), v.float()
    signs = random_signs(head_dim, seed)

    # All scores of a query fall by the same q . mean(k), which softmax does not see, but lse does.
    k_mean = k.mean(2, keepdim=True) if scheme.smooth_k else None
    lse_shift = 0.0
    if k_mean is not None:
        k = k - k_mean
        lse_shift = scale * (q @ k_mean.repeat_interleave(group, 1).mT)[..., 0]
    bias = None
    if scheme.smooth_q:
        q_mean = _block_means(q)
        bias = q_mean @ k.repeat_interleave(group, 1).mT
        q = q - q_mean.repeat_interleave(BLOCK_Q, 2)[:, :, : q.shape[2]]
    if scheme.rotate_qk:
        q, k = rotate(q, signs), rotate(k, signs)
    v_mean = v.mean(2, keepdim=True) if scheme.smooth_v else None
    if v_mean is not None:
        v = v - v_mean
    if scheme.rotate_v:
        v = rotate(v, signs)

    q_scale = k_scale = p_factor = None
    v_scale = q.new_ones(1, 1, 1, 1)
    if scheme.qk == "e4m3":
        q8 = _quantize(q, scheme.qk_scales, BLOCK_Q, scheme.rule)
        k8 = _quantize(k, scheme.qk_scales, BLOCK_K, scheme.rule)
        q, k, q_scale, k_scale = q8.data.float(), k8.data.float(), q8.row_scale, k8.row_scale
    elif scheme.qk == "bf16":
        q, k = q.bfloat16().float(), k.bfloat16().float()
    if scheme.v == "e4m3":
        v8 = _quantize(v, scheme.v_scales, BLOCK_K, scheme.rule)
        v = v8.data.float()
        v_scale, p_factor = split_v_scale(v8)
    elif scheme.v == "bf16":
        v = v.bfloat16().float()

    folded = {"q_scale": q_scale, "k_scale": k_scale, "p_factor": p_factor, "bias": bias, "bias_rows": BLOCK_Q}
    o, lse = online_attention(q, k, v, causal=causal, scale=scale, arithmetic=scheme.arithmetic, **folded)
    o = o * (v_scale.expand(1, k.shape[1], 1, -1) if v_scale.shape[1] == 1 else v_scale).repeat_interleave(group, 1)
    if scheme.rotate_v:
        o = unrotate(o, signs)
    if v_mean is not None:
        back = v_mean.repeat_interleave(group, 1)
        o = torch.where((lse == -torch.inf)[..., None], o, o + back)
    return o.bfloat16(), lse + lse_shift


PLAIN = Scheme("tensor", "FP8, one scale per tensor")
BLOCK = PLAIN.but("block", "+ block scales", "one more factor a tile", qk_scales="block", v_scales="head")
ROTATION = PLAIN.but("rotation", "+ rotation", "rotation fused into the quantiser", rotate_qk=True)
BOTH = BLOCK.but("both", "+ block scales + rotation", "both of these", rotate_qk=True)

_HALF = "matmul time 1.5x"
_SMOOTH_Q = "one addition a score, a vector a tile"
_BF16 = Arithmetic("bf16", p_offset=0)
_BF16_QK = PLAIN.but("bf16 qk", "Q K^T in BF16, P V in FP8", _HALF, qk="bf16", v_scales="head")

ALTERNATIVES: tuple[Scheme, ...] = (
    PLAIN,
    PLAIN.but("static", "static scales (calibrated on 1/8)", "saves the pass over the data", rule="static"),
    PLAIN.but("head", "scales per head", "none", qk_scales="head", v_scales="head"),
    BLOCK,
    PLAIN.but("token", "Q, K scales per token", "one multiply a score", qk_scales="token", v_scales="head"),
    BLOCK.but("block clipped", "block scales, clipped for least error", "5 trials a block", rule="mse"),
    PLAIN.but("smooth k", "K without its mean", "a pass over K", smooth_k=True),
    ROTATION,
    BOTH,
    BOTH.but("both token", "both, Q, K scales per token", "one multiply a score", qk_scales="token"),
    BOTH.but("both clipped", "both, clipped for least error", "5 trials a block", rule="mse"),
    BOTH.but("both smooth k", "both, K without its mean", "a pass over K", smooth_k=True),
    PLAIN.but("smooth q and k", "Q, K without their means", _SMOOTH_Q, smooth_q=True, smooth_k=True),
    BOTH.but("both smooth q", "both, Q without its block means", _SMOOTH_Q, smooth_q=True),
    BOTH.but("both smooth q, k", "both, Q, K without their means", _SMOOTH_Q, smooth_q=True, smooth_k=True),
    BOTH.but("v channel", "both, V scales per channel", "d factors for O", v_scales="channel"),
    BOTH.but("v block", "both, V scales per block, in P", "one multiply a probability", v_scales="block"),
    BOTH.but("smooth v", "both, V without its mean", "a pass over V, d additions for O", smooth_v=True),
    BOTH.but("rotate v", "both, V rotated too", "O rotated back, or folded into a weight", rotate_v=True),
    BOTH.but("smooth k and v", "both, K, V without their means", "a pass over K and V", smooth_k=True, smooth_v=True),
    BOTH.but("offset 0", "both, P without the factor 2^8", "none", arithmetic=Arithmetic(p_offset=0)),
    BOTH.but("ascending", "both, keys from first to last", "none", arithmetic=Arithmetic(descending=False)),
    BOTH.but(
        "sum rounded", "both, rounded P in the row sum", "P decoded again", arithmetic=Arithmetic(sum_rounded=True)
    ),
    BOTH.but("bf16 pv", "both, P V in BF16", _HALF, v="bf16", arithmetic=_BF16),
    _BF16_QK,
    _BF16_QK.but("bf16 qk smooth v", "Q K^T in BF16, V without its mean", "1.5x, a pass over V", smooth_v=True),
    PLAIN.but("bf16", "all in BF16", "matmul time 2x", qk="bf16", v="bf16", arithmetic=_BF16),
)

# One rounding at a time, everything else in float32: where the error comes from.
_EXACT = Arithmetic("fp32")
SOURCES: tuple[Scheme, ...] = (
    PLAIN.but("only Q, K", "only Q and K in e4m3", v="fp32", arithmetic=_EXACT),
    ROTATION.but("only Q, K rotated", "only Q and K in e4m3, rotated", v="fp32", arithmetic=_EXACT),
    PLAIN.but("only Q, K token", "only Q and K in e4m3, token scales", v="fp32", qk_scales="token", arithmetic=_EXACT),
    PLAIN.but("only P", "only P in e4m3", qk="fp32", v="fp32"),
    PLAIN.but("only V", "only V in e4m3", qk="fp32", arithmetic=_EXACT),
)
