"""FP8 attention on the H100: right, accurate, and how fast beside the official kernels, in one command.

    python cuda/race_fp8.py [--out results] [--lengths 2048,4096,8192,16384] [--rounds 15] [--variants]

First the checks: the quantiser bit for bit against fa_reference.fp8; random shapes (debug build first) against the
emulation, and against float64 by root mean square error, which may be 1.1 times the emulation's; the error on the
paper's input and on activations of SmolLM2, where the emulation adds as the tensor core does. Then the race,
interleaved, in the paper's setting (16k tokens in all, hidden size 2048), two-level accumulation at 64k keys, and
records in results/: checks_fp8_<device>_<day>.json and forward_fp8_<device>_<day>.json.
"""

import argparse
import dataclasses
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

import fa3_forward  # noqa: E402
import fa3_forward_fp8 as fp8  # noqa: E402
import quantise_fp8  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fa_reference.activations import LAYERS, load_activations  # noqa: E402
from fa_reference.bench import record as records  # noqa: E402
from fa_reference.bench.grid import PAPER_HEAD_DIMS, PAPER_HIDDEN, PAPER_TOKENS, Cell  # noqa: E402
from fa_reference.bench.monitor import Monitor  # noqa: E402
from fa_reference.bench.peers_fp8 import fp8_peers  # noqa: E402
from fa_reference.bench.timing import (  # noqa: E402
    ROUNDS,
    SLICE_MS,
    SPIN_MS,
    Column,
    CudaClock,
    interleave,
    plan,
)
from fa_reference.fp8 import attention_fp8, kv_order, quantize, random_signs, rotate  # noqa: E402
from fa_reference.fp8.online import Arithmetic  # noqa: E402
from fa_reference.fp8.scales import Quantized  # noqa: E402
from fa_reference.gold import gold_attention  # noqa: E402
from fa_reference.inputs import KINDS, Case  # noqa: E402
from fa_reference.kernels import compiler_version  # noqa: E402

DEVICE = "cuda"
CASES = 200
DEBUG_CASES = 40  # of them, with the debug build too
LARGEST_RATIO = 1.1  # error against float64 over the emulation's
ENOUGH = 20_000  # output elements from which on a root mean square error is a steady number
LONG = 65536
POLYNOMIAL_AT = 8192  # length at which different shares of polynomial exponentials are compared
QUANTISE_AT = 2048  # and the quantiser alone: it does not depend on the length
Made = tuple[Tensor, Tensor, Tensor]


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())


# ---- checks --------------------------------------------------------------------------------------------------------
def kernel_layout(v: Tensor) -> Tensor:
    """V's codes (B, H, N, d) as the kernel takes them transposed; by torch, for comparison."""
    batch, heads, length, head_dim = v.shape
    padded = v.new_zeros(batch, heads, fp8.padded_keys(length), head_dim, dtype=torch.uint8)
    padded[:, :, :length] = v.view(torch.uint8)
    turned = padded.mT[:, :, fp8.channel_order(head_dim).to(v.device)]
    return turned[..., kv_order(padded.shape[2]).to(v.device)].contiguous().view(v.dtype)


def operands(made: quantise_fp8.QuantisedInputs) -> tuple[Quantized, Quantized, Quantized]:
    """The quantised inputs (V not transposed) for the emulation."""
    q, k = (Quantized(x, scale, quantise_fp8.BLOCK) for x, scale in ((made.q, made.q_scale), (made.k, made.k_scale)))
    return q, k, Quantized(made.v, made.v_scale[:, :, None], made.v.shape[2])


def check_quantiser() -> int:
    """Codes and scales bit for bit those of fa_reference.fp8 on the CPU; returns the number of tensors compared."""
    compared = 0
    shapes = ((1, 1, 1, 1, 1), (2, 4, 2, 300, 777), (1, 5, 1, 65, 1025))
    for head_dim, dtype, shape, rotated in itertools.product(
        quantise_fp8.HEAD_DIMS, quantise_fp8.DTYPES, shapes, (True, False)
    ):
        batch, heads_q, heads_kv, len_q, len_k = shape
        q, k, v = (
            (3 * torch.randn(batch, n, h, head_dim)).to(dtype).transpose(1, 2)
            for n, h in ((len_q, heads_q), (len_k, heads_kv), (len_k, heads_kv))
        )
        k[0, 0, :128] = 0
        k[0, 0, 64:128] = -0.0
        signs = random_signs(head_dim, len_q)
        wanted = [quantize(rotate(x, signs) if rotated else x, "block", quantise_fp8.BLOCK) for x in (q, k)]
        wanted.append(quantize(v, "head"))
        on_gpu = [x.to(DEVICE) for x in (q, k, v)]
        for transposed in (False, True):
            made = quantise_fp8.quantise(
                *on_gpu, signs=signs.to(DEVICE) if rotated else None, v_transposed=transposed, check=True
            )
            pairs = [(made.q, wanted[0].data), (made.k, wanted[1].data), (made.q_scale, wanted[0].scale)]
            pairs += [(made.k_scale, wanted[1].scale), (made.v_scale, wanted[2].scale[:, :, 0])]
            pairs += [(made.v, kernel_layout(wanted[2].data) if transposed else wanted[2].data)]
            for number, (found, right) in enumerate(pairs):
                found, right = (x.cpu().contiguous().view(torch.uint8) for x in (found, right))
                if not torch.equal(found, right):
                    different = int((found != right).sum())
                    raise AssertionError(
                        f"quantiser, d {head_dim}, {dtype}, {shape}, rotated {rotated}, transposed {transposed}: "
                        f"tensor {number} differs in {different} of {found.numel()} bytes"
                    )
                compared += 1
    return compared


def compare(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, debug: bool = False, seed: int = 0) -> dict[str, float]:
    """Both forms of the kernel against the emulation and float64, for 16-bit inputs.

    ratio: RMSE over the emulation's; difference: RMS of kernel - emulation over the RMS of the output; lse: largest
    difference over what the scores' size allows. AssertionError for NaN or a wrong set of empty rows.
    """
    rows, turned = both_forms(q, k, v, seed)
    o_emulated, lse_emulated = attention_fp8(*operands(rows), causal=causal)
    gold, _ = gold_attention(q, k, v, causal=causal)
    size = max(rms(o_emulated), 1e-30)
    emulated = max(rms(o_emulated.double() - gold), 1e-30)
    worst = {"ratio": 0.0, "difference": 0.0, "lse": 0.0, "rmse": 0.0, "emulation": emulated}
    for made in (rows, turned):
        o, lse = fp8.forward_fp8(**made.arguments(), causal=causal, debug=debug)
        seen = lse_emulated > -torch.inf
        assert bool(o.isfinite().all()) and bool((lse[seen]).isfinite().all()), "not finite"
        assert torch.equal(lse > -torch.inf, seen) and bool((o[~seen] == 0).all()), "wrong rows are empty"
        rmse = rms(o.double() - gold)
        magnitude = float(lse_emulated[seen].abs().max()) if bool(seen.any()) else 1.0
        lse_off = float((lse - lse_emulated)[seen].abs().max()) / max(1.0, magnitude) if bool(seen.any()) else 0.0
        found = {"ratio": rmse / emulated, "difference": rms(o.double() - o_emulated.double()) / size}
        found |= {"lse": lse_off, "rmse": rmse}
        worst |= {key: max(worst[key], value) for key, value in found.items()}
    return worst


def both_forms(q: Tensor, k: Tensor, v: Tensor, seed: int) -> tuple[quantise_fp8.QuantisedInputs, ...]:
    """(V as it lies, V transposed) of 16-bit inputs."""
    signs = random_signs(q.shape[3], seed).to(DEVICE)
    return tuple(quantise_fp8.quantise(q, k, v, signs=signs, v_transposed=turned) for turned in (False, True))


TENSOR_CORE = Arithmetic(qk="tensor_core", pv="tensor_core")


def error_on(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, seed: int = 0) -> dict[str, float]:
    """RMSE against float64 of the kernel and of the emulation, each with one and with two levels of sums.

    The kernel's one level is to be compared with the emulation of the tensor core's 14-bit sums, its two levels with
    float32 sums. "ratio": the largest of both, and of both forms of V.
    """
    rows, turned = both_forms(q, k, v, seed)
    gold, _ = gold_attention(q, k, v, causal=causal)

    def error(o: Tensor) -> float:
        return rms(o.double() - gold)

    found = {"output": rms(gold), "emulation, float32 sums": error(attention_fp8(*operands(rows), causal=causal)[0])}
    short = attention_fp8(*operands(rows), causal=causal, arithmetic=TENSOR_CORE)[0]
    found["emulation, 14-bit sums"] = error(short)
    found["kernel"] = max(error(fp8.forward_fp8(**made.arguments(), causal=causal)[0]) for made in (rows, turned))
    found["ratio"] = found["kernel"] / found["emulation, 14-bit sums"]
    if q.shape[3] in fp8.TWO_LEVEL_CONFIGS:
        two = fp8.forward_fp8(**turned.arguments(), causal=causal, two_level=True)[0]
        found["kernel, two levels"] = error(two)
        found["ratio"] = max(found["ratio"], found["kernel, two levels"] / found["emulation, float32 sums"])
    return found


def random_case(rng: random.Random) -> tuple[Made, bool, str]:
    """16-bit inputs of a random shape, layout and kind."""
    head_dim = rng.choice(fp8.HEAD_DIMS)
    heads_kv, group, batch = rng.choice((1, 2, 3)), rng.choice((1, 2, 4)), rng.choice((1, 2))
    len_q, len_k = (rng.choice((1, 64, 127, 128, 129, 300, 511, 777, 1024, rng.randint(1, 1500))) for _ in range(2))
    kind, causal = rng.choice(("normal", "outliers", "large", "shifted", "rising")), rng.random() < 0.5
    dtype, layout = rng.choice(("float16", "bfloat16")), rng.choice(("bhnd", "bnhd", "padded"))
    heads_q, seed = heads_kv * group, rng.randrange(2**31)
    case = Case(len_q, len_k, batch, heads_q, heads_kv, head_dim, dtype, causal, kind=kind, layout=layout, seed=seed)
    shape = f"B {batch}, heads {heads_q}/{heads_kv}, {len_q} x {len_k}, d {head_dim}"
    return case.make(DEVICE), causal, f"{shape}, {'causal' if causal else 'full'}, {kind}, {dtype}, {layout}"


def check_random(cases: int, debug_cases: int) -> dict:
    """Random cases; those with enough output count for the error against float64, all for everything else."""
    rng = random.Random(2026)
    worst: dict = {"cases": cases, "ratio": 0.0, "difference": 0.0, "lse": 0.0, "failed": []}
    for number in range(cases):
        inputs, causal, name = random_case(rng)
        for debug in (True, False) if number < debug_cases else (False,):
            try:
                found = compare(*inputs, causal=causal, debug=debug, seed=number)
            except AssertionError as error:
                worst["failed"].append(f"{name}: {error}")
                continue
            steady = inputs[0].numel() >= ENOUGH
            if found["difference"] > 0.08 or found["lse"] > 4e-3 or (steady and found["ratio"] > LARGEST_RATIO):
                worst["failed"].append(f"{name}: {found}")
            for key in ("difference", "lse") + (("ratio",) if steady else ()):
                worst[key] = max(worst[key], found[key])
    return worst


def check_inputs() -> list[dict]:
    """The two families of inputs that the error experiment uses."""
    rows = []
    for head_dim, causal, seed in itertools.product(fp8.HEAD_DIMS, (False, True), (0, 1)):
        generator = torch.Generator().manual_seed(seed)
        lengths = (1024, 4096, 4096)
        made = (KINDS["outliers"]((1, 2, n, head_dim), generator).to(DEVICE, torch.bfloat16) for n in lengths)
        name = f"paper's input, d {head_dim}, {'causal' if causal else 'full'}, seed {seed}"
        rows.append({"input": name} | error_on(*made, causal=causal, seed=seed))
    for layer in LAYERS:
        a = load_activations(layer)
        made = (x.to(DEVICE, torch.float16) for x in (a.q, a.k, a.v))
        rows.append({"input": f"SmolLM2, layer {layer}"} | error_on(*made, causal=True))
    return rows


def check_determinism() -> bool:
    """The same bits in 20 runs."""
    q, k, v = (torch.randn(2, 8, 1111, 128, device=DEVICE).bfloat16() for _ in range(3))
    made = quantise_fp8.quantise(q, k, v, signs=random_signs(128).to(DEVICE), v_transposed=False).arguments()
    first = fp8.forward_fp8(**made, causal=True)
    again = [fp8.forward_fp8(**made, causal=True) for _ in range(20)]
    return all(torch.equal(one, other) for run in again for one, other in zip(first, run, strict=True))


def two_level(clock: CudaClock) -> list[dict]:
    """Error and time of one- and two-level accumulation over 64k keys; V around 0 and around 1."""
    rows = []
    for head_dim, mean in itertools.product(fp8.TWO_LEVEL_CONFIGS, (0.0, 1.0)):
        generator = torch.Generator(DEVICE).manual_seed(head_dim)
        q, k, v = (torch.randn(1, 2, LONG, head_dim, device=DEVICE, generator=generator) for _ in range(3))
        q, k, v = q.bfloat16(), k.bfloat16(), (v + mean).bfloat16()
        made = quantise_fp8.quantise(q, k, v, signs=random_signs(head_dim).to(DEVICE))
        plain = quantise_fp8.quantise(q[:, :, :512], k, v, signs=random_signs(head_dim).to(DEVICE), v_transposed=False)
        gold, _ = gold_attention(q[:, :, :512], k, v)
        emulated, _ = attention_fp8(*operands(plain))
        row = {"head_dim": head_dim, "len_k": LONG, "v_mean": mean, "output": rms(gold)}
        row["emulation, float32 sums"] = rms(emulated.double() - gold)
        launches = {
            name: (lambda made=made, options=options: fp8.forward_fp8(**made.arguments(), **options))
            for name, options in (
                ("one level", {}),
                ("one level, the same tiles", {"config": fp8.TWO_LEVEL_CONFIGS[head_dim]}),
                ("two levels", {"two_level": True}),
            )
        }
        for name, launch in launches.items():
            row[name] = rms(launch()[0][:, :, :512].double() - gold)
        columns = [Column(name, launch, 1, SPIN_MS, 5) for name, launch in launches.items()]
        interleave(columns, clock, rounds=5)
        flops = 4 * 2 * LONG**2 * head_dim
        row["tflops"] = {c.name: flops / statistics.median(c.samples_ms) / 1e9 for c in columns}
        rows.append(row)
    return rows


# ---- race ----------------------------------------------------------------------------------------------------------
def _variants(head_dim: int, causal: bool, length: int) -> dict[str, tuple[fp8.Config, bool]]:
    """name -> (tile sizes, V comes transposed): changes of the kernel to compare with."""
    main, change = fp8.CONFIGS[head_dim, causal], dataclasses.replace
    found = {"with turns": (change(main, pingpong=True), True), "3 stages": (change(main, stages=3), True)}
    turning = fp8.TURNING_CONFIGS[head_dim, causal]
    found["V turned inside, without turns"] = change(turning, pingpong=False), False
    if head_dim < 256 and length == POLYNOMIAL_AT:
        found |= {f"polynomial {n} of 8": (change(main, polynomial=n), True) for n in range(4) if n != main.polynomial}
    return found


def builds(options: argparse.Namespace) -> list[tuple]:
    """(config, causal, v_transposed, two_level, debug) of all that will run."""
    jobs = []
    for head_dim, causal in itertools.product(fp8.HEAD_DIMS, (False, True)):
        for transposed, debug in itertools.product(
            (False, True), (False,) if options.only == "race" else (False, True)
        ):
            config = fp8.default_config(head_dim, causal=causal, v_transposed=transposed, two_level=False)
            configs = [config, *([fp8.SHORT[head_dim]] if transposed and head_dim in fp8.SHORT else [])]
            jobs += [(c, causal, transposed, False, debug) for c in configs]
        if options.variants:
            jobs += [
                (c, causal, turned, False, False) for c, turned in _variants(head_dim, causal, POLYNOMIAL_AT).values()
            ]
        if head_dim in fp8.TWO_LEVEL_CONFIGS and not causal:
            jobs += [(fp8.TWO_LEVEL_CONFIGS[head_dim], causal, True, two, False) for two in (False, True)]
    return jobs


def build(job: tuple) -> str:
    """Compile one into the cache; returns what is wrong with its code, if anything."""
    config, causal, transposed, two, debug = job
    report = fp8.compile_config(config, causal=causal, v_transposed=transposed, two_level=two, debug=debug).report
    spills = any(used.spill_store_bytes + used.spill_load_bytes for used in report.kernels.values())
    return f"{job}: {report.describe()}" if not debug and (spills or report.notes) else ""


def launches(cell: Cell, variants: bool) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str], list[dict]]:
    """(launch of every column, title of every column, absent columns); all of one shape and the same numbers."""
    shape = (cell.batch, cell.len_q, cell.heads_q, cell.head_dim)
    generator = torch.Generator(DEVICE).manual_seed(cell.len_q)
    q, k, v = (torch.randn(shape, device=DEVICE, generator=generator).bfloat16().transpose(1, 2) for _ in range(3))
    signs = random_signs(cell.head_dim).to(DEVICE)
    turned = quantise_fp8.quantise(q, k, v, signs=signs).arguments()
    rows = quantise_fp8.quantise(q, k, v, signs=signs, v_transposed=False).arguments()
    causal = cell.causal

    found = {
        "fa3_forward_fp8": (
            "this kernel, V transposed by the quantiser",
            lambda: fp8.forward_fp8(**turned, causal=causal)[0],
        ),
        "turned": ("this kernel, V turned inside", lambda: fp8.forward_fp8(**rows, causal=causal)[0]),
        "whole": ("with rotation and quantisation", lambda: fp8.forward(q, k, v, causal=causal)[0]),
        "fa3_forward": ("our BF16 kernel", lambda: fa3_forward.forward(q, k, v, causal=causal)[0]),
    }
    if variants:
        for name, (config, transposed) in _variants(cell.head_dim, causal, cell.len_q).items():
            made = turned if transposed else rows
            found[name] = name, lambda made=made, c=config: fp8.forward_fp8(**made, causal=causal, config=c)[0]
    peers, absent = fp8_peers()
    one = [quantize(x, "tensor") for x in (q, k, v)]
    one = [
        Quantized(torch.empty_like(x, dtype=y.data.dtype).copy_(y.data), y.scale, y.rows)
        for x, y in zip((q, k, v), one, strict=True)
    ]
    for peer in peers:
        try:
            found[peer.name] = peer.title, peer.bind(*one, causal)
        except Exception as error:  # a peer may refuse a shape; its reason goes into the record
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            absent.append({"name": peer.name, "title": peer.title, "reason": reason})
    if not causal and cell.len_q == QUANTISE_AT:
        found["quantise"] = "the quantiser alone", lambda: quantise_fp8.quantise(q, k, v, signs=signs)
        found["quantise, V not transposed"] = (
            "the quantiser alone, V as it lies",
            lambda: quantise_fp8.quantise(q, k, v, signs=signs, v_transposed=False),
        )
        found["quantise, not rotated"] = (
            "the quantiser without rotation",
            lambda: quantise_fp8.quantise(q, k, v, signs=None),
        )
        copies = [torch.empty_like(x) for x in (q, k, v)]
        found["copy"] = (
            "copy of Q, K, V in 16 bits",
            lambda: [to.copy_(x) for to, x in zip(copies, (q, k, v), strict=True)],
        )
    return {name: launch for name, (_, launch) in found.items()}, {n: t for n, (t, _) in found.items()}, absent


def race_cell(cell: Cell, clock: CudaClock, monitor: Monitor, rounds: int, variants: bool, rng: random.Random) -> dict:
    """Check every column against the BF16 kernel, then time all of them interleaved."""
    columns, titles, absent = launches(cell, variants)
    right = columns["fa3_forward"]().double()
    results: dict[str, dict] = {}
    racing = []
    for name, launch in columns.items():
        results[name] = {"title": titles[name]}
        if not name.startswith(("quantise", "copy")):
            off = rms(launch().double() - right) / rms(right)
            results[name]["from_bf16"] = off
            if not off < 0.15:
                results[name]["status"] = "wrong"
                continue
        racing.append(Column(name, launch, *plan(*clock.probe(launch), rounds)))
    monitor.take()
    interleave(racing, clock, rounds=rounds, rng=rng)
    samples = monitor.take()
    for column in racing:
        results[column.name] |= {"status": "ok"} | column.summary
        if not column.name.startswith(("quantise", "copy")):
            results[column.name]["tflops"] = cell.flops / results[column.name]["median_ms"] / 1e9
    clocks = {"sm_clock_mhz": [c for c, _ in samples], "power_w": [round(p, 1) for _, p in samples]}
    return cell.to_json() | {"results": results, "absent": absent} | clocks


def show(cell: Cell, done: dict) -> None:
    """One line a cell: TFLOP/s and ratio to the faster peer; microseconds for what has no FLOPs."""
    fastest = max(
        (r.get("tflops", 0) for n, r in done["results"].items() if n.startswith(("fa3_fp8", "cudnn"))), default=0
    )
    parts = []
    for name, r in done["results"].items():
        if "tflops" in r:
            parts.append(
                f"{name} {r['tflops']:.0f} ({r['tflops'] / fastest:.2f})" if fastest else f"{name} {r['tflops']:.0f}"
            )
        elif r["status"] == "ok":
            parts.append(f"{name} {r['median_ms'] * 1e3:.0f} us")
        else:
            parts.append(f"{name} WRONG {r.get('from_bf16')}")
    clock = statistics.median(done["sm_clock_mhz"] or [0])
    print(
        f"d {cell.head_dim} {'causal' if cell.causal else 'full'} {cell.len_q} [{clock:.0f} MHz]: {'; '.join(parts)}",
        flush=True,
    )


class Run:
    """A record that is saved after every step, and a line on the screen for it."""

    def __init__(self, kind: str, folder: Path, settings: dict) -> None:
        self.started = time.perf_counter()
        self.record = records.new_record(kind, settings, ["cuda/race_fp8.py", *sys.argv[1:]])
        self.record["provenance"]["compiler"] = compiler_version()
        made = self.record["provenance"]
        self.path = records.default_path(kind, made["device"], made["date"], folder=folder)
        self.failed = False

    def step(self, name: str, action: Callable[[], object], place: str = "checks") -> None:
        """Do one step and record what it returns; one that fails is recorded too and does not stop the others."""
        try:
            result = action()
        except Exception as error:
            result, self.failed = f"FAILED: {type(error).__name__}: {error}", True
        self.record.setdefault(place, {})[name] = result
        print(f"[{time.perf_counter() - self.started:.0f} s] {name}: {result}"[:2500], flush=True)
        records.save(self.record, self.path)

    def finish(self) -> None:
        """Mark the record as complete."""
        self.record["complete"] = True
        records.save(self.record, self.path)
        print(f"written to {self.path}{', something FAILED' if self.failed else ''}", flush=True)


def run_checks(options: argparse.Namespace) -> bool:
    """All checks; True if they passed."""
    run = Run("checks_fp8", options.out, {"cases": options.cases, "largest_ratio": LARGEST_RATIO})
    run.step("quantiser, tensors equal bit for bit", check_quantiser)
    run.step("same bits in 20 runs", check_determinism)
    run.step("random cases", lambda: check_random(options.cases, min(DEBUG_CASES, options.cases)))
    run.step("error", check_inputs)
    cases, errors = run.record["checks"]["random cases"], run.record["checks"]["error"]
    run.failed |= isinstance(cases, dict) and bool(cases["failed"])
    run.failed |= isinstance(errors, list) and any(row["ratio"] > LARGEST_RATIO for row in errors)
    run.finish()
    return not run.failed


def run_race(options: argparse.Namespace) -> bool:
    """The race and two-level accumulation; True if every cell was timed."""
    monitor = Monitor()
    clock = CudaClock(monitor)
    settings = {"rounds": options.rounds, "slice_ms": SLICE_MS, "spin_ms": SPIN_MS, "layout": "bnhd"}
    run = Run("forward_fp8", options.out, settings | {"monitor": monitor.source})
    rng = random.Random(1)
    lengths = [int(n) for n in options.lengths.split(",")]
    for head_dim, causal, n in itertools.product(PAPER_HEAD_DIMS, (False, True), lengths):
        heads = PAPER_HIDDEN // head_dim
        cell = Cell("paper", PAPER_TOKENS // n, heads, heads, n, n, head_dim, causal, dtype="e4m3")
        try:
            done = race_cell(cell, clock, monitor, options.rounds, options.variants, rng)
        except Exception as error:
            run.failed = True
            print(f"{cell.name} FAILED: {type(error).__name__}: {error}", flush=True)
            continue
        run.record["cells"].append(done)
        run.record["absent"] = done["absent"]
        records.save(run.record, run.path)
        show(cell, done)
        torch.cuda.empty_cache()
    run.step("two-level accumulation", lambda: two_level(clock), "accumulation")
    run.finish()
    return not run.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the records")
    parser.add_argument("--only", choices=("checks", "race"), help="one of the two parts")
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cases", type=int, default=CASES, help="random cases")
    parser.add_argument("--variants", action="store_true", help="race changes of the kernel too")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    with ThreadPoolExecutor(16) as pool:
        for remark in pool.map(build, builds(options)):
            print(remark, end="\n" if remark else "")
    with torch.no_grad():
        passed = [
            part(options) for name, part in (("checks", run_checks), ("race", run_race)) if options.only in (None, name)
        ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
