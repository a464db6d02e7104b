"""CUDA source -> machine code, by NVRTC through cuda.core: no CUDA toolkit and no GPU needed, seconds per kernel.

Compiled kernels are cached on disk under a hash of everything that decides the result: the source, every header it
includes with quotes, the options and the compiler version. Change any of them and the kernel is compiled again.
"""

import base64
import codecs
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from fa_reference.kernels.build_log import BuildReport, parse_build_log
from fa_reference.kernels.compile_errors import compile_error
from fa_reference.kernels.errors import KernelUnavailable

ARCH = "sm_90a"  # Hopper with its own instructions (wgmma, setmaxnreg); runs on compute capability 9.0 only
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_FORMAT = 1  # of the cache files
_importing = threading.Lock()  # cuda.core cannot be imported by two threads at once


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """Machine code of one source file with one set of options, and what the compiler said about it."""

    source: Path
    cubin: bytes
    log: str
    key: str
    arch: str
    compiler: str
    seconds: float
    from_cache: bool

    @property
    def report(self) -> BuildReport:
        """Registers, spills, shared memory and the compiler's notes about wgmma, read from the log."""
        return parse_build_log(self.log)


def cache_folder() -> Path:
    """Where compiled kernels are kept: $FA_CACHE, or flash-attention-from-scratch in the user's cache folder."""
    if folder := os.environ.get("FA_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flash-attention-from-scratch"


def included_files(source: Path, include_dirs: Sequence[Path] = ()) -> list[Path]:
    """Files that `source` includes with quotes, and those that they include, each once, in order of appearance.

    A header is looked for beside the including file, then in `include_dirs`. One that is nowhere is left out here: the
    compiler will name it.
    """
    found: list[Path] = []
    todo = [source]
    while todo:
        file = todo.pop(0)
        for name in _INCLUDE.findall(file.read_text()):
            for folder in (file.parent, *include_dirs):
                header = (folder / name).resolve()
                if header.is_file():
                    if header not in found:
                        found.append(header)
                        todo.append(header)
                    break
    return found


@cache
def compiler_version() -> str:
    """Name and version of the compiler, part of every cache key and worth recording beside every measurement."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelUnavailable(
            f"compiling CUDA needs the packages cuda-core and nvidia-cuda-nvrtc, which are not importable ({error}); "
            "install the course with its kernels: make setup"
        ) from error
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise KernelUnavailable(f"the NVRTC library cannot be loaded: {error}; install nvidia-cuda-nvrtc") from error
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13"):
        try:
            return f"NVRTC {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"NVRTC {major}.{minor}"


def compile_kernel(
    source: str | os.PathLike[str],
    *,
    defines: Mapping[str, int | str] | None = None,
    include_dirs: Sequence[str | os.PathLike[str]] = (),
    arch: str = ARCH,
    options: Mapping[str, object] | None = None,
    use_cache: bool = True,
) -> CompiledKernel:
    """Compile a .cu file, or fetch it from the cache.

    `defines` become macros (-D name=value); headers are found beside the source and in `include_dirs`; `options` are
    further keyword arguments of cuda.core's ProgramOptions (such as `lineinfo=True`). Needs neither GPU nor driver.
    Raises KernelCompileError with file, line and the source line, KernelUnavailable if the compiler is missing.
    """
    path = Path(source).resolve()
    text = path.read_text(encoding="utf-8-sig")  # the compiler does not know the byte order mark of Windows editors
    folders = [path.parent, *(Path(folder).resolve() for folder in include_dirs)]
    settings = {
        "arch": arch,
        "std": "c++17",
        "define_macro": [(name, str(value)) for name, value in sorted((defines or {}).items())] or None,
        "ptxas_options": ["-v"],  # registers and spills into the log
        "device_as_default_execution_space": True,  # lambdas in kernels need no __device__
        **(options or {}),
    }
    version = compiler_version()
    digest = hashlib.sha256()
    for part in (str(_FORMAT), version, json.dumps(settings, sort_keys=True), str(path)):
        digest.update(part.encode() + b"\0")
    for file in (path, *included_files(path, folders)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    key = digest.hexdigest()[:32]
    stored = cache_folder() / f"{path.stem}-{key}.json"
    if use_cache and (hit := _read(stored)) is not None:
        return CompiledKernel(path, base64.b64decode(hit["cubin"]), hit["log"], key, arch, version, 0.0, True)

    Program, ProgramOptions = _cuda_core()
    log = io.StringIO()
    started = time.perf_counter()
    try:
        with _without_marks(included_files(path, folders)) as cleaned:
            include_path = [str(f) for f in (*cleaned, *folders)]
            program = Program(text, "c++", ProgramOptions(name=_shown(path), include_path=include_path, **settings))
            cubin = bytes(program.compile("cubin", logs=log).code)
    except Exception as error:  # cuda.core has no public base class of its own for these
        if "NVRTC" not in type(error).__name__:
            raise
        raise compile_error(str(error), path, text, _shown(path), folders, settings) from None
    seconds = time.perf_counter() - started
    messages = log.getvalue().replace("\0", "").strip()
    if use_cache:
        _write(stored, {"cubin": base64.b64encode(cubin).decode(), "log": messages})
    return CompiledKernel(path, cubin, messages, key, arch, version, seconds, False)


@contextlib.contextmanager
def _without_marks(headers: Sequence[Path]) -> Iterator[list[Path]]:
    """A folder with copies of the headers that begin with a byte order mark, without it; none if no header does."""
    marked = [header for header in headers if header.read_bytes().startswith(codecs.BOM_UTF8)]
    if not marked:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        for header in marked:
            (Path(folder) / header.name).write_bytes(header.read_bytes().removeprefix(codecs.BOM_UTF8))
        yield [Path(folder)]


def _shown(path: Path) -> str:
    """The path as a person would type it: relative to the working folder if it lies inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _cuda_core() -> tuple[type, type]:
    with _importing:
        try:
            from cuda.core import Program, ProgramOptions
        except ImportError as error:
            raise KernelUnavailable(
                f"compiling CUDA needs the package cuda-core, 1.0 or later ({error}); run: make setup"
            ) from error
    return Program, ProgramOptions


def _read(file: Path) -> dict[str, str] | None:
    try:
        content = json.loads(file.read_text())
        return content if {"cubin", "log"} <= content.keys() else None
    except (OSError, ValueError, AttributeError):
        return None  # not there, or damaged: compile again


def _write(file: Path, content: dict[str, str]) -> None:
    """All or nothing: another process sees no half-written file. A cache that cannot be written is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as temporary:
            json.dump(content, temporary)
        os.replace(temporary.name, file)
    except OSError:
        pass
