"""Host side of pingpong.cu: as in chapter 7."""

from pathlib import Path

from fa_reference.kernels.attention_host import AttentionKernel

BLOCK_Q = 128  # two consumer warpgroups of 64 rows
BLOCK_K, STAGES = 128, 2  # keys in a block; slots in the rings of K and V
THREADS = 384  # one producer warpgroup, two consumers


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory: Q, the two rings, and 1 KiB for the barriers."""
    return 2 * head_dim * (BLOCK_Q + 2 * STAGES * BLOCK_K) + 1024


KERNEL = AttentionKernel(
    source=Path(__file__).resolve().with_suffix(".cu"),
    barriers=("q_full", "k_full", "k_empty", "v_full", "v_empty"),  # as in the kernel's BarrierName
    block_q=BLOCK_Q,
    block_k=BLOCK_K,
    stages=STAGES,
    threads=THREADS,
    shared_bytes=shared_bytes,
)
forward, machine_code, milliseconds = KERNEL.forward, KERNEL.machine_code, KERNEL.milliseconds
