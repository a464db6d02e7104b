"""The FP8 kernels of cuda/ without a GPU: they compile cleanly, their layouts fit, bad input is refused.

Compiling says nothing about right results: those are checked on a Hopper GPU by the tests at the end, which are marked
`gpu` and reported as skipped, with the reason, where there is none.
"""

import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fa_reference.fp8 import layouts
from fa_reference.kernels import count_instructions, instructions_between, sass_instructions
from fa_reference.versions import load_file

CUDA = Path(__file__).parents[2] / "cuda"
fp8 = load_file(CUDA / "fa3_forward_fp8.py")
quantiser = load_file(CUDA / "quantise_fp8.py")

# (config, causal, V comes transposed, two levels)
VARIANTS = [(config, causal, True, False) for (_, causal), config in fp8.CONFIGS.items()]
VARIANTS += [(config, causal, True, False) for config in fp8.SHORT.values() for causal in (False, True)]
VARIANTS += [(config, causal, False, False) for (_, causal), config in fp8.TURNING_CONFIGS.items()]
VARIANTS += [(config, True, True, True) for config in fp8.TWO_LEVEL_CONFIGS.values()]


def name(variant) -> str:
    config, causal, transposed, two = variant
    kind = "causal" if causal else "full"
    how = "two-level" if two else "transposed" if transposed else "turned"
    return f"d{config.head_dim}-{config.block_q}x{config.block_k}-{kind}-{how}"


@pytest.fixture(scope="module")
def builds():
    """All variants, compiled side by side (or taken from the cache)."""
    with ThreadPoolExecutor() as pool:
        jobs = {
            variant: pool.submit(
                fp8.compile_config, variant[0], causal=variant[1], v_transposed=variant[2], two_level=variant[3]
            )
            for variant in VARIANTS
        }
        return {variant: job.result() for variant, job in jobs.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_registers_spills_and_notes(builds, variant):
    report, config = builds[variant].report, variant[0]
    used = report.kernels["fa3_forward_fp8"]
    split = config.producer_registers + config.consumers * config.consumer_registers
    assert split <= used.registers * (config.consumers + 1), "setmaxnreg asks for more than the block has"
    assert used.spill_store_bytes + used.spill_load_bytes == 0
    assert report.notes == (), report.describe()
    assert report.warnings == ()


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_the_instructions_of_the_technique_are_there(builds, variant):
    config, _, transposed, _ = variant
    cubin = builds[variant].cubin
    counts = count_instructions(cubin)
    # S stands in the first block, in the single step and twice in the loop over pairs; P V in the latter three and at
    # the end. More would mean that the compiler copied a loop, fewer that a product is missing.
    assert counts["QGMMA"] == 4 * (config.head_dim // 32 + config.block_k // 32)
    assert counts["HGMMA"] == counts["HMMA"] == 0
    assert counts["UTMALDG"] >= 3
    assert counts["UTMASTG"] >= 1
    assert counts["USETMAXREG"] == 2
    assert (counts["LDSM"] > 0) == (counts["PRMT"] > 0) == (not transposed)
    assert len(instructions_between(cubin, "QGMMA", ("R2UR", "WARPSYNC"))) <= 8  # see test_fa3_forward.py


def test_only_the_main_loop_uses_polynomials(builds):
    for variant in VARIANTS:
        config = variant[0]
        saturating = sum("FFMA.SAT" in line for line in sass_instructions(builds[variant].cubin))
        # Two steps of a pair, block_k / 2 exponentials each.
        assert saturating == 2 * (config.block_k // 2) * config.polynomial // 8


def test_shared_memory_fits():
    for config, _, transposed, _ in VARIANTS:
        assert config.shared_bytes(not transposed) <= 227 * 1024
        assert config.block_k % config.turned_span == 0
        assert config.turned_span in (32, 64, 128)


def test_debug_build_has_bounded_waits(builds):
    config = fp8.TURNING_CONFIGS[64, False]
    debug = fp8.compile_config(config, causal=False, debug=True)
    assert b"fa_deadlock_record" in debug.cubin
    assert b"fa_deadlock_record" not in builds[config, False, False, False].cubin
    names = (CUDA / "fa3_forward_fp8.cu").read_text().partition("enum BarrierName {")[2].partition("}")[0]
    assert [name.strip().lower() for name in names.split(",")] == list(fp8.BARRIER_NAMES)


def test_the_source_is_short_enough_to_read():
    assert len((CUDA / "fa3_forward_fp8.cu").read_text().splitlines()) <= 500


@pytest.mark.parametrize("head_dim", quantiser.HEAD_DIMS)
def test_the_quantiser_compiles_cleanly_and_fits(head_dim):
    for transposed in (True, False):
        compiled = quantiser.compile_variant(head_dim, torch.bfloat16, v_transposed=transposed)
        assert compiled.report.notes == compiled.report.warnings == ()
        used = compiled.report.kernels["quantise_fp8"]
        assert used.spill_store_bytes + used.spill_load_bytes == 0
        blocks = quantiser.blocks_per_sm(head_dim)
        assert used.registers * 2 * head_dim * blocks <= 65536
        assert (quantiser.shared_bytes(head_dim) + 1024) * blocks <= 228 * 1024  # the hardware takes 1 KiB of each
        counts = count_instructions(compiled.cubin)
        assert counts["UTMALDG"] > 0
        assert counts["UTMASTG"] > 0
        # 64 elements a thread, once for each span that other threads hold.
        assert butterflies(compiled.cubin) == 64 * {64: 0, 128: 1, 256: 2}[head_dim]


def butterflies(cubin: bytes) -> int:
    return sum("SHFL.BFLY" in line for line in sass_instructions(cubin))


def test_rotation_is_compiled_out():
    assert butterflies(quantiser.compile_variant(128, torch.float16, rotate=False).cubin) == 0


def job_of(number: int, *, q: int, k: int, v: int, lag: int) -> tuple[str, int]:
    """(kind, tile) as the kernel's text says."""
    body = (CUDA / "quantise_fp8.cu").read_text().partition(" Job job_of(")[2].partition("\n}")[0]
    names = {"number": number, "q": q, "k": k, "v": v, "lag": lag, "in_turn": number - lag}
    for condition, kind, tile in re.findall(r"(?:if \((.+)\) )?(?:job =|return) \{(\w+)(?:, (.+))?\};", body):
        if not condition or eval(condition, {}, names):
            return kind, eval(tile.replace("/", "//"), {}, names) if tile else -1
    raise AssertionError("no branch was taken")


@pytest.mark.parametrize(
    ("q", "v_heads", "v_blocks", "at_once"),
    [(1, 1, 1, 528), (7, 3, 5, 4), (64, 4, 16, 8), (0, 2, 9, 2), (40, 1, 10, 4)],
)
def test_every_job_comes_once_and_after_those_that_it_waits_for(q, v_heads, v_blocks, at_once):
    tiles = v_heads * v_blocks
    lag = quantiser.visit_lag(tiles, v_blocks, at_once)
    jobs = [job_of(number, q=q, k=tiles, v=tiles, lag=lag) for number in range(q + 3 * tiles + 2)]
    assert jobs[-2:] == [("kEnd", -1)] * 2
    assert sorted(jobs[:-2]) == sorted(
        [(kind, tile) for kind in ("kK", "kV", "kLargestOfV") for tile in range(tiles)] + [("kQ", i) for i in range(q)]
    )
    place = {job: number for number, job in enumerate(jobs)}
    for tile in range(tiles):
        head = range(tile // v_blocks * v_blocks, (tile // v_blocks + 1) * v_blocks)
        assert all(place["kLargestOfV", other] < place["kV", tile] for other in head)


# ---- the polynomial ------------------------------------------------------------------------------------------------
def polynomial(t: np.ndarray) -> np.ndarray:
    """exp2_polynomial of the kernel in float32, with the coefficients that stand there; t = s c - shift."""
    source = (CUDA / "fa3_forward_fp8.cu").read_text()
    body = source.partition("float exp2_polynomial(")[2].partition("\n}")[0]
    a3, a2, a1, a0 = (np.float32(x) for x in re.findall(r"(0\.\d+)f \* kTiny", body))
    f32 = np.float32
    with np.errstate(invalid="ignore"):
        u = np.clip((t + f32(48)) / f32(64), f32(0), f32(1)).astype(f32)
    whole = (u * f32(64) + f32(12582912)).astype(f32)
    f = (u.astype(np.float64) * 64 + (f32(12582912) - whole).astype(np.float64)).astype(f32)
    tiny = f32(2.0**-48)
    y = f * (a3 * tiny) + a2 * tiny
    y = f * y + a1 * tiny
    y = (f * y + a0 * tiny).astype(f32)
    bits = y.view(np.uint32) + (whole.view(np.uint32) << np.uint32(23))
    return bits.view(f32)


def test_the_polynomial_is_exact_enough_and_cannot_overflow():
    t = np.linspace(-47.5, 15.5, 1_000_001, dtype=np.float32)
    relative = np.abs(polynomial(t).astype(np.float64) / np.exp2(t.astype(np.float64)) - 1)
    assert 5e-5 < relative.max() < 1e-4  # e4m3 rounds P by up to 6e-2
    far = polynomial(np.array([16, 100, 1e9, np.inf, -48, -1e9, -np.inf], dtype=np.float32))
    assert (np.abs(far[:4] / 65536 - 1) < 1e-4).all()  # far above 448: seen, and the block is redone
    assert (np.abs(far[4:] * 2.0**48 - 1) < 1e-4).all()


# ---- layouts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head_dim", fp8.HEAD_DIMS)
def test_channel_order_is_what_turning_does(head_dim):
    order = fp8.channel_order(head_dim)
    assert sorted(order.tolist()) == list(range(head_dim))
    tile = torch.randint(0, 256, (16, 16), dtype=torch.uint8)
    low, high = layouts.ldmatrix_trans(tile[:8]), layouts.ldmatrix_trans(tile[8:])
    even = layouts.stmatrix(layouts.byte_perm(low, high, 0x6420))
    odd = layouts.stmatrix(layouts.byte_perm(low, high, 0x7531))
    assert torch.equal(torch.cat((even, odd)), layouts.transpose_v(tile)[fp8.channel_order(16)])


def test_turning_stores_meet_no_bank_twice():
    """The 8 rows that one stmatrix phase writes lie in 8 different 16-byte columns of the 128-byte wide banks."""
    for span in (32, 64, 128):
        for first in (0, 8, 24):
            offsets = [row * span for row in range(first, first + 8)]
            places = {(x ^ (((x >> 7) & (span // 16 - 1)) << 4)) % 128 for x in offsets}
            assert len(places) == 8


def test_a_thread_has_four_neighbouring_channels():
    order = fp8.channel_order(64)
    for thread in (0, 1, 2, 3, 77, 127):
        for group in range(4):
            for half in range(2):
                registers = [8 * group + 2 * half + extra for extra in (0, 4, 1, 5)]
                found = [layouts.accumulator_position(thread, register) for register in registers]
                channels = [int(order[column]) for _, column in found]
                assert channels == [16 * group + 4 * (thread % 4) + i for i in range(4)]
                assert len({row for row, _ in found}) == 1


def test_p_registers_are_the_operand():
    """p[i] of the kernel, register by register, against pack_p."""
    accumulators = torch.arange(64)  # one thread's S of 128 keys
    packed = layouts.pack_p(accumulators).reshape(-1, 4)  # k step and register, byte
    for i in range(16):
        half = i % 2
        assert packed[i].tolist() == [i // 2 * 8 + j // 2 * 4 + half * 2 + j % 2 for j in range(4)]


# ---- input ---------------------------------------------------------------------------------------------------------
def codes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


def call(**changes):
    q, k, one = codes(1, 4, 300, 64), codes(1, 2, 200, 64), torch.ones(1, 2)
    arguments = {"q": q, "k": k, "v": k, "q_scale": torch.ones(1, 4), "k_scale": one, "v_scale": one} | changes
    return fp8.forward_fp8(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ("q is on device cpu", "cuda")),
        ({"q": torch.zeros(1, 4, 300, 64)}, ("q has dtype torch.float32", "torch.float8_e4m3fn")),
        ({"q": "codes"}, ("q is a str",)),
        ({"v": codes(1, 2, 200, 64), "v_transposed": True}, ("v has shape (1, 2, 200, 64)", "(1, 2, 64, 256)")),
        ({"v": torch.zeros(1, 2, 64, 256), "v_transposed": True}, ("v is torch.float32", "torch.float8_e4m3fn")),
    ],
)
def test_bad_codes_are_refused_before_any_launch(changes, words):
    with pytest.raises(ValueError) as caught:
        call(**changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_scale": torch.ones(1, 2)}, ("q_scale has shape (1, 2)", "(1, 4)", "(1, 4, 3)")),
        ({"k_scale": torch.ones(1, 2, 3)}, ("k_scale has shape (1, 2, 3)", "(1, 2, 2)")),
        ({"v_scale": torch.ones(1, 2, 200)}, ("v_scale has shape (1, 2, 200)", "(1, 2, 64)")),
        ({"k_scale": torch.ones(1, 2).double()}, ("k_scale has dtype torch.float64", "torch.float32")),
        ({"v_scale": 1.0}, ("v_scale is a float", "float32 tensor")),
    ],
)
def test_bad_scales_are_refused(changes, words, monkeypatch):
    monkeypatch.setattr(fp8, "check_attention_inputs", lambda *_, **__: 0.125)  # it refuses CPU tensors
    with pytest.raises(ValueError) as caught:
        call(**changes)
    for word in words:
        assert word in str(caught.value)


def test_two_levels_at_head_dim_256_are_refused(monkeypatch):
    monkeypatch.setattr(fp8, "check_attention_inputs", lambda *_, **__: 0.0625)
    q, one = codes(1, 1, 128, 256), torch.ones(1, 1)
    with pytest.raises(ValueError, match="two_level is True with head_dim 256"):
        call(q=q, k=q, v=q, q_scale=one, k_scale=one, v_scale=one, two_level=True)


def test_default_config():
    for head_dim, causal in fp8.CONFIGS:
        options = {"causal": causal, "two_level": False}
        assert fp8.default_config(head_dim, v_transposed=True, **options) == fp8.CONFIGS[head_dim, causal]
        assert fp8.default_config(head_dim, v_transposed=False, **options) == fp8.TURNING_CONFIGS[head_dim, causal]
    assert fp8.default_config(128, causal=True, v_transposed=True, two_level=True) == fp8.TWO_LEVEL_CONFIGS[128]
    assert [fp8.padded_keys(n) for n in (1, 128, 129)] == [128, 128, 256]


def test_short_sequences_get_small_tiles_where_v_comes_transposed():
    kind = {"causal": True, "v_transposed": True, "two_level": False}
    assert fp8.choose_config(64, 1024, 1024, **kind) == fp8.SHORT[64]
    assert fp8.choose_config(64, 16384, 16384, **kind) == fp8.CONFIGS[64, True]
    assert fp8.choose_config(64, 1024, 1024, **kind | {"v_transposed": False}) == fp8.TURNING_CONFIGS[64, True]
    assert fp8.choose_config(64, 1024, 1024, **kind | {"two_level": True}) == fp8.TWO_LEVEL_CONFIGS[64]
    assert fp8.choose_config(128, 1024, 1024, **kind) == fp8.CONFIGS[128, True]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([torch.zeros(1, 1, 8, 64).half()] * 3, ("q is on device cpu", "cuda")),
        ([torch.zeros(1, 1, 8, 64)] * 3, ("q has dtype torch.float32", "torch.float16 or torch.bfloat16")),
        ([codes(1, 1, 8, 64)] * 3, ("q has dtype torch.float8_e4m3fn",)),
        ([None] * 3, ("q is a NoneType",)),
    ],
)
def test_the_quantiser_refuses_bad_input(inputs, words):
    with pytest.raises(ValueError) as caught:
        quantiser.quantise(*inputs, signs=None)
    for word in words:
        assert word in str(caught.value)


# ---- on a GPU ------------------------------------------------------------------------------------------------------
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
gpu = pytest.mark.skipif(not HOPPER, reason="NOT CHECKED HERE: needs an H100 or H200 (results of the kernels)")


@pytest.fixture(scope="module")
def race():
    sys.path.insert(0, str(CUDA))
    try:
        return load_file(CUDA / "race_fp8.py")
    finally:
        sys.path.remove(str(CUDA))


@gpu
def test_the_quantiser_equals_the_reference_bit_for_bit(race):
    assert race.check_quantiser() > 0


@gpu
@pytest.mark.parametrize(("heads", "length"), [(1, 70_000), (600, 130)])
def test_the_quantiser_with_long_and_many_heads_on_two_streams(race, heads, length):
    tensors = [torch.randn(1, heads, length, 64, device="cuda").half() for _ in range(2)]
    made = []
    torch.cuda.synchronize()
    for x in tensors:
        with torch.cuda.stream(torch.cuda.Stream()):
            made.append([race.quantise_fp8.quantise(x, x, x, signs=None, v_transposed=False) for _ in range(3)])
    torch.cuda.synchronize()
    for x, runs in zip(tensors, made, strict=True):
        wanted = race.quantize(x.cpu(), "head")
        for run in runs:
            assert torch.equal(run.v_scale.cpu(), wanted.scale[:, :, 0])
            assert torch.equal(run.v.cpu().view(torch.uint8), wanted.data.view(torch.uint8))


@gpu
@pytest.mark.parametrize("debug", [True, False])
def test_random_cases_keep_the_emulations_error(race, debug):
    found = race.check_random(20, 20 if debug else 0)
    assert found["failed"] == []


@gpu
def test_both_families_of_inputs_keep_the_emulations_error(race):
    for row in race.check_inputs():
        assert row["ratio"] <= race.LARGEST_RATIO, row


@gpu
def test_every_run_gives_the_same_bits(race):
    assert race.check_determinism()


@gpu
def test_zeros_give_zeros_and_bad_numbers_a_message_or_nan(race):
    q = torch.randn(1, 2, 300, 64, device="cuda").half()
    k = torch.zeros_like(q)
    made = race.quantise_fp8.quantise(q, k, k, signs=None, check=True)
    assert (made.k_scale == 1).all()
    o, lse = race.fp8.forward_fp8(**made.arguments())
    assert (o == 0).all()
    assert torch.allclose(lse, torch.full_like(lse, math.log(300)))
    k[0, 1, 200, 3] = torch.nan
    with pytest.raises(ValueError, match=r"k holds nan at position \(0, 1, 200, 3\)"):
        race.quantise_fp8.quantise(q, k, k, signs=None, check=True)
    made = race.quantise_fp8.quantise(q, q, k, signs=None)
    assert made.v_scale.isnan().tolist() == [[False, True]]
    o, _ = race.fp8.forward_fp8(**race.quantise_fp8.quantise(q, k, q, signs=None).arguments())
    assert o[0, 1].isnan().all()
    assert o[0, 0].isfinite().all()


@gpu
def test_a_cuda_graph_can_capture_it(race):
    q, k, v = (torch.randn(2, 4, 500, 128, device="cuda").bfloat16() for _ in range(3))
    signs = race.random_signs(128).cuda()

    def whole():
        return race.fp8.forward_fp8(**race.quantise_fp8.quantise(q, k, v, signs=signs).arguments(), causal=True)[0]

    expected = whole()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = whole()
    for _ in range(3):
        o.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(o, expected)
