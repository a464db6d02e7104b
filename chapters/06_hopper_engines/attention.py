"""Host side of attention.cu: one warpgroup a block of threads, one tile each of K and V."""

from pathlib import Path

from fa_reference.kernels.attention_host import AttentionKernel

BLOCK_Q, BLOCK_K = 64, 128  # rows of a tile; keys in a block
THREADS = 128  # one warpgroup


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory: Q, one block of K, one of V, and 1 KiB for the barriers."""
    return 2 * head_dim * (BLOCK_Q + 2 * BLOCK_K) + 1024


KERNEL = AttentionKernel(
    source=Path(__file__).resolve().with_suffix(".cu"),
    barriers=("q_full", "k_full", "v_full"),  # as in the kernel's BarrierName
    block_q=BLOCK_Q,
    block_k=BLOCK_K,
    stages=1,
    threads=THREADS,
    shared_bytes=shared_bytes,
)
forward, machine_code, milliseconds = KERNEL.forward, KERNEL.machine_code, KERNEL.milliseconds
