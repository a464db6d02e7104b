"""How long things take on one SM: rates and latencies of the model.

NOT CALIBRATED YET: data-sheet or assumed values. Rates are what the hardware can do at best; latencies marked
"assumed" have the right order of magnitude and no measurement behind them.
"""

import random
from dataclasses import dataclass, field, fields

CALIBRATED = False
SMS = 132
CLOCK_GHZ = 1.83  # the clock at which an H100's data-sheet rates hold: 989 TFLOP/s = 132 SMs x 4096 FLOP x 1.83 GHz


def _value(default: float, source: str) -> float:
    return field(default=default, metadata={"source": source})


@dataclass(frozen=True)
class Timing:
    """Rates in units per clock of one SM, latencies in clocks. Change one with `dataclasses.replace`.

    >>> replace(Timing(), exp_per_clk=32)        # what if the exponential unit were twice as fast?
    """

    tensor_flop_per_clk: float = _value(4096, "H100 data sheet: 989 TFLOP/s dense fp16 / (132 SMs x 1.83 GHz)")
    fp8_factor: float = _value(2, "H100 data sheet: 1979 TFLOP/s dense fp8")
    exp_per_clk: float = _value(16, "CUDA programming guide, instruction throughput, cc 9.0: special functions")
    fp32_per_clk: float = _value(128, "CUDA programming guide, instruction throughput, cc 9.0: fp32 add, multiply, fma")
    convert_per_clk: float = _value(64, "CUDA programming guide, instruction throughput, cc 9.0: type conversions")
    smem_bytes_per_clk: float = _value(128, "32 banks of 4 bytes")
    l2_bytes_per_clk: float = _value(50, "12 TB/s (FlashAttention-3 paper, table of memories) / (132 SMs x 1.83 GHz)")
    hbm_bytes_per_clk: float = _value(
        13.9, "H100 data sheet: 3.35 TB/s / (132 SMs x 1.83 GHz), all SMs loading at once"
    )
    tma_l2_latency: float = _value(600, "assumed: from the TMA instruction to the last bytes in shared memory, L2 hit")
    tma_hbm_latency: float = _value(1000, "assumed: the same from HBM")
    wgmma_latency: float = _value(32, "assumed: from the last product of a wgmma to the end of wait_group")
    rs_wgmma_hold: float = _value(0, "assumed: share of a wgmma with A in registers that keeps its issuer from issuing")
    math_latency: float = _value(6, "assumed: from an FP32 instruction to one that needs its result")
    quad_reduce: float = _value(60, "assumed: two shuffles and two maxima across the four threads that share a row")
    issue: float = _value(4, "assumed: clocks that any instruction to another unit keeps its warpgroup")
    mbarrier_latency: float = _value(20, "assumed: from the last arrival to the waiter that goes on")
    named_barrier_latency: float = _value(20, "assumed: the same for bar.sync")

    def seconds(self, cycles: float) -> float:
        """Cycles at the data sheet's clock."""
        return cycles / (CLOCK_GHZ * 1e9)

    def sources(self) -> dict[str, tuple[float, str]]:
        """Every value with where it comes from."""
        return {f.name: (getattr(self, f.name), f.metadata["source"]) for f in fields(self)}


class Luck:
    """Multiplies durations by random factors, the same ones for the same seed; seed None leaves them alone.

    Hardware promises an order only where a barrier makes one. A schedule that is right by luck of timing meets, under
    some seed, a load that takes eight times as long or a warpgroup that starts late.
    """

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else random.Random(seed)

    def vary(self, clocks: float) -> float:
        """`clocks` times something between 1/8 and 8, evenly on a logarithmic scale."""
        return clocks if self._random is None else clocks * 2 ** self._random.uniform(-3, 3)

    def delay(self) -> float:
        """Clocks by which a warpgroup starts late: 0 to 2000."""
        return 0.0 if self._random is None else self._random.uniform(0, 2000)

    def order(self) -> float:
        """A tie-breaker for events of the same cycle."""
        return 0.0 if self._random is None else self._random.random()
