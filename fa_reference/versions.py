"""The registry of attention versions, and loading one by path: from the solutions or from a learner's folder."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fa_reference.course import chapter


@dataclass(frozen=True)
class Version:
    """One attention of the course: the file that defines its `forward`, and what that accepts.

    devices: where it runs at all ("cpu" for Triton versions means: in the interpreter, on small inputs only).
    head_dims: None for any.
    """

    name: str
    chapter: int
    file: str
    title: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] | None = None


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


def load_version(name: str, root: Path | None = None) -> ModuleType:
    """The module of a version: from the solutions, or from `root`, a folder that holds a chapter's files.

    `root` may be one chapter's folder or a folder with all chapters' folders in it. KeyError for an unknown name.
    """
    version = VERSIONS[name]
    where = chapter(version.chapter)
    if root is None:
        return load_file(where.solution / version.file)
    nested = Path(root) / where.folder / version.file
    return load_file(nested if nested.is_file() else Path(root) / version.file)
