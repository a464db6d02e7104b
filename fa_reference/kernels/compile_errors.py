"""Compiler messages that point at the learner's own file and line, also for errors that only the assembler finds."""

import re
from collections.abc import Sequence
from pathlib import Path

from fa_reference.kernels.errors import KernelCompileError

_FRONT_END = re.compile(r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?:catastrophic )?error", re.MULTILINE)
# What is said besides about a half-written file: unused names, functions that return nothing yet.
_BESIDES = re.compile(r": warning #(?:177|550|940)-D: |^Remark: The warnings can be suppressed", re.MULTILINE)
_ASSEMBLER = re.compile(r"ptxas application ptx input, line (\d+); error\s*: (.*)")
_LOCATION = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.MULTILINE)


def compile_error(
    message: str, path: Path, text: str, shown: str, folders: Sequence[Path], settings: dict[str, object]
) -> KernelCompileError:
    """The exception for NVRTC's `message` about `path`, whose name in messages is `shown`."""
    message = message.replace("\0", "")
    log = message.partition("compilation log:")[2].strip() or message
    if found := _FRONT_END.search(log):
        log = "\n\n".join(words for words in log.split("\n\n") if not _BESIDES.search(words))
        return KernelCompileError(
            f"{shown} does not compile:\n{log}", file=found["file"].strip(), line=int(found["line"])
        )
    if _ASSEMBLER.search(log):
        return _assembler_error(log, path, text, shown, folders, settings)
    return KernelCompileError(f"{shown} does not compile:\n{log}", file=shown)


def _assembler_error(
    log: str, path: Path, text: str, shown: str, folders: Sequence[Path], settings: dict[str, object]
) -> KernelCompileError:
    """The assembler counts lines of PTX. Compile to PTX with line information and look the source lines up there."""
    ptx, log_with_lines = _ptx_with_lines(text, shown, folders, settings)
    lines = ptx.splitlines()
    files = {int(number): name for number, name in _FILE.findall(ptx)}
    told: list[str] = []
    first: tuple[str, int] | None = None
    for number, complaint in _ASSEMBLER.findall(log_with_lines or log):
        for line in reversed(lines[: int(number)]):
            if not (location := _LOCATION.match(line)):
                continue
            inner = (files.get(int(location[1]), shown), int(location[2]))
            outer = (files.get(int(location[3]), shown), int(location[4])) if location[3] else None
            where = f"{inner[0]}({inner[1]})" + (f", called from {outer[0]}({outer[1]})" if outer else "")
            told.append(f"{where}: error in the assembly: {complaint}\n    {_source_line(inner, path, shown)}")
            own = outer if outer and Path(outer[0]).name == path.name else inner
            first = first or own
            break
    details = "\n".join(dict.fromkeys(told)) or log
    file, line = first or (shown, None)
    return KernelCompileError(f"{shown} does not assemble:\n{details}", file=file, line=line)


def _source_line(place: tuple[str, int], path: Path, shown: str) -> str:
    file = path if place[0] == shown else Path(place[0])
    try:
        return file.read_text().splitlines()[place[1] - 1].strip()
    except (OSError, IndexError):
        return ""


def _ptx_with_lines(text: str, shown: str, folders: Sequence[Path], settings: dict[str, object]) -> tuple[str, str]:
    """PTX with line information, and what the assembler says about exactly that PTX."""
    from cuda.bindings import nvrtc

    arch = str(settings["arch"])
    common = [f"--std={settings['std']}", "--device-as-default-execution-space", "--generate-line-info"]
    common += [f"-I{folder}" for folder in folders]
    common += [f"-D{name}={value}" for name, value in settings["define_macro"] or ()]  # type: ignore[attr-defined]
    results = []
    for target in (arch.replace("sm_", "compute_"), arch):
        options = [option.encode() for option in (f"--gpu-architecture={target}", *common)]
        _, program = nvrtc.nvrtcCreateProgram(text.encode(), shown.encode(), 0, [], [])
        nvrtc.nvrtcCompileProgram(program, len(options), options)
        results.append(program)
    _, size = nvrtc.nvrtcGetPTXSize(results[0])
    ptx = b" " * size
    nvrtc.nvrtcGetPTX(results[0], ptx)
    _, size = nvrtc.nvrtcGetProgramLogSize(results[1])
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(results[1], log)
    for program in results:
        nvrtc.nvrtcDestroyProgram(program)
    return ptx.decode(errors="replace"), log.decode(errors="replace")
