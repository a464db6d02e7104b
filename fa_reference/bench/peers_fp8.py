"""Yardsticks for FP8 attention: the official FA3's and cuDNN's e4m3 kernels, when their packages are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fa_reference.fp8.scales import Quantized

Launch = Callable[[], Tensor]


@dataclass(frozen=True)
class PeerFp8:
    """bind(q, k, v, causal) of tensors with one scale each does what must not be timed; its launch returns o."""

    name: str
    title: str
    bind: Callable[[Quantized, Quantized, Quantized, bool], Launch]


def _bind_fa3(q: Quantized, k: Quantized, v: Quantized, causal: bool) -> Launch:
    from fa3_fwd_interface import flash_attn_func

    codes = [x.data.transpose(1, 2) for x in (q, k, v)]
    heads_kv = k.data.shape[1]
    scales = [x.scale[:, :heads_kv, 0].contiguous() for x in (q, k, v)]  # one scale for the whole tensor
    names = ("q_descale", "k_descale", "v_descale")

    def launch() -> Tensor:
        out = flash_attn_func(*codes, causal=causal, **dict(zip(names, scales, strict=True)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return launch


P_SCALE = 256.0  # cuDNN is told the factor of P; this is the official FA3's, and ours at first


def _bind_cudnn(q: Quantized, k: Quantized, v: Quantized, causal: bool) -> Launch:
    try:
        return _build_cudnn(q, k, v, causal, torch.bfloat16)
    except Exception:  # cuDNN has FP8 attention with 16-bit output on Blackwell only, and says so in errors of its own
        return _build_cudnn(q, k, v, causal, torch.float8_e4m3fn)


def _build_cudnn(q: Quantized, k: Quantized, v: Quantized, causal: bool, out: torch.dtype) -> Launch:
    import cudnn

    kinds = cudnn.data_type
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=kinds.FP8_E4M3,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
    )

    def number(x: float | Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32, device=q.data.device).reshape(1, 1, 1, 1).clone()

    inputs = {name: x.data for name, x in (("q", q), ("k", k), ("v", v))}
    inputs |= {f"descale_{name}": number(x.scale.flatten()[0]) for name, x in (("q", q), ("k", k), ("v", v))}
    inputs |= {"scale_s": number(P_SCALE), "descale_s": number(1 / P_SCALE), "scale_o": number(1.0)}
    nodes = {
        name: graph.tensor(
            name=name,
            dim=list(x.shape),
            stride=list(x.stride()),
            data_type=kinds.FLOAT if x.dtype == torch.float32 else kinds.FP8_E4M3,
        )
        for name, x in inputs.items()
    }
    o_node, _, amax_s_node, amax_o_node = graph.sdpa_fp8(
        **nodes, generate_stats=False, attn_scale=q.data.shape[3] ** -0.5, use_causal_mask=causal
    )
    o = torch.empty_like(q.data, dtype=out)
    o_node.set_output(True).set_dim(list(o.shape)).set_stride(list(o.stride()))
    o_node.set_data_type(kinds.BFLOAT16 if out == torch.bfloat16 else kinds.FP8_E4M3)
    pack = {nodes[name]: x for name, x in inputs.items()} | {o_node: o}
    for node in (amax_s_node, amax_o_node):
        node.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(kinds.FLOAT)
        pack[node] = number(0.0)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=o.device)

    def launch() -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pack, workspace, handle=handle)
        return o

    return launch


def _contiguous(bind: Callable) -> Callable:
    """The same peer on (batch, heads, len, d) storage, which cuDNN likes better."""

    def bind_contiguous(q: Quantized, k: Quantized, v: Quantized, causal: bool) -> Launch:
        return bind(*(Quantized(x.data.contiguous(), x.scale, x.rows) for x in (q, k, v)), causal)

    return bind_contiguous


PEERS = (
    ("fa3_fp8", "FA3 FP8 (official)", _bind_fa3, "fa3_fwd_interface", "fa3-fwd"),
    ("cudnn_fp8", "cuDNN FP8", _bind_cudnn, "cudnn", "nvidia-cudnn-frontend"),
    ("cudnn_fp8_bhnd", "cuDNN FP8, heads outside", _contiguous(_bind_cudnn), "cudnn", "nvidia-cudnn-frontend"),
)


def fp8_peers() -> tuple[list[PeerFp8], list[dict]]:
    """(peers, absent): what this machine's packages offer; an absent peer is {"name", "title", "reason"}."""
    peers, absent = [], []
    for name, title, bind, module, package in PEERS:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            reason = f"package {package} is not usable: {type(error).__name__}: {error}".splitlines()[0]
            absent.append({"name": name, "title": title, "reason": reason})
        else:
            peers.append(PeerFp8(name, title, bind))
    return peers, absent
