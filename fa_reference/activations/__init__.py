"""Queries, keys and values of a real language model, for checks on inputs that are not random numbers.

The tensors are what the attention function of SmolLM2-135M-Instruct receives (after RoPE) while the model reads the
first 2,048 tokens of "Alice's Adventures in Wonderland". How they were made: `make_activations.py`; what exactly was
used: `provenance.json`; an overview: `README.md`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch

__all__ = ["HEADS_PER_GROUP", "HEAD_DIM", "KV_GROUP", "LAYERS", "TOKENS", "Activations", "load_activations"]

LAYERS: tuple[int, ...] = (0, 7, 18, 27)
"""Layers (counted from 0, of 30) stored in the fixture. The README says why these."""

KV_GROUP = 2
"""Stored KV group (counted from 0, of 3): KV head 2 and the query heads 6, 7, 8 that share it."""

HEADS_PER_GROUP = 3
"""Query heads per KV head."""

TOKENS = 2048
HEAD_DIM = 64

FOLDER = Path(__file__).resolve().parent
NPZ_FILE = FOLDER / "activations.npz"
REBUILD = "python -m fa_reference.activations.make_activations make MODEL_FOLDER"


@dataclass(frozen=True)
class Activations:
    """One KV group of one layer: float16 tensors on the CPU, contiguous, batch size 1.

    The model attends with these under a causal mask and scale 1/sqrt(64); q and k carry RoPE already.
    """

    layer: int
    q: torch.Tensor
    """(1, 3, 2048, 64): the three query heads of the group."""
    k: torch.Tensor
    """(1, 1, 2048, 64): their key head."""
    v: torch.Tensor
    """(1, 1, 2048, 64): their value head."""


def array_name(layer: int, tensor: str) -> str:
    """Name of an array inside the .npz file, e.g. `layer07_q` (tensor is "q", "k" or "v")."""
    return f"layer{layer:02d}_{tensor}"


def array_shape(tensor: str) -> tuple[int, int, int, int]:
    """Shape (batch, heads, tokens, head_dim) of the stored tensor "q", "k" or "v"."""
    return (1, HEADS_PER_GROUP if tensor == "q" else 1, TOKENS, HEAD_DIM)


@overload
def load_activations(layer: int) -> Activations: ...
@overload
def load_activations(layer: None = None) -> dict[int, Activations]: ...
def load_activations(layer: int | None = None) -> Activations | dict[int, Activations]:
    """Load recorded q, k, v of one layer, or of all stored layers.

    Args:
        layer: one of `LAYERS`; None loads all of them.

    Returns:
        With a layer: its `Activations`, q (1, 3, 2048, 64), k and v (1, 1, 2048, 64), float16 on the CPU.
        Without: a dict from layer to `Activations`, in the order of `LAYERS`.
        Every call returns fresh tensors, so they may be changed in place.

    Raises:
        ValueError: the layer is not stored, or the file holds something else than this version expects.
        FileNotFoundError: the .npz file is missing.

    Source: SmolLM2-135M-Instruct, see `provenance.json`.
    """
    if layer is not None and layer not in LAYERS:
        allowed = ", ".join(str(stored) for stored in LAYERS)
        raise ValueError(f"layer={layer!r} is not in the fixture; allowed: {allowed}, or None for all of them")
    with _open_npz() as arrays:
        if layer is not None:
            return _read_layer(arrays, layer)
        return {stored: _read_layer(arrays, stored) for stored in LAYERS}


@contextmanager
def _open_npz() -> Iterator[np.lib.npyio.NpzFile]:
    if not NPZ_FILE.is_file():
        raise FileNotFoundError(f"{NPZ_FILE} is missing; restore it from the repository or rebuild it: {REBUILD}")
    with np.load(NPZ_FILE, allow_pickle=False) as arrays:
        yield arrays


def _read_layer(arrays: np.lib.npyio.NpzFile, layer: int) -> Activations:
    return Activations(layer, *(_read_tensor(arrays, layer, tensor) for tensor in "qkv"))


def _read_tensor(arrays: np.lib.npyio.NpzFile, layer: int, tensor: str) -> torch.Tensor:
    name, shape = array_name(layer, tensor), array_shape(tensor)
    if name not in arrays:
        raise ValueError(f"{NPZ_FILE} has no array {name}; restore the file or rebuild it: {REBUILD}")
    array = arrays[name]
    if array.shape != shape or array.dtype != np.float16:
        raise ValueError(
            f"{NPZ_FILE}: {name} is {array.dtype} {array.shape}, expected float16 {shape}; "
            f"restore the file or rebuild it: {REBUILD}"
        )
    return torch.from_numpy(array)
