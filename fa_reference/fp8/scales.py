"""Scales: which numbers share one, and the quantisation to e4m3 that goes with them.

e4m3 is symmetric, so a scale needs the largest magnitude alone (no minimum): scale = amax / 448, code = x / scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fa_reference.fp8 import e4m3

GRANULARITIES = ("tensor", "head", "block", "token", "channel")

# Below this a scale would be a subnormal float32, which GPUs may flush to zero, and 1 / scale could overflow.
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Quantized:
    """A tensor in e4m3 with its scales; the value meant is data * scale."""

    data: Tensor
    """(B, H, N, d), torch.float8_e4m3fn."""
    scale: Tensor
    """float32: (B, H, n) with one scale for every `rows` rows, or (B, H, d), one a channel, if rows is None."""
    rows: int | None
    """Rows that share a scale (the last group may be shorter); None: all rows, but each channel has its own."""

    @property
    def row_scale(self) -> Tensor:
        """The scale of every row, (B, H, N, 1); ValueError for channel scales."""
        if self.rows is None:
            raise ValueError("this tensor has channel scales; allowed here: tensor, head, block or token scales")
        return _spread(self.scale, self.rows, self.data.shape[2])

    def dequantized(self) -> Tensor:
        """data * scale in float32, (B, H, N, d)."""
        return self.data.float() * (self.scale[:, :, None, :] if self.rows is None else self.row_scale)


def _spread(scale: Tensor, rows: int, length: int) -> Tensor:
    return scale.repeat_interleave(rows, dim=2)[:, :, :length, None]


def check_finite(x: Tensor, name: str) -> None:
    """Raise ValueError, naming the argument and the first bad position, if x holds NaN or an infinity."""
    bad = ~x.isfinite()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} holds {x[where].item()} at position {where}; allowed: finite numbers (one NaN or infinity would "
            "spoil the scale of everything that shares it)"
        )


def safe_scale(amax: Tensor) -> Tensor:
    """amax / 448 as float32; 1 where amax is 0, so that zeros stay zeros; never below 2^-126."""
    scale = (amax.float() / e4m3.MAX).clamp(min=SMALLEST_SCALE)
    return torch.where(amax == 0, 1.0, scale)


def amax_scale(x: Tensor, granularity: str, block: int | None = None, name: str = "x") -> tuple[Tensor, int | None]:
    """(scale, rows) of x (B, H, N, d) from the largest magnitudes of whatever shares a scale.

    granularity: "tensor" one for all heads and batches; "head" one for each of B x H; "block" one for `block` rows of a
    head (B_r for Q, B_c for K and V); "token" one a row; "channel" one a column of a head. scale is (B, H, n) float32,
    or (B, H, d) for "channel"; rows counts the rows that share it (None for "channel").
    Raises ValueError for an unknown granularity, a missing or bad block, another rank, or NaN or infinity in x.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
    if x.dim() != 4 or 0 in (x.shape[0], x.shape[1], x.shape[3]):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; allowed: (batch, heads, len, head_dim), none zero but len"
        )
    if granularity == "block" and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block is {block!r}; allowed with granularity 'block': the number of rows, 1 or more")
    check_finite(x, name)
    magnitude = x.float().abs()
    batch, heads, length, head_dim = x.shape
    if length == 0:
        magnitude, length = magnitude.new_zeros(batch, heads, 1, head_dim), 1
    if granularity == "channel":
        return safe_scale(magnitude.amax(2)), None
    if granularity == "tensor":
        return safe_scale(magnitude.amax()).expand(batch, heads, 1).contiguous(), length
    rows = {"head": length, "block": block, "token": 1}[granularity]
    groups = -(-length // rows)
    padded = torch.nn.functional.pad(magnitude.amax(3), (0, groups * rows - length))
    return safe_scale(padded.reshape(batch, heads, groups, rows).amax(3)), rows


def quantize_with(x: Tensor, scale: Tensor, rows: int | None) -> Quantized:
    """Quantise x (B, H, N, d) with given scales (as `amax_scale` shapes them): round(x / scale), beyond 448 clipped."""
    spread = scale[:, :, None, :] if rows is None else _spread(scale, rows, x.shape[2])
    codes = (x.float() / spread).clamp(-e4m3.MAX, e4m3.MAX).to(torch.float8_e4m3fn)
    return Quantized(codes, scale, rows)


def quantize(x: Tensor, granularity: str, block: int | None = None, name: str = "x") -> Quantized:
    """Quantise x (B, H, N, d), any float dtype, to e4m3 with scales from its largest magnitudes (see amax_scale).

    Finite input never gives NaN: a group of zeros has scale 1. Raises ValueError as amax_scale does.
    """
    return quantize_with(x, *amax_scale(x, granularity, block, name))
