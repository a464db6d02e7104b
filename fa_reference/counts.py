"""How much arithmetic and how many bytes an attention needs, counted exactly; and what a card can do."""

from dataclasses import dataclass
from math import ceil


def attention_flops(batch: int, heads_q: int, len_q: int, len_k: int, head_dim: int, causal: bool = False) -> float:
    """FLOPs of the two matmuls, 4 B H N_q N_k d, halved if causal (the convention of the FlashAttention papers)."""
    flops = 4.0 * batch * heads_q * len_q * len_k * head_dim
    return flops / 2 if causal else flops


def naive_hbm_bytes(len_q: int, len_k: int, head_dim: int, element: int = 2) -> int:
    """HBM bytes of one head computed by matmul, softmax, matmul with S and P (len_q, len_k) kept in HBM.

    Read Q, K, write S; read S, write P; read P, V, write O. `element` is the bytes of one number.
    """
    qkvo = 2 * len_q * head_dim + 2 * len_k * head_dim
    return element * (qkvo + 4 * len_q * len_k)


def fa1_hbm_bytes(len_q: int, len_k: int, head_dim: int, block_k: int, element: int = 2, accumulator: int = 4) -> int:
    """HBM bytes of one head by Algorithm 1 of the FlashAttention paper (outer loop over K/V, no mask).

    K and V are read once; in each of the ceil(N_k / B_c) outer steps Q is read, and O, l and m are read and written.
    Q, K, V have `element` bytes a number; O, l and m, which are partial results, `accumulator`. B_r does not matter.
    """
    steps = ceil(len_k / block_k)
    partial = accumulator * (len_q * head_dim + 2 * len_q)
    return element * 2 * len_k * head_dim + steps * (element * len_q * head_dim + 2 * partial)


def fa2_hbm_bytes(len_q: int, len_k: int, head_dim: int, block_q: int, element: int = 2) -> int:
    """HBM bytes of one head by FlashAttention-2's forward pass (outer loop over Q, no mask).

    Q is read and O written once, lse (4 bytes a row) written once; K and V are read in each of the ceil(N_q / B_r)
    query blocks. Reads that the L2 cache serves are counted too: this is what the algorithm asks for.
    """
    return element * (2 * len_q * head_dim + ceil(len_q / block_q) * 2 * len_k * head_dim) + 4 * len_q


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of a GPU: dense 16-bit tensor-core TFLOP/s, HBM TB/s, L2 in MB, number of SMs."""

    name: str
    tflops_16bit: float
    hbm_tb_s: float
    l2_mb: float
    sms: int

    @property
    def ridge(self) -> float:
        """FLOP per byte at which compute time equals memory time."""
        return self.tflops_16bit / self.hbm_tb_s


# NVIDIA's data sheets of the SXM5 parts (dense figures, that is without structured sparsity).
H100 = Device("H100 SXM5", tflops_16bit=989.4, hbm_tb_s=3.35, l2_mb=50, sms=132)
H200 = Device("H200 SXM5", tflops_16bit=989.4, hbm_tb_s=4.8, l2_mb=50, sms=132)


def attainable_tflops(intensity: float, device: Device) -> float:
    """Roofline (Williams et al. 2009): min(peak, intensity x bandwidth); intensity in FLOP per byte."""
    return min(device.tflops_16bit, intensity * device.hbm_tb_s)
