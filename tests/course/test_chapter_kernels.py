"""The kernels of chapters 6 to 9 without a GPU: they compile, and their code is what the chapter says.

Compiling says nothing about right results: those are checked on a Hopper GPU by the tests at the end, which are marked
`gpu` and reported as skipped, with the reason, where there is none.
"""

import difflib
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fa_reference.course import ROOT
from fa_reference.kernels import (
    KernelUnavailable,
    cache_folder,
    compile_kernel,
    count_instructions,
    instructions_between,
    require_hopper,
    sass_instructions,
)
from fa_reference.stubs import cut
from fa_reference.versions import load_file

FOLDER = ROOT / "solutions"
KERNELS = {
    "attention": "06_hopper_engines/attention.py",
    "two_stage_unspecialised": "09_two_stage/two_stage_unspecialised.py",
    "warp_specialised": "07_warp_specialised/warp_specialised.py",
    "pingpong": "08_pingpong/pingpong.py",
    "fa3": "09_two_stage/fa3.py",
}
HOSTS = {name: load_file(FOLDER / file).KERNEL for name, file in KERNELS.items()}
SPECIALISED = ("warp_specialised", "pingpong", "fa3")
TWO_STAGE = ("two_stage_unspecialised", "fa3")
VARIANTS = [
    *((name, 128, causal, torch.bfloat16) for name in KERNELS for causal in (False, True)),
    *((name, 64, True, torch.float16) for name in KERNELS),
]


def label(variant) -> str:
    name, head_dim, causal, dtype = variant
    return f"{name}-d{head_dim}-{'causal' if causal else 'full'}-{str(dtype).removeprefix('torch.')}"


def written(name: str, text: str) -> Path:
    """A file whose path is the same in every run, so that its machine code is found in the cache."""
    file = cache_folder() / "tests" / name
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


@pytest.fixture(scope="module")
def builds():
    """All variants, compiled side by side (or taken from the cache)."""

    def build(variant):
        name, head_dim, causal, dtype = variant
        return HOSTS[name].build(head_dim, dtype, causal)

    with ThreadPoolExecutor() as pool:
        return dict(zip(VARIANTS, pool.map(build, VARIANTS), strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_registers_spills_and_notes(builds, variant):
    report = builds[variant].report
    used = report.kernels["attention"]
    assert used.spill_store_bytes + used.spill_load_bytes == 0
    assert report.notes == (), report.describe()
    assert report.warnings == ()
    if variant[0] in SPECIALISED:
        assert used.registers * 3 >= 24 + 2 * 240, "setmaxnreg asks for more than the block has"
    if variant[0] == "attention":
        assert used.registers * 128 * 2 <= 65536, "two blocks no longer fit on an SM"


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_the_instructions_of_the_technique_are_there(builds, variant):
    name, head_dim = variant[:2]
    cubin = builds[variant].cubin
    counts = count_instructions(cubin)
    products = head_dim // 16 + HOSTS[name].block_k // 16  # Q K^T and P V of one block
    # The two-stage kernels have the first S before the loop and the last P V behind it. More would mean that the
    # compiler copied the loop, fewer that a product is missing.
    assert counts["HGMMA"] == (2 if name in TWO_STAGE else 1) * products
    assert counts["HMMA"] == 0
    assert counts["UTMALDG"] >= 3
    assert counts["SYNCS"] >= 10
    assert counts["USETMAXREG"] == (2 if name in SPECIALISED else 0)
    turns = {"pingpong": 5, "fa3": 3}.get(name, 0)  # __syncthreads is one BAR more
    if name in SPECIALISED:
        assert counts["BAR"] == 1 + turns
    # Warp-uniform values that left the uniform registers come back one by one between the products.
    assert len(instructions_between(cubin, "HGMMA", ("R2UR", "WARPSYNC"))) <= 8


def exponentials_between_the_waits(cubin: bytes) -> list[int]:
    """For each wait that leaves P V running: how many exponentials stand between it and the next wait for all."""
    lines = sass_instructions(cubin)
    waits = [(number, line) for number, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line]
    counted = []
    for (start, first), (end, second) in itertools.pairwise(waits):
        if "0x1" in first and "0x0" in second:
            counted.append(sum("MUFU.EX2" in line for line in lines[start:end]))
    return counted


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[0] in TWO_STAGE], ids=label)
def test_softmax_stands_where_p_v_is_still_running(builds, variant):
    """The compiler moves it behind the wait otherwise: right results, and no overlap inside a warpgroup."""
    (count,) = exponentials_between_the_waits(builds[variant].cubin)
    assert count >= HOSTS[variant[0]].block_k // 2


def test_without_the_pin_it_does_not_stand_there():
    """That the check above can fail, and that the pin is what makes it pass."""
    host = HOSTS["fa3"]
    text = host.source.read_text()
    line = "        if (never) pin(s);\n"
    assert text.count(line) == 1
    unpinned = written("unpinned.cu", text.replace(line, ""))
    (count,) = exponentials_between_the_waits(host.build(128, torch.bfloat16, False, source=unpinned).cubin)
    assert count < 8


def test_the_variants_of_the_ablation_compile():
    """Each is a kernel with a few lines exchanged; the lines must still be there, and the code still be clean."""
    ablation = load_file(FOLDER / "09_two_stage" / "ablation.py")
    assert set(ablation.KERNELS) == set(KERNELS)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda name: ablation.build(name, False), ablation.VARIANTS)) == [""] * len(
            ablation.VARIANTS
        )
    for name, (_, changes) in ablation.VARIANTS.items():
        file = KERNELS[name.partition(":")[0]]
        original = (FOLDER / file).with_suffix(".cu").read_text()
        assert (ablation.source(name).read_text() == original) == (not changes)


@pytest.mark.parametrize("name", KERNELS)
def test_debug_build_has_bounded_waits(builds, name):
    host = HOSTS[name]
    assert b"fa_deadlock_record" in host.build(128, torch.bfloat16, False, debug=True).cubin
    assert b"fa_deadlock_record" not in builds[name, 128, False, torch.bfloat16].cubin
    if name in SPECIALISED:
        debug = count_instructions(host.build(128, torch.bfloat16, False, debug=True).cubin)
        assert debug["BAR"] == 1, (
            "named barriers are counters there, as the hardware's cannot be waited for with a limit"
        )
    names = host.source.read_text().partition("enum BarrierName {")[2].partition("}")[0]
    assert tuple(barrier.strip().lower() for barrier in names.split(",")) == host.barriers


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "two_stage_unspecialised"])
def test_the_stub_compiles_and_lacks_the_technique(name):
    """Without what the learner writes nothing is multiplied and nobody waits: the kernel ends, with a wrong result."""
    host = HOSTS[name]
    stub = written(f"stub_{name}.cu", cut(host.source.read_text(), host.source.name))
    assert "SOLUTION" not in stub.read_text()
    assert "TODO" in stub.read_text()
    counts = count_instructions(host.build(128, torch.bfloat16, True, source=stub).cubin)
    assert counts["HGMMA"] == 0
    assert counts["UTMALDG"] == 0


@pytest.mark.parametrize("name", KERNELS)
def test_shared_memory_fits(name):
    host = HOSTS[name]
    blocks = 2 if name == "attention" else 1
    for head_dim in host.head_dims:
        # An SM has 228 KiB, of which each block takes 1 KiB more than it asks for.
        assert blocks * (host.shared_bytes(head_dim) + 1024) <= 228 * 1024
        defines = {"FA_HEAD_DIM": head_dim, "FA_BLOCK_K": host.block_k, "FA_STAGES": host.stages}
        defines |= {"FA_CAUSAL": 0, "FA_BF16": 1}
        probe = f'#include "{host.source}"\nstatic_assert(sizeof(Shared) <= {host.shared_bytes(head_dim)});\n'
        probe += f"static_assert(kThreads == {host.threads} && kBlockQ == {host.block_q});\n"
        file = written(f"probe_{name}_{head_dim}.cu", probe)
        compile_kernel(file, defines=defines, include_dirs=[ROOT / "cuda"])


def test_the_sources_are_short_enough_to_read():
    for host in HOSTS.values():
        assert len(host.source.read_text().splitlines()) <= 330


@pytest.mark.parametrize(
    ("before", "after", "most"),
    [
        ("attention", "warp_specialised", 180),
        ("warp_specialised", "pingpong", 35),
        ("pingpong", "fa3", 65),
        ("two_stage_unspecialised", "fa3", 165),
    ],
)
def test_the_difference_is_the_lesson(before, after, most):
    """Lines taken out and put in from one chapter to the next."""
    one, other = (HOSTS[name].source.read_text().splitlines() for name in (before, after))
    changes = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert 10 <= len(changes) <= most


def qkv(**changes):
    shape = {"q": (1, 2, 64, 64), "k": (1, 2, 64, 64), "v": (1, 2, 64, 64)}
    dtype = changes.pop("dtype", torch.bfloat16)
    shape.update(changes)
    return [torch.zeros(shape[name], dtype=dtype) for name in "qkv"]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (qkv(), ("q is on device cpu", "cuda")),
        (qkv(dtype=torch.float32), ("q has dtype torch.float32", "torch.float16 or torch.bfloat16")),
        ([None, None, None], ("q is a NoneType",)),
    ],
)
def test_bad_input_is_refused_before_any_launch(name, inputs, words):
    with pytest.raises(ValueError) as caught:
        HOSTS[name].forward(*inputs)
    for word in words:
        assert word in str(caught.value)


# ---- on a Hopper GPU -------------------------------------------------------------------------------------------------


def no_hopper() -> str | None:
    try:
        require_hopper(torch.device("cuda", 0))
    except KernelUnavailable as error:
        return str(error)
    return None


gpu = pytest.mark.skipif(no_hopper() is not None, reason=f"not checked here: {no_hopper()}")
CASES = [
    # batch, heads_q, heads_kv, len_q, len_k, kind, layout
    (1, 1, 1, 128, 128, "normal", "bhnd"),
    (2, 4, 2, 300, 777, "normal", "bnhd"),
    (1, 2, 1, 1000, 200, "normal", "bhnd"),
    (2, 3, 3, 513, 1025, "large", "bhnd"),
    (1, 2, 2, 257, 700, "shifted", "padded"),
    (1, 4, 1, 65, 1, "normal", "bhnd"),
    (2, 2, 1, 1, 999, "normal", "bhnd"),
    (1, 2, 2, 500, 1500, "rising", "bnhd"),
    (1, 2, 2, 400, 450, "outliers", "padded"),
]


@gpu
@pytest.mark.parametrize("debug", [True, False], ids=["debug", "release"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("head_dim", "dtype"), list(itertools.product((64, 128), ("float16", "bfloat16"))))
@pytest.mark.parametrize("name", KERNELS)
def test_numbers(name, head_dim, dtype, causal, debug):
    from fa_reference.error_rule import judge
    from fa_reference.inputs import Case

    for batch, heads_q, heads_kv, len_q, len_k, kind, layout in CASES:
        case = Case(len_q, len_k, batch, heads_q, heads_kv, head_dim, dtype, causal, kind=kind, layout=layout)
        q, k, v = case.make("cuda")
        o, lse = HOSTS[name].forward(q, k, v, causal=causal, debug=debug)
        report = judge(o, lse, q, k, v, causal=causal)
        assert report.passed, (case, report)


@gpu
@pytest.mark.parametrize("name", KERNELS)
def test_every_run_gives_the_same_bits(name):
    q, k, v = (torch.randn(2, 8, 1111, 128, device="cuda").bfloat16() for _ in range(3))
    first = HOSTS[name].forward(q, k, v, causal=True)
    for _ in range(20):
        for one, other in zip(first, HOSTS[name].forward(q, k, v, causal=True), strict=True):
            assert torch.equal(one, other)
