"""Matrix products as Hopper's FP8 tensor cores accumulate them, which is not float32.

Assumption, from measurements others made: one wgmma k step adds 32 exact products and the accumulator in fixed point.
All 33 terms are aligned to the largest exponent among them, bits below 2^-13 of that exponent are cut off (towards
zero), and the rest is added exactly. So an accumulator keeps 14 significant bits of float32's 24, and small terms
beside a large sum are lost. A product's exponent is the sum of its factors' exponents (before it is normalised).
Sources: Khattak and Mikaitis 2025, "Accurate models of NVIDIA tensor cores" (arXiv 2512.07004: H100, blocks of 32 made
of two interleaved sixteens, 13 fraction bits, truncation); DeepSeek-V3 report, section 3.5.2; SageAttention2.
On an H100, lse of chapter 10's kernel differs from float32 sums by what this predicts, to two digits (lesson 10).
"""

import torch
from torch import Tensor

TERMS = 32
"""Products added at once: the k of an e4m3 wgmma."""

FRACTION_BITS = 13
SMALLEST_EXPONENT = -6
"""Subnormal e4m3 numbers are aligned as if they had the exponent of the smallest normal number."""

_NEVER = -10_000
# Products held at once: 2^23 of them are 32 MB in float32.
_AT_ONCE = 2**23


def _exponents(x: Tensor, smallest: int) -> Tensor:
    """floor(log2 |x|), at least `smallest`; far below everything for 0, which takes no part in the alignment."""
    _, exponent = torch.frexp(x)
    return torch.where(x == 0, _NEVER, (exponent - 1).clamp(min=smallest))


def _truncate(x: Tensor, quantum: Tensor) -> Tensor:
    return torch.trunc(x / quantum)


def tensor_core_matmul(
    a: Tensor, b: Tensor, accumulator: Tensor | None = None, *, terms: int = TERMS, fraction_bits: int = FRACTION_BITS
) -> Tensor:
    """accumulator + a @ b as an FP8 tensor core adds it up (see above), float32.

    a (M, K) and b (K, N): float32 tensors of e4m3 values; accumulator (M, N) float32 or None for zeros. K is taken
    `terms` at a time, in order; a shorter last step is filled with zeros.
    """
    rows, depth = a.shape
    columns = b.shape[1]
    out = a.new_zeros(rows, columns) if accumulator is None else accumulator.float().clone()
    step = max(1, _AT_ONCE // max(1, columns * terms))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        for k in range(0, depth, terms):
            out[chunk] = _k_step(a[chunk, k : k + terms], b[k : k + terms], out[chunk], fraction_bits)
    return out


def _k_step(a: Tensor, b: Tensor, accumulator: Tensor, fraction_bits: int) -> Tensor:
    a_exponent, b_exponent = _exponents(a, SMALLEST_EXPONENT), _exponents(b, SMALLEST_EXPONENT)
    largest = (a_exponent[:, None, :] + b_exponent.T[None, :, :]).amax(-1)
    largest = torch.maximum(largest, _exponents(accumulator, -126))
    # Where everything is zero any quantum will do.
    quantum = torch.ldexp(torch.ones_like(accumulator), largest.clamp(min=-100) - fraction_bits)
    products = a[:, None, :] * b.T[None, :, :]  # exact: 4 x 4 significant bits
    total = _truncate(products, quantum[..., None]).sum(-1)  # integers below 2^20: exact in any order
    return (total + _truncate(accumulator, quantum)) * quantum


def matmul(a: Tensor, b: Tensor, accumulator: Tensor | None, arithmetic: str) -> Tensor:
    """accumulator + a @ b over any leading dimensions; arithmetic "fp32" or "tensor_core"."""
    if arithmetic == "fp32":
        product = a @ b
        return product if accumulator is None else accumulator + product
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*leading, *a.shape[-2:]), b.expand(*leading, *b.shape[-2:])
    out = a.new_empty(*leading, a.shape[-2], b.shape[-1])
    flat_a, flat_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    flat_out = out.view(-1, *out.shape[-2:])
    flat_acc = None if accumulator is None else accumulator.reshape(flat_out.shape)
    for i in range(flat_out.shape[0]):
        flat_out[i] = tensor_core_matmul(flat_a[i], flat_b[i], None if flat_acc is None else flat_acc[i])
    return out
