"""cuda/fa3_forward.cu without a GPU: it compiles, its instructions are the intended ones, bad input is refused.

Compiling says nothing about right results: those are checked on a Hopper GPU by the tests at the end, which are marked
`gpu` and reported as skipped, with the reason, where there is none.
"""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fa_reference.kernels import KernelUnavailable, count_instructions, instructions_between, require_hopper
from fa_reference.kernels.persistent import schedule
from fa_reference.kernels.tile_choice import computed_scores

FILE = Path(__file__).parents[2] / "cuda" / "fa3_forward.py"


def load():
    spec = importlib.util.spec_from_file_location("fa3_forward_under_test", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fa3 = load()
VARIANTS = [(config, causal, torch.bfloat16) for (_, causal), config in fa3.CONFIGS.items()]
VARIANTS += [(config, causal, torch.bfloat16) for config in fa3.SHORT.values() for causal in (False, True)]
VARIANTS += [(fa3.CONFIGS[128, True], True, torch.float16)]


def name(variant) -> str:
    config, causal, dtype = variant
    kind = "causal" if causal else "full"
    return f"d{config.head_dim}-{config.block_q}x{config.block_k}-{kind}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module")
def builds():
    """All variants, compiled side by side (or taken from the cache)."""
    with ThreadPoolExecutor() as pool:
        jobs = {
            (config, causal, dtype): pool.submit(fa3.compile_config, config, causal=causal, dtype=dtype)
            for config, causal, dtype in VARIANTS
        }
        return {variant: job.result() for variant, job in jobs.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_registers_spills_and_notes(builds, variant):
    report = builds[variant].report
    used = report.kernels["fa3_forward"]
    config = variant[0]
    split = config.producer_registers + config.consumers * config.consumer_registers
    assert split <= used.registers * (config.consumers + 1), "setmaxnreg asks for more than the block has"
    assert used.spill_store_bytes + used.spill_load_bytes == 0
    assert report.notes == (), report.describe()
    assert report.warnings == ()


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_the_instructions_of_the_technique_are_there(builds, variant):
    cubin = builds[variant].cubin
    counts = count_instructions(cubin)
    config = variant[0]
    # S stands in the first block, in the single step and twice in the loop over pairs; P V in the latter three and at
    # the end. More would mean that the compiler copied a loop, fewer that a product is missing.
    assert counts["HGMMA"] == 4 * (config.head_dim // 16 + config.block_k // 16)
    assert counts["UTMALDG"] >= 3
    assert counts["USETMAXREG"] == 2
    assert counts["SYNCS"] >= 12
    assert counts["HMMA"] == 0
    # Warp-uniform values stay in uniform registers: where the compiler loses track of them, dozens of these stand
    # between the wgmmas of the main loop and no message tells. A few, once a tile in the first block, cost nothing.
    assert len(instructions_between(cubin, "HGMMA", ("R2UR", "WARPSYNC"))) <= 8


def test_shared_memory_fits():
    for config, _, _ in VARIANTS:
        assert config.shared_bytes <= 227 * 1024
        assert config.threads <= 1024
        assert config.block_k % 16 == 0


def test_debug_build_has_bounded_waits(builds):
    config = fa3.CONFIGS[64, False]
    debug = fa3.compile_config(config, causal=False, dtype=torch.bfloat16, debug=True)
    assert b"fa_deadlock_record" in debug.cubin
    assert b"fa_deadlock_record" not in builds[config, False, torch.bfloat16].cubin
    names = FILE.with_suffix(".cu").read_text().partition("enum BarrierName {")[2].partition("}")[0]
    assert [name.strip().lower() for name in names.split(",")] == list(fa3.BARRIER_NAMES)


def test_the_source_is_short_enough_to_read():
    assert len(FILE.with_suffix(".cu").read_text().splitlines()) <= 500


def qkv(**changes):
    shape = {"q": (1, 2, 64, 64), "k": (1, 2, 64, 64), "v": (1, 2, 64, 64)}
    dtype = changes.pop("dtype", torch.bfloat16)
    shape.update(changes)
    return [torch.zeros(shape[name], dtype=dtype) for name in "qkv"]


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        (qkv(), {}, ("q is on device cpu", "cuda")),
        (qkv(dtype=torch.float32), {}, ("q has dtype torch.float32", "torch.float16 or torch.bfloat16")),
        (["q", *qkv()[1:]], {}, ("q is a str",)),
        ([None, None, None], {}, ("q is a NoneType",)),
    ],
)
def test_bad_input_is_refused_before_any_launch(inputs, options, words):
    with pytest.raises(ValueError) as caught:
        fa3.forward(*inputs, **options)
    for word in words:
        assert word in str(caught.value)


def test_head_dims():
    assert fa3.HEAD_DIMS == (64, 128, 256)


def test_short_sequences_get_tiles_that_fit_them():
    main, short = fa3.CONFIGS[64, True], fa3.SHORT[64]
    for length, expected in ((512, short), (2048, short), (16384, main)):
        assert fa3.choose_config(64, length, length, True) == expected
    assert fa3.choose_config(64, 1, 8192, False) == short  # 64 rows for one query, not 192
    assert fa3.choose_config(128, 100, 100, False) == fa3.CONFIGS[128, False]
    tile = fa3.CONFIGS[128, True]  # 128 x 128, causal, 256 x 256: the lower triangle of blocks
    assert computed_scores(tile, 256, 256, True) == 3 * 128 * 128
    assert computed_scores(tile, 200, 100, True) == 2 * 128 * 128  # rows 0 .. 99 see nothing, row 127 sees 28
    assert computed_scores(tile, 256, 100, True) == 1 * 128 * 128  # the first tile sees nothing


@pytest.mark.parametrize(("length", "blocks_per_sm", "heads"), [(512, 1, 16), (512, 3, 48), (16384, 3, 4)])
def test_causal_tiles_of_few_heads_are_in_flight(length, blocks_per_sm, heads):
    q, k = torch.empty(2, 128, length, 128, device="meta"), torch.empty(2, 64, length, 128, device="meta")
    q, k = q.bfloat16(), k.bfloat16()
    assert schedule(q, k, block_q=128, causal=True, blocks_per_sm=blocks_per_sm)[-1] == 2 * heads  # of the queries
    assert schedule(q, k, block_q=128, causal=False, blocks_per_sm=blocks_per_sm)[-1] == 1


def test_another_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    with pytest.raises(KernelUnavailable, match=r"NVIDIA B200 has compute capability 10\.0.*H100, H200"):
        require_hopper(torch.device("cuda"))


def test_no_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelUnavailable, match="no CUDA GPU is visible"):
        require_hopper(torch.device("cuda"))


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
gpu = pytest.mark.skipif(not HOPPER, reason="NOT CHECKED HERE: needs an H100 or H200 (results of the kernel)")


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", fa3.HEAD_DIMS)
@pytest.mark.parametrize(
    "shape",  # batch, heads_q, heads_kv, len_q, len_k
    [(1, 1, 1, 1, 1), (2, 4, 2, 300, 777), (1, 2, 1, 1000, 200), (1, 2, 2, 128, 128), (3, 5, 1, 65, 1025)],
    ids=str,
)
def test_results_keep_the_error_rule(shape, head_dim, causal, dtype):
    from fa_reference.error_rule import judge

    batch, heads_q, heads_kv, len_q, len_k = shape
    generator = torch.Generator("cuda").manual_seed(len_q + len_k)
    for factor, sign in ((1.0, 1.0), (6.0, 1.0), (3.0, -1.0)):  # ordinary, large, and all scores negative
        q, k, v = (
            (torch.randn(batch, n, h, head_dim, device="cuda", generator=generator) * factor).to(dtype).transpose(1, 2)
            for n, h in ((len_q, heads_q), (len_k, heads_kv), (len_k, heads_kv))
        )
        if sign < 0:
            q, k = -q.abs(), k.abs()
        for debug in (True, False):  # the debug build first: a deadlock becomes a message
            o, lse = fa3.forward(q, k, v, causal=causal, debug=debug)
            report = judge(o, lse, q, k, v, causal=causal)
            assert report.passed, report


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_maximum_that_grows_from_block_to_block(causal, dtype):
    """Blocks are visited from the last key on; scores that grow that way force the exact path again and again."""
    from fa_reference.error_rule import judge

    for sign in (1, -1):
        q, k, v = (torch.randn(1, 2, 1500, 128, device="cuda") for _ in range(3))
        k = k * torch.logspace(1.3, -2, 1500, device="cuda")[:, None]
        if sign < 0:
            q, k = -q.abs(), k.abs()
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        report = judge(*fa3.forward(q, k, v, causal=causal), q, k, v, causal=causal)
        assert report.passed, report


@gpu
def test_every_run_gives_the_same_bits():
    q, k, v = (torch.randn(2, 8, 1111, 128, device="cuda").bfloat16() for _ in range(3))
    first = fa3.forward(q, k, v, causal=True)
    for _ in range(20):
        for one, other in zip(first, fa3.forward(q, k, v, causal=True), strict=True):
            assert torch.equal(one, other)


@gpu
def test_no_keys_and_rows_without_keys():
    q = torch.randn(1, 2, 300, 64, device="cuda").half()
    k = torch.randn(1, 2, 100, 64, device="cuda").half()
    o, lse = fa3.forward(q, k[:, :, :0], k[:, :, :0])
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    o, lse = fa3.forward(q, k, k, causal=True)  # rows 0 .. 199 see nothing
    assert (o[:, :, :200] == 0).all()
    assert (lse[:, :, :200] == -torch.inf).all()
    assert lse[:, :, 200:].isfinite().all()


@gpu
def test_a_cuda_graph_can_capture_it():
    q, k, v = (torch.randn(2, 4, 500, 128, device="cuda").bfloat16() for _ in range(3))
    expected, _ = fa3.forward(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = fa3.forward(q, k, v, causal=True)
    for _ in range(3):
        o.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(o, expected)
