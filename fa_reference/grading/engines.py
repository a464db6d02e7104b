"""What grading chapter 6's wrappers and tile kernels needs beside cuda.py: their machine code, and values out of C++.

A wrapper is one instruction, so it is graded by compiling a small kernel that calls it, twice: with the learner's
header and with the course's. Formulas that a kernel keeps as constexpr functions are graded exactly: the compiler
computes them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fa_reference.course import chapter
from fa_reference.grading import cuda
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed, NotWritten
from fa_reference.grading.cuda import Built
from fa_reference.grading.hopper import DEBUG_SECONDS
from fa_reference.kernels.sass import opcode
from fa_reference.versions import load_file

CHAPTER, HOST = 6, "engines.py"
ENGINE = re.compile(r"SYNCS|UTMA|UBLK|HGMMA|WARPGROUP|FENCE|MEMBAR|ELECT")  # opcodes of barriers and engines
WRAPPER = re.compile(r"\b((?:mbarrier|tma|wgmma)_\w+)")
TOO_FAR = re.compile(r"^(.*)\((\d+)\): warning #63-D: .*\n(.*)", re.M)  # a shift by more bits than a number has
ASKED = re.compile(r'"?[^\s"]*/chapter6/\w+\.cu"?')  # the file that engines.py writes what is asked to
VALUE = re.compile(r'static assertion failed with "([^"]*)"')


@dataclass(frozen=True)
class Tile:
    """One of the tile kernels and the learner's files that it needs, its own last."""

    name: str
    files: tuple[str, ...]

    @property
    def file(self) -> str:
        return self.files[-1]

    def require_written(self, answer: Answer) -> None:
        """Raise NotWritten while one of the files holds a TODO."""
        for file in self.files:
            cuda.require_written(answer, file)

    def build(self, answer: Answer, head_dim: int = 128) -> Built:
        """Compile the learner's kernel; NotWritten for a stub, CheckFailed with the compiler's words."""
        cubin, log = cuda.machine_code(answer, self.files, HOST, self.name, head_dim)
        return cuda.read_build(self.file, bytes(cubin.tolist()), log, self.name)

    def reference(self, head_dim: int = 128) -> Built:
        """The same of the course's solution."""
        cubin, log = load_file(chapter(CHAPTER).solution / HOST).machine_code(self.name, head_dim)
        return cuda.read_build(self.file, bytes(cubin.tolist()), log, self.name)

    def computes(self, answer: Answer, head_dim: int, values: Mapping[str, int]) -> None:
        """CheckFailed naming the first of the kernel's constexpr expressions that has another value than it should."""
        self.require_written(answer)
        _computes(answer, f"{self.file}, head_dim {head_dim}", values, "machine_code", self.name, head_dim)


def wrappers_written(answer: Answer, file: str, code: str) -> None:
    """Raise NotWritten if a wrapper that `code` calls still holds a TODO in the header `file`.

    So that each can be checked as soon as it is written.
    """
    if not (path := answer.folder / file).is_file():
        raise CheckFailed(f"there is no file {file} in {answer.folder}")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for name in dict.fromkeys(WRAPPER.findall(code)):
        body = re.search(rf"^[^\n/]*\b{name}\([^;{{]*\{{.*?^\}}", text, re.M | re.S)
        if body and (todo := cuda.unwritten(body[0])):
            line = text.count("\n", 0, body.start()) + todo[0]
            raise NotWritten(
                f"not written yet: {file}: line {line}: {todo[1]} (delete the TODO comment when it is done)"
            )


def header_computes(answer: Answer, file: str, values: Mapping[str, int]) -> None:
    """The same for constexpr functions of a header."""
    wrappers_written(answer, file, " ".join(values))
    _computes(answer, file, values, "wrapper_code", (file,))


def _computes(answer: Answer, where: str, values: Mapping[str, int], function: str, *request: object) -> None:
    asserts = (f'static_assert({call} == {value}ull, "{call} must be {value:#x}");' for call, value in values.items())
    try:
        answer.call(HOST, function, *request, "\n".join(asserts))
    except CheckFailed as failure:
        if wrong := VALUE.search(str(failure)):
            raise CheckFailed(f"{where}: {wrong[1]}") from None
        if shift := TOO_FAR.search(str(failure)):
            raise CheckFailed(
                f"{Path(shift[1]).name}, line {shift[2]}: a 32-bit number is shifted by 32 bits or more, so all of it "
                f"is lost; widen it first: u64{{x}} << 32\n    {shift[3].strip()}"
            ) from None
        raise type(failure)(ASKED.sub(where, str(failure))) from None


def wrapper(
    answer: Answer,
    file: str,
    course: Sequence[str],
    body: str,
    *,
    call: str = "",
    alias: str = "",
    around: bool = True,
) -> None:
    """CheckFailed unless `body`, which calls wrappers, becomes the same machine code with the learner's header `file`.

    `course`: the course's headers of the same functions; `alias` defines what has another name there. `body` stands
    in a kernel with `barrier`, `tile` (shared memory), `map` and `out` (global memory). `call`: what messages call it.
    `around`: the instructions that prepare the operands must be the same, too.
    """
    wrappers_written(answer, file, body)
    text = (
        'extern "C" __global__ void attention(const __grid_constant__ TensorMap map, float* out) {\n'
        "    __shared__ u64 barrier;\n    extern __shared__ __align__(1024) unsigned char tile[];\n"
        f"    {body}\n}}\n"
    )
    cubin, log = answer.call(HOST, "wrapper_code", (file,), text)
    mine = cuda.read_build(file, bytes(cubin.tolist()), log)
    cubin, log = load_file(chapter(CHAPTER).solution / HOST).wrapper_code(tuple(course), alias + text)
    right = cuda.read_build(file, bytes(cubin.tolist()), log)
    if notes := set(mine.notes) - set(right.notes):
        words = "\n".join(f"{note.code}: {note.explanation}" for note in notes)
        raise CheckFailed(f"the compiler says about {file}, {call or body}:\n{words}")
    if mine.instructions == right.instructions:
        return
    found, wanted = ([line for line in built.instructions if ENGINE.match(opcode(line))] for built in (mine, right))
    call = call or body.rstrip(";")
    if [opcode(line) for line in found] != [opcode(line) for line in wanted]:
        names = [", ".join(map(opcode, lines)) or "nothing" for lines in (wanted, found)]
        raise CheckFailed(f"{file}: {call} must become {names[0]} in machine code; it becomes {names[1]}")
    if found == wanted and not around:
        return
    for a, b in zip(mine.instructions, right.instructions, strict=False):
        if a != b:
            raise CheckFailed(
                f"{file}: {call} becomes the right instruction with other operands: are %0, %1, ... in order, the "
                "addresses those of shared memory, and a result not turned round? First difference in machine code: "
                f"`{a}` instead of `{b}`"
            )
    raise CheckFailed(f"{file}: {call} does more, or less, than one instruction")


def on_gpu(answer: Answer, function: str, requests: Sequence[tuple], runs: int = 1) -> Iterator[object]:
    """Results of a function of engines.py on the GPU, for each tuple of arguments `runs` times.

    All requests go through the debug build first, where no barrier waits for ever: CheckFailed in words for a hang.
    """
    watched = Answer(answer.workshop, answer.folder, DEBUG_SECONDS)
    try:
        for request in requests:
            watched.call(HOST, function, *request, device="cuda", debug=True)
    finally:
        watched.close()
    for request in requests:
        for _ in range(runs):
            yield answer.call(HOST, function, *request, device="cuda")
