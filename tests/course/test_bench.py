"""The benchmark's own tests: they run without a GPU, on a fake clock and on small shapes."""

import csv
import io
import json
import random
import subprocess
from functools import partial

import pytest
import torch
from rich.console import Console

from fa_reference.bench import cli, cpu, gpu, grid, monitor, peers, plots, profile, roofline, tables, timing, traffic
from fa_reference.bench import record as records
from fa_reference.bench.check import make_inputs, run_checked
from fa_reference.bench.contenders import Contender, course_contenders
from fa_reference.bench.run import DeviceLost, Race, run_cell, run_cells
from fa_reference.error_rule import Yardstick
from fa_reference.fp8 import schemes
from fa_reference.gold import baseline_attention
from fa_reference.versions import load_version

SMALL = grid.Cell("paper", 1, 2, 1, 48, 48, 64, True)


class FakeClock:
    """Says that every launch takes `device_ms`; keeps the order of the slices; runs the launch."""

    def __init__(self, device_ms=2.0):
        self.device_ms = device_ms
        self.launched = []

    def probe(self, launch):
        launch()
        return self.device_ms, 0.01

    def slice(self, launch, launches, spin_ms):
        launch()
        self.launched.append(launch)
        return self.device_ms


def contender(name, function, group="course", **kwargs):
    return Contender(
        name, name.title(), group, lambda q, k, v, causal: (lambda: function(q, k, v, causal), ""), **kwargs
    )


def right(q, k, v, causal):
    return baseline_attention(q, k, v, causal=causal)


def wrong(q, k, v, causal):
    o, lse = right(q, k, v, causal)
    return o * 1.05, lse


def race(*contenders, **kwargs):
    return Race(contenders, FakeClock(), device="cpu", rounds=4, **kwargs)


def text_of(renderable):
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


# --- grid


def test_the_papers_grid_has_16k_tokens_and_hidden_size_2048():
    cells = grid.paper_cells()
    assert len(cells) == 3 * 6 * 2
    assert all(c.batch * c.len_q == 16384 and c.heads_q * c.head_dim == 2048 for c in cells)
    assert {c.head_dim for c in cells} == {64, 128, 256}
    assert {c.len_q for c in cells} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {c.causal for c in cells} == {False, True}


def test_llama_prefill_shares_key_value_heads():
    cells = grid.llama_cells()
    assert [c.len_q for c in cells] == [2048, 4096, 8192, 16384, 32768]
    assert all((c.heads_q, c.heads_kv, c.head_dim, c.batch, c.causal) == (32, 8, 128, 1, True) for c in cells)


def test_all_holds_every_grid_once():
    cells = grid.select("all")
    assert cells == grid.paper_cells() + grid.llama_cells() + grid.smollm2_cells()
    assert len({c.name for c in cells}) == len(cells)


def test_selection_restricts_and_refuses():
    cells = grid.select("paper", head_dims=[64], lengths=[512, 1024], causal=False, dtypes=["bf16", "fp16"])
    assert {(c.head_dim, c.len_q, c.causal, c.dtype) for c in cells} == {
        (64, n, False, t) for n in (512, 1024) for t in ("bf16", "fp16")
    }
    for arguments in ({"grid": "nope"}, {"grid": "paper", "lengths": [7]}, {"grid": "paper", "dtypes": ["fp8"]}):
        with pytest.raises(ValueError, match="allowed|lengths"):
            grid.select(**arguments)


def test_inputs_are_transposed_views_and_real_layers_differ():
    q, _, _ = make_inputs(SMALL, "cpu")
    assert q.shape == (1, 2, 48, 64) and q.dtype == torch.bfloat16
    assert q.transpose(1, 2).is_contiguous() and not q.is_contiguous()
    first, second = (make_inputs(c, "cpu") for c in grid.smollm2_cells()[:2])
    assert first[0].shape == (1, 3, 2048, 64) and first[1].shape == (1, 1, 2048, 64)
    assert not torch.equal(first[0], second[0])


# --- timing


def test_every_round_is_a_new_shuffle_of_all_columns():
    names = ["a", "b", "c", "d"]
    orders = timing.round_orders(names, 15, random.Random(0))
    assert all(sorted(order) == names for order in orders)
    assert all(one != two for one, two in zip(orders, orders[1:], strict=False))
    assert {order[0] for order in orders} == set(names)


def test_columns_are_interleaved_on_a_fake_clock():
    clock = FakeClock()
    columns = [timing.Column(name, lambda name=name: name) for name in "abcd"]
    timing.interleave(columns, clock, rounds=6, rng=random.Random(1))
    taken = [launch() for launch in clock.launched]
    assert all(sorted(taken[i : i + 4]) == list("abcd") for i in range(0, 24, 4))
    assert all(len(column.samples_ms) == 6 for column in columns)


def test_slow_columns_take_fewer_rounds_spread_over_the_run():
    taken = [i for i in range(15) if timing.takes_part(i, 3, 15)]
    assert len(taken) == 3 and taken[-1] - taken[0] >= 8
    assert sum(timing.takes_part(i, 15, 15) for i in range(15)) == 15
    assert timing.plan(400.0, 0.1)[2] == timing.MIN_ROUNDS
    assert timing.plan(1.0, 0.1) == (8, timing.SPIN_MS, timing.ROUNDS)


def test_spin_covers_a_host_that_is_slower_than_the_gpu():
    launches, spin_ms, _ = timing.plan(0.02, 0.1)
    assert spin_ms >= 0.1 * launches and spin_ms <= timing.MAX_SPIN_MS


def test_summary_is_the_median_with_its_range():
    assert timing.summarize([3.0, 1.0, 10.0]) == {"median_ms": 3.0, "min_ms": 1.0, "max_ms": 10.0}


# --- one cell


def test_right_is_timed_wrong_is_wrong_and_a_peer_is_only_flagged():
    done = run_cell(race(contender("right", right), contender("wrong", wrong), contender("lib", wrong, "peer")), SMALL)
    good, bad, peer = (done["results"][name] for name in ("right", "wrong", "lib"))
    assert good["status"] == "ok" and len(good["samples_ms"]) == 4 and good["median_ms"] == 2.0
    assert good["tflops"] == pytest.approx(4 * 2 * 48 * 48 * 64 / 2 / 2e-3 / 1e12)
    assert bad["status"] == "wrong" and "WRONG" in bad["message"] and bad["error"]["ratio"] > 1
    assert not {"median_ms", "samples_ms", "tflops"} & set(bad)
    assert peer["status"] == "ok" and peer["flagged"] and peer["tflops"] > 0


def test_fp8_is_held_to_a_baseline_of_its_own_and_raced_only_by_name():
    def emulated(q, k, v, causal):
        return schemes.attend(schemes.BOTH, q, k, v, causal=causal)

    baseline = partial(schemes.attend, schemes.BOTH)
    columns = [contender("fp8", emulated, baseline=baseline), contender("as bf16", emulated), contender("bf16", right)]
    columns.append(contender("zeros", lambda q, k, v, causal: (0 * q, right(q, k, v, causal)[1]), baseline=baseline))
    results = run_cell(race(*columns), SMALL)["results"]
    assert {name: result["status"] for name, result in results.items()} == {
        "fp8": "ok",
        "as bf16": "wrong",
        "bf16": "ok",
        "zeros": "wrong",
    }
    assert all(c.baseline is None for c in course_contenders("cuda")[0])
    contenders, remarks = course_contenders("cuda", ["fp8"])
    assert [c.baseline is not None for c in contenders] == [True] or "fp8 is left out" in remarks[0]


def test_what_is_wrong_only_after_the_timed_launches_gets_no_speed():
    calls = []

    def decays(q, k, v, causal):
        calls.append(1)
        return (right if len(calls) < 4 else wrong)(q, k, v, causal)

    result = run_cell(race(contender("decays", decays)), SMALL)["results"]["decays"]
    assert result["status"] == "wrong" and "tflops" not in result


def test_unwritten_and_misshapen_outputs_are_not_right():
    def unwritten(q, k, v, causal):
        o, lse = right(q, k, v, causal)
        o[..., -1, :] = torch.nan
        return o, lse

    results = run_cell(
        race(contender("nan", unwritten), contender("short", lambda q, k, v, c: (q[:, :, 1:], None))), SMALL
    )["results"]
    assert results["nan"]["status"] == "wrong"
    assert results["short"]["status"] == "failed" and "shape" in results["short"]["message"]


def test_out_of_memory_and_exceptions_do_not_end_the_run():
    def hungry(q, k, v, causal):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    def leaves(q, k, v, causal):
        raise SystemExit(3)

    def unsolved(q, k, v, causal):
        raise NotImplementedError("fa2_triton.py: forward: write the launch")

    done = run_cell(
        race(*(contender(f.__name__, f, "mine") for f in (hungry, leaves, unsolved)), contender("right", right)), SMALL
    )
    results = done["results"]
    assert results["hungry"] == {"status": "oom", "message": "out of memory"}
    assert results["leaves"]["status"] == "failed"
    assert "write the launch" in results["unsolved"]["message"]
    assert results["right"]["status"] == "ok"
    assert "out of memory" in text_of(tables.cell_table(done, [{"name": "hungry", "title": "H"}]))


def test_failing_while_timed_drops_the_column_only():
    calls = []

    def late(q, k, v, causal):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("late")
        return right(q, k, v, causal)

    results = run_cell(race(contender("late", late), contender("right", right)), SMALL)["results"]
    assert results["late"]["status"] == "oom" and "tflops" not in results["late"]
    assert len(results["right"]["samples_ms"]) == 4


def test_limits_of_a_version_are_said():
    narrow = contender("narrow", right, head_dims=(128,))
    top_left = contender("top", right, "peer", mask_top_left=True)
    rectangle = grid.Cell("paper", 1, 1, 1, 16, 32, 64, True)
    assert "128" in run_cell(race(narrow), SMALL)["results"]["narrow"]["message"]
    assert top_left.refuses(SMALL) is None and "top-left" in top_left.refuses(rectangle)


def test_a_recorded_command_names_no_folder_of_its_machine():
    command = ["bench", "--out", "/home/somebody/results/forward.json", "--impl", "chapters/04_fa2"]
    assert records.provenance(command)["command"] == "bench --out forward.json --impl chapters/04_fa2"


def test_a_lost_device_ends_the_run_and_keeps_what_there_was(tmp_path, monkeypatch):
    cells = [SMALL, SMALL]
    done = []

    def run_once(*arguments):
        if done:
            raise DeviceLost("after x the GPU answers nothing")
        return SMALL.to_json() | {"results": {}}

    monkeypatch.setattr("fa_reference.bench.run.run_cell", run_once)
    record = records.new_record("forward", {})
    with pytest.raises(DeviceLost):
        run_cells(race(), cells, record, tmp_path / "r.json", lambda *a: done.append(a))
    kept = records.load(tmp_path / "r.json")
    assert len(kept["cells"]) == 1 and not kept["complete"] and "answers nothing" in kept["aborted"]


def test_the_error_allowed_is_that_of_the_error_rule():
    from fa_reference.error_rule import judge

    inputs = make_inputs(SMALL, "cpu")
    ours = run_checked(lambda: wrong(*inputs, True), inputs, Yardstick.of(*inputs, causal=True))
    rule = judge(*wrong(*inputs, True), *inputs, causal=True)
    for name in ("rms", "max", "rms_allowed", "max_allowed", "lse_error", "lse_allowed"):
        assert getattr(ours, name) == pytest.approx(getattr(rule, name), rel=1e-6), name


# --- contenders and peers


def test_solutions_race_and_unknown_names_are_refused(tmp_path):
    contenders, remarks = course_contenders("cuda", ["naive"])
    assert [c.name for c in contenders] == ["naive"] and contenders[0].graded
    assert any("fa1_tiled" in remark for remark in course_contenders("cuda")[1])
    with pytest.raises(ValueError, match="unknown"):
        course_contenders("cuda", ["fa9"])
    with pytest.raises(ValueError, match="no version"):
        course_contenders("cuda", impl=tmp_path)
    with pytest.raises(ValueError, match="unknown"):
        peers.peer_contenders(["fa9"])


def test_a_learners_file_races_beside_the_solution_and_may_be_broken(tmp_path):
    (tmp_path / "naive.py").write_text("def forward(:\n")
    contenders, _ = course_contenders("cuda", ["naive"], tmp_path)
    assert [c.name for c in contenders] == ["naive", "mine:naive"]
    results = run_cell(race(*contenders), SMALL)["results"]
    assert results["naive"]["status"] == "ok"
    assert results["mine:naive"]["status"] == "failed" and "SyntaxError" in results["mine:naive"]["message"]


@pytest.mark.parametrize("causal", [False, True])
def test_the_explicit_peer_computes_attention_and_keeps_the_rules_mask(causal):
    cell = grid.Cell("paper", 2, 4, 2, 40, 56, 64, causal)
    inputs = make_inputs(cell, "cpu")
    launch, note = peers._bind_explicit(*inputs, causal)
    report = run_checked(launch, inputs, Yardstick.of(*inputs, causal=causal))
    assert report.rms < 5 * report.rms_allowed and "expanded" in note


def test_an_official_kernel_gets_batch_len_heads_dim():
    seen = []

    def flash_attn_func(q, k, v, causal):
        seen.append(tuple(q.shape))
        o, lse = right(*(x.transpose(1, 2) for x in (q, k, v)), causal)
        return o.transpose(1, 2), lse

    inputs = make_inputs(SMALL, "cpu")
    launch, _ = peers._bind_official(flash_attn_func)(*inputs, True)
    assert run_checked(launch, inputs, Yardstick.of(*inputs, causal=True)).passed
    assert seen == [(1, 48, 2, 64)]


def test_absent_peers_are_named_with_their_package():
    found, absent = peers.peer_contenders(["explicit", "fa3", "fa4"])
    reasons = {a["name"]: a["reason"] for a in absent}
    assert "explicit" in {c.name for c in found}
    for name, package in (("fa3", "fa3-fwd"), ("fa4", "flash-attn-4")):
        assert name in {c.name for c in found} or package in reasons[name]


# --- records, tables, figures


@pytest.fixture
def recorded(tmp_path):
    """A small recorded run, built by racing on the fake clock, with a device and a date of its own."""
    cells = [c for c in grid.paper_cells() if c.head_dim in (64, 128) and c.len_q in (512, 1024)]
    record = records.new_record("forward", {"rounds": 4, "layout": "bnhd"}, ["bench"])
    record["provenance"] |= {"device": "NVIDIA Test 9000", "date": "2025-01-02T03:04:05Z"}
    contenders = [contender(n, right) for n in ("naive", "fa2_triton")] + [contender("cudnn", right, "peer")]
    record["columns"] = [c.to_json() for c in contenders]
    record["absent"] = [{"name": "fa3", "title": "FA3", "reason": "package fa3-fwd is not usable"}]
    result = run_cell(race(*contenders), SMALL)["results"]
    for cell in cells:
        results = json.loads(json.dumps(result))
        for ms, entry in zip((4.0, 1.0, 2.0), results.values(), strict=True):
            entry |= timing.summarize([ms]) | {"samples_ms": [ms], "tflops": cell.flops / ms / 1e9}
        if cell.len_q == 1024:
            results["naive"] = {"status": "oom", "message": "out of memory"}
        record["cells"].append(cell.to_json() | {"results": results})
    record["ceilings"] = {
        "bf16": [{"m": 1, "n": 2, "k": 3, "tflops": 700.0}, {"m": 4, "n": 4, "k": 4, "tflops": 750.0}],
        "copy": [{"bytes": 8, "tb_s": 3.0}],
    }
    record["complete"] = True
    path = tmp_path / "forward_test-9000_2025-01-02.json"
    records.save(record, path)
    return record, path


def test_a_record_survives_the_round_trip(recorded):
    record, path = recorded
    assert records.load(path) == json.loads(json.dumps(record))
    assert not list(path.parent.glob(".*tmp"))
    for key in ("date", "device", "torch", "commit", "dirty", "command", "python"):
        assert key in record["provenance"]
    assert json.loads(records.dumps({"x": [float("nan"), float("inf"), 1.5]})) == {"x": [None, None, 1.5]}


def test_other_files_are_refused_in_words(tmp_path):
    (tmp_path / "x.json").write_text('{"schema_version": 99}')
    (tmp_path / "y.json").write_text("{")
    for name in ("x.json", "y.json", "none.json"):
        with pytest.raises(ValueError, match=name):
            records.load(tmp_path / name)


def test_file_names_come_from_device_and_date_and_replace_nothing(tmp_path):
    assert records.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    first = records.default_path("forward", "NVIDIA H200", "2025-01-02T03:04:05Z", folder=tmp_path)
    assert first.name == "forward_h200_2025-01-02.json"
    first.write_text("kept")
    again = records.default_path("forward", "NVIDIA H200", "2025-01-02T03:04:05Z", folder=tmp_path)
    assert again.name == "forward_h200_2025-01-02_030405.json"


def test_newest_prefers_complete_and_later_runs(recorded):
    record, path = recorded
    later = record | {"provenance": record["provenance"] | {"date": "2025-02-01T00:00:00Z"}}
    records.save(later, path.with_name("forward_b.json"))
    records.save(later | {"complete": False}, path.with_name("forward_c.json"))
    assert records.newest("forward", path.parent)[0].name == "forward_b.json"
    assert records.newest("nothing", path.parent) is None


def test_markdown_has_speed_error_ratio_device_and_date(recorded):
    text = tables.markdown(recorded[0])
    assert "NVIDIA Test 9000, 2025-01-02" in text and "750 TFLOP/s" in text
    assert "out of memory" in text and "Absent: FA3" in text
    assert "FA2, Triton / Cudnn" in text and "| 2.00 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| 64 | 32x32 | 512 |"))
    assert f"{4 * 16384 * 512 * 32 * 64 / 1e-3 / 1e12:.0f} (" in row


def test_terminal_table_shows_ratios(recorded):
    text = text_of(tables.cell_table(recorded[0]["cells"][0], recorded[0]["columns"]))
    assert "0.50" in text and "2.00" in text and "1.000 (1.000-1.000)" in text


def test_plots_come_from_the_json_alone(recorded, capsys):
    _, path = recorded
    assert cli.main(["--plot", str(path)]) == 0
    pictures = {p.name for p in path.parent.glob("*.png")}
    assert "forward_test-9000_2025-01-02_paper_bf16.png" in pictures
    svg = path.with_name("forward_test-9000_2025-01-02_paper_bf16.svg").read_bytes()
    assert len(svg) > 10_000
    figure = plots.speed_figure(recorded[0], "paper", "bf16")
    assert any("NVIDIA Test 9000, 2025-01-02" in t.get_text() for t in figure.texts)
    assert len(figure.axes) == 4


def test_a_version_keeps_its_colour():
    assert plots.style("mine:fa2_triton")["color"] == plots.style("fa2_triton")["color"]
    names = ("naive", "explicit", "fa1_triton", "fa2_triton", "math", "torch_fa2", "cudnn", "fa3", "fa4")
    assert len({plots.style(n)["color"] for n in names}) == len(names)
    assert len({plots.style(n)["marker"] for n in names}) == len(names)


def test_roofline_has_the_runs_own_ceilings_and_points(recorded):
    record, _ = recorded
    assert roofline.ceilings(record) == (750.0, 3.0)
    found = roofline.points(record, head_dim=64, length=512)
    assert [p.name for p in found] == ["naive", "fa2_triton", "cudnn"]
    assert found[0].intensity < found[1].intensity
    figure = roofline.roofline_figure(record, head_dim=64, length=512)
    assert any("2025-01-02" in t.get_text() for t in figure.texts)
    with pytest.raises(ValueError, match="no timed"):
        roofline.roofline_figure(record, head_dim=256, length=512)


def test_counted_bytes_agree_with_the_formulas_of_the_course():
    from fa_reference.counts import naive_hbm_bytes

    cell = grid.Cell("paper", 2, 3, 3, 256, 256, 64, False)
    assert traffic.counted("explicit", cell).bytes == 6 * naive_hbm_bytes(256, 256, 64)
    assert traffic.from_hbm("cudnn", cell).bytes == 6 * (4 * 256 * 64 * 2 + 4 * 256)
    assert traffic.counted("math", cell) is None


# --- without a GPU


def test_without_a_gpu_recorded_results_are_called_recorded(recorded, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", recorded[1].parent)
    console = Console(file=io.StringIO(), width=200)
    cpu.show_recorded(console)
    text = console.file.getvalue()
    assert "Recorded earlier on NVIDIA Test 9000, 2025-01-02" in text
    assert "NOT measured here" in text and "nothing in them was measured on this machine" in text


def test_without_a_gpu_or_records_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    console = Console(file=io.StringIO(), width=200)
    cpu.show_recorded(console)
    assert "No GPU results are recorded" in console.file.getvalue()


def test_counted_tiles_are_those_of_the_solutions():
    hopper = torch.device("cpu")  # the solutions take a machine without a GPU for a Hopper one
    fa1, fa2 = load_version("fa1_triton"), load_version("fa2_triton")
    assert {d: fa1.key_block(d, hopper) for d in traffic.FA1_BLOCK_K} == traffic.FA1_BLOCK_K
    assert {d: fa2.config_for(d, hopper).block_q for d in traffic.FA2_BLOCK_Q} == traffic.FA2_BLOCK_Q


def test_fa1_moves_fewer_bytes_than_any_naive_version():
    for d in traffic.FA1_BLOCK_K:
        for n in (512, 2048, 16384):
            cell = grid.Cell("bytes", 1, 1, 1, n, n, d, False)
            assert traffic.counted("fa1_triton", cell).bytes < traffic.counted("explicit", cell).bytes, (d, n)


def test_counted_bytes_equal_the_formula():
    rows = cpu.counted_rows()
    assert len(rows) == 2
    assert all(moved == formula for _, moved, formula in rows)


def test_cpu_run_times_what_runs_here(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(cpu, "CPU_LENGTHS", (32,))
    console = Console(file=io.StringIO(), width=200)
    record = cpu.run_cpu(console, ["naive"], rounds=2, clock=FakeClock())
    assert record["kind"] == "cpu" and record["complete"]
    assert all(c["results"]["naive"]["status"] == "ok" for c in record["cells"])
    assert "No CUDA GPU here" in console.file.getvalue()


# --- the whole GPU path, with the device replaced


def test_a_gpu_run_from_start_to_end_on_a_fake_device(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.timing, "CudaClock", lambda while_running: FakeClock())
    monkeypatch.setattr(gpu.ceilings, "warm_up", lambda: None)
    monkeypatch.setattr(gpu.ceilings, "MATMULS", ((64, 64, 64), (64, 64, 128)))
    monkeypatch.setattr(gpu.ceilings, "COPY_BYTES", (1024,))
    monkeypatch.setattr(gpu, "peer_contenders", lambda names: ([contender("cudnn", right, "peer")], []))
    console = Console(file=io.StringIO(), width=200)
    path = tmp_path / "forward_x.json"
    record, _ = gpu.run_gpu(console, [SMALL], ["naive"], None, None, 3, path, "", device="cpu")
    text = console.file.getvalue()
    assert "solutions" in text and "minutes" in text and str(path) in text
    kept = records.load(path)
    assert kept["complete"] and kept["ceilings"]["bf16"][0]["tflops"] > 0 and kept["ceilings"]["copy"][0]["tb_s"] > 0
    naive = kept["cells"][0]["results"]["naive"]
    assert naive["status"] == "ok" and naive["of_best_matmul"] > 0 and len(naive["samples_ms"]) == 3


def test_wrong_calls_are_said_in_one_line(capsys):
    for arguments in (["--grid", "nope"], ["--rounds", "0"], ["--len", "x"], ["--impl", "/no/folder"], ["--zz"]):
        assert cli.main(arguments) == 2, arguments
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_monitor_samples_seldom_and_never_raises(monkeypatch):
    watch = monitor.Monitor()
    monkeypatch.setattr(watch, "_read", lambda: (1755.0, 690.0))
    watch()
    watch()
    assert watch.take() == [(1755.0, 690.0)] and watch.take() == []


# --- measured bytes


def ncu_text(rows):
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Kernel Name", "dram__bytes_read.sum", "dram__bytes_write.sum"])
    writer.writerow(["", "", "byte", "Kbyte"])
    writer.writerows(rows)
    return "==PROF== Connected to process 1\n" + out.getvalue()


def test_ncu_output_is_added_up():
    text = ncu_text([["0", "gemm", "1,000", "2"], ["1", "softmax", "500", "1"]])
    entry = profile.profile_version("explicit", SMALL, lambda *a, **k: subprocess.CompletedProcess(a, 0, text, ""))
    assert (entry["read_bytes"], entry["write_bytes"], entry["measured_bytes"]) == (1500.0, 3000.0, 4500.0)
    assert entry["counted_bytes"] > 0 and "measured" in profile.describe(entry)


def test_ncu_that_fails_or_is_missing_is_said(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "==ERROR== no permission", "")
    entry = profile.profile_version("naive", SMALL, lambda *a, **k: failed)
    assert "no permission" in entry["message"] and "measured_bytes" not in entry
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    said = []
    assert profile.profile_all(None, said.append) == 1 and "ncu" in said[0]
