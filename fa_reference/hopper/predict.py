"""What the calibrated model says about the chapters' kernels, beside what an H100's clock counters measured.

    python -m fa_reference.hopper.predict            # print the tables
    python -m fa_reference.hopper.predict --write    # and write results/model_prediction_h100-80gb-hbm3.json

No value of the model was fitted to a kernel: they come from micro-measurements (timing.py). Which mechanisms the model
has was decided with the timelines and clocks of the chapters' kernels in view; the variants (variants.py) were
predicted before anybody looked at their clocks. Measured: clocks from the start of a block to its end, in the middle of
a grid that fills the GPU (median of four blocks; 64 blocks of 128 keys, not causal, bf16, in chapter 10 e4m3).
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType

import numpy as np

from fa_reference.bench.record import RESULTS, save
from fa_reference.hopper.attention import AttentionBlock
from fa_reference.hopper.kernel_clocks import KERNELS
from fa_reference.hopper.memory import FP8
from fa_reference.hopper.registers import ROWS
from fa_reference.hopper.report import Report
from fa_reference.hopper.rules import RuleBroken
from fa_reference.hopper.schedules import CHAPTERS, load_schedule
from fa_reference.hopper.sm import SM
from fa_reference.hopper.timing import RECORD, Timing
from fa_reference.hopper.variants import VARIANTS

PATH = RESULTS / RECORD.name.replace("calibration", "model_prediction")
KEY_BLOCKS, BLOCK_K = 64, 128
# Chapter 6's kernel needs few registers and little shared memory: several blocks share an SM (registers decide: 198 a
# thread at d 128, 154 at d 64).
BLOCKS_ON_SM = {(6, 64): 3, (6, 128): 2}
NAMES = {chapter: name for name, chapter in CHAPTERS.items()}


# How the measurements were used; written to the record.
USED = {
    "fitted to": "nothing below: lost_together and lost_beside to softmax steps at once (together.py), every other "
    "value to a unit by itself",
    "predictions": "kernels whose clocks and timelines were looked at while the model was made",
    "held_out": "variants whose clocks nobody looked at before the model was finished",
}


@dataclass(frozen=True)
class Prediction:
    """Clocks of one block on one SM: as the model has them and as they were measured. error: of the prediction."""

    chapter: int
    head_dim: int
    blocks_on_sm: int
    predicted: int
    measured: int
    error: float


@dataclass(frozen=True)
class HeldOut:
    """The same for a variant. remark: what the compiler made of it, if that is not what it should be."""

    name: str
    predicted: int
    measured: int
    error: float
    remark: str


@dataclass(frozen=True)
class WhatIf:
    """One line of a what-if table. clocks: for 128 keys and 128 queries; tensor, exp: how busy those units are.

    impossible: why the schedule cannot run that way (then the numbers are None).
    """

    name: str
    clocks: float | None
    tensor: float | None
    exp: float | None
    impossible: str = ""


def simulate(
    schedule: str | ModuleType,
    head_dim: int,
    *,
    key_blocks: int = KEY_BLOCKS,
    block_k: int = BLOCK_K,
    blocks: int = 1,
    timing: Timing | None = None,
    dtype: str = "float16",
    **options: int,
) -> Report:
    """Run a schedule, by its name in schedules.CHAPTERS or as a module, on zeros; `blocks` of them share the SM.

    Raises RuleBroken, such as RegistersOverBudget, if the tiles do not fit.
    """
    module = load_schedule(schedule) if isinstance(schedule, str) else schedule
    consumers, length = module.CONSUMERS, key_blocks * block_k
    sm, roles = SM(timing), {}
    for i in range(blocks):
        rows = ROWS * consumers
        output = "bfloat16" if dtype == FP8 else dtype
        block = AttentionBlock(
            Q=sm.gmem("Q", np.zeros((rows, head_dim), np.float32), dtype, level="HBM"),
            K=sm.gmem("K", np.zeros((length, head_dim), np.float32), dtype),
            V=sm.gmem("V", np.zeros((length, head_dim), np.float32), dtype),
            O=sm.gmem("O", np.zeros((rows, head_dim), np.float32), output, level="HBM"),
            L=sm.gmem("L", np.zeros((rows, 1), np.float32), "float32"),
            row=0,
            consumers=consumers,
            block_k=block_k,
            causal=False,
            scale=head_dim**-0.5,
        )
        roles |= {
            f"{name} {i}" if blocks > 1 else name: role for name, role in module.kernel(sm, block, **options).items()
        }
    return sm.run(roles)


def predictions() -> list[Prediction]:
    """All of the chapters' kernels."""
    measured, rows = json.loads(RECORD.read_text())["kernels"], []
    for chapter, head_dim in KERNELS:
        blocks, dtype = BLOCKS_ON_SM.get((chapter, head_dim), 1), FP8 if chapter == CHAPTERS["fp8"] else "float16"
        cycles = round(simulate(NAMES[chapter], head_dim, blocks=blocks, dtype=dtype).cycles)
        took = round(statistics.median(measured[f"chapter {chapter}, d {head_dim}"][f"block_of_{KEY_BLOCKS}"]))
        rows.append(Prediction(chapter, head_dim, blocks, cycles, took, round(cycles / took - 1, 4)))
    return rows


def held_out() -> list[HeldOut]:
    """All variants that were measured."""
    measured, rows = json.loads(RECORD.read_text())["variants"], []
    for variant in VARIANTS:
        found = measured.get(variant.name, {})
        if "clocks" not in found:
            continue
        sizes = {"key_blocks": variant.key_blocks, "block_k": variant.block_k, "blocks": variant.blocks_on_sm or 1}
        cycles = round(simulate(variant.schedule(), variant.head_dim, **sizes, **variant.options).cycles)
        took = round(statistics.median(found["clocks"]))
        rows.append(HeldOut(variant.name, cycles, took, round(cycles / took - 1, 4), found["remark"]))
    return rows


FASTER_EXP = {"exp_per_clk": 2 * Timing().exp_per_clk, "exp_sum": Timing().exp_sum / 2}
# name -> (schedule, head_dim, block_k, dtype, options of the schedule, changes of the timing)
WHAT_IF: dict[str, tuple[str, int, int, str, Mapping[str, int], Mapping[str, float]]] = {
    "two stages, d 128, as it is": ("two-stage", 128, 128, "float16", {}, {}),
    "one slot for K and V": ("two-stage", 128, 128, "float16", {"stages": 1}, {}),
    "three slots, blocks of 64 keys": ("two-stage", 128, 64, "float16", {"stages": 3}, {}),
    "blocks of 64 keys": ("two-stage", 128, 64, "float16", {}, {}),
    "blocks of 96 keys": ("two-stage", 128, 96, "float16", {}, {}),
    "blocks of 176 keys": ("two-stage", 128, 176, "float16", {}, {}),
    "exponential unit twice as fast": ("two-stage", 128, 128, "float16", {}, FASTER_EXP),
    "tensor cores twice as fast": (
        "two-stage",
        128,
        128,
        "float16",
        {},
        {"tensor_flop_per_clk": 2 * Timing().tensor_flop_per_clk, "smem_bytes_per_clk": 256},
    ),
    "arithmetic as fast beside wgmma as alone": (
        "two-stage",
        128,
        128,
        "float16",
        {},
        dict.fromkeys(("exp_beside", "exp_sum_beside", "fp32_beside", "alu_beside"), 1.0),
    ),
    "d 64": ("two-stage", 64, 128, "float16", {}, {}),
    "d 64, exponential unit twice as fast": ("two-stage", 64, 128, "float16", {}, FASTER_EXP),
    "d 256": ("two-stage", 256, 128, "float16", {}, {}),
    "d 256, blocks of 64 keys": ("two-stage", 256, 64, "float16", {}, {}),
    "fp8, d 128": ("fp8", 128, 128, FP8, {}, {}),
    "fp8, d 128, exponential unit twice as fast": ("fp8", 128, 128, FP8, {}, FASTER_EXP),
    "pingpong, d 128": ("pingpong", 128, 128, "float16", {}, {}),
    "warp-specialised, d 128": ("warp-specialised", 128, 128, "float16", {}, {}),
}


def what_if(names: Sequence[str] = tuple(WHAT_IF)) -> list[WhatIf]:
    """The model's answers for entries of WHAT_IF: steady state, from the difference of a long and a short block."""
    rows = []
    for name in names:
        schedule, head_dim, block_k, dtype, options, changes = WHAT_IF[name]
        timing = replace(Timing(), **changes)
        try:
            short, long = (
                simulate(
                    schedule,
                    head_dim,
                    block_k=block_k,
                    key_blocks=keys // block_k,
                    timing=timing,
                    dtype=dtype,
                    **options,
                )
                for keys in (16 * block_k, 32 * block_k)
            )
        except RuleBroken as error:
            rows.append(WhatIf(name, None, None, None, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
            continue
        clocks = long.cycles - short.cycles
        tensor, exp = ((long.busy[unit] - short.busy[unit]) / clocks for unit in ("wgmma", "exp"))
        rows.append(WhatIf(name, round(clocks / (16 * block_k) * 128), round(tensor, 3), round(exp, 3)))
    return rows


def describe(rows: Sequence[Prediction], others: Sequence[HeldOut], questions: Sequence[WhatIf]) -> str:
    """The tables as text."""
    lines = [f"{'kernel':48} measured  predicted   error   (clocks of a block; 64 x 128 keys)"]
    lines += [
        f"{f'chapter {r.chapter}, d {r.head_dim}':46} {r.measured:10,} {r.predicted:10,} {r.error:+7.1%}" for r in rows
    ]
    errors = [abs(r.error) for r in others]
    lines += ["", "held out: predicted before anybody looked"]
    lines += [f"{r.name:46} {r.measured:10,} {r.predicted:10,} {r.error:+7.1%}  {r.remark}" for r in others]
    lines += [
        f"mean of |error| {statistics.mean(errors):.1%}, within 15%: {sum(e <= 0.15 for e in errors)} of {len(errors)}"
    ]
    lines += ["", f"{'what if':44} clocks  tensor cores  exp unit   (128 queries, 128 keys; busy)"]
    for q in questions:
        numbers = q.impossible or f"{q.clocks:6,} {q.tensor:13.0%} {q.exp:9.0%}"
        lines.append(f"{q.name:44} {numbers}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The model's predictions beside the H100's clocks.")
    parser.add_argument("--write", action="store_true", help=f"also write {PATH.relative_to(RESULTS.parent)}")
    options = parser.parse_args()
    rows, others, questions = predictions(), held_out(), what_if()
    print(describe(rows, others, questions))
    if options.write:
        timing = {name: {"value": value, "source": source} for name, (value, source) in Timing().sources().items()}
        record = {
            "kind": "model_prediction",
            "measured_in": RECORD.name,
            "used": USED,
            "predictions": [asdict(row) for row in rows],
            "held_out": [asdict(row) for row in others],
            "what_if": [asdict(row) for row in questions],
            "timing": timing,
        }
        save(record, PATH)


if __name__ == "__main__":
    main()
