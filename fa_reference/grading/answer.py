"""The grader's side of the child process: start it, ask it, and turn whatever goes wrong into words."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fa_reference.course import ROOT
from fa_reference.grading import wire
from fa_reference.grading.check import CannotRun, CheckFailed, NotWritten

# Seconds that the learner's code may take in one check, not counting those in which it could run but other programs had
# the processor; on a GPU the first call compiles a kernel.
TIME_LIMIT = {"cpu": 15.0, "cuda": 90.0}
# Once a check ran into its limit, the others of the same run get this share of it: one endless loop is enough.
AFTER_A_TIMEOUT = 0.3
PATIENCE = 20  # no check takes longer than its limit this many times, whatever else the machine does
# How a check fails on each kind of error that the child reports; the others are ordinary failures.
FAILURES = {"stub": NotWritten, "syntax": CannotRun, "missing": CannotRun, "exit": CannotRun}
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "_scaled_dot_product_flash_attention")


@dataclass
class Counted:
    """Result of a call through the accounting: outputs, bytes by tensor name, the SRAM peak, and every transfer."""

    o: Tensor
    lse: Tensor
    loaded: dict[str, int]
    stored: dict[str, int]
    peak_sram_bytes: int
    log: list[tuple[str, str, int, int]]


class Workshop:
    """The preloaded process from which a fresh child is forked for every check."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        # NVML answers "is there a GPU?" without starting CUDA, which would not survive a fork.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # One thread: a process with a pool of threads should not fork.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {**os.environ, **threads, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "fa_reference.grading.worker", str(theirs.fileno()), *preload]
        self.timed_out = False
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, cwd=ROOT
        )
        theirs.close()
        self._control = ours

    def fork(self, folder: Path, device: str, log: Path) -> tuple[int, Connection]:
        """A fresh child on `folder`: its pid and the connection to it."""
        ours, theirs = socket.socketpair()
        order = json.dumps({"folder": str(folder), "device": device, "log": str(log)})
        socket.send_fds(self._control, [order.encode()], [theirs.fileno()])
        theirs.close()
        return int(self._control.recv(64)), Connection(ours.detach())

    def status(self, pid: int) -> int:
        """How a child ended: its exit status, or minus the signal that killed it."""
        self._control.sendall(json.dumps({"status": pid}).encode())
        return int(self._control.recv(64))

    def close(self) -> None:
        """End the process."""
        self._control.close()
        self._process.wait()


class _Stopwatch:
    """Seconds that a process had since now: on a busy machine a right answer is not an endless loop."""

    def __init__(self, pid: int) -> None:
        self._schedstat = Path(f"/proc/{pid}/schedstat")  # of its first thread: ns on a processor, ns waiting for one
        self._began, self._waited = time.monotonic(), self._waiting()

    def _waiting(self) -> float:
        try:
            return int(self._schedstat.read_text().split()[1]) * 1e-9
        except (OSError, IndexError, ValueError):  # ended, or a kernel that does not count it
            return 0.0

    def passed(self) -> float:
        """All of them."""
        return time.monotonic() - self._began

    def spent(self) -> float:
        """Those in which the process ran, or waited for something else than a processor."""
        return self.passed() - max(0.0, self._waiting() - self._waited)


class Answer:
    """The learner's folder, as a check sees it: calls run in a child process of this check's own."""

    def __init__(self, workshop: Workshop, folder: Path, time_limit: float | None = None) -> None:
        self.folder = folder
        self.gpu = torch.cuda.is_available()
        self.workshop = workshop
        self.remarks: list[str] = []  # shown beside a passed check: what was measured
        self._limit = time_limit
        self._spent = 0.0
        self._child: tuple[int, Connection, str] | None = None
        self._log = Path(tempfile.mkstemp(prefix="printed-", suffix=".txt")[1])

    def call(
        self,
        file: str,
        function: str,
        *args: Any,
        device: str = "cpu",
        forbid: Sequence[str] = ATTENTION,
        allow_changes: bool = False,
        driver: str | None = None,
        seconds: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Call `function` of the learner's `file` and return its result, tensors on the CPU.

        With `driver`, a module of the course, call that module's `function` with the learner's module first.
        `seconds`: the least time that it may take, where a check's usual limit is too short (a compiler).
        CheckFailed in the learner's words for an exception, a time-out, a dead process, a call of a forbidden torch
        function, a changed input, or a result that shares memory with an input.
        """
        answer = self._ask(file, function, args, kwargs, device, forbid, None, driver, seconds)
        if not allow_changes:
            self._refuse_side_effects(function, args, answer)
        return answer["value"]

    def refusal(self, file: str, function: str, *args: Any, device: str = "cpu", **kwargs: Any) -> str:
        """The message of the ValueError that a call must raise; CheckFailed if it raises anything else or nothing."""
        answer = self._exchange(file, function, args, kwargs, device, ATTENTION, None)
        error = answer.get("error")
        if error is None:
            raise CheckFailed(f"{function} accepted it; it must raise a ValueError")
        if error["kind"] != "exception" or not error["message"].startswith("ValueError: "):
            raise CheckFailed(f"{function} must raise a ValueError; instead: {error['message']}")
        return error["message"].removeprefix("ValueError: ")

    def call_counted(
        self, file: str, q: Tensor, k: Tensor, v: Tensor, *, sram_bytes: int, function: str = "forward", **kwargs: Any
    ) -> Counted:
        """Call `forward(q, k, v, ..., memory=Memory(sram_bytes))` and return its outputs with the counts."""
        answer = self._ask(file, function, (q, k, v), kwargs, "cpu", ATTENTION, sram_bytes)
        o, lse = attention_result(answer["value"], q, function)
        return Counted(o, lse, **answer["memory"])

    def printed(self, lines: int = 5) -> str:
        """The last lines that the learner's code printed in this check."""
        text = self._log.read_bytes()[-4000:].decode(errors="replace")
        own, skip = [], False
        for line in text.splitlines():
            if "Warning: " in line and str(self.folder) not in line:  # a library's: two lines each
                skip = True
            elif skip and line.startswith("  "):
                skip = False
            else:
                own.append(line)
        return "\n".join(own[-lines:])

    def close(self) -> None:
        """Kill the child and everything it started."""
        if self._child:
            pid, connection, _ = self._child
            self._child = None
            connection.close()
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.workshop.status(pid)
        self._log.unlink(missing_ok=True)

    def _ask(self, *request: Any) -> dict[str, Any]:
        answer = self._exchange(*request)
        if "error" in answer:
            raise FAILURES.get(answer["error"]["kind"], CheckFailed)(str(answer["error"]["message"]))
        return answer

    def _exchange(
        self,
        file: str,
        function: str,
        args: tuple,
        kwargs: dict,
        device: str,
        forbid: Sequence[str],
        counted: Any,
        driver: str | None = None,
        seconds: float = 0.0,
    ) -> dict[str, Any]:
        if not (self.folder / file).is_file():
            raise CannotRun(f"there is no file {file} in {self.folder}")
        if self._child is None or self._child[2] != device:
            self._log_reset()
            self._child = (*self.workshop.fork(self.folder, device, self._log), device)
        pid, connection, _ = self._child
        body = {
            "function": function,
            "args": list(args),
            "kwargs": kwargs,
            "forbid": list(forbid),
            "counted": counted,
            "driver": driver,
        }
        usual = TIME_LIMIT[device] * (AFTER_A_TIMEOUT if self.workshop.timed_out else 1)
        limit = self._limit or max(usual, seconds)
        watch = _Stopwatch(pid)
        try:
            connection.send_bytes(file.encode())
            connection.send_bytes(wire.to_bytes(body))
            while not connection.poll(max(0.0, limit - self._spent - watch.spent())):
                if self._spent + watch.spent() < limit and watch.passed() < PATIENCE * limit:
                    continue
                self._forget_child(pid)
                self.workshop.timed_out = True
                raise CheckFailed(f"{function} did not finish within this check's {limit:g} s: an endless loop?")
            data = connection.recv_bytes()
        except (EOFError, ConnectionError):
            raise CheckFailed(self._how_it_died(function)) from None
        self._spent += watch.spent()
        try:
            answer = wire.from_bytes(data)
            if not isinstance(answer, dict) or not ("value" in answer or "error" in answer):
                raise ValueError("not an answer")
        except Exception:
            raise CheckFailed(f"{function} sent something that is not an answer") from None
        return answer

    def _log_reset(self) -> None:
        if self._child:
            self._forget_child(self._child[0])

    def _forget_child(self, pid: int) -> None:
        os.killpg(pid, signal.SIGKILL)
        self.workshop.status(pid)
        self._child[1].close()
        self._child = None

    def _how_it_died(self, function: str) -> str:
        pid, connection, _ = self._child
        self._child = None
        connection.close()
        status = self.workshop.status(pid)
        if status < 0:
            name = signal.Signals(-status).name
            why = "out of memory, or a write past the end of a tensor (in a kernel: a missing mask, too many programs)"
            return f"the process running {function} was killed by {name}: {why}"
        return f"{function} ended the whole process with exit status {status} (os._exit?)"

    def _refuse_side_effects(self, function: str, args: tuple, answer: dict[str, Any]) -> None:
        for position, (before, after) in enumerate(zip(args, answer.get("inputs", args), strict=True)):
            for old, new in zip(_tensors(before), _tensors(after), strict=True):
                if not torch.equal(old.nan_to_num(), new.nan_to_num()):
                    raise CheckFailed(f"{function} changed its input number {position + 1} in place: work on a copy")
        if answer.get("shares_input"):
            raise CheckFailed(f"{function} returned a tensor that shares memory with an input: return a new one")


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a value: itself, or those in its items or fields."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, tuple | list | wire.Record) else []


def attention_result(value: Any, q: Tensor, function: str = "forward") -> tuple[Tensor, Tensor]:
    """(o, lse) of a forward's result, after checking types, shapes and dtypes; CheckFailed in words."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        kind = value.type_name if isinstance(value, wire.Foreign | wire.Record) else type(value).__name__
        raise CheckFailed(f"{function} must return the pair (o, lse); it returned a {kind}")
    for name, tensor, shape, dtype in (
        ("o", value[0], q.shape, q.dtype),
        ("lse", value[1], q.shape[:3], torch.float32),
    ):
        if not isinstance(tensor, Tensor):
            kind = tensor.type_name if isinstance(tensor, wire.Foreign | wire.Record) else type(tensor).__name__
            raise CheckFailed(f"{name} must be a torch.Tensor; it is a {kind}")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckFailed(f"{name} must have shape {tuple(shape)}; it has {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise CheckFailed(f"{name} must have dtype {dtype}; it has {tensor.dtype}")
    return value[0], value[1]
