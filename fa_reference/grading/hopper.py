"""What grading a Hopper kernel needs on top of cuda.py: its roles, its asynchronous instructions, and never a hang.

Without a GPU: it compiles for sm_90a, stays within the solution's registers, keeps wgmma asynchronous, and shows the
technique in its machine code. On an H100 or H200: the debug build, whose waits at barriers end after a second, runs
before the release build on the same numbers, so that a wrong barrier is a sentence and not a hang.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fa_reference.course import chapter
from fa_reference.grading import cuda, properties
from fa_reference.grading.answer import Answer
from fa_reference.grading.check import CheckFailed
from fa_reference.grading.cuda import Built
from fa_reference.inputs import Case
from fa_reference.kernels.sass import opcode
from fa_reference.versions import load_file

DEBUG_SECONDS = 45.0  # for all debug runs of a check: start of CUDA, compiling, and a wait that ends after a second
WARPGROUP = 128
# What the instructions of the asynchronous engines are called in SASS.
TMA_LOAD, MBARRIER, PRODUCT, REGISTERS = "UTMALDG", "SYNCS", "HGMMA", "USETMAXREG"
BARRIER_0 = re.compile(r"BAR\.SYNC\S* (0x0|RZ|URZ)\b")  # __syncthreads


@dataclass(frozen=True)
class Kernel:
    """One graded .cu file: its chapter, the host file beside it, threads of a block.

    The host file has `forward(..., debug=False)`, `machine_code` and `milliseconds`, as AttentionKernel offers them.
    """

    chapter: int
    host: str
    file: str
    threads: int

    def build(
        self, answer: Answer, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, causal: bool = False
    ) -> Built:
        """Compile the learner's file; NotWritten for a stub, CheckFailed with the compiler's words."""
        cubin, log = cuda.machine_code(answer, [self.file], self.host, head_dim, dtype, causal)
        return cuda.read_build(self.file, bytes(cubin.tolist()), log)

    def reference(self, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, causal: bool = False) -> Built:
        """The same of the course's solution, which sets the budget."""
        cubin, log = load_file(self.solution).machine_code(head_dim, dtype, causal)
        return cuda.read_build(self.file, bytes(cubin.tolist()), log)

    @property
    def solution(self) -> Path:
        """The solution's host file."""
        return chapter(self.chapter).solution / self.host

    # ---- without a GPU ----

    def within_budget(self, answer: Answer) -> None:
        """CheckFailed for local memory, too many registers, or more than setmaxnreg can hand out."""
        for head_dim, dtype, causal in ((128, torch.bfloat16, False), (64, torch.float16, True)):
            built = self.build(answer, head_dim, dtype, causal)
            cuda.within_budget(built, self.reference(head_dim, dtype, causal), self.threads)
            registers_add_up(built, self.threads)

    def stays_asynchronous(self, answer: Answer) -> None:
        """CheckFailed, in plain words, if the compiler serialised wgmma or ignored setmaxnreg."""
        for head_dim, causal in ((128, False), (128, True), (64, True)):
            built = self.build(answer, head_dim, torch.bfloat16, causal)
            if built.notes:
                words = "\n".join(f"{note.code}: {note.explanation}" for note in built.notes)
                raise CheckFailed(f"the compiler says about {self.file} (head_dim {head_dim}):\n{words}")

    # ---- on a Hopper GPU ----

    def numbers(self, answer: Answer, cases: Iterable[Case], bug: str = "", *, watched: bool = True) -> None:
        """Hold the kernel to the error rule, smallest case first: all cases in the debug build, then in the release.

        `watched` = False leaves the debug build out, for cases that only add size.
        """
        cuda.require_written(answer, self.file)
        cases = list(cases)
        if not watched:
            properties.attention(answer, self.host, cases, bug=bug, device="cuda")
            return
        child = Answer(answer.workshop, answer.folder, DEBUG_SECONDS)
        try:
            properties.attention(child, self.host, cases, bug=bug, device="cuda", debug=True)
        except CheckFailed as failure:
            if "did not finish within" not in str(failure):
                raise
            words = (
                "In this build every wait at a barrier ends after a second, so something else does not end: a loop, or "
                "setmaxnreg claiming registers that no warpgroup has released"
            )
            raise CheckFailed(f"{failure}\n{words}") from None
        finally:
            child.close()
        try:
            properties.attention(answer, self.host, cases, bug=bug, device="cuda")
        except CheckFailed as failure:
            words = "The debug build gave right numbers on the same input, so suspect timing: a missing wait, or a slot"
            raise CheckFailed(f"{failure}\n{words} that is given back too early") from None

    def deterministic(self, answer: Answer, case: Case) -> None:
        """CheckFailed unless 20 runs give the same bits."""
        cuda.deterministic(answer, self.host, self.file, "forward", case)

    def refuses_bad_input(self, answer: Answer) -> None:
        """Bad arguments raise a ValueError that names the argument."""
        cuda.require_written(answer, self.file)
        properties.refuses_bad_input(answer, self.host, device="cuda", dtype=torch.float16)

    def speed(
        self, answer: Answer, previous: Path, at_least: float, problem: Sequence[object] = (4, 16, 8192, 128, False)
    ) -> None:
        """Report the speed beside the previous chapter's kernel and the solution, all from one run.

        CheckFailed below `at_least` of the solution's. `previous`: a host file. `problem`: batch, heads, length,
        head_dim, causal.
        """
        cuda.require_written(answer, self.file)
        mine, before, solution = cuda.best_times(answer, self.host, [previous, self.solution], *problem)
        batch, heads, length, head_dim, causal = problem
        work = 4e-9 * batch * heads * length**2 * head_dim / (2 if causal else 1)  # TFLOP/s times milliseconds
        words = (
            f"{work / mine:.0f} TFLOP/s; the solution {work / solution:.0f}, {previous.stem} {work / before:.0f} "
            f"(batch {batch}, heads {heads}, N {length}, d {head_dim}{', causal' if causal else ''}, one run)"
        )
        if solution / mine < at_least:
            raise CheckFailed(f"{words}: {solution / mine:.2f} of the solution's speed; {at_least} is wanted")
        answer.remarks.append(words)


# ---- what the machine code shows -------------------------------------------------------------------------------------


def registers_of_roles(built: Built) -> tuple[list[int], list[int]]:
    """What setmaxnreg leaves to those who release registers, and grants to those who claim them."""
    released, claimed = [], []
    for line in built.instructions:
        if opcode(line).split(".")[0] == REGISTERS:
            (released if "DEALLOC" in line else claimed).append(int(re.findall(r"0x([0-9a-f]+)", line)[-1], 16))
    return released, claimed


def registers_add_up(built: Built, threads: int) -> None:
    """CheckFailed if the warpgroups together claim more registers than the block has: they would wait for ever."""
    released, claimed = registers_of_roles(built)
    if not claimed:
        return
    warpgroups, at_launch = threads // WARPGROUP, built.resources.registers
    producers = min(released, default=at_launch)
    needed = producers + (warpgroups - 1) * max(claimed)
    if needed > warpgroups * at_launch:
        raise CheckFailed(
            f"setmaxnreg: one warpgroup keeps {producers} registers a thread, {warpgroups - 1} claim {max(claimed)}: "
            f"{needed} together, but the block has {warpgroups} x {at_launch} = {warpgroups * at_launch}. Whoever asks "
            "last waits for ever"
        )


def parts(built: Built) -> tuple[list[str], list[str]]:
    """(producer's, consumers') instructions: from where setmaxnreg releases, or claims, up to its next use.

    CheckFailed if there is not one of each.
    """
    marks = [n for n, line in enumerate(built.instructions) if opcode(line).split(".")[0] == REGISTERS]
    if len(marks) != 2 or len({"DEALLOC" in built.instructions[n] for n in marks}) != 2:
        raise CheckFailed(
            f"{built.file} has {len(marks)} setmaxnreg instructions; wanted: one that releases (producer) and one that "
            "claims (consumers)"
        )
    first, second = list(built.instructions[marks[0] : marks[1]]), list(built.instructions[marks[1] :])
    return (first, second) if "DEALLOC" in first[0] else (second, first)


def count(lines: Iterable[str], name: str) -> int:
    """Instructions with this opcode, whatever modifiers they have."""
    return sum(opcode(line).split(".")[0] == name for line in lines)


def specialised(built: Built) -> None:
    """CheckFailed unless the producer copies and does not multiply, and the consumers multiply and do not copy.

    Nor may one of them wait in __syncthreads (barrier 0), where the other never comes.
    """
    producer, consumers = parts(built)
    meets = [any(BARRIER_0.search(line) for line in lines) for lines in (producer, consumers)]
    if meets[0] != meets[1]:
        whose = "producer's" if meets[0] else "consumers'"
        raise CheckFailed(
            f"a __syncthreads stands in the {whose} part of {built.file} alone: "
            "the others never come to it. What must be waited for has an mbarrier: full before a tile is read, empty "
            "before it is overwritten"
        )
    if copies := count(consumers, TMA_LOAD):
        raise CheckFailed(f"{copies} TMA loads stand in the consumers' part of {built.file}: copying is the producer's")
    if products := count(producer, PRODUCT):
        raise CheckFailed(
            f"{products} wgmma stand in the producer's part of {built.file}: it has no registers for them"
        )
    if not count(producer, TMA_LOAD):
        raise CheckFailed(f"there is no TMA load (UTMALDG) in the producer's part of {built.file}")
    if not count(consumers, PRODUCT):
        raise CheckFailed(f"there is no wgmma (HGMMA) in the consumers' part of {built.file}")


def products_of(built: Built, solution: Built) -> None:
    """CheckFailed if there are fewer wgmma than in the solution: a product, or a part of one, is missing."""
    mine, right = count(built.instructions, PRODUCT), count(solution.instructions, PRODUCT)
    if mine < right:
        raise CheckFailed(
            f"{mine} wgmma in {built.file}, {right} in the solution: is every 16 columns of head_dim (Q K^T) and every "
            "16 keys (P V) there, in unrolled loops?"
        )


def turns(built: Built, fewest_syncs: int, fewest_arrivals: int) -> None:
    """CheckFailed if the consumers' part has fewer named barriers (bar.sync, bar.arrive) than the technique needs."""
    _, consumers = parts(built)
    barriers = [line for line in consumers if opcode(line).split(".")[0] == "BAR"]
    arrivals = sum(opcode(line).startswith("BAR.ARV") for line in barriers)
    for found, wanted, words in (
        (len(barriers) - arrivals, fewest_syncs, "named_barrier_sync: a consumer must wait for its turn"),
        (arrivals, fewest_arrivals, "named_barrier_arrive: a turn must be handed on, and the first one given"),
    ):
        if found < wanted:
            raise CheckFailed(f"{found} in the consumers' part of {built.file}, at least {wanted} wanted: {words}")


def exponentials_beside_pv(built: Built) -> list[int]:
    """For each wait that leaves one product running (wait<1>): exponentials between it and the next wait for all."""
    waits = [(n, line) for n, line in enumerate(built.instructions) if "WARPGROUP.DEPBAR" in line]
    return [
        count((line for line in built.instructions[start:end] if "EX2" in line), "MUFU")
        for (start, first), (end, second) in itertools.pairwise(waits)
        if "0x1" in first and "0x0" in second
    ]


def overlaps(built: Built, wanted: int) -> None:
    """CheckFailed unless `wanted` exponentials a thread stand where P V is still running."""
    found = exponentials_beside_pv(built)
    if not found:
        raise CheckFailed(
            f"{built.file} never waits for S alone: no wgmma_wait<1>(), then wgmma_wait<0>(), in its code"
        )
    if max(found) < wanted:
        raise CheckFailed(
            f"only {max(found)} of {wanted} exponentials a thread stand between wait<1> and wait<0>: the compiler has "
            "moved the softmax behind the wait for P V, and nothing overlaps. Is `if (never) pin(s);` between them?"
        )
