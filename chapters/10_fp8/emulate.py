"""FP8 attention on any machine: everything that fp8.cu rounds is rounded here, at the same places.

Rounded to e4m3 are Q, K and V (once, by quantise.py) and P (block by block). Scores, softmax, sums and O are float32,
the output is bfloat16. Scales never touch a code: Q's and K's go into the softmax scale, V's into the output.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from fa_reference.versions import load_file

quantise = load_file(Path(__file__).resolve().with_name("quantise.py"))

BLOCK_Q = BLOCK_K = 128
OFFSET = 8.0  # P is computed as 2^8 exp(s - m)


def round_p(p: Tensor) -> Tensor:
    """P (float32) rounded to e4m3, as float32."""
    # TODO: replace this statement by your code.
    raise NotImplementedError("emulate.py: there and back")


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(o bfloat16, lse float32) of codes, as the kernel computes them: blocks of 128 keys, from the last to the first.

    q (B, Hq, Nq, d), k and v (B, Hkv, Nk, d): uint8 codes. q_scale (B, Hq, ceil(Nq / 128)), k_scale (B, Hkv, ceil(Nk /
    128)), v_scale (B, Hkv, 1). lse is the natural logarithm; a row without keys has o = 0 and lse = -inf.
    """
    batch, heads, len_q, head_dim = q.shape
    len_k, group = k.shape[2], heads // k.shape[1]
    q, k, v = (quantise.decode_e4m3(x) for x in (q, k, v))
    k, v, k_scale, v_scale = (x.repeat_interleave(group, 1) for x in (k, v, k_scale, v_scale))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    # What a raw score of each query is multiplied with, but for the keys' scale: exp becomes exp2.
    factor = scale * math.log2(math.e) * q_scale.repeat_interleave(BLOCK_Q, 2)[:, :, :len_q, None]
    m = q.new_full((batch, heads, len_q, 1), -torch.inf)  # running maximum, in units of log2
    l = q.new_zeros(batch, heads, len_q, 1)
    acc = q.new_zeros(batch, heads, len_q, head_dim)
    for block in reversed(range(math.ceil(len_k / BLOCK_K))):
        keys = slice(block * BLOCK_K, min((block + 1) * BLOCK_K, len_k))
        s = q @ k[:, :, keys].mT  # of codes
        # TODO: replace this statement by your code.
        raise NotImplementedError(
            "emulate.py: multiply s with factor and this block's k_scale; hide keys (causal: query i sees key"
            " j if j <= i + len_k - len_q); new m; P = 2^(s - m + OFFSET); alpha = 2^(m_old - m), without "
            "OFFSET; l sums P as it is, acc takes P rounded. Mind rows that see no key yet: subtract 0 "
            "instead of -inf."
        )
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "emulate.py: o = acc v_scale / l in bfloat16; lse = (m + log2(l) - OFFSET) / log2(e), and rows without keys"
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """FP8 attention of float tensors with block scales and rotation; shapes as attention_fp8. seed: of the signs."""
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "emulate.py: rotate q and k with the same random_signs; quantise q and k by blocks of 128 rows, v "
        "with one scale a head; then attention_fp8"
    )
