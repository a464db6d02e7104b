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
    # BEGIN SOLUTION: take sign, exponent and mantissa out of the code; (1 + mantissa / 8) 2^(exponent - 7), or mantissa
    #: 2^-9 where the exponent is 0; then NaN where all lower seven bits are set
    code = codes.to(torch.int32)
    sign = torch.where(code >= 0x80, -1.0, 1.0)
    exponent, mantissa = code >> 3 & 0xF, (code & 0x7).float()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, torch.ldexp(1 + mantissa / 8, exponent - 7))
    return torch.where(code & 0x7F == 0x7F, torch.nan, sign * value)
    # END SOLUTION


def encode_e4m3(x: Tensor) -> Tensor:
    """The e4m3 codes of float32 values, as the GPU's `cvt.rn.satfinite.e4m3x2.f32` makes them: uint8, x's shape.

    To the nearest value; exactly halfway, to the even code. Beyond 448, infinity too, to +-448. NaN becomes 0x7F. Zero
    keeps its sign, and so does a negative number that rounds to zero. Not by torch's own cast.
    """
    # BEGIN SOLUTION: round the magnitude to a multiple of 2^(exponent - 3), the exponent at least -6 (torch.round is
    #: half-to-even); the multiple and the exponent then give the code: a multiple of 16 carries into the exponent
    magnitude = x.abs().clamp(max=LARGEST)  # NaN stays NaN
    exponent = torch.frexp(magnitude.clamp(min=2.0**-6))[1] - 1
    steps = torch.round(torch.ldexp(magnitude, 3 - exponent))  # 0 .. 16, exact: only the exponent changes
    # Normal numbers have 8 .. 16 steps: 8 + mantissa. With exponent -6, 0 .. 7 are the subnormal ones.
    code = (exponent + 6) * 8 + steps.nan_to_num().to(torch.int32)
    code = code | torch.signbit(x).to(torch.int32) << 7
    return torch.where(x.isnan(), 0x7F, code).to(torch.uint8)
    # END SOLUTION


def block_scales(x: Tensor, block: int | None = None) -> Tensor:
    """One scale for every `block` rows of a head of x (B, H, N, d), the last block may be shorter: float32 (B, H, n).

    block None: one for the whole head, (B, H, 1). A scale is the largest magnitude over 448, so that this becomes 448,
    but at least SMALLEST_SCALE; a block of zeros has scale 1.
    """
    # BEGIN SOLUTION: largest magnitude of each block (pad the row maxima with zeros), over LARGEST; mind the zeros
    rows = x.float().abs().amax(3)
    length = rows.shape[2]
    block = length if block is None else block
    blocks = -(-length // block)
    padded = torch.nn.functional.pad(rows, (0, blocks * block - length))
    largest = padded.reshape(*rows.shape[:2], blocks, block).amax(3)
    return torch.where(largest == 0, 1.0, (largest / LARGEST).clamp(min=SMALLEST_SCALE))
    # END SOLUTION


def quantise(x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (B, H, N, d): x is about decode(codes) * scale of its block.

    codes uint8 (B, H, N, d), contiguous; scales as block_scales. Raises ValueError for NaN or infinity in x, which
    would spoil the scale of their whole block.
    """
    # BEGIN SOLUTION: refuse what is not finite; then encode x divided by the scale of its row's block
    if not bool(x.isfinite().all()):
        raise ValueError(f"x holds {x[~x.isfinite()][0].item()}; allowed: finite numbers")
    scales = block_scales(x, block)
    rows = x.shape[2] if block is None else block
    spread = scales.repeat_interleave(rows, dim=2)[:, :, : x.shape[2], None]
    return encode_e4m3(x.float() / spread).contiguous(), scales
    # END SOLUTION


def random_signs(head_dim: int, seed: int = 0) -> Tensor:
    """float32 (d,) of +1 and -1, the same for the same seed. Given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (head_dim,), generator=generator).float() * 2 - 1


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(d) over the last dimension by the fast transform: log2(d) rounds of sums and differences.

    d a power of two; x float32 or float64, any leading shape. H[i, j] = (-1)^(number of ones in i & j).
    Raises ValueError for another d.
    """
    # BEGIN SOLUTION: for span = 1, 2, 4, ... d / 2: replace elements a and b that lie span apart by a + b and a - b
    head_dim = x.shape[-1]
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim is {head_dim}; allowed: a power of two")
    y, span = x, 1
    while span < head_dim:
        a, b = y.reshape(*x.shape[:-1], -1, 2, span).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        span *= 2
    return y * head_dim**-0.5
    # END SOLUTION


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x D H / sqrt(d), D the diagonal matrix of `signs` (d,): a rotation, the same for Q and K. x (..., d) floats."""
    # BEGIN SOLUTION: multiply each channel with its sign, then transform
    return hadamard(x * signs)
    # END SOLUTION


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate` with the same signs."""
    # BEGIN SOLUTION: H is symmetric and H H = d, so undo the two steps in the other order
    return hadamard(x) * signs
    # END SOLUTION
