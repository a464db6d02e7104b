"""How long things take on one SM: rates and latencies of the model, measured on an H100.

`fa_reference.hopper.calibrate` measured them with small kernels of their own (cuda/micro), none on the attention
kernels that the model predicts. Every value names the entries of that record from which it is computed, or says that
it is assumed.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import reduce

from fa_reference.course import ROOT

RECORD = ROOT / "results" / "calibration_h100-80gb-hbm3.json"
_RECORDED = json.loads(RECORD.read_text())
CALIBRATED = True
SMS = 132
CLOCK_GHZ = 1.83  # the clock at which an H100's data-sheet rates hold: 989 TFLOP/s = 132 SMs x 4096 FLOP x 1.83 GHz
# Share of the time for which the tensor cores were busy while something else was measured beside them: batches of 512
# clocks, each waited for.
_BUSY = 512 / _RECORDED["wgmma"]["ss_n128"]["batch"]["8"]["done"]


def _value(default: float, source: str) -> float:
    return field(default=default, metadata={"source": source})


def _measured(what: str, compute: Callable[..., float], *entries: str) -> float:
    """A value computed from entries of the record, such as "units.exp2.latency"."""
    numbers = [reduce(lambda found, key: found[key], entry.split("."), _RECORDED) for entry in entries]
    device, date = _RECORDED["provenance"]["device"], _RECORDED["provenance"]["date"][:10]
    return _value(round(compute(*numbers), 3), f"{what}; {device}, {date}: {', '.join(entries)}")


def _beside(unit: str, what: str) -> float:
    """By how much a warp's instructions of one kind slow down while the tensor cores are busy all the time."""
    entries = (f"units.{unit}.clocks_beside_SS", f"units.{unit}.clocks_by_warps.1")
    return _measured(what, lambda beside, alone: 1 + (beside / alone - 1) / _BUSY, *entries)


@dataclass(frozen=True)
class Timing:
    """Rates in units per clock of one SM, latencies in clocks. Change one with `dataclasses.replace`.

    >>> replace(Timing(), exp_per_clk=32, exp_sum=4.5)        # what if the exponential unit were twice as fast?
    """

    tensor_flop_per_clk: float = _measured(
        "m64n128k16 from shared memory", lambda clocks: 2 * 64 * 128 * 16 / clocks, "wgmma.ss_n128.clocks"
    )
    fp8_factor: float = _measured(
        "m64n128k32 against m64n128k16", lambda a, b: 2 * a / b, "wgmma.ss_n128.clocks", "wgmma.fp8_ss_n128.clocks"
    )
    wgmma_latency: float = _measured(
        "eight wgmmas of 64 clocks, alone, until wait_group returns",
        lambda done, clocks: done - 8 * clocks,
        "wgmma.ss_n128.batch.8.done",
        "wgmma.ss_n128.clocks",
    )
    wgmma_issue: float = _measured(
        "clocks to issue one wgmma, once the tensor cores take it", lambda x: x / 8, "wgmma.ss_n128.batch.8.issued"
    )
    wgmma_issue_registers: float = _measured(
        "the same with A in registers", lambda x: x / 8, "wgmma.rs_n128.batch.8.issued"
    )
    exp_per_clk: float = _measured("ex2, four warps a sub-core", lambda x: 128 / x, "units.exp2.clocks_by_warps.4")
    exp_sum: float = _measured(
        "clocks from one exponential of a warp to its next, when it scales the argument and adds the result up",
        lambda x: x,
        "units.exp2_sum.clocks_by_warps.1",
    )
    fp32_per_clk: float = _measured("fma, four warps a sub-core", lambda x: 128 / x, "units.fma.clocks_by_warps.4")
    alu_per_clk: float = _measured("max, four warps a sub-core", lambda x: 128 / x, "units.max.clocks_by_warps.4")
    convert_per_clk: float = _measured(
        "conversions, two by an instruction, four warps a sub-core",
        lambda x: 2 * 128 / x,
        "units.to_bf16.clocks_by_warps.4",
    )
    convert_e4m3: float = _measured(
        "conversions to e4m3: times as long as to bf16, four warps a sub-core",
        lambda a, b: a / b,
        "units.to_e4m3.clocks_by_warps.4",
        "units.to_bf16.clocks_by_warps.4",
    )
    exp_beside: float = _beside("exp2", "times as long while the tensor cores are busy: ex2")
    exp_sum_beside: float = _beside("exp2_sum", "the same for ex2 with scaling and adding up")
    fp32_beside: float = _beside("fma", "the same for fma")
    alu_beside: float = _beside("max", "the same for max, select and conversions")
    lost_together: float = _value(
        0.4,
        "share lost while another warpgroup calculates too (with n of them, this over n), besides waiting for units: "
        "set so that two and three softmax steps at once take what was measured (fa_reference.hopper.together)",
    )
    lost_beside: float = _value(
        0.5, "the same while the tensor cores are busy: set on two softmax steps at once beside Q K^T and beside P V"
    )
    smem_bytes_per_clk: float = _value(128, "32 banks of 4 bytes")
    l2_bytes_per_clk: float = _measured(
        "128 x 128 tiles, all SMs loading the same ones", lambda x: x, "tma.L2.bytes_per_clk_all_sms_same_rows"
    )
    hbm_bytes_per_clk: float = _measured(
        "the same, all SMs loading different ones from HBM", lambda x: x, "tma.HBM.bytes_per_clk_all_sms_apart"
    )
    tma_l2_latency: float = _measured(
        "a load of 2 KB from L2, less its bytes",
        lambda clocks, rate: clocks - 2048 / rate,
        "tma.L2.latency_2048_bytes.median",
        "tma.L2.bytes_per_clk_one_sm",
    )
    tma_hbm_latency: float = _measured(
        "a load of 2 KB from HBM, less its bytes",
        lambda clocks, rate: clocks - 2048 / rate,
        "tma.HBM.latency_2048_bytes.median",
        "tma.HBM.bytes_per_clk_one_sm",
    )
    math_latency: float = _measured("fma to an fma that needs it", lambda x: x, "units.fma.latency")
    exp_latency: float = _measured("the same for ex2", lambda x: x, "units.exp2.latency")
    quad_reduce: float = _measured(
        "maximum over the four threads of a row, less an addition",
        lambda both, add: both - add,
        "units.quad_max.latency",
        "units.add.latency",
    )
    issue: float = _value(4, "assumed: clocks that any instruction to another unit keeps its warpgroup")
    mbarrier_test: float = _measured(
        "a wait at an mbarrier whose phase is complete", lambda x: x, "barriers.mbarrier_wait_when_complete"
    )
    bar_sync_alone: float = _measured(
        "bar.sync of a warpgroup with itself", lambda x: x, "barriers.named_barrier_sync_alone"
    )
    mbarrier_latency: float = _measured(
        "from an arrival to the waiter that goes on, less the issue", lambda x: x - 4, "barriers.mbarrier_hand_over"
    )
    named_barrier_latency: float = _measured(
        "the same for bar.sync", lambda x: x - 4, "barriers.named_barrier_hand_over"
    )

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
