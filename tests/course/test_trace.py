"""The in-kernel timeline without a GPU: tracing builds are clean, and spans follow from events made up here."""

import pytest

from fa_reference.hopper.trace import read_trace, write_trace
from fa_reference.kernels import KernelUnavailable, compiler_version, count_instructions, sass_instructions
from fa_reference.kernels import trace as tracing
from fa_reference.kernels.spans import Event, Kind, TraceBroken, shares, spans_of

try:
    compiler_version()
except KernelUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

CHAPTERS = (7, 8, 9, 10)
VARIANTS = [(chapter, d) for chapter in (6, 7, 8, 9) for d in (64, 128)] + [(10, 128)]
BARRIERS = ("q_full", "k_full", "k_empty", "v_full", "v_empty")
K_FULL, V_FULL = 1, 3


@pytest.mark.parametrize(("chapter", "head_dim"), VARIANTS)
def test_a_tracing_build_has_no_spills_and_no_serialised_wgmma(chapter, head_dim):
    compiled = tracing.build(tracing.kernel_of(chapter), head_dim)
    used = compiled.report.kernels["attention"]
    assert used.spill_store_bytes + used.spill_load_bytes == 0
    assert compiled.report.notes == (), compiled.report.describe()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_marks_are_in_the_tracing_build_alone_and_leave_the_wgmmas_as_they_were(chapter):
    kernel = tracing.kernel_of(chapter)
    release = kernel.build(128, tracing.input_type(kernel), False)
    traced = tracing.build(kernel, 128)
    clocks = [
        sum("SR_CLOCKLO" in line for line in sass_instructions(build.cubin))
        for build in (release, tracing.build(kernel, 128, tracing.CYCLES), traced)
    ]
    assert clocks[0] == 0
    assert clocks[1] >= 2, "start and end"
    assert clocks[2] > clocks[1] + 8, "waits and commits"
    counts = [count_instructions(build.cubin) for build in (release, traced)]
    for name in ("HGMMA", "QGMMA", "UTMALDG", "MUFU", "LDSM", "STSM", "WARPGROUP", "BAR"):
        assert counts[0][name] == counts[1][name], name


def test_the_host_knows_the_events_of_the_header():
    header = (tracing.ROOT / "cuda" / "hopper" / "trace.cuh").read_text()
    listed = header[header.index("enum TraceEvent") : header.index("#ifdef FA_TRACE\n")]
    names = [part.split("TRACE_")[1].split()[0].rstrip(",") for part in listed.split("\n") if "    TRACE_" in part]
    assert [kind.name for kind in Kind] == names
    assert f"kTraceWarpgroups = {tracing.WARPGROUPS};" in header
    assert f"#define FA_TRACE_SLOTS {tracing.SLOTS[tracing.EVERYTHING]}\n" in header


def test_instrument_refuses_a_file_without_a_place_for_its_marks(tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text("extern void nothing();\n")
    with pytest.raises(ValueError, match=r"kernel\.cu has no"):
        tracing.instrument(file, level=tracing.EVERYTHING, producer=True, first_block=0)


class Script:
    """Events of one warpgroup, each so many clocks after the one before."""

    def __init__(self, start: int = 0) -> None:
        self.clock, self.events = start, [Event(start, start, Kind.START)]

    def __call__(self, after: int, kind: Kind, detail: int = 0, clocks: int = 0) -> "Script":
        self.clock += after
        self.events.append(Event(self.clock, self.clock + clocks, kind, detail))
        self.clock += clocks
        return self

    def wait(self, name: int, clocks: int, after: int = 2) -> "Script":
        return self(after, Kind.MBARRIER, name, clocks)

    def issue(self, clocks: int) -> "Script":
        return self(clocks, Kind.COMMIT)

    def join(self, pending: int, after: int, clocks: int) -> "Script":
        return self(after, Kind.WGMMA, pending, clocks)


def two_stages(start: int = 0) -> Script:
    """Two blocks of keys in the order of Algorithm 2."""
    script = Script(start)
    script.wait(K_FULL, 100).issue(20).join(0, 5, 500)
    script.wait(K_FULL, 10, after=700).issue(20)  # after the first softmax
    script.wait(V_FULL, 10).issue(20).join(1, 5, 480)
    script.join(0, 900, 7)  # softmax, then P V is found done
    script.wait(V_FULL, 10, after=200).issue(20).join(0, 5, 510)  # after rescaling
    return script(400, Kind.END)


def named(spans, track, name):
    return [s for s in spans if s.track == track and s.name == name]


def test_groups_are_completed_in_order_by_the_waits_that_cover_them():
    spans = spans_of({"consumer 0": two_stages().events}, BARRIERS)
    qk, pv = (named(spans, "wgmma of consumer 0", name) for name in ("QK", "PV"))
    assert [s.iteration for s in qk] == [0, 1]
    assert [s.iteration for s in pv] == [0, 1]
    assert qk[1].start < pv[0].start < qk[1].stop < pv[0].stop, "P V of block 0 flies through the softmax of block 1"
    softmax = named(spans, "consumer 0", "softmax")
    assert [s.iteration for s in softmax] == [0, 1]
    assert (softmax[1].start, softmax[1].stop - softmax[1].start) == (qk[1].stop, 900)
    assert pv[0].start < softmax[1].start
    assert pv[0].stop > softmax[1].stop
    assert [s.stop - s.start for s in named(spans, "consumer 0", "rescale")] == [200]
    assert [s.stop - s.start for s in named(spans, "consumer 0", "epilogue")] == [400]
    assert [s.stop - s.start for s in named(spans, "consumer 0", "issue PV")] == [20, 20]
    assert [s.iteration for s in named(spans, "consumer 0", "K_full")] == [0, 1]


def test_a_producer_that_turns_v_round_calculates():
    script = Script().wait(0, 40).wait(1, 30).wait(2, 50)  # V_rows_full, K_empty, V_empty
    script(300, Kind.BARRIER, 3, 10).wait(0, 40)(10, Kind.END)
    spans = spans_of({"producer": script.events}, ("v_rows_full", "k_empty", "v_empty"))
    assert [(s.name, s.stop - s.start, s.iteration) for s in spans if s.kind == "math"] == [("turn V round", 300, 0)]


def test_a_long_gap_after_a_commit_is_time_held():
    script = Script().wait(K_FULL, 100).issue(20).join(0, 400, 100)
    spans = spans_of({"consumer 0": script(50, Kind.END).events}, BARRIERS)
    assert [(s.kind, s.stop - s.start) for s in named(spans, "consumer 0", "held")] == [("issue", 400)]
    assert not named(spans_of({"consumer 0": two_stages().events}, BARRIERS), "consumer 0", "held")


def test_shares_say_how_much_softmax_ran_under_wgmma():
    one, other = two_stages(), two_stages(700)
    spans = spans_of({"consumer 0": one.events, "consumer 1": other.events}, BARRIERS)
    went_to = shares(spans, "consumer 0")
    first, second = named(spans, "consumer 0", "softmax")
    own = (second.stop - second.start) / (second.stop - second.start + first.stop - first.start)
    assert went_to["softmax under own wgmma"] == pytest.approx(own)
    assert went_to["softmax under wgmma"] >= max(
        went_to["softmax under own wgmma"], went_to["softmax under other wgmma"]
    )
    parts = ("softmax", "epilogue", "rescale", "issue QK", "issue PV", "wait K_full", "wait V_full")
    total = sum(went_to.get(name, 0) for name in parts) + went_to["wait wgmma QK"] + went_to["wait wgmma PV"]
    assert 0.9 < total <= 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda events: [e for e in events if e.kind != Kind.COMMIT], "waits for no group"),
        (lambda events: [e for e in events if e.kind != Kind.WGMMA], "groups in flight"),
        (lambda events: [Event(e.start, e.stop + 600, e.kind, e.detail) for e in events], "begins before"),
    ],
)
def test_lost_marks_are_noticed(damage, message):
    with pytest.raises(TraceBroken, match=message):
        spans_of({"consumer 0": damage(two_stages().events)}, BARRIERS)


def test_decode_sorts_by_time_across_the_clock_coming_round():
    start = 2**32 - 100
    noted = [(start, start, 1, 0), (start + 60, 20, 3 | 1 << 4, 0), (60, 70, 6, 0), (90, 90, 2, 0)]
    empty = (0, 0, 0, 0)
    events = tracing.decode([empty, noted[2], empty, noted[3], noted[1], noted[0]])
    assert [e.kind for e in events] == [Kind.START, Kind.MBARRIER, Kind.WGMMA, Kind.END]
    assert [e.start - events[0].start for e in events] == [0, 60, 160, 190]
    assert [e.stop - e.start for e in events] == [0, 60, 10, 0]
    assert events[1].detail == 1
    assert tracing.decode([empty]) == []


def test_a_recorded_trace_has_the_format_of_the_model(tmp_path):
    spans = spans_of({"consumer 0": two_stages().events}, BARRIERS)
    assert sorted(read_trace(write_trace(tmp_path / "t.json", spans, source="test"))) == sorted(spans)
