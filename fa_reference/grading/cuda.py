"""What grading a CUDA file needs: has it been written, does it compile, and what does its machine code show?

A `.cu` file counts as not written while a line `// TODO: ...` of its stub is left in it. Compiling needs no GPU; it is
done in the learner's child process, always for the same architecture, so that every machine sees the same code.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from fa_reference.course import chapter
from fa_reference.grading import properties
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed, NotWritten
from fa_reference.inputs import Case
from fa_reference.kernels import parse_build_log, sass_instructions
from fa_reference.kernels.build_log import Note, Resources
from fa_reference.kernels.sass import opcode
from fa_reference.versions import load_file

ARCH = "sm_90a"
COMPILER_SECONDS = 60.0  # fully unrolled loops over global memory take a compiler a quarter of a minute
REGISTERS_OF_AN_SM = 65536  # 32-bit registers; the same from compute capability 8.0 to 9.0
REGISTERS_OF_A_THREAD = 255
GRANULARITY = 8  # registers are handed out to a thread in eights,
WARPS_AT_ONCE = 4  # and to warps in fours
TODO = re.compile(r"^[ \t]*// TODO: (?P<words>.*(?:\n[ \t]*// (?!TODO: ).*)*)", re.MULTILINE)


def unwritten(text: str) -> tuple[int, str] | None:
    """Line and words of the first `// TODO:` in a CUDA source, joined over its comment lines; None if there is none."""
    found = TODO.search(text)
    if not found:
        return None
    return text.count("\n", 0, found.start("words")) + 1, re.sub(r"\s*\n[ \t]*// ", " ", found["words"]).strip()


def require_written(answer: Answer, file: str) -> None:
    """Raise NotWritten with the stub's words while `file` holds a TODO; CheckFailed if there is no such file."""
    path = answer.folder / file
    if not path.is_file():
        raise CheckFailed(f"there is no file {file} in {answer.folder}")
    todo = unwritten(path.read_text(encoding="utf-8-sig", errors="replace"))
    if todo is not None:
        line, words = todo
        raise NotWritten(f"not written yet: {file}: line {line}: {words} (delete the TODO comment when it is done)")


def machine_code(answer: Answer, files: Sequence[str], host: str, *request: object) -> tuple[torch.Tensor, str]:
    """Machine code and compiler's log, as `host`'s `machine_code` gives them for `request`, of the learner's `files`.

    NotWritten while one of the files holds a TODO, with the compiler's errors in what is written; CheckFailed with them
    if all is written and does not compile.
    """
    try:
        for file in files:
            require_written(answer, file)
    except NotWritten as todo:
        try:
            answer.call(host, "machine_code", *request, seconds=COMPILER_SECONDS)
        except CheckFailed as failure:
            if "KernelCompileError" in str(failure):
                raise NotWritten(f"{todo}\nWhat is written does not compile yet. {failure}") from None
        raise
    return answer.call(host, "machine_code", *request, seconds=COMPILER_SECONDS)


@dataclass(frozen=True)
class Built:
    """A compiled kernel: what a thread takes, its instructions in program order, the compiler's notes about wgmma."""

    file: str
    resources: Resources
    instructions: tuple[str, ...]
    notes: tuple[Note, ...] = ()

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each opcode (with modifiers) stands in the machine code."""
        return Counter(map(opcode, self.instructions))

    def count(self, wanted: str) -> int:
        """Instructions with this opcode, whatever further modifiers they have."""
        return sum(n for name, n in self.opcodes.items() if name == wanted or name.startswith(wanted + "."))

    @property
    def local_memory(self) -> int:
        """Bytes of stack and spills of a thread: memory that looks private and is as slow as global memory."""
        used = self.resources
        return used.stack_bytes + used.spill_store_bytes + used.spill_load_bytes


def read_build(file: str, cubin: bytes, log: str, kernel: str = "attention") -> Built:
    """What machine code and log say about a kernel of a file; CheckFailed if there is none of this name."""
    report = parse_build_log(log)
    if kernel not in report.kernels:
        raise CheckFailed(f'{file} has no kernel `extern "C" __global__ void {kernel}`: keep its name')
    return Built(file, report.kernels[kernel], tuple(sass_instructions(cubin)), report.notes)


def build(answer: Answer, host: str, step: str, file: str, head_dim: int, dtype: torch.dtype, causal: bool) -> Built:
    """Compile a step of the learner's `host` file and read the result.

    NotWritten for a stub; CheckFailed with the compiler's words, file and line if it does not compile.
    """
    cubin, log = machine_code(answer, [file], host, step, head_dim, dtype, causal, ARCH)
    return read_build(file, bytes(cubin.tolist()), log)


def reference(number: int, host: str, step: str, file: str, head_dim: int, dtype: torch.dtype, causal: bool) -> Built:
    """The same of the course's solution, which sets the budget."""
    module = load_file(chapter(number).solution / host)
    cubin, log = module.machine_code(step, head_dim, dtype, causal, ARCH)
    return read_build(file, bytes(cubin.tolist()), log)


def register_budget(solution: Resources, threads: int) -> int:
    """The most registers a thread may take while as many blocks fit on an SM as of the solution."""

    def blocks(registers: int) -> int:
        warps = REGISTERS_OF_AN_SM // (32 * registers) // WARPS_AT_ONCE * WARPS_AT_ONCE
        return 32 * warps // threads

    granted = -(-solution.registers // GRANULARITY) * GRANULARITY
    while granted < REGISTERS_OF_A_THREAD and blocks(granted + GRANULARITY) >= max(1, blocks(granted)):
        granted += GRANULARITY
    return min(REGISTERS_OF_A_THREAD, granted)


def within_budget(built: Built, solution: Built, threads: int, tolerated: int = 0) -> None:
    """CheckFailed if a thread takes more registers than the budget, or local memory where the solution takes none.

    `tolerated`: bytes of local memory let pass where a few spills depend on the compiler more than on the answer.
    """
    if built.local_memory > max(tolerated, solution.local_memory):
        used = built.resources
        spilled = used.spill_store_bytes + used.spill_load_bytes
        cause = (
            "Is a register array indexed by something that the compiler does not know? Unroll the loop around it."
            if used.stack_bytes > spilled
            else "Too many values are alive at once: unroll less where no register array is indexed (copying a tile, "
            "for instance: `#pragma unroll 1`), or compute addresses anew instead of keeping them."
        )
        raise CheckFailed(
            f"{built.file} uses local memory: {used.stack_bytes} bytes of stack, {spilled} bytes spilled. {cause}"
        )
    allowed = register_budget(solution.resources, threads)
    if built.resources.registers > allowed:
        raise CheckFailed(
            f"{built.file} takes {built.resources.registers} registers a thread; more than {allowed} leave fewer "
            f"blocks on an SM than the solution has (it takes {solution.resources.registers})"
        )


def has_instructions(built: Built, wanted: Mapping[str, str]) -> None:
    """CheckFailed naming what is missing in the machine code. `wanted`: opcode (its first parts) -> what it does."""
    missing = [f"no {name} ({words})" for name, words in wanted.items() if not built.count(name)]
    if missing:
        raise CheckFailed(f"the machine code of {built.file} has " + ", ".join(missing))


def numbers(
    answer: Answer,
    host: str,
    file: str,
    function: str,
    cases: Iterable[Case],
    bug: str = "",
    head_dims: Sequence[int] = (64, 128),
) -> None:
    """Hold a step to the error rule on the GPU, smallest case first; memory that it allocates is full of NaN.

    Every case is tried with every head_dim, but real activations only with theirs.
    """
    require_written(answer, file)
    cases = [c.but(head_dim=d) for d in head_dims for c in cases if c.kind != "smollm2" or d == c.head_dim]
    properties.attention(answer, host, cases, bug=bug, device="cuda", function=function)


def deterministic(answer: Answer, host: str, file: str, function: str, case: Case, runs: int = 20) -> None:
    """CheckFailed unless every one of `runs` calls on the GPU gives the same bits."""
    require_written(answer, file)
    q, k, v = case.make()
    first = answer.call(host, function, q, k, v, causal=case.causal, device="cuda")
    for number in range(2, runs + 1):
        again = answer.call(host, function, q, k, v, causal=case.causal, device="cuda")
        for name, a, b in zip(("o", "lse"), first, again):
            if not torch.equal(a, b):
                raise CheckFailed(
                    f"run {number} of the same problem gives another {name} in {int((a != b).sum())} of {a.numel()} "
                    f"elements: a race, so a barrier or a wait is missing\n{case}"
                )


def best_times(answer: Answer, host: str, others: Sequence[Path], *request: object, rounds: int = 3) -> list[float]:
    """Milliseconds of the learner's kernel, then of the host files `others`: best of `rounds`, by turns in one run.

    `request` goes to each file's `milliseconds`.
    """
    racers = [(answer, host), *((Answer(answer.workshop, path.parent), path.name) for path in others)]
    times: list[list[float]] = [[] for _ in racers]
    try:
        for _ in range(rounds):
            for own, (who, file) in zip(times, racers, strict=True):
                own.append(who.call(file, "milliseconds", *request, device="cuda"))
    finally:
        for who, _ in racers[1:]:
            who.close()
    return [min(own) for own in times]


def relative_speed(answer: Answer, number: int, host: str, *request: object, rounds: int = 3) -> float:
    """Time of the solution over time of the learner's kernel in the same run; arguments as for `best_times`."""
    mine, solution = best_times(answer, host, [chapter(number).solution / host], *request, rounds=rounds)
    return solution / mine
