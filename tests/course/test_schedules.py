"""The schedules of chapters 6 to 10 on the model: right numbers, nothing superfluous, and times that make sense."""

import inspect
import json
import sys
import time
from itertools import product
from types import ModuleType

import pytest
import torch

from fa_reference.grading.schedules import FP8, yardstick
from fa_reference.hopper import Timing, covered, overlap, read_trace, ring, run_attention, two_stage
from fa_reference.hopper.rules import Deadlock, RuleBroken
from fa_reference.hopper.schedules import CHAPTERS, load_schedule
from fa_reference.inputs import Case

SCHEDULES = {name: load_schedule(name) for name in CHAPTERS}
RINGS = [name for name in SCHEDULES if name != "one warpgroup"]
DTYPES = {name: FP8 if name == "fp8" else "bfloat16" for name in SCHEDULES}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: handing them to other threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(schedule: ModuleType, case: Case, **options):
    q, k, v = case.make()
    run = run_attention(schedule, q, k, v, causal=case.causal, scale=case.scale, **options)
    error = yardstick((q, k, v), case).judge(run.o, run.lse)
    assert error.passed, f"{schedule.__name__}, {case}, {options}: {error}"
    return run


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_numbers_equal_gold(name, head_dim):
    dtype = "float16" if head_dim == 128 and name != "fp8" else DTYPES[name]
    base, schedule = Case(head_dim=head_dim, dtype=dtype), SCHEDULES[name]
    check(schedule, base.but(len_q=128, len_k=512))
    check(schedule, base.but(len_q=150, len_k=333, kind="rising"))
    check(schedule, base.but(len_q=40, len_k=7), block_k=64)
    check(schedule, base.but(len_q=130, len_k=200, causal=True, heads_q=2, kind="large"), block_k=64)
    rows_without_keys = base.but(len_q=200, len_k=100, causal=True, layout="bnhd")
    check(schedule, rows_without_keys, block_k=96)
    k = torch.zeros(1, 1, 0, head_dim, dtype=getattr(torch, dtype))
    run = run_attention(schedule, base.but(len_q=70).make()[0], k, k)
    assert (run.o == 0).all() and (run.lse == -torch.inf).all()


@pytest.mark.parametrize("name", RINGS)
def test_every_ring_depth_and_length_under_random_latencies(name):
    seeds = iter(range(1000))
    for stages, blocks in product((2, 3, 5) if name == "fp8" else (1, 2, 3, 5), (1, 2, 3, 4, 7)):
        case = Case(len_q=128, len_k=64 * blocks - 5, dtype=DTYPES[name], seed=blocks)
        check(SCHEDULES[name], case, block_k=64, stages=stages, seed=next(seeds))


def test_latencies_change_cycles_but_not_numbers():
    case = Case(len_q=128, len_k=300, dtype="bfloat16")
    runs = [check(SCHEDULES["two-stage"], case, block_k=64, seed=seed) for seed in (None, None, 1, 1, 2, 3)]
    assert all(torch.equal(run.o, runs[0].o) and torch.equal(run.lse, runs[0].lse) for run in runs)
    cycles = [run.report.cycles for run in runs]
    assert cycles[0] == cycles[1] and cycles[2] == cycles[3] and len(set(cycles)) == 4


@pytest.mark.parametrize(
    "name, consumers, options",
    [
        ("warp-specialised", 1, {}),
        ("two-stage", 1, {"pingpong": False}),
        *((name, 3, {}) for name in RINGS if name != "fp8"),
    ],
)
def test_other_numbers_of_consumers(name, consumers, options):
    for seed in (None, 1, 2):
        case = Case(len_q=200, len_k=300, dtype="bfloat16")
        check(SCHEDULES[name], case, consumers=consumers, seed=seed, **options)


def without_each_instruction(module: ModuleType):
    """The module's source with one awaited instruction after the other left out."""
    lines = inspect.getsource(module).splitlines()
    for i, line in enumerate(lines):
        if line.strip().startswith("await ") and line.endswith(")"):
            indent = line[: len(line) - len(line.lstrip())]
            yield f"{i + 1}: {line.strip()}", "\n".join([*lines[:i], indent + "pass", *lines[i + 1 :]])


def loaded(source: str, file: str, name: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def user_of(shared: ModuleType, mutant: ModuleType) -> ModuleType:
    """A schedule that uses a shared module, importing the mutant instead."""
    user = SCHEDULES["fp8" if shared is two_stage else "two-stage"]
    source = inspect.getsource(user).replace(f"from {shared.__name__} import", f"from {mutant.__name__} import")
    return loaded(source, user.__file__, "user")


@pytest.mark.parametrize("name", [*SCHEDULES, "ring", "two_stage"])
def test_every_instruction_of_the_schedules_matters(name):
    """Leave out any one: a rule is broken or the numbers are wrong. So nothing in them is there for show."""
    shared = {"ring": ring, "two_stage": two_stage}.get(name)
    module = shared or SCHEDULES[name]
    dtype = FP8 if name in ("fp8", "two_stage") else "bfloat16"
    case = Case(len_q=64 if name == "one warpgroup" else 128, len_k=500, head_dim=128, dtype=dtype)
    survivors, tried = [], 0
    for line, source in without_each_instruction(module):
        tried += 1
        mutant = loaded(source, module.__file__, "mutant")
        try:
            check(user_of(shared, mutant) if shared else mutant, case)
        except (RuleBroken, AssertionError):
            continue
        survivors.append(line)
    assert tried >= 8 and not survivors


def test_a_deadlock_names_the_consumer_that_did_not_release():
    module = SCHEDULES["warp-specialised"]
    release = "await wg.mbarrier_arrive(at.V_empty[slot])"
    source = inspect.getsource(module).replace(release, f"if w == 0 or j != 1:\n            {release}")
    with pytest.raises(Deadlock, match="1 of 2 arrivals .consumer 0 arrived; not yet: consumer 1.") as caught:
        check(loaded(source, module.__file__, "forgetful"), Case(len_q=128, len_k=1000, dtype="float16"))
    assert (caught.value.warpgroup, caught.value.iteration, caught.value.buffer) == ("producer", 3, "V_empty[1]")
    line = 1 + source[: source.index("at.V_empty[slot], parity ^ 1")].count("\n")
    assert f"schedule.py, line {line})" in str(caught.value)


def test_an_overlapped_schedule_is_faster_and_the_report_adds_up():
    case = Case(len_q=128, len_k=2048, head_dim=128, dtype="bfloat16")
    reports = {name: check(SCHEDULES[name], case.but(dtype=DTYPES[name])).report for name in SCHEDULES}
    cycles = {name: report.cycles for name, report in reports.items()}
    cycles["one warpgroup"] *= 2  # it does half of the queries
    order = list(cycles.values())
    assert order == sorted(order, reverse=True), cycles
    for report in reports.values():
        assert all(0 < report.utilisation(unit) <= 1 for unit in report.busy)
        for wg in report.registers:
            spans = report.select(wg)
            assert all(a.stop <= b.start for a, b in zip(spans, spans[1:])), "a warpgroup does one thing at a time"
            assert covered(spans) <= report.cycles and max(s.stop for s in spans) <= report.cycles
    report = reports["pingpong"]
    softmax = report.select("consumer 0", "softmax")
    other = report.select("wgmma", owner="consumer 1")
    # The timeline of an H100 says 78 to 87%, counting from issue to wait; here products are only as long as they take.
    assert overlap(softmax, other) > 0.65 * covered(softmax), "pingpong: one's softmax under the other's products"
    assert {i.warpgroup for i in report.issued if i.instruction == "TMA load"} == {"producer"}
    assert "exp" in report.table() and "waited for" in report.table()


def test_what_if_the_exponential_unit_were_faster():
    case = Case(len_q=128, len_k=1024, dtype="bfloat16")
    slow, fast = (check(SCHEDULES["two-stage"], case, timing=Timing(exp_per_clk=rate)).report for rate in (16, 32))
    assert fast.cycles < slow.cycles and fast.busy["exp"] == slow.busy["exp"] / 2
    assert all(source for _, source in Timing().sources().values())


def test_64_key_blocks_at_d_128_take_less_than_two_seconds():
    q, k, v = Case(len_q=128, len_k=64 * 128, head_dim=128, dtype="bfloat16").make()
    start = time.process_time()
    run_attention(SCHEDULES["two-stage"], q, k, v)
    assert time.process_time() - start < 2


def test_traces_can_be_written_read_and_drawn(tmp_path):
    report = check(SCHEDULES["pingpong"], Case(len_q=128, len_k=256, dtype="bfloat16"), block_k=64).report
    path = report.write_trace(tmp_path / "trace.json")
    assert sorted(read_trace(path)) == sorted(report.spans)
    document = json.loads(path.read_text())
    assert document["otherData"]["unit"] == "cycles" and {e["ph"] for e in document["traceEvents"]} == {"X", "M"}
    for ending in ("svg", "png"):
        report.plot(tmp_path / f"timeline.{ending}", stop=report.cycles / 2)
        assert (tmp_path / f"timeline.{ending}").stat().st_size > 1000
