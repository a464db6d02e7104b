"""One call of one version between cudaProfilerStart and cudaProfilerStop; profile.py runs this under Nsight Compute."""

from __future__ import annotations

import sys

import torch

from fa_reference.bench.check import make_inputs
from fa_reference.bench.contenders import course_contenders
from fa_reference.bench.grid import Cell
from fa_reference.bench.peers import peer_contenders
from fa_reference.versions import VERSIONS

EVICT_BYTES = 2**29  # several times any L2


def main(name: str, shape: str, dtype: str) -> None:
    """Warm up (compile), evict L2 by reading a large buffer, then run the version once under the profiler."""
    batch, heads_q, heads_kv, len_q, len_k, head_dim, causal = (int(n) for n in shape.split(","))
    cell = Cell("profile", batch, heads_q, heads_kv, len_q, len_k, head_dim, bool(causal), dtype)
    contenders = course_contenders("cuda", [name])[0] if name in VERSIONS else peer_contenders([name])[0]
    inputs = make_inputs(cell, "cuda")
    with torch.no_grad():
        launch, _ = contenders[0].bind(*inputs, cell.causal)
        launch()
        evict = torch.ones(EVICT_BYTES // 4, device="cuda")
        torch.cuda.synchronize()
        evict.sum()  # reads, so that the lines left in L2 are clean
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        launch()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main(*sys.argv[1:])
