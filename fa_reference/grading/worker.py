"""The child side of grading: a preloaded process that forks a fresh copy of itself for every check.

`python -m fa_reference.grading.worker FD [module ...]` imports torch (and the modules named) once. For every request on
the control socket it forks a child that loads the learner's files from one folder and answers calls. The child only
computes: it never sees a reference result, and nothing that it does to torch reaches the grader or the next check.
"""

import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
import weakref
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fa_reference import versions
from fa_reference.grading import wire
from fa_reference.grading.gpu_faults import in_plain_words
from fa_reference.kernels.errors import KernelCompileError

GIB = 2**30
PRINT_LIMIT = 16 * 2**20


class Forbidden(RuntimeError):
    """The learner's code called the function that the exercise is to write."""


class Forbid(TorchFunctionMode):
    """Refuse calls of torch functions by name."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = set(names)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").removesuffix("_default")
        if name in self.names:
            raise Forbidden(f"it calls torch's {name}, which is what this exercise asks you to write yourself")
        return func(*args, **(kwargs or {}))


class Overrun(RuntimeError):
    """The learner's code wrote past the end of a tensor."""


# Memory behind every poisoned tensor: what a block of rows without a mask writes past the end lands there, and shows.
GUARD_BYTES = 2**17
_guards: list[weakref.finalize] = []
_overrun: list[tuple[int, ...]] = []  # shapes of tensors behind which something was written


def poison_new_tensors() -> None:
    """Fill what torch.empty and its relatives return with NaN, and some memory behind it.

    An element that is never written shows, and so does a write past the end (refuse_overruns).
    """
    plain = torch.empty

    def poisoned(make: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if not tensor.is_floating_point() or not wire.has_storage(tensor):
                return tensor
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            length = size + GUARD_BYTES // tensor.element_size()
            memory = plain(length, dtype=tensor.dtype, device=tensor.device).fill_(torch.nan)
            tensor = memory.as_strided(tensor.shape, tensor.stride())
            guard = weakref.finalize(tensor, _look, memory[size:], tuple(tensor.shape))
            guard.atexit = False
            _guards.append(guard)
            return tensor

        return empty

    for holder, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        setattr(holder, name, poisoned(getattr(holder, name)))


def _look(behind: torch.Tensor, shape: tuple[int, ...]) -> None:
    if not behind.isnan().all():
        _overrun.append(shape)


def refuse_overruns() -> None:
    """Raise Overrun if anything was written behind a poisoned tensor that was made since the last call."""
    for guard in _guards:
        if guard.alive:
            _look(*guard.peek()[2])
    _guards.clear()
    if _overrun:
        shape = _overrun[0]
        _overrun.clear()
        raise Overrun(
            f"it wrote past the end of a tensor of shape {shape} that torch.empty made: in a kernel, a store without a "
            "mask, too many programs, or the strides of another tensor"
        )


def line_of(error: BaseException, folder: Path) -> str:
    """File, line, function and code of the innermost frame in the learner's folder."""
    frames = []
    while error is not None:  # Triton's interpreter wraps what a kernel raised
        frames += [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == folder]
        error = error.__cause__
    if not frames:
        return ""
    frame = frames[-1]
    return f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})\n    {frame.line}"


def _is_the_learners(error: BaseException, folder: Path) -> bool:
    """True if an exception was raised by a line in the learner's folder: torch, too, raises NotImplementedError."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent == folder


def describe(error: BaseException, folder: Path) -> dict[str, str]:
    """A learner's exception as {kind, message}: the stub's own words, or what was raised and where."""
    if isinstance(error, NotImplementedError) and _is_the_learners(error, folder):
        return {"kind": "stub", "message": f"not written yet: {error}"}
    if isinstance(error, SyntaxError):
        line = (error.text or "").rstrip()
        name = Path(error.filename or "?").name
        return {"kind": "syntax", "message": f"{name}, line {error.lineno}: {error.msg}\n    {line.strip()}"}
    if isinstance(error, Overrun):
        return {"kind": "exception", "message": str(error)}
    if isinstance(error, Forbidden):
        return {"kind": "forbidden", "message": str(error) + line_of(error, folder)}
    if isinstance(error, SystemExit):
        return {"kind": "exit", "message": f"your code ended the program with sys.exit({error.code!r})"}
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return {"kind": "memory", "message": "your code asked for more memory than a check may use (4 GiB)"}
    text = str(error)
    if fault := in_plain_words(text):
        return {"kind": "exception", "message": fault}
    if "static_assert" in text or type(error).__name__ in ("CompileTimeAssertionFailure", "InterpreterError"):
        cause = error.__cause__ or error.__context__
        text = str(cause) if cause else text
    if ".py: " in text and type(error).__name__ in (
        "CompileTimeAssertionFailure",
        "AssertionError",
        "InterpreterError",
    ):
        return {"kind": "stub", "message": f"not written yet: {text.strip().splitlines()[-1]}"}
    if len(text) > 1500:
        text = text[:700] + "\n...\n" + text[-700:]
    # The compiler has named the line already; the host file that called it is the course's.
    line = "" if isinstance(error, KernelCompileError) else line_of(error, folder)
    return {"kind": "exception", "message": f"{type(error).__name__}: {text}{line}"}


class Child:
    """Answers calls on the files of one folder until the grader hangs up."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.device = device
        self.modules: dict[str, Any] = {}

    def module(self, file: str) -> Any:
        if file not in self.modules:
            self.modules[file] = versions.load_file(self.folder / file)
        return self.modules[file]

    def answer(self, file: str, request: bytes) -> dict[str, Any]:
        """Run one request on a file; {"value": ...} or {"error": {kind, message}}."""
        try:
            module = self.module(file)
            return self.run(module, wire.from_bytes(request, lambda record: _make_record(module, record)))
        except BaseException as error:  # noqa: BLE001 - whatever a learner's code raises is an answer
            return {"error": describe(error, self.folder)}

    def run(self, module: Any, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["function"]
        if asked["driver"] is None:
            function = getattr(module, name, None)
        else:  # the course's own code drives the learner's module
            function = partial(getattr(importlib.import_module(asked["driver"]), name), module)
        if not callable(function):
            return {"error": {"kind": "missing", "message": f"{Path(module.__file__).name} has no function {name}"}}
        args = [wire.to_device(a, self.device) for a in asked["args"]]
        kwargs = {k: wire.to_device(v, self.device) for k, v in asked["kwargs"].items()}
        with Forbid(asked["forbid"]):
            if asked["counted"] is None:
                value, memory = function(*args, **kwargs), None
            else:
                from fa_reference.memory import Memory

                memory = Memory(asked["counted"])
                value = function(*args, **kwargs, memory=memory)
        refuse_overruns()
        answer = {"value": value, "inputs": args, "shares_input": _shares_input(value, args)}
        if memory is not None:
            answer["memory"] = {
                "loaded": memory.loaded,
                "stored": memory.stored,
                "peak_sram_bytes": memory.peak_sram_bytes,
                "log": [tuple(t) for t in memory.log],
            }
        return answer


def _make_record(module: Any, record: wire.Record) -> Any:
    return getattr(module, record.type_name)(**record.fields)


def _storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()} if value.numel() and wire.has_storage(value) else set()
    if isinstance(value, list | tuple):
        return set().union(*map(_storages, value))
    return set()


def _shares_input(value: Any, args: list[Any]) -> bool:
    return bool(_storages(value) & _storages(args))


def serve(connection: Connection, folder: Path, device: str) -> None:
    """The forked child's life: answer requests until the connection closes."""
    poison_new_tensors()
    child = Child(folder, device)
    while True:
        try:
            file, request = connection.recv_bytes().decode(), connection.recv_bytes()
        except EOFError:
            return
        answer = child.answer(file, request)
        try:
            data = wire.to_bytes(answer)
        except BaseException as error:  # noqa: BLE001 - an answer that cannot be sent is a failed check, not a crash
            data = wire.to_bytes({"error": describe(error, folder)})
        connection.send_bytes(data)


def _become_child(fd: int, order: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PRINT_LIMIT, PRINT_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order["device"] == "cpu":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * GIB, in_use + 4 * GIB))
    sys.path.insert(0, order["folder"])
    os.chdir(order["folder"])
    sys.dont_write_bytecode = True
    serve(Connection(fd), Path(order["folder"]), order["device"])


def main(argv: list[str]) -> None:
    """The preloaded process: fork a child for every order until the grader hangs up."""
    for name in argv[1:]:
        importlib.import_module(name)
    torch.set_num_threads(1)
    control = socket.socket(fileno=int(argv[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            return
        order = json.loads(data)
        if "status" in order:
            control.sendall(json.dumps(_status(order["status"])).encode())
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            try:
                _become_child(fds[0], order)
            finally:
                os._exit(0)
        os.close(fds[0])
        control.sendall(json.dumps(pid).encode())


def _status(pid: int) -> int:
    """Exit status of a child (negative: signal), waiting for at most two seconds for it to end."""
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
