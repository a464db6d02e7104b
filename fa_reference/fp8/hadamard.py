"""Incoherent processing: rotate queries and keys so that no channel holds all of an outlier.

With M = D H / sqrt(d), where H is the Hadamard matrix and D a diagonal of random signs, M M^T = 1, so that
(Q M)(K M)^T = Q K^T.
An outlier in one channel becomes d values of size |outlier| / sqrt(d).

Why does that help e4m3? Not because the scale shrinks: a floating-point format has the same relative error, up to 2^-4,
at any scale, which is why block scales gain so little. But a score in which an outlier of q meets one of k is one huge
product, as wrong as its two factors, and softmax picks just such scores. Rotated, it is a sum of d products, whose
errors average out. Sources: FlashAttention-3, section 3.3; Chee et al. 2023 (QuIP).
"""

import torch
from torch import Tensor


def _check_dim(head_dim: int) -> None:
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(
            f"head_dim is {head_dim}; allowed: a power of two (pad the head with zero channels, which adds nothing "
            "to any score)"
        )


def random_signs(head_dim: int, seed: int = 0) -> Tensor:
    """Random signs, one a channel: shape (d,), float32 of +1 and -1; the same for the same seed.

    Queries and keys must use the same signs. Raises ValueError if head_dim is not a power of two.
    """
    _check_dim(head_dim)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (head_dim,), generator=generator).float() * 2 - 1


def hadamard_transform(x: Tensor) -> Tensor:
    """x H / sqrt(d) over the last dimension, which must be a power of two; float32 or float64, any leading shape.

    The fast transform: log2(d) rounds of sums and differences of pairs, d log2(d) additions instead of d^2 products.
    H is symmetric and H H = d, so this is its own inverse. H is Sylvester's: H[i, j] = (-1)^popcount(i & j).
    """
    head_dim = x.shape[-1]
    _check_dim(head_dim)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x has dtype {x.dtype}; allowed: torch.float32 or torch.float64 (convert it first)")
    y = x
    span = 1
    while span < head_dim:
        pairs = y.reshape(*x.shape[:-1], head_dim // (2 * span), 2, span)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        span *= 2
    return y * head_dim**-0.5


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x D H / sqrt(d): x (..., d) in any float dtype, signs (d,); float64 stays, everything else becomes float32.

    Raises ValueError if d is not a power of two or the signs do not fit.
    """
    check_signs(x, signs)
    work = x if x.dtype == torch.float64 else x.float()
    return hadamard_transform(work * signs.to(work))


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate` with the same signs: x H D / sqrt(d)."""
    check_signs(x, signs)
    work = x if x.dtype == torch.float64 else x.float()
    return hadamard_transform(work) * signs.to(work)


def check_signs(x: Tensor, signs: Tensor) -> None:
    _check_dim(x.shape[-1])
    if tuple(signs.shape) != (x.shape[-1],):
        raise ValueError(f"signs has shape {tuple(signs.shape)}; allowed: ({x.shape[-1]},), one sign a channel of x")
    if not bool((signs.abs() == 1).all()):
        raise ValueError("signs holds a value other than +1 and -1; allowed: what random_signs returns")
