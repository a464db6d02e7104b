"""Refuse bad input before any work is done, in words that say what to change."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fa_reference.gold import default_scale

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check_tensor(name: str, tensor: Tensor, q: Tensor, dtypes: Sequence[torch.dtype], devices: Sequence[str]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; allowed: a torch.Tensor")
    shape = tuple(tensor.shape)
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {shape}, rank {tensor.dim()}; allowed: (batch, heads, len, head_dim)")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {allowed}")
    if tensor.dtype != q.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype} but q has {q.dtype}; allowed: one dtype for q, k and v")
    if tensor.device.type not in devices:
        raise ValueError(f"{name} is on device {tensor.device}; allowed: {' or '.join(devices)}")
    if tensor.device != q.device:
        raise ValueError(f"{name} is on device {tensor.device} but q is on {q.device}; allowed: one device for all")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} has requires_grad=True; allowed: tensors without gradients, as there is no backward pass "
            f"(use {name}.detach() or torch.no_grad())"
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(f"{name} has strides {tensor.stride()}; allowed: a contiguous last dimension (stride 1)")


def check_attention_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    head_dims: Sequence[int] | None = None,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> float:
    """Check the arguments of a `forward` and return the scale as a number.

    q (B, H_q, N_q, d); k, v (B, H_kv, N_k, d). Raises ValueError naming the argument, its value and what is allowed:
    for a wrong rank, shape, dtype, device, stride, head_dim, a zero size (only N_k may be 0), requires_grad, or a
    scale or causal of the wrong kind.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor, q, dtypes, devices)
    batch, heads_q, len_q, head_dim = q.shape
    for name, size in (("batch", batch), ("heads_q", heads_q), ("len_q", len_q), ("head_dim", head_dim)):
        if size == 0:
            raise ValueError(f"q has {name} = 0 in its shape {tuple(q.shape)}; allowed: at least 1")
    if head_dims is not None and head_dim not in head_dims:
        raise ValueError(f"q has head_dim = {head_dim}; allowed: {' or '.join(map(str, head_dims))}")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {tuple(v.shape)} but k has {tuple(k.shape)}; allowed: the same shape")
    if k.shape[0] != batch:
        raise ValueError(f"k has batch {k.shape[0]} but q has {batch}; allowed: the same batch")
    if k.shape[3] != head_dim:
        raise ValueError(f"k has head_dim {k.shape[3]} but q has {head_dim}; allowed: the same head_dim")
    heads_kv = k.shape[1]
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(f"k has heads_kv = {heads_kv} for heads_q = {heads_q}; allowed: a divisor of heads_q")
    if not isinstance(causal, bool):
        raise ValueError(f"causal is {causal!r}; allowed: True or False")
    if scale is None:
        return default_scale(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale!r}; allowed: None for 1/sqrt(head_dim), or a positive finite number")
    return float(scale)
