"""Inputs that expose bugs: lengths that fill no tile, large scores, outliers, strides, NaN around the tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LAYOUTS = ("bhnd", "bnhd", "padded")


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _large(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard deviation 6: scores of some hundreds, whose exponentials overflow float32."""
    return 6 * torch.randn(shape, generator=generator)


def _outliers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(0, 1) + N(0, 100) x Bernoulli(0.001): the error experiment of the FlashAttention-3 paper (section 4.3)."""
    spikes = torch.rand(shape, generator=generator) < 0.001
    return torch.randn(shape, generator=generator) + 10 * torch.randn(shape, generator=generator) * spikes


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": _normal,
    "large": _large,
    "outliers": _outliers,
    "shifted": _normal,
    "rising": _normal,
}


@dataclass(frozen=True)
class Case:
    """One attention problem, made the same way every time from its seed.

    kind: "normal"; "large" (scores of hundreds); "shifted" (all scores near -120: exponentials underflow unless the
    maximum is subtracted, and a running maximum that starts from 0 is wrong); "rising" (scores grow with the key
    index: the running maximum moves in every block); "outliers"; "smollm2" (real activations: 3 query heads, 1 KV
    head, d 64; the seed picks layer and position).
    layout: "bhnd" contiguous; "bnhd" a transposed view of (batch, len, heads, d); "padded" a view into a larger buffer
    full of NaN, so that reading outside the tensor poisons the result.
    """

    len_q: int = 64
    len_k: int = 64
    batch: int = 1
    heads_q: int = 1
    heads_kv: int = 1
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = False
    scale: float | None = None
    kind: str = "normal"
    layout: str = "bhnd"
    seed: int = 0

    def but(self, **changes: object) -> "Case":
        """The same case with some fields changed."""
        return replace(self, **changes)

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H_q, N_q, d), k and v (B, H_kv, N_k, d) in this case's dtype and layout on `device`.

        float8_e4m3fn: without a scale, and what is too large becomes 448, e4m3's largest number.
        """
        q, k, v = self._smollm2() if self.kind == "smollm2" else self._random()
        dtype = getattr(torch, self.dtype)
        if dtype == torch.float8_e4m3fn:  # some versions of torch make NaN of what is too large
            largest = torch.finfo(dtype).max
            q, k, v = (x.clamp(-largest, largest) for x in (q, k, v))
        return tuple(_laid_out(x.to(device=device, dtype=dtype), self.layout) for x in (q, k, v))

    def _random(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        make = KINDS[self.kind]
        q = make((self.batch, self.heads_q, self.len_q, self.head_dim), generator)
        k = make((self.batch, self.heads_kv, self.len_k, self.head_dim), generator)
        v = torch.randn(k.shape, generator=generator)
        if self.kind in ("shifted", "rising"):
            # One channel of q is constant, so that this channel of k adds a chosen amount to every score of a key.
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            q[..., 0] = 1.0
            added = torch.full((self.len_k,), -120.0) if self.kind == "shifted" else torch.linspace(0, 40, self.len_k)
            k[..., 0] = added / scale
        return q, k, v

    def _smollm2(self) -> tuple[Tensor, Tensor, Tensor]:
        from fa_reference.activations import LAYERS, load_activations

        layer = load_activations(LAYERS[self.seed % len(LAYERS)])
        heads, tokens, head_dim = layer.q.shape[1:]
        if (self.batch, self.heads_q, self.heads_kv, self.head_dim) != (1, heads, 1, head_dim):
            raise ValueError(f"{self}: real activations have batch 1, heads {heads}/1, d {head_dim}")
        longest = max(self.len_q, self.len_k)
        if longest > tokens:
            raise ValueError(f"{self}: real activations have at most {tokens} tokens")
        # The last queries against the keys up to them, as in a causal model.
        end = tokens - (self.seed * 97) % (tokens - longest + 1)
        keys = slice(end - self.len_k, end)
        return layer.q[:, :, end - self.len_q : end], layer.k[:, :, keys], layer.v[:, :, keys]

    def __str__(self) -> str:
        parts = [f"batch {self.batch}", f"heads {self.heads_q}/{self.heads_kv}", f"len_q {self.len_q}"]
        parts += [f"len_k {self.len_k}", f"d {self.head_dim}", self.dtype]
        parts += ["causal"] if self.causal else []
        parts += [f"scale {self.scale:g}"] if self.scale is not None else []
        return ", ".join([*parts, f"{self.kind} input", f"layout {self.layout}", f"seed {self.seed}"])


def _laid_out(x: Tensor, layout: str) -> Tensor:
    batch, heads, length, head_dim = x.shape
    if layout == "bhnd":
        return x.contiguous()
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        # Strides stay multiples of 16 bytes, as TMA demands.
        buffer = x.new_full((batch + 1, heads + 1, length + 16, head_dim + 8), torch.nan)
        view = buffer[:batch, :heads, 8 : 8 + length, :head_dim]
        view.copy_(x)
        return view
    raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
