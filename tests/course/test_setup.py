"""The Makefile, the set-up script, the command line and the doctor: on this machine and on invented ones."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fa_reference import doctor
from fa_reference.course import CHAPTERS, ROOT
from fa_reference.doctor import FULLY, NOT_HERE, PARTLY, Gpu, Machine

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# A make inside `make test` must not inherit what that one was called with.
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if name not in {"PYTHON", "CHAPTER", "IMPL", "SOLUTION", "JSON", "ONLY", "ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
}


def make(*arguments: str, folder: Path = ROOT, path: str | None = None) -> subprocess.CompletedProcess:
    environment = CLEAN | ({"PATH": path} if path else {})
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def course(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fa_reference", *arguments]
    return subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=120)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"python-given"}


# ---- make ------------------------------------------------------------------------------------------------------


def test_make_alone_lists_every_target_in_one_line():
    listed = make().stdout
    for target in targets():
        lines = [line for line in listed.splitlines() if re.match(rf"  {target}\s+\S", line)]
        assert len(lines) == 1, target
    assert {"check", "hint", "progress", "watch", "reset", "lab", "bench", "test", "doctor"} <= targets()
    assert "Exit status" in listed


@pytest.mark.parametrize("target", ["check", "hint", "watch", "reset"])
def test_a_missing_chapter_is_said_in_one_line_before_any_set_up(target, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    result = make(target, folder=tmp_path)
    assert result.returncode == 2
    assert f"make {target} CHAPTER=1" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_given_python_must_exist():
    result = make("doctor", "PYTHON=no-such-python")
    assert result.returncode == 2
    assert "no such program" in result.stderr


# ---- set-up, with a python3 that only pretends -----------------------------------------------------------------

PRETENDER = """#!/bin/sh
# $version and $venv_module come from the test; everything else that the set-up asks of Python succeeds at once.
case "$*" in
    *version_info*) test "${{version#3.}}" -ge 11 ;;
    *python_version*) echo "$version.0" ;;
    *'import venv'*) test "$venv_module" = yes ;;
    *'-m venv'*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *'-m pip'*) echo "$@" >>pip-calls; {pip} ;;
    *'importlib.metadata'*) {torch_wants_triton} ;;
    *) : ;;
esac
"""


@pytest.fixture
def room(tmp_path):
    """A copy of what the set-up reads, in a folder with a space in its name, and a way to run it there."""
    folder = tmp_path / "my course"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "tools", "constraints"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in "sh make cat cksum touch uname date sed awk tail grep df rm mkdir cp flock env sleep test".split():
        if found := shutil.which(name):
            (tools / name).symlink_to(found)

    class Room:
        def __init__(self):
            self.folder = folder

        def prepare(self, version="3.11", venv_module="yes", pip=":", torch_wants_triton="false", gpu=False):
            text = PRETENDER.format(pip=pip, torch_wants_triton=torch_wants_triton)
            text = text.replace("\n", f"\nversion={version} venv_module={venv_module}\n", 1)
            self._tool("python3", text)
            if gpu:
                self._tool("nvidia-smi", "#!/bin/sh\necho 'GPU 0: An invented GPU'\n")
            return self

        def _tool(self, name, text):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)

        def setup(self):
            return make("setup", folder=folder, path=str(tools))

        def start(self):
            command = ["make", "setup"]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
            # A shell starts `make test &` with Ctrl-C ignored, and that would be handed on.
            options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
            return subprocess.Popen(command, cwd=folder, env=CLEAN | {"PATH": str(tools)}, **options)

        @property
        def pip_calls(self):
            calls = folder / "pip-calls"
            return calls.read_text().splitlines() if calls.exists() else []

        @property
        def ready(self):
            return (folder / ".venv" / "ready").exists()

    return Room()


def test_setup_runs_once_and_then_not_again(room):
    room.prepare()
    first = room.setup()
    assert first.returncode == 0, first.stderr
    assert room.ready
    calls = len(room.pip_calls)
    assert calls > 0
    second = room.setup()
    assert second.returncode == 0
    assert second.stdout.splitlines() == ["Ready: .venv/bin/python"]
    assert len(room.pip_calls) == calls


def test_setup_follows_a_changed_list_of_dependencies_but_not_a_new_time_stamp(room):
    room.prepare().setup()
    calls = len(room.pip_calls)
    listed = room.folder / "pyproject.toml"
    later = time.time() + 5
    os.utime(listed, (later, later))
    assert room.setup().returncode == 0
    assert len(room.pip_calls) == calls
    listed.write_text(listed.read_text() + "\n# changed\n")
    os.utime(listed, (later + 5, later + 5))
    assert room.setup().returncode == 0
    assert len(room.pip_calls) > calls


def test_old_python_is_one_line(room):
    result = room.prepare(version="3.10").setup()
    assert result.returncode == 2
    assert "needs Python 3.11 or newer; found 3.10.0" in result.stderr
    assert not room.ready


def test_missing_venv_module_names_the_package(room):
    result = room.prepare(venv_module="no").setup()
    assert result.returncode == 2
    assert "python3.11-venv" in result.stderr
    assert not room.ready


def test_failing_pip_shows_the_log_and_leaves_nothing_ready(room):
    result = room.prepare(pip="echo 'no route to host' >&2; exit 1").setup()
    assert result.returncode == 2
    assert "no route to host" in result.stderr
    assert "What to do" in result.stderr
    assert not room.ready
    assert room.prepare().setup().returncode == 0
    assert room.ready


def test_interrupted_setup_is_not_ready_and_starts_afresh(room):
    started = room.prepare(pip="sleep 30").start()
    deadline = time.monotonic() + 30
    while not room.pip_calls and time.monotonic() < deadline:
        time.sleep(0.05)
    (room.folder / ".venv" / "half").touch()
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=30)
    assert started.returncode != 0
    assert "interrupted" in errors
    assert not room.ready
    assert room.prepare().setup().returncode == 0
    assert room.ready
    assert not (room.folder / ".venv" / "half").exists()


def test_an_environment_that_is_not_ours_is_left_alone(room):
    (room.folder / ".venv").mkdir()
    (room.folder / ".venv" / "precious").touch()
    for target in ("setup", "clean-env"):
        result = make(target, folder=room.prepare().folder)
        assert result.returncode == 2
        assert "did not make" in result.stderr or "not made by" in result.stderr
    assert (room.folder / ".venv" / "precious").exists()


def test_without_a_gpu_the_cpu_build_is_tried_first(room):
    room.prepare(pip="case \"$*\" in *+cpu*) echo 'ERROR: No matching distribution found'; exit 1 ;; esac").setup()
    torches = [call for call in room.pip_calls if " torch=" in call]
    assert "+cpu" in torches[0]
    assert "+cpu" not in torches[1]
    assert room.ready


def test_a_cpu_build_that_fails_for_another_reason_is_not_replaced(room):
    room.prepare(pip="echo 'no space left on device'; exit 1").setup()
    assert len(room.pip_calls) == 1


def test_with_a_gpu_no_cpu_build_is_asked_for_and_torch_keeps_its_own_triton(room):
    room.prepare(gpu=True, torch_wants_triton="true").setup()
    assert room.ready
    assert not any("+cpu" in call for call in room.pip_calls)
    assert "constraints/cuda.txt" in room.pip_calls[-1]
    for file in ("common.txt", "cuda.txt"):
        assert not re.search(r"^(triton|nvidia-cuda-nvrtc)\b", (ROOT / "constraints" / file).read_text(), re.MULTILINE)


def test_without_a_gpu_triton_is_pinned(room):
    room.prepare().setup()
    assert "constraints/cpu.txt" in room.pip_calls[-1]
    assert re.search(r"^triton==", (ROOT / "constraints" / "cpu.txt").read_text(), re.MULTILINE)


# ---- command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["check", "99"],
        ["check", "one"],
        ["check", "1", "--no-such-option"],
        ["check", "1", "--impl", "no/such/folder"],
        ["check", "1", "--impl", "solutions/01_naive", "--solution"],
        ["hint", "99"],
        ["hint", "1", "--function", "no_such_function"],
        ["watch", "99"],
        ["reset", "99"],
        ["lab", "--chapter", "99"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_one_line_and_status_2(arguments):
    result = course(*arguments)
    said = (result.stdout + result.stderr).strip()
    assert result.returncode == 2, said
    assert len(said.splitlines()) == 1
    assert "Traceback" not in said


def test_help_imports_neither_torch_nor_triton():
    code = (
        "import sys; from fa_reference.cli import main; main(['--help']); print({'torch', 'triton'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("set()"), result.stdout + result.stderr


def test_missing_package_is_one_line(tmp_path):
    # -S and an empty path: no site-packages, so not even typer.
    environment = {"PATH": CLEAN["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-m", "fa_reference", "progress"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "no module" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# ---- doctor ----------------------------------------------------------------------------------------------------

LAPTOP = Machine(torch="2.13.0+cpu", triton="3.6.0", nvrtc="13.0.88", c_compiler="/usr/bin/gcc", python_headers=True)


def with_gpu(name: str, capability: tuple[int, int], **changes) -> Machine:
    gpus = (Gpu(name, capability, 80.0),)
    found = {"torch": "2.13.0+cu130", "torch_cuda": "13.0", "driver": "580.65", "smi_gpus": gpus, "torch_gpus": gpus}
    return Machine(**(vars(LAPTOP) | found | changes))


def outcomes(machine: Machine) -> str:
    """One letter for each of the chapters 1 to 10: f(ully), p(artly), n(ot here)."""
    return "".join(verdict.outcome[0] for verdict in doctor.gradable(machine, range(1, 11)))


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        pytest.param(LAPTOP, "ffpppppppp", id="no GPU"),
        pytest.param(with_gpu("NVIDIA A100-SXM4-80GB", (8, 0)), "fffffppppp", id="A100"),
        pytest.param(with_gpu("NVIDIA GeForce RTX 4090", (8, 9)), "fffffppppp", id="4090"),
        pytest.param(with_gpu("NVIDIA H100 80GB HBM3", (9, 0)), "ffffffffff", id="H100"),
        pytest.param(with_gpu("NVIDIA H200", (9, 0)), "ffffffffff", id="H200"),
        pytest.param(with_gpu("NVIDIA B200", (10, 0)), "fffffppppp", id="B200"),
        pytest.param(with_gpu("Tesla T4", (7, 5)), "ffpppppppp", id="T4"),
        pytest.param(with_gpu("NVIDIA H100", (9, 0), nvrtc=None), "ffffnnnnnn", id="H100 without NVRTC"),
        pytest.param(with_gpu("NVIDIA H100", (9, 0), c_compiler=None), "ffppffffff", id="H100 without gcc"),
        pytest.param(
            with_gpu("NVIDIA H100", (9, 0), torch_gpus=(), torch_cuda=None), "ffpppppppp", id="CPU torch on GPU"
        ),
        pytest.param(Machine(), "nnnnnnnnnn", id="nothing at all"),
    ],
)
def test_what_can_be_graded(machine, expected):
    assert outcomes(machine) == expected


def test_every_verdict_has_a_reason_and_one_of_three_outcomes():
    for machine in (Machine(), LAPTOP, with_gpu("NVIDIA B200", (10, 0)), with_gpu("?", None)):
        for verdict in doctor.gradable(machine, range(1, 11)):
            assert verdict.outcome in {FULLY, PARTLY, NOT_HERE}
            assert verdict.reason


def test_a_b200_is_told_that_it_cannot_run_hopper_code():
    hopper = doctor.gradable(with_gpu("NVIDIA B200", (10, 0)), [6])[0]
    assert "NVIDIA B200 (sm_100) cannot run sm_90a code" in hopper.reason


def test_a_gpu_that_torch_does_not_use_is_never_taken_for_no_gpu():
    cpu_build = with_gpu("NVIDIA H100", (9, 0), torch="2.13.0+cpu", torch_cuda=None, torch_gpus=())
    (problem,) = doctor.problems(cpu_build)
    assert "CPU build" in problem
    assert "make clean-env setup" in problem
    assert "torch cannot use this machine's GPU" in doctor.gradable(cpu_build, [3])[0].reason

    old_driver = with_gpu("NVIDIA H100", (9, 0), torch_gpus=(), driver="525.60", torch_cuda_error="driver too old")
    (problem,) = doctor.problems(old_driver)
    assert "525.60" in problem
    assert "driver too old" in problem


def test_a_machine_without_faults_has_no_problems():
    for machine in (LAPTOP, with_gpu("NVIDIA A100", (8, 0)), with_gpu("NVIDIA H100", (9, 0))):
        assert doctor.problems(machine) == []


def test_missing_parts_are_named():
    assert any("torch is missing" in p for p in doctor.problems(Machine()))
    assert any("gcc" in p for p in doctor.problems(with_gpu("NVIDIA H100", (9, 0), c_compiler=None)))
    assert any("python3-dev" in p for p in doctor.problems(with_gpu("NVIDIA H100", (9, 0), python_headers=False)))


def test_nvidia_smi_is_read_also_where_it_does_not_know():
    text = "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65.06\nOld GPU, [N/A], [N/A], 580.65.06\nsome warning\n"
    gpus, driver = doctor.parse_smi(text)
    assert [(gpu.name, gpu.capability) for gpu in gpus] == [("NVIDIA H100 80GB HBM3", (9, 0)), ("Old GPU", None)]
    assert round(gpus[0].memory_gib) == 80
    assert gpus[1].memory_gib is None
    assert driver == "580.65.06"
    assert doctor.parse_smi("") == ((), None)


def test_probing_survives_missing_tools(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("broken installation")

    for name in ("_smi", "_torch", "_nvrtc", "_system", "_c_compiler"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor.importlib.metadata, "version", broken)
    machine = doctor.probe()
    assert machine.torch is None
    assert machine.nvrtc_error == "broken installation"
    assert all(description for _, description in doctor.rows(machine))


def test_doctor_lists_every_chapter():
    result = course("doctor")
    assert result.returncode == 0, result.stderr
    for chapter in CHAPTERS:
        assert re.search(rf"│ {chapter.number} \S", result.stdout)
