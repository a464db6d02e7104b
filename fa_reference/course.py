"""The chapters of the course and where their files live."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Chapter:
    """One chapter: `files` are the learner's files, cut from the solution's files of the same names.

    `given` lie beside them, whole, because a learner's kernel needs them (its host's side): nothing is cut or graded.
    """

    number: int
    slug: str
    title: str
    hours: float
    files: tuple[str, ...]
    given: tuple[str, ...] = ()

    @property
    def all_files(self) -> tuple[str, ...]:
        """Everything that the course puts into the learner's folder beside lesson and hints."""
        return (*self.files, *self.given)

    @property
    def folder(self) -> str:
        """Folder name below chapters/, solutions/ and tests/, such as `03_fa1`."""
        return f"{self.number:02d}_{self.slug}"

    @property
    def room(self) -> Path:
        """The learner's folder: lesson, stubs, hints."""
        return ROOT / "chapters" / self.folder

    @property
    def solution(self) -> Path:
        """The folder of the complete files."""
        return ROOT / "solutions" / self.folder

    @property
    def tests(self) -> Path:
        """The folder of the graded checks."""
        return ROOT / "tests" / self.folder


CHAPTERS = (
    Chapter(1, "naive", "Naive attention and the roofline", 1.5, ("naive.py",)),
    Chapter(2, "online_softmax", "Online softmax", 2.0, ("online_softmax.py",)),
    Chapter(3, "fa1", "FlashAttention-1: tiling", 4.0, ("fa1_tiled.py", "fa1_triton.py")),
    Chapter(4, "fa2", "FlashAttention-2: loop order and work partitioning", 4.0, ("fa2_tiled.py", "fa2_triton.py")),
    Chapter(
        5,
        "cuda",
        "CUDA: FlashAttention-2 in four steps",
        10.0,
        ("layouts.py", "fa2_cuda.py", "scalar.cu", "tiles.cu", "tensor_cores.cu", "fa2.cu"),
    ),
    Chapter(
        6,
        "hopper_engines",
        "Hopper's engines: TMA and wgmma",
        8.0,
        (
            "schedule.py",
            "layouts.py",
            "tma_engine.cuh",
            "tma_tile.cu",
            "wgmma_engine.cuh",
            "wgmma_tile.cu",
            "attention.cu",
        ),
        given=("engines.py", "attention.py"),
    ),
    Chapter(
        7,
        "warp_specialised",
        "Warp specialisation: a producer and two consumers",
        6.0,
        ("schedule.py", "budget.py", "warp_specialised.cu"),
        ("warp_specialised.py",),
    ),
    Chapter(8, "pingpong", "Pingpong: warpgroups in turns", 3.0, ("schedule.py", "pingpong.cu"), ("pingpong.py",)),
    Chapter(
        9,
        "two_stage",
        "Two-stage pipelining: FlashAttention-3",
        4.0,
        ("schedule.py", "fa3.cu"),
        ("fa3.py",),
    ),
    Chapter(
        10,
        "fp8",
        "FP8: quantisation, layouts, rotation",
        9.0,
        ("schedule.py", "quantise.py", "emulate.py", "layouts.py", "fp8.cu"),
        ("fp8.py",),
    ),
)


def chapter(number: int) -> Chapter:
    """The chapter with this number; ValueError naming the chapters that exist otherwise."""
    for candidate in CHAPTERS:
        if candidate.number == number:
            return candidate
    known = ", ".join(str(c.number) for c in CHAPTERS)
    raise ValueError(f"no chapter {number}: the chapters are {known}")
