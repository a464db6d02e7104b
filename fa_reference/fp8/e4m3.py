"""The number format e4m3 by hand: 1 sign bit, 4 exponent bits (bias 7), 3 mantissa bits; no infinity, one NaN per sign.

"fn" in torch's name float8_e4m3fn says finite, with NaN: the exponent 1111 counts as a number, except with mantissa
111, so the largest value is 1.75 x 2^8 = 448 and the smallest are the subnormals, multiples of 2^-9.
Source: Micikevicius et al. 2022, "FP8 formats for deep learning"; PTX ISA, instruction cvt.
"""

import torch
from torch import Tensor

MAX = 448.0
SMALLEST_NORMAL = 2.0**-6
SMALLEST = 2.0**-9
NAN_CODE = 0x7F
MAX_CODE = 0x7E


def decode_e4m3(codes: Tensor) -> Tensor:
    """The float32 values of e4m3 codes: uint8 in, float32 out, any shape.

    0x7F and 0xFF decode to NaN. Raises ValueError for another dtype.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes has dtype {codes.dtype}; allowed: torch.uint8 (a float8 tensor: .view(torch.uint8))")
    code = codes.to(torch.int32)
    sign = torch.where(code >= 0x80, -1.0, 1.0)
    exponent, mantissa = (code >> 3) & 0xF, (code & 0x7).float()
    subnormal = mantissa * SMALLEST
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    value = sign * torch.where(exponent == 0, subnormal, normal)
    return torch.where((code & 0x7F) == NAN_CODE, torch.nan, value)


def encode_e4m3(x: Tensor) -> Tensor:
    """The e4m3 codes of float32 values as `cvt.rn.satfinite.e4m3x2.f32` makes them: uint8, x's shape.

    Rounds to nearest, ties to the even code; what lies beyond 448, infinities too, becomes +-448; NaN of either sign
    becomes 0x7F. Raises ValueError unless x is float32, float16 or bfloat16 (float64 would be rounded twice).
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x has dtype {x.dtype}; allowed: torch.float32, torch.float16 or torch.bfloat16")
    bits = x.float().contiguous().view(torch.int32)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF

    # Normal numbers: of float32's 23 mantissa bits 3 stay. Adding just under half of the last kept bit, and one more if
    # that bit is odd, rounds to nearest even; a carry out of the mantissa moves into the exponent as it should.
    # The exponent's bias falls from 127 to 7. The clamp keeps the sum in 31 bits and saturates in the same step.
    bounded = magnitude.clamp(max=0x7F000000)
    rounded = (bounded + 0x7FFFF + ((bounded >> 20) & 1)) >> 20
    normal = (rounded - ((127 - 7) << 3)).clamp(max=MAX_CODE)

    # Subnormal numbers: float32 values in [2^14, 2^15) are 2^-9 apart, so that adding 2^14 lets the adder itself round
    # to a multiple of 2^-9 (and a result of 8 of them is the code of 2^-6, the smallest normal number).
    shifted = (magnitude.view(torch.float32).clamp(max=1.0) + 2.0**14).view(torch.int32)
    subnormal = shifted - torch.tensor(2.0**14).view(torch.int32).item()

    code = torch.where(magnitude < torch.tensor(SMALLEST_NORMAL).view(torch.int32).item(), subnormal, normal)
    code = torch.where(magnitude > 0x7F800000, NAN_CODE, code | sign)
    return code.to(torch.uint8)


def round_e4m3(x: Tensor) -> Tensor:
    """x rounded to e4m3, saturating, as float32: decode(encode(x)) by torch's cast, which is faster (and tested equal).

    torch versions differ in what they do beyond 448, so that x is clamped first. NaN stays NaN.
    """
    return x.float().clamp(-MAX, MAX).to(torch.float8_e4m3fn).float()
