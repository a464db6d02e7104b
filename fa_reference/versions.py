"""The registry of attention versions, and loading one by path: from the solutions or from a learner's folder."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fa_reference.course import ROOT, chapter


@dataclass(frozen=True)
class Version:
    """One attention of the course: the file that defines its `forward`, and what that accepts.

    chapter: None for the finished kernels in cuda/, which are no exercise.
    devices: where it runs at all ("cpu" for Triton versions means: in the interpreter, on small inputs only).
    head_dims: None for any. hopper: needs an H100 or H200.
    """

    name: str
    chapter: int | None
    file: str
    title: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] | None = None
    hopper: bool = False

    @property
    def home(self) -> Path:
        """The folder that holds the course's own file."""
        return ROOT / "cuda" if self.chapter is None else chapter(self.chapter).solution


ANY_FLOAT = ("float32", "float16", "bfloat16")
HALF = ("float16", "bfloat16")

VERSIONS = {
    version.name: version
    for version in (
        Version("naive", 1, "naive.py", "naive", ("cpu", "cuda"), ANY_FLOAT),
        Version("online_softmax", 2, "online_softmax.py", "online softmax", ("cpu", "cuda"), ANY_FLOAT),
        Version("fa1_tiled", 3, "fa1_tiled.py", "FA1, counted in Python", ("cpu",), ANY_FLOAT),
        Version("fa1_triton", 3, "fa1_triton.py", "FA1, Triton", ("cpu", "cuda"), HALF, (64, 128)),
        Version("fa2_tiled", 4, "fa2_tiled.py", "FA2, counted in Python", ("cpu",), ANY_FLOAT),
        Version("fa2_triton", 4, "fa2_triton.py", "FA2, Triton", ("cpu", "cuda"), HALF, (64, 128, 256)),
        Version("fa2_cuda", 5, "fa2_cuda.py", "FA2, CUDA", ("cuda",), HALF, (64, 128)),
        Version("one_warpgroup", 6, "attention.py", "one warpgroup, CUDA", ("cuda",), HALF, (64, 128), hopper=True),
        *(
            Version(name, number, file, title, ("cuda",), HALF, (64, 128), hopper=True)
            for name, number, file, title in (
                ("warp_specialised", 7, "warp_specialised.py", "FA3: warp specialisation"),
                ("pingpong", 8, "pingpong.py", "FA3: + pingpong"),
                ("two_stage", 9, "fa3.py", "FA3: + two stages"),
            )
        ),
        Version("fa3_forward", None, "fa3_forward.py", "FA3, CUDA", ("cuda",), HALF, (64, 128, 256), hopper=True),
    )
}


def load_file(path: Path) -> ModuleType:
    """Import the Python file at `path` as a fresh module; FileNotFoundError naming the path if it is missing."""
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"loaded_{path.parent.name}_{path.stem}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and Triton look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def find_version(version: Version, root: Path) -> Path | None:
    """Where a learner's folder (one chapter's files, or all chapters' folders) keeps a version; None if it does not."""
    if version.chapter is None:
        return None
    nested = Path(root) / chapter(version.chapter).folder / version.file
    return next((path for path in (nested, Path(root) / version.file) if path.is_file()), None)


def load_version(name: str, root: Path | None = None) -> ModuleType:
    """The module of a version: the course's own, or the one in `root`, a folder of a learner's.

    KeyError for an unknown name, FileNotFoundError if the folder does not hold it.
    """
    version = VERSIONS[name]
    if root is None:
        return load_file(version.home / version.file)
    return load_file(find_version(version, root) or Path(root) / version.file)
