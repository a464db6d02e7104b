"""The 16-bit rows of the paper's error table, and its plain FP8 baseline, which keeps the softmax in FP16 too."""

import torch
from torch import Tensor

from fa_reference.fp8.e4m3 import MAX, round_e4m3
from fa_reference.fp8.online import Arithmetic, online_attention
from fa_reference.fp8.scales import quantize
from fa_reference.gold import default_scale, visible


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _softmax_in_fp16(s: Tensor, causal: bool) -> Tensor:
    """Softmax whose every intermediate result is rounded to FP16: s - max, exp, the sum, and the quotient."""
    s = _half(s)
    if causal:
        s = s.masked_fill(~visible(range(s.shape[-2]), *s.shape[-2:]), -torch.inf)
    e = _half(torch.exp(_half(s - s.amax(-1, keepdim=True))))
    return _half(e / _half(e.sum(-1, keepdim=True)))


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def standard_fp16(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Standard attention in FP16: matmuls accumulate in float32, every tensor in between is FP16; o float16.

    q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d), any float dtype. No row may be without keys.
    """
    q, k, v = _half(q), _half(k), _half(v)
    k, v = _grouped(q, k, v)
    # The scale goes into Q, as the official test's reference does, which keeps the scores inside FP16's range.
    s = _half(q * default_scale(q.shape[-1])) @ k.mT
    return (_softmax_in_fp16(s, causal) @ v).half()


def flash_fp16(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, version: int = 3) -> Tensor:
    """FlashAttention's arithmetic in FP16: scores, softmax and O in float32, P rounded to FP16 for P V; o float16.

    version 2: tiles of 64 keys from the first to the last; version 3: 128 keys, from the last to the first.
    """
    arithmetic = Arithmetic("fp16", p_offset=0, block_k=64 if version == 2 else 128, descending=version == 3)
    scale = default_scale(q.shape[-1])
    o, _ = online_attention(_half(q), _half(k), _half(v), causal=causal, scale=scale, arithmetic=arithmetic)
    return o.half()


def baseline_fp8(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """The paper's FP8 baseline: one scale per tensor, float32 accumulation, softmax intermediates in FP16; o float16.

    Its text does not say how P is scaled: here by 448, as P is at most 1.
    """
    q, k, v = (quantize(x, "tensor").dequantized() for x in (q, k, v))
    k, v = _grouped(q, k, v)
    p = _softmax_in_fp16(q @ k.mT * default_scale(q.shape[-1]), causal)
    return (round_e4m3(p * MAX) / MAX @ v).half()
