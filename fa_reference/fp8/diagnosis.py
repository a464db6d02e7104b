"""Looking into the error: whose rows carry it, where outliers sit, and what the tensor core's short sums add to it."""

import torch
from torch import Tensor

from fa_reference.fp8.attention import attention_fp8
from fa_reference.fp8.hadamard import random_signs, rotate
from fa_reference.fp8.online import Arithmetic
from fa_reference.fp8.scales import quantize
from fa_reference.fp8.schemes import PLAIN, ROTATION, attend
from fa_reference.gold import gold_attention

OUTLIER = 5.0
"""A draw of N(0, 1) is beyond this once in 1.7 million: in the paper's distribution such an entry is an outlier."""


def concentration(q: Tensor, k: Tensor, v: Tensor, seed: int = 0) -> dict[str, float]:
    """How much of the squared error sits in rows whose favourite key has an outlier in a channel where q has one too.

    q (1, 1, N_q, d), k, v (1, 1, N_k, d). Returns "rows", the fraction of such rows, and for one scale per tensor and
    for the rotation the share of the squared error in them and in the worst 1 % of all rows.
    """
    gold, _ = gold_attention(q, k, v)
    favourite = (q @ k.mT).argmax(-1)[0, 0]
    meeting = ((q[0, 0].abs() > OUTLIER) & (k[0, 0, favourite].abs() > OUTLIER)).any(-1)
    found = {"rows": float(meeting.double().mean())}
    for scheme in (PLAIN, ROTATION):
        o, _ = attend(scheme, q, k, v, seed=seed)
        squares = (o.double() - gold).square().sum(-1)[0, 0]
        worst = squares.sort(descending=True).values[: max(1, squares.numel() // 100)]
        found[f"{scheme.name}: share of rows where outliers meet"] = float(squares[meeting].sum() / squares.sum())
        found[f"{scheme.name}: share of the worst 1 %"] = float(worst.sum() / squares.sum())
    return found


def outliers(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, dict[str, float]]:
    """Largest magnitude over root mean square, before and after the rotation, of each named tensor (B, H, N, d)."""
    found = {}
    for name, x in tensors.items():
        turned = rotate(x, random_signs(x.shape[-1], seed))
        found[name] = {
            label: float(t.abs().max() / t.square().mean().sqrt()) for label, t in (("before", x), ("after", turned))
        }
    return found


def accumulation_errors(len_k: int, len_q: int = 64, head_dim: int = 128, seed: int = 0) -> list[dict]:
    """RMSE by how P V accumulates: float32, 14 bits through all tiles, 14 bits within a tile (two-level).

    Normal q and k (as in a long context where attention is spread), v normal around 0 and around 1. The reference is
    the float32 accumulation of the same codes, so that only the accumulation differs, and float64.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 1, len_q, head_dim, generator=generator)
    k, noise = (torch.randn(1, 1, len_k, head_dim, generator=generator) for _ in range(2))
    ways = {
        "fp32": Arithmetic(),
        "14 bits": Arithmetic(qk="tensor_core", pv="tensor_core"),
        "14 bits, two-level": Arithmetic(qk="tensor_core", pv="tensor_core", two_level=True),
    }
    rows = []
    for mean in (0.0, 1.0):
        v = noise + mean
        gold, _ = gold_attention(q, k, v)
        row = {"len_k": len_k, "v_mean": mean, "output": float(gold.square().mean().sqrt())}
        for name, arithmetic in ways.items():
            codes = [quantize(x, "head") for x in (q, k, v)]
            o, _ = attention_fp8(*codes, arithmetic=arithmetic)
            row[name] = float((o.double() - gold).square().mean().sqrt())
        rows.append(row)
    return rows
