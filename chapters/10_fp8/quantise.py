"""From floats to e4m3 codes and back, by hand: the format, one scale a block of rows, and the rotation before it.

e4m3 has 1 sign bit, 4 exponent bits (bias 7) and 3 mantissa bits. Exponent 0 means subnormal: mantissa x 2^-9, no
hidden one. There is no infinity; the one NaN has all seven lower bits set (codes 0x7F and 0xFF), so that 0x7E = 448 is
the largest value. Source: Micikevicius et al. 2022, "FP8 formats for deep learning"; PTX ISA, instruction cvt.
"""

import torch
from torch import Tensor

LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126  # below it 1 / scale would overflow, and GPUs may flush the scale itself to zero


def decode_e4m3(codes: Tensor) -> Tensor:
    """The float32 values of e4m3 codes: uint8 in, any shape; NaN for 0x7F and 0xFF.

    From the bits, not by torch's own cast from float8_e4m3fn: that is what this is compared with.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "quantise.py: take sign, exponent and mantissa out of the code; (1 + mantissa / 8) 2^(exponent - 7), "
        "or mantissa 2^-9 where the exponent is 0; then NaN where all lower seven bits are set"
    )


def encode_e4m3(x: Tensor) -> Tensor:
    """The e4m3 codes of float32 values, as the GPU's `cvt.rn.satfinite.e4m3x2.f32` makes them: uint8, x's shape.

    To the nearest value; exactly halfway, to the even code. Beyond 448, infinity too, to +-448. NaN becomes 0x7F. Zero
    keeps its sign, and so does a negative number that rounds to zero. Not by torch's own cast.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "quantise.py: round the magnitude to a multiple of 2^(exponent - 3), the exponent at least -6 "
        "(torch.round is half-to-even); the multiple and the exponent then give the code: a multiple of 16 "
        "carries into the exponent"
    )


def block_scales(x: Tensor, block: int | None = None) -> Tensor:
    """One scale for every `block` rows of a head of x (B, H, N, d), the last block may be shorter: float32 (B, H, n).

    block None: one for the whole head, (B, H, 1). A scale is the largest magnitude over 448, so that this becomes 448,
    but at least SMALLEST_SCALE; a block of zeros has scale 1.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "quantise.py: largest magnitude of each block (pad the row maxima with zeros), over LARGEST; mind the zeros"
    )


def quantise(x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (B, H, N, d): x is about decode(codes) * scale of its block.

    codes uint8 (B, H, N, d), contiguous; scales as block_scales. Raises ValueError for NaN or infinity in x, which
    would spoil the scale of their whole block.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "quantise.py: refuse what is not finite; then encode x divided by the scale of its row's block"
    )


def random_signs(head_dim: int, seed: int = 0) -> Tensor:
    """float32 (d,) of +1 and -1, the same for the same seed. Given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (head_dim,), generator=generator).float() * 2 - 1


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(d) over the last dimension by the fast transform: log2(d) rounds of sums and differences.

    d a power of two; x float32 or float64, any leading shape. H[i, j] = (-1)^(number of ones in i & j).
    Raises ValueError for another d.
    """
    # TODO: replace this statement by your code.
    raise NotImplementedError(
        "quantise.py: for span = 1, 2, 4, ... d / 2: replace elements a and b that lie span apart by a + b and a - b"
    )


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x D H / sqrt(d), D the diagonal matrix of `signs` (d,): a rotation, the same for Q and K. x (..., d) floats."""
    # TODO: replace this statement by your code.
    raise NotImplementedError("quantise.py: multiply each channel with its sign, then transform")


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate` with the same signs."""
    # TODO: replace this statement by your code.
    raise NotImplementedError("quantise.py: H is symmetric and H H = d, so undo the two steps in the other order")
