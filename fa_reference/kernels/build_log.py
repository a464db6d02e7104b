"""What ptxas says about a kernel, as numbers and in plain words."""

import dataclasses
import re

# Causes and cures of ptxas' notes about Hopper's asynchronous instructions.
EXPLANATIONS = {
    "C7508": "setmaxnreg is ignored, because the register count at entry is unknown: write "
    "__launch_bounds__(threads, 1), with the 1.",
    "C7510": "wgmma is serialised: a function call lies between a wgmma and its wait. Remove the call (printf is one) "
    "or force it inline.",
    "C7511": "wgmma is serialised: too few registers for what is in flight. Take a smaller tile or more registers.",
    "C7512": "wgmma is serialised: too few registers in this function. Take a smaller tile or more registers per "
    "thread.",
    "C7513": "wgmma is serialised: registers of operand A are written while a wgmma may still read them. Wait first, "
    "or use other registers.",
    "C7514": "wgmma is serialised: an accumulator is read before the wait that covers it. Wait first; copying an "
    "accumulator around a loop counts as reading it.",
    "C7515": "wgmma is serialised: an accumulator is written while a wgmma is in flight. Start with accumulate = 0 "
    "instead of clearing it, and rescale after the wait.",
    "C7516": "wgmma is serialised: fence, wgmma, commit and wait differ between paths. Keep them in one straight line.",
    "C7517": "the compiler inserted a wait: an accumulator is used before your own wait. The result is right, the "
    "overlap is gone.",
    "C7519": "the compiler inserted a wgmma.fence: one is missing before a wgmma whose registers were touched.",
    "C7520": "the compiler inserted a wgmma.fence or wait in a path that not all threads take: keep control flow "
    "uniform.",
    "C7602": "one wgmma needs more registers than a thread may have: take a smaller N or fewer threads.",
}
_OVERLAP_LOST = {"C7510", "C7511", "C7512", "C7513", "C7514", "C7515", "C7516", "C7517", "C7520"}

_FUNCTION = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?(\d+) bytes smem)?")
_NOTE = re.compile(r"\((C7\d\d\d)\) ?(.*)")
_WARNING = re.compile(r"^(.*\(\d+\): warning.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes. Bytes a thread for stack and spills, bytes a block for (static) shared memory."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int
    barriers: int


@dataclasses.dataclass(frozen=True)
class Note:
    """A remark of ptxas about wgmma or setmaxnreg."""

    code: str
    text: str

    @property
    def explanation(self) -> str:
        """Cause and cure in plain words."""
        return EXPLANATIONS.get(self.code, self.text)

    @property
    def costs_overlap(self) -> bool:
        """True if tensor cores and arithmetic no longer run side by side because of it."""
        return self.code in _OVERLAP_LOST


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """Everything read from one build log."""

    kernels: dict[str, Resources]
    notes: tuple[Note, ...]
    warnings: tuple[str, ...]

    def describe(self) -> str:
        """The report as a few sentences for a learner."""
        lines = []
        for name, used in self.kernels.items():
            spills = used.spill_store_bytes + used.spill_load_bytes
            lines.append(
                f"{name}: {used.registers} registers a thread at launch, {used.stack_bytes} bytes of stack, "
                + ("no spills" if not spills else f"{spills} bytes spilled to local memory: this is slow")
            )
        lines += [f"{note.code}: {note.explanation}" for note in self.notes]
        lines += [f"compiler warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def parse_build_log(log: str) -> BuildReport:
    """Read NVRTC's log of a compilation with `ptxas -v`."""
    kernels: dict[str, Resources] = {}
    name, stack = None, (0, 0, 0)
    for line in log.splitlines():
        if found := _FUNCTION.search(line):
            name, stack = found[1], (0, 0, 0)
        elif found := _STACK.search(line):
            stack = (int(found[1]), int(found[2]), int(found[3]))
        elif (found := _USED.search(line)) and name is not None:
            kernels[name] = Resources(int(found[1]), *stack, int(found[3] or 0), int(found[2] or 0))
            name = None
    notes = {Note(code, text.strip()) for code, text in _NOTE.findall(log)}
    return BuildReport(kernels, tuple(sorted(notes, key=lambda note: note.code)), tuple(_WARNING.findall(log)))
