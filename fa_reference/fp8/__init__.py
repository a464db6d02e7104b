"""FP8 attention in numbers: the format e4m3, scales, rotation, register layouts, an emulated kernel; on any machine."""

from fa_reference.fp8.attention import attention_fp8, forward_fp8
from fa_reference.fp8.e4m3 import decode_e4m3, encode_e4m3, round_e4m3
from fa_reference.fp8.hadamard import hadamard_transform, random_signs, rotate, unrotate
from fa_reference.fp8.layouts import kv_order, pack_p, transpose_v
from fa_reference.fp8.online import Arithmetic
from fa_reference.fp8.scales import Quantized, amax_scale, quantize, quantize_with

__all__ = [
    "Arithmetic",
    "Quantized",
    "amax_scale",
    "attention_fp8",
    "decode_e4m3",
    "encode_e4m3",
    "forward_fp8",
    "hadamard_transform",
    "kv_order",
    "pack_p",
    "quantize",
    "quantize_with",
    "random_signs",
    "rotate",
    "round_e4m3",
    "transpose_v",
    "unrotate",
]
