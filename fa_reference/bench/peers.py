"""Yardsticks: attention written as three torch calls, torch's backends, and the official kernels when installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fa_reference.bench.contenders import Bind, Contender, Output
from fa_reference.gold import visible

HALF = ("float16", "bfloat16")


def expand_heads(x: Tensor, heads_q: int) -> Tensor:
    """Repeat key/value heads (B, H_kv, N, d) so that each query head has its own: (B, H_q, N, d)."""
    return x if x.shape[1] == heads_q else x.repeat_interleave(heads_q // x.shape[1], dim=1)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Matmul, softmax, matmul, each reading and writing HBM in the input's 16 bits: what FlashAttention replaces.

    The scale is folded into q, and `mask` (True = hidden) written in place, to spare passes over the N x N scores.
    """
    scores = torch.matmul(q * scale, k.transpose(-2, -1))
    if mask is not None:
        scores.masked_fill_(mask, -torch.inf)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def _bind_explicit(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[], Output], str]:
    heads_q, len_q, head_dim = q.shape[1:]
    len_k = k.shape[2]
    mask = ~visible(range(len_q), len_q, len_k, q.device) if causal else None
    note = "key/value heads expanded before timing" if k.shape[1] != heads_q else ""
    k, v = expand_heads(k, heads_q), expand_heads(v, heads_q)
    return lambda: (explicit_attention(q, k, v, mask, head_dim**-0.5), None), note


def bind_sdpa(backend: SDPBackend) -> Bind:
    """Torch's scaled_dot_product_attention with one backend; grouped heads by enable_gqa where the backend takes it."""

    def bind(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[], Output], str]:
        grouped = k.shape[1] != q.shape[1]

        def launch_with(k: Tensor, v: Tensor, gqa: bool) -> Callable[[], Output]:
            def launch() -> Output:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa), None

            return launch

        if not grouped:
            return launch_with(k, v, False), ""
        try:
            launch = launch_with(k, v, True)
            launch()
            return launch, "enable_gqa"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # "No available kernel": this backend has no grouped heads in this torch
            expanded = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
            return launch_with(*expanded, False), "key/value heads expanded before timing"

    return bind


def _bind_official(function: Callable) -> Bind:
    """flash_attn_func of the official packages: (batch, len, heads, d), grouped heads native, causal bottom-right."""

    def bind(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[], Output], str]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))

        def launch() -> Output:
            out = function(q, k, v, causal=causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2), None

        return launch, ""

    return bind


def _backend_on(backend: SDPBackend) -> str | None:
    """Why torch cannot use this backend on this GPU at all; None if it can (shown by a tiny call)."""
    q = torch.randn(1, 128, 2, 64, device="cuda", dtype=torch.float16).transpose(1, 2)
    try:
        with sdpa_kernel(backend):
            scaled_dot_product_attention(q, q, q)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


SDPA_PEERS = {
    "math": ("torch math", SDPBackend.MATH),
    "torch_fa2": ("FA2 (torch)", SDPBackend.FLASH_ATTENTION),
    "cudnn": ("cuDNN", SDPBackend.CUDNN_ATTENTION),
}
OFFICIAL_PEERS = {
    # name: (title, module, head dims, package that brings it)
    "fa3": ("FA3 (official)", ("fa3_fwd_interface", "flash_attn_interface"), "fa3-fwd"),
    "fa4": ("FA4 (official)", ("flash_attn.cute", "flash_attn.cute.interface"), "flash-attn-4"),
}
PEER_NAMES = ("explicit", *SDPA_PEERS, *OFFICIAL_PEERS)


def _official(modules: tuple[str, ...]) -> tuple[Callable | None, str]:
    reasons = []
    for module in modules:
        try:
            return importlib.import_module(module).flash_attn_func, module
        except (Exception, SystemExit) as error:
            reasons.append(f"{type(error).__name__}: {error}")
    return None, reasons[0].splitlines()[0]


def peer_contenders(names: Iterable[str] | None = None) -> tuple[list[Contender], list[dict]]:
    """(peers, absent): what this machine's GPU and packages offer; `names` restricts them (None: all).

    An absent peer is {"name", "title", "reason"}. Raises ValueError for a name that does not exist.
    """
    wanted = set(PEER_NAMES) if names is None else set(names)
    if unknown := wanted - set(PEER_NAMES):
        raise ValueError(f"peers: {', '.join(sorted(unknown))} unknown; allowed: {', '.join(PEER_NAMES)}, none")
    peers: list[Contender] = []
    absent: list[dict] = []
    if "explicit" in wanted:
        peers.append(Contender("explicit", "explicit 16-bit", "peer", _bind_explicit, HALF))
    for name, (title, backend) in SDPA_PEERS.items():
        if name in wanted:
            if reason := _backend_on(backend):
                absent.append({"name": name, "title": title, "reason": f"torch refuses it here: {reason}"})
            else:
                peers.append(Contender(name, title, "peer", bind_sdpa(backend), HALF, mask_top_left=True))
    for name, (title, modules, package) in OFFICIAL_PEERS.items():
        if name in wanted:
            function, reason = _official(modules)
            if function is None:
                absent.append({"name": name, "title": title, "reason": f"package {package} is not usable: {reason}"})
            else:
                peers.append(Contender(name, title, "peer", _bind_official(function), HALF))
    return peers, absent
