"""`make doctor`: what this machine has, and which chapters can be graded on it.

Probing (`probe`) and judging (`problems`, `gradable`) are apart: the rules are pure functions of a `Machine`, so that
they can be tested with machines that nobody here owns. A probe that finds nothing leaves None; none of them raises.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

FULLY, PARTLY, NOT_HERE = "fully", "partly", "not here"
AMPERE = (8, 0)  # first with bf16 tensor cores, ldmatrix with cp.async: what chapters 3 to 5 are written for
HOPPER = 9  # sm_90a code uses instructions that only compute capability 9.0 has
FIRST_CUDA_CHAPTER, FIRST_HOPPER_CHAPTER = 5, 6

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU: its compute capability as (major, minor), or None if unknown; its memory in GiB."""

    name: str
    capability: tuple[int, int] | None
    memory_gib: float | None = None

    @property
    def architecture(self) -> str:
        """Such as sm_90."""
        return "sm_?" if self.capability is None else "sm_{}{}".format(*self.capability)


@dataclass(frozen=True)
class Machine:
    """What was found. None (or an empty tuple) means: not there, or not to be found out."""

    python: str = ""
    interpreter: str = ""
    system: str = ""
    cpu_cores: int | None = None
    smi_gpus: tuple[Gpu, ...] = ()  # what the driver's nvidia-smi lists
    torch_gpus: tuple[Gpu, ...] = ()  # what torch can use
    driver: str | None = None
    torch: str | None = None
    torch_cuda: str | None = None  # CUDA release torch was built for; None for a CPU build
    torch_cuda_error: str | None = None  # what torch says when it cannot use the GPU
    triton: str | None = None
    nvrtc: str | None = None  # version of the run-time compiler, if it compiled a kernel for sm_90a just now
    nvrtc_error: str | None = None
    cuda_core: str | None = None
    c_compiler: str | None = None
    python_headers: bool = False
    jupyter: str | None = None


@dataclass(frozen=True)
class Verdict:
    """How much of a chapter can be graded here: FULLY, PARTLY or NOT_HERE, and why."""

    chapter: int
    outcome: str
    reason: str


def problems(machine: Machine) -> list[str]:
    """What is wrong with this machine and what to do about it; an empty list if nothing is.

    The most important case is a GPU that nvidia-smi sees and torch does not: it must not pass as "no GPU".
    """
    found = []
    if machine.torch is None:
        found.append("torch is missing: run `make setup`, or name a Python that has it with PYTHON=...")
    elif machine.smi_gpus and not machine.torch_gpus:
        name = machine.smi_gpus[0].name
        if machine.torch_cuda is None:
            found.append(
                f"nvidia-smi sees a GPU ({name}) but torch {machine.torch} is a CPU build. Run `make clean-env setup` "
                "to install a CUDA build; if that brings a CPU build again, your pip settings name an index or folder "
                "that has only CPU builds. With PYTHON=..., install a CUDA build of torch there."
            )
        else:
            found.append(
                f"nvidia-smi sees a GPU ({name}) but torch {machine.torch}, built for CUDA {machine.torch_cuda}, "
                f"cannot use it: {machine.torch_cuda_error or 'torch gives no reason'}. Usual causes: driver "
                f"{machine.driver or '(unknown)'} is too old for that CUDA release (update the driver), "
                "CUDA_VISIBLE_DEVICES hides the GPU, or a container was started without it."
            )
    elif machine.torch_gpus and not machine.smi_gpus:
        found.append(
            "torch uses a GPU but nvidia-smi does not answer: clocks and power cannot be recorded by `make bench`."
        )
    if machine.triton is None:
        found.append("triton is missing: chapters 3 and 4 need it. Run `make setup` (triton exists for Linux only).")
    if machine.torch_gpus and machine.triton and not _triton_can_launch(machine):
        missing = "a C compiler" if machine.c_compiler is None else "Python's header files"
        package = "gcc" if machine.c_compiler is None else "python3-dev"
        found.append(
            f"{missing} not found: on a GPU, Triton builds a small launcher in C. "
            f"Install it (Debian, Ubuntu: sudo apt install {package})."
        )
    return found


def _triton_can_launch(machine: Machine) -> bool:
    return machine.c_compiler is not None and machine.python_headers


def gradable(machine: Machine, chapters: Sequence[int]) -> list[Verdict]:
    """Say for every chapter number how much of it can be graded on this machine, and why."""
    return [Verdict(number, *_gradable(machine, number)) for number in chapters]


def _gradable(machine: Machine, chapter: int) -> tuple[str, str]:
    if machine.torch is None:
        return NOT_HERE, "torch is missing"
    gpu = machine.torch_gpus[0] if machine.torch_gpus else None
    no_gpu = "torch cannot use this machine's GPU (see below)" if machine.smi_gpus else "no NVIDIA GPU"
    if chapter < 3:
        return FULLY, "needs no GPU"
    if chapter < FIRST_CUDA_CHAPTER:
        return _gradable_triton(machine, gpu, no_gpu)
    return _gradable_cuda(machine, gpu, no_gpu, chapter)


def _gradable_triton(machine: Machine, gpu: Gpu | None, no_gpu: str) -> tuple[str, str]:
    if machine.triton is None:
        return PARTLY, "the Python part; the kernels need triton"
    if gpu is None:
        return (
            PARTLY,
            f"{no_gpu}: all answers are graded on the CPU, kernels through Triton's interpreter; not speed",
        )
    if not _triton_can_launch(machine):
        return PARTLY, "the Python part; Triton cannot build its launcher (see below)"
    if gpu.capability is None or gpu.capability < AMPERE:
        return PARTLY, f"{gpu.name} ({gpu.architecture}) is older than the kernels are written for (sm_80)"
    return FULLY, f"{gpu.name} ({gpu.architecture})"


def _gradable_cuda(machine: Machine, gpu: Gpu | None, no_gpu: str, chapter: int) -> tuple[str, str]:
    if machine.nvrtc is None:
        return NOT_HERE, "the CUDA compiler (NVRTC through cuda-core) is missing or does not work"
    compiled = "kernels are compiled and their instructions checked, not run"
    if gpu is None:
        return PARTLY, f"{no_gpu}: {compiled}"
    if chapter >= FIRST_HOPPER_CHAPTER and (gpu.capability is None or gpu.capability[0] != HOPPER):
        why = f"{gpu.name} ({gpu.architecture}) cannot run sm_90a code, which only Hopper (H100, H200) runs"
        return PARTLY, f"{why}: {compiled}"
    if gpu.capability is None or gpu.capability < AMPERE:
        return PARTLY, f"{gpu.name} ({gpu.architecture}) lacks instructions of sm_80: {compiled}"
    return FULLY, f"{gpu.name} ({gpu.architecture})"


# ---- probing ---------------------------------------------------------------------------------------------------


def _try(probe: Callable[[], T], otherwise: T) -> T:
    """The probe's answer; `otherwise` whatever goes wrong: broken installations raise all sorts of errors."""
    try:
        return probe()
    except Exception:
        return otherwise


def _version(distribution: str) -> str | None:
    return _try(lambda: importlib.metadata.version(distribution), None)


def _system() -> str:
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    wsl = "microsoft" in platform.release().lower()
    return f"{release}{' in WSL2' if wsl else ''}, {platform.machine()}"


def parse_smi(text: str) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and driver version from `nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version` (CSV, MiB)."""
    gpus, driver = [], None
    for line in text.strip().splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4:
            continue
        major, dot, minor = fields[1].partition(".")
        capability = (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None
        memory = float(fields[2]) / 1024 if fields[2].replace(".", "", 1).isdigit() else None
        gpus.append(Gpu(fields[0], capability, memory))
        driver = fields[3]
    return tuple(gpus), driver


def _smi() -> tuple[tuple[Gpu, ...], str | None]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    return parse_smi(subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout)


def _torch() -> dict[str, object]:
    import torch

    found: dict[str, object] = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    try:
        # cuda.init() raises with the reason, where is_available() only says no.
        torch.cuda.init()
        found["torch_gpus"] = tuple(
            Gpu(p.name, (p.major, p.minor), p.total_memory / 2**30)
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        )
    except Exception as error:
        found["torch_cuda_error"] = str(error).strip().partition("\n")[0].rstrip(".")
    return found


def _nvrtc() -> str:
    """Compile a kernel for sm_90a (no GPU or driver needed) and return the compiler's version."""
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    Program('extern "C" __global__ void nothing() {}', "c++", ProgramOptions(arch="sm_90a")).compile("cubin")
    _, major, minor = nvrtc.nvrtcVersion()
    return _version("nvidia-cuda-nvrtc") or f"{major}.{minor}"


def _c_compiler() -> str | None:
    names = [os.environ.get("CC"), "gcc", "clang", "cc"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def probe() -> Machine:
    """Look at this machine. Takes a few seconds (torch is imported); never raises."""
    found: dict[str, object] = {}
    found["smi_gpus"], found["driver"] = _try(_smi, ((), None))
    found.update(_try(_torch, {}))
    try:
        found["nvrtc"] = _nvrtc()
    except Exception as error:
        found["nvrtc_error"] = str(error).strip().partition("\n")[0]
    return Machine(
        python=platform.python_version(),
        interpreter=sys.executable,
        system=_try(_system, platform.platform()),
        cpu_cores=os.cpu_count(),
        triton=_version("triton"),
        cuda_core=_version("cuda-core"),
        c_compiler=_try(_c_compiler, None),
        python_headers=_try(lambda: Path(sysconfig.get_paths()["include"], "Python.h").exists(), False),
        jupyter=_version("jupyterlab"),
        **found,
    )


# ---- showing ---------------------------------------------------------------------------------------------------


def _describe(gpus: tuple[Gpu, ...], none: str) -> str:
    def one(gpu: Gpu) -> str:
        memory = "" if gpu.memory_gib is None else f", {gpu.memory_gib:.0f} GiB"
        return f"{gpu.name} ({gpu.architecture}{memory})"

    return "\n".join(one(gpu) for gpu in gpus) or none


def rows(machine: Machine) -> list[tuple[str, str]]:
    """The table of what was found, as (name, description)."""
    if machine.torch is None:
        torch = "missing"
    else:
        build = f"built for CUDA {machine.torch_cuda}" if machine.torch_cuda else "CPU build"
        torch = f"{machine.torch} ({build})"
    nvrtc = machine.nvrtc or f"not working: {machine.nvrtc_error or 'unknown reason'}"
    return [
        ("Python", f"{machine.python} ({machine.interpreter})"),
        ("system", f"{machine.system}, {machine.cpu_cores or '?'} CPU cores"),
        ("GPU, says nvidia-smi", _describe(machine.smi_gpus, "none")),
        ("GPU, says torch", _describe(machine.torch_gpus, "none")),
        ("driver", machine.driver or "none"),
        ("torch", torch),
        ("triton", machine.triton or "missing"),
        ("CUDA compiler (NVRTC)", nvrtc),
        ("cuda-core", machine.cuda_core or "missing"),
        ("C compiler", machine.c_compiler or "none (Triton needs one, on a GPU only)"),
        ("JupyterLab", machine.jupyter or "missing: `make lab` needs it"),
    ]


def show() -> int:
    """Print what this machine has, which chapters can be graded, and what to mend. Returns 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fa_reference.course import CHAPTERS

    machine = probe()
    console = Console()

    found = Table(title="This machine", title_justify="left", show_header=False)
    found.add_column(no_wrap=True)
    found.add_column(overflow="fold")
    for name, description in rows(machine):
        found.add_row(name, escape(description))
    console.print(found)

    colours = {FULLY: "green", PARTLY: "yellow", NOT_HERE: "red"}
    table = Table(title="What can be graded here", title_justify="left")
    for heading in ("chapter", "graded", "why"):
        table.add_column(heading, no_wrap=heading == "graded")
    titles = {chapter.number: chapter.title for chapter in CHAPTERS}
    for verdict in gradable(machine, sorted(titles)):
        outcome = f"[{colours[verdict.outcome]}]{verdict.outcome}[/]"
        table.add_row(f"{verdict.chapter} {escape(titles[verdict.chapter])}", outcome, escape(verdict.reason))
    console.print(table)

    for problem in problems(machine):
        console.print(f"[red bold]Mend this:[/] {escape(problem)}")
    return 0
