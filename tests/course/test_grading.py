"""The grader: three outcomes, exit statuses, and answers that are hostile, clumsy or unfinished."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fa_reference.course import ROOT, chapter
from fa_reference.grading import cuda
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed, NotWritten
from fa_reference.grading.properties import attention, close
from fa_reference.inputs import Case
from fa_reference.stubs import write_stubs


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fa_reference", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def ask(workshop, tmp_path):
    """ask(source, ...) -> the result of calling f of a learner's file with this source."""
    answers = []

    def ask(source: str, *args, time_limit: float = 5.0, **kwargs):
        (tmp_path / "a.py").write_text(source)
        answers.append(Answer(workshop, tmp_path, time_limit))
        return answers[-1].call("a.py", "f", *args, **kwargs)

    yield ask
    for answer in answers:
        answer.close()


X = Case(4, 4).make()[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(x:\n  pass", r"a.py, line 1: .*\n    def f\(x:"),
        ("def f(x):\n    return y", r"NameError: name 'y' is not defined \(a.py, line 2, in f\)\n    return y"),
        ("def g(x): pass", "a.py has no function f"),
        ("def f(): pass", r"TypeError: f\(\) takes 0 positional arguments but 1 was given"),
        ("def f(x):\n    while True: pass", "did not finish within this check's 2 s: an endless loop?"),
        ("import time\ndef f(x): time.sleep(60)", "did not finish"),
        ("while True: pass", "did not finish"),
        ("import sys\ndef f(x): sys.exit(0)", r"ended the program with sys.exit\(0\)"),
        ("import sys\nsys.exit('bye')", r"sys.exit\('bye'\)"),
        ("def f(x): return input('x? ')", "EOFError"),
        ("import numpy\ndef f(x):\n    kept = []\n    while True: kept.append(numpy.empty(2**27))", "more memory than"),
        ("def f(*, x): return x", r"TypeError: f\(\) takes 0 positional arguments but 1 was given"),
        ("class f:\n    def __init__(self): pass", "TypeError"),
        ("f = 3", "a.py has no function f"),
        ("import missing_module\ndef f(x): return x", "ModuleNotFoundError: No module named 'missing_module'"),
        ("import os\ndef f(x): os._exit(0)", "ended the whole process with exit status 0"),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import torch\ndef f(x): return torch.zeros(10**11)", "more memory than a check may use"),
        ("def f(x):\n    while True: print('x' * 10000)", "File too large"),
        ("def f(x):\n    return f(x)", "RecursionError"),
        ("def f(x): raise NotImplementedError('a.py: write it')", "not written yet: a.py: write it"),
        ("def f(x): raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(x):\n    x.add_(1)\n    return x * 2", "changed its input number 1 in place"),
        ("def f(x): return x.transpose(1, 2)", "shares memory with an input"),
        (
            "import torch.nn.functional as F\ndef f(x): return F.scaled_dot_product_attention(x, x, x)",
            "it calls torch's scaled_dot_product_attention",
        ),
    ],
)
def test_whatever_goes_wrong_is_a_failed_check_in_words(ask, source, words):
    with pytest.raises(CheckFailed) as failure:
        ask(source, X, time_limit=2.0)
    assert re.search(words, str(failure.value)), failure.value
    assert "fa_reference/grading" not in str(failure.value), "no frames of the grader"


def test_windows_line_ends_tabs_and_a_byte_order_mark_are_accepted(workshop, tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfdef f(x):\r\n\tif True:\r\n\t\treturn x + 1\r\n")
    answer = Answer(workshop, tmp_path)
    assert (answer.call("a.py", "f", X) == X + 1).all()
    answer.close()


def test_other_encodings_are_named(workshop, tmp_path):
    (tmp_path / "a.py").write_bytes("def f(x): return 'é'".encode("latin-1"))
    answer = Answer(workshop, tmp_path)
    with pytest.raises(CheckFailed, match="utf-8"):
        answer.call("a.py", "f", X)
    answer.close()


def test_cuda_files_with_windows_line_ends_tabs_and_a_byte_order_mark_are_accepted(workshop, tmp_path):
    folder = shutil.copytree(chapter(5).solution, tmp_path / "05", ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "scalar.cu").read_text().replace("    ", "\t").replace("\n", "\r\n")
    (folder / "scalar.cu").write_bytes(b"\xef\xbb\xbf" + text.encode())
    answer = Answer(workshop, folder)
    built = cuda.build(answer, "fa2_cuda.py", "scalar", "scalar.cu", 64, torch.float16, False)
    answer.close()
    assert built.count("FFMA") > 0
    stub = b"\xef\xbb\xbf// TODO: write it\r\nint x;\r\n"
    (folder / "scalar.cu").write_bytes(stub)
    answer = Answer(workshop, folder)
    with pytest.raises(NotWritten, match="scalar.cu: line 1: write it"):
        cuda.require_written(answer, "scalar.cu")
    answer.close()


def test_what_is_never_written_is_nan(ask):
    result = ask("import torch\ndef f(x):\n    o = torch.empty_like(x)\n    o[0, 0, :3] = 0\n    return o", X)
    assert result[0, 0, 3].isnan().all() and not result[0, 0, :3].isnan().any()


def test_a_write_past_the_end_is_seen(ask):
    source = "import torch\ndef f(x):\n    o = torch.empty(5)\n    torch.as_strided(o, (6,), (1,))[:] = 1\n    return o"
    with pytest.raises(CheckFailed, match=r"wrote past the end of a tensor of shape \(5,\)"):
        ask(source, X)
    with pytest.raises(CheckFailed, match="wrote past the end"):  # also if the tensor is gone by then
        ask(source.replace("return o", "del o\n    return 1"), X)
    assert ask("import torch\ndef f(x):\n    o = torch.empty(5)\n    o[:] = 1\n    return o", X).sum() == 5


def test_damage_to_torch_stays_in_the_child_of_one_check(ask):
    vandal = "import torch\ntorch.exp = torch.equal = torch.manual_seed = None\ndef f(x): return 1"
    assert ask(vandal, X) == 1
    assert (ask("import torch\ndef f(x): return torch.exp(x)", X) > 0).all()


VANDALS = {
    "the reference": "import fa_reference.gold as g, fa_reference.error_rule as e\n"
    "g.gold_attention = g.baseline_attention = e.gold_attention = lambda *a, **k: (a[0] * 0, a[0][..., 0] * 0)\n"
    "e.FACTOR = 1e30\n",
    "the judge": "import fa_reference.grading.properties as p\np.judged = p.judge = lambda *a, **k: None\n",
    "its own module": "import sys\nsys.modules['fa_reference.error_rule'] = None\n",
    "comparisons": "torch.equal = torch.allclose = torch.Tensor.__eq__ = lambda *a, **k: True\n",
}


@pytest.mark.parametrize("vandal", VANDALS.values(), ids=VANDALS)
def test_an_answer_that_patches_what_judges_it_is_judged_all_the_same(workshop, tmp_path, vandal):
    body = "def forward(q, k, v, *, causal, scale):\n    return q * 0, q[..., 0] * 0\n"
    (tmp_path / "a.py").write_text(f"import torch\n{vandal}{body}")
    answer = Answer(workshop, tmp_path)
    with pytest.raises(CheckFailed, match="O is all zeros"):
        attention(answer, "a.py", [Case(3, 5)])
    answer.close()


def test_global_state_of_torch_ends_with_the_check(ask):
    state = "torch.set_default_dtype(torch.float64); torch.manual_seed(1); torch.set_flush_denormal(True)"
    state += "; torch.set_grad_enabled(False); torch.set_num_threads(3)"
    before = torch.random.get_rng_state()
    assert ask(f"import torch\n{state}\ndef f(x): return torch.zeros(1)", X).dtype == torch.float64
    assert ask("import torch\ndef f(x): return torch.zeros(1)", X).dtype == torch.float32
    assert ask("import torch\ndef f(x): return torch.is_grad_enabled()", X) is True
    assert torch.equal(before, torch.random.get_rng_state()) and torch.get_default_dtype() == torch.float32


def test_megabytes_of_print_are_cut(workshop, tmp_path):
    (tmp_path / "a.py").write_text("def f(x):\n    for i in range(10**5): print('row', i, 'x' * 90)\n    return i")
    answer = Answer(workshop, tmp_path, time_limit=20.0)
    assert answer.call("a.py", "f", X) == 10**5 - 1
    assert len(answer.printed()) < 600 and "row 99999" in answer.printed()
    answer.close()


def test_processes_that_an_answer_starts_end_with_the_check(workshop, tmp_path):
    source = (
        "import subprocess, threading, time\ndef f(x): return subprocess.Popen(['sleep', '300']).pid\n"
        "def g(x):\n    threading.Thread(target=time.sleep, args=(300,)).start()\n    return 1\n"
    )
    (tmp_path / "a.py").write_text(source)
    answer = Answer(workshop, tmp_path)
    pid = answer.call("a.py", "f", X)
    assert answer.call("a.py", "g", X) == 1
    answer.close()
    time.sleep(0.2)
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("q.to_sparse(), q[..., 0] * 1", "o must be a torch.Tensor; it is a torch.sparse_coo tensor"),
        ("q.to('meta'), q[..., 0] * 1", "o must be a torch.Tensor; it is a meta tensor"),
        ("q.to(torch.complex64), q[..., 0] * 1", "o must have dtype torch.float32; it has torch.complex64"),
        ("[q * 1, q * 1, q * 1]", r"must return the pair \(o, lse\); it returned a list"),
        ("q, q[..., 0] * 1", "shares memory with an input"),
        ("(q * 1).requires_grad_(), q[..., 0] * 1", "likely bug|RMS error"),
        ("q * 1, None", "lse must be a torch.Tensor; it is a NoneType"),
        ("{'o': q * 1, 'lse': q[..., 0]}", r"must return the pair \(o, lse\); it returned a dict"),
    ],
)
def test_odd_results_are_named(workshop, tmp_path, returned, words):
    (tmp_path / "a.py").write_text(f"import torch\ndef forward(q, k, v, *, causal, scale):\n    return {returned}\n")
    answer = Answer(workshop, tmp_path)
    with pytest.raises(CheckFailed, match=words):
        attention(answer, "a.py", [Case(3, 5)])
    answer.close()


def test_other_types_are_named(ask):
    assert ask("def f(x): return x.numpy()", X).type_name == "numpy.ndarray"
    assert ask("def f(x): return object()", X).type_name == "object"


def test_records_go_there_and_back(ask, workshop, tmp_path):
    source = (
        "from typing import NamedTuple\nclass State(NamedTuple):\n    m: float\n    l: float\n"
        "def f(x): return State(1.0, 2.0)\ndef g(s): return s.m + s.l\n"
    )
    state = ask(source, X)
    assert (state.m, state.l) == (1.0, 2.0) and list(state) == [1.0, 2.0]
    answer = Answer(workshop, tmp_path)
    assert answer.call("a.py", "g", state) == 3.0
    answer.close()


def test_layouts_survive_the_way_to_the_child(ask):
    q, _, _ = Case(5, 7, heads_q=2, layout="padded").make()
    assert ask("def f(x): return [list(x.stride()), x.storage_offset()]", q) == [list(q.stride()), q.storage_offset()]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("return q * 1", r"must return the pair \(o, lse\); it returned a Tensor"),
        ("return None", "it returned a NoneType"),
        ("return q * 1, q[..., 0].double()", "lse must have dtype torch.float32; it has torch.float64"),
        ("return q.half(), q[..., 0] * 1", "o must have dtype torch.float32; it has torch.float16"),
        ("return q[:, :, :2] * 1, q[..., 0] * 1", r"o must have shape \(1, 1, 3, 64\); it has \(1, 1, 2, 64\)"),
        ("return q.numpy(), q[..., 0] * 1", "o must be a torch.Tensor; it is a numpy.ndarray"),
        ("return q * 0, q[..., 0] * 0", "seen: O is all zeros"),
        ("return torch.empty_like(q), q[..., 0] * 0", "O is NaN or infinite everywhere: was it written at all"),
    ],
)
def test_wrong_results_are_named(workshop, tmp_path, returned, words):
    (tmp_path / "a.py").write_text(f"import torch\ndef forward(q, k, v, *, causal, scale):\n    {returned}\n")
    answer = Answer(workshop, tmp_path)
    with pytest.raises(CheckFailed, match=words) as failure:
        attention(answer, "a.py", [Case(3, 5)])
    answer.close()
    assert "smallest failing case: batch 1, heads 1/1, len_q 3, len_k 5" in str(failure.value)


WRONG = """
import torch

def forward(q, k, v, *, causal=False, scale=None):
    g = q.shape[1] // k.shape[1]
    k, v = {repeat}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = {scores}
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    if causal:
        s = s.masked_fill(j > i + {offset}, -torch.inf)
    m = s.amax(-1, keepdim=True)
    p = torch.exp(s - m.nan_to_num(neginf=0.0))
    l = p.sum(-1, keepdim=True)
    return ({o}), ({lse})
"""
RIGHT = {
    "repeat": "k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)",
    "scores": "q @ k.mT * scale",
    "offset": "k.shape[2] - q.shape[2]",
    "o": "p @ v / torch.where(l == 0, 1, l)",
    "lse": "(m + l.log()).squeeze(-1)",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"scores": "q @ k.mT"}, "the scale is missing"),
        ({"scores": "q @ k.mT * scale**2"}, "the scale is applied twice"),
        ({"offset": "0"}, "aligned top-left"),
        ({"offset": "k.shape[2] - q.shape[2] + 1"}, "one key of the future is seen"),
        ({"offset": "k.shape[2] - q.shape[2] - 1"}, "the diagonal is hidden too"),
        ({"offset": "10**6"}, "the causal mask is missing"),
        ({"offset": "q.shape[2] - k.shape[2]"}, "the sign of the causal offset is wrong"),
        ({"repeat": "k.repeat(1, g, 1, 1), v.repeat(1, g, 1, 1)"}, "wrong KV head"),
        ({"lse": "(m + l.log()).squeeze(-1) / 0.6931471805599453"}, "lse is in base 2"),
        ({"lse": "l.log().squeeze(-1)"}, "lse lacks the maximum"),
        ({"o": "p @ v / l"}, "rows without a visible key give NaN"),
        ({"o": "p @ v"}, "O is not divided by the row sum l"),
        ({"o": "(p.half() @ v.half() / torch.where(l == 0, 1, l).half()).float()"}, "not precise enough"),
    ],
)
def test_the_likely_bug_is_named(workshop, tmp_path, change, words):
    (tmp_path / "a.py").write_text(WRONG.format(**{**RIGHT, **change}))
    answer = Answer(workshop, tmp_path)
    cases = [Case(7, 12, causal=True), Case(40, 37, heads_q=4, heads_kv=2, causal=True)]
    if words is None:
        attention(answer, "a.py", cases)
    else:
        with pytest.raises(CheckFailed, match=words):
            attention(answer, "a.py", cases)
    answer.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "99"], "no chapter 99"),
        (["check", "1", "--impl", "/nowhere"], "/nowhere"),
        (["check", "1", "--impl", ".", "--solution"], "exclude each other"),
        (["check", "1", "--only", "no such check"], "no such check"),
        (["check", "1", "--solution", "--json", "/nowhere/report.json"], "/nowhere"),
        (["hint", "99"], "no chapter 99"),
        (["reset", "99"], "no chapter 99"),
    ],
)
def test_wrong_calls_are_one_line_and_status_2(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2, done
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_report_of_a_solution(tmp_path):
    done = run("check", 1, "--solution", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0].startswith(f"Grading {chapter(1).solution} (the reference solution)")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["totals"]["failed"] == 0 and report["points"] == report["points_possible"] > 0
    assert report["exit_status"] == 0 and {c["state"] for c in report["checks"]} <= {"passed", "not graded here"}


def test_a_missing_file_and_a_broken_file_fail_without_a_traceback(tmp_path):
    done = run("check", 1, "--impl", tmp_path)
    assert done.returncode == 1 and "there is no file naive.py" in done.stdout
    write_stubs(chapter(1), tmp_path)
    with (tmp_path / "naive.py").open("a") as file:
        file.write("\ndef half_edited(:\n")
    done = run("check", 1, "--impl", tmp_path)
    assert done.returncode == 1 and "half_edited(:" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_close_names_the_first_wrong_element_and_takes_no_number_for_infinity():
    expected = torch.tensor([1.0, -torch.inf])
    close(expected.clone(), expected, "lse")
    with pytest.raises(CheckFailed, match=r"lse: 1 of 2 elements are wrong; at \[1\] it is -5, not -inf"):
        close(torch.tensor([1.0, -5.0]), expected, "lse")


def test_a_change_inside_a_tuple_is_seen(ask):
    with pytest.raises(CheckFailed, match="changed its input number 1 in place"):
        ask("def f(pair):\n    pair[1].add_(1)\n    return 0", (X, X.clone()))


def test_a_reader_who_leaves_early_gets_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m fa_reference check 1 --solution | head -2"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "Grading" in done.stdout and "Error" not in done.stdout + done.stderr


def test_an_endless_loop_ends(workshop, tmp_path):
    shutil.copy(chapter(1).solution / "naive.py", tmp_path)
    with (tmp_path / "naive.py").open("a") as file:
        file.write("\ndef forward(*a, **k):\n    while True: pass\n")
    answer = Answer(workshop, tmp_path, time_limit=1.0)
    began = time.monotonic()
    with pytest.raises(CheckFailed, match="endless loop"):
        answer.call("naive.py", "forward", X, X, X)
    assert time.monotonic() - began < 60  # most of it, where the machine is busy, is no time of the answer
    answer.close()


def test_a_busy_machine_is_not_an_endless_loop(ask):
    source = (
        "import os, subprocess, sys, time\n"
        "def f(x):\n"
        "    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(3)]\n"
        "    while time.process_time() < 3: pass\n"
        "    [other.kill() for other in others]\n"
        "    return 1\n"
    )
    began = time.monotonic()
    assert ask(source, X, time_limit=5.0) == 1
    assert time.monotonic() - began > 5, "it was not busy"
