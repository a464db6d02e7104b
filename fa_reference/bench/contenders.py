"""What races: the course's versions, solutions by default, and the learner's beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fa_reference.bench.grid import DTYPES, Cell
from fa_reference.fp8.schemes import BOTH, attend
from fa_reference.versions import VERSIONS, Version, find_version, load_file

Output = tuple[Tensor, Tensor | None]
# bind(q, k, v, causal) does what must not be timed, and returns the launch and a remark for the record.
Bind = Callable[[Tensor, Tensor, Tensor, bool], tuple[Callable[[], Output], str]]

# Versions that take codes and scales. Raced only if named: their error is another matter, and so is their baseline.
QUANTISED = {
    version.name: version
    for version in (
        Version("fp8", 10, "fp8.py", "FP8, codes given", ("cuda",), ("bfloat16",), (128,), hopper=True),
        Version(
            "fa3_forward_fp8",
            None,
            "fa3_forward_fp8.py",
            "FA3 FP8, codes given",
            ("cuda",),
            ("bfloat16",),
            (64, 128, 256),
            hopper=True,
        ),
    )
}


@dataclass(frozen=True)
class Contender:
    """One column. Group "course" and "mine" are held to the error rule; a "peer" is a yardstick and only flagged."""

    name: str
    title: str
    group: str
    bind: Bind
    dtypes: tuple[str, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    mask_top_left: bool = False  # torch's is_causal: the same as the course's mask only where len_q == len_k
    chapter: int | None = None
    file: str | None = None
    baseline: Callable[..., tuple[Tensor, Tensor]] | None = None
    """What its error is held to, called like gold_attention, if not to plain attention in the input's dtype."""

    @property
    def graded(self) -> bool:
        return self.group != "peer"

    def refuses(self, cell: Cell) -> str | None:
        """Why this contender does not run in `cell`; None if it does."""
        dtype = DTYPES.get(cell.dtype, cell.dtype)
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}"
        if self.head_dims is not None and cell.head_dim not in self.head_dims:
            return f"takes head_dim {', '.join(map(str, self.head_dims))}"
        if self.mask_top_left and cell.causal and cell.len_q != cell.len_k:
            return "its causal mask is aligned top-left, which differs when len_q != len_k"
        return None

    def to_json(self) -> dict:
        keys = ("name", "title", "group", "chapter", "file")
        return {key: getattr(self, key) for key in keys}


def _bind_version(version: Version, root: Path | None) -> Bind:
    try:
        module = load_file((root and find_version(version, root)) or version.home / version.file)
        forward = module.forward
    except (Exception, SystemExit) as error:
        message = f"{version.file} does not load: {type(error).__name__}: {error}"

        def bind_failed(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[], Output], str]:
            raise RuntimeError(message)

        return bind_failed

    def bind(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[], Output], str]:
        return lambda: forward(q, k, v, causal=causal), ""

    def bind_codes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[], Output], str]:
        codes = module.quantised(q, k, v)
        return lambda: module.forward_fp8(**codes, causal=causal), "attention alone: rotated and quantised before"

    return bind_codes if version.name in QUANTISED else bind


def _contender(version: Version, root: Path | None) -> Contender:
    mine = root is not None
    return Contender(
        name=f"mine:{version.name}" if mine else version.name,
        title=f"yours: {version.title}" if mine else version.title,
        group="mine" if mine else "course",
        bind=_bind_version(version, root),
        dtypes=tuple(version.dtypes),
        head_dims=version.head_dims,
        chapter=version.chapter,
        file=version.file,
        baseline=partial(attend, BOTH) if version.name in QUANTISED else None,
    )


def _not_hopper() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9


def course_contenders(
    device: str, names: Iterable[str] = (), impl: Path | None = None
) -> tuple[list[Contender], list[str]]:
    """(contenders, remarks): versions that run on `device`, those of `impl` after each solution.

    `names` restricts them, and adds those of QUANTISED that it names; "mine:name" names the learner's alone. Raises
    ValueError for a name that does not exist
    or when `impl` holds no version that could run.
    """
    wanted = set(names)
    versions = VERSIONS | {name: v for name, v in QUANTISED.items() if wanted & {name, f"mine:{name}"}}
    runnable = {name: v for name, v in versions.items() if device in v.devices and not (v.hopper and _not_hopper())}
    named = {*VERSIONS, *QUANTISED}
    known = named | ({f"mine:{name}" for name in named} if impl else set())
    if unknown := wanted - known:
        raise ValueError(
            f"versions: {', '.join(sorted(unknown))} unknown; allowed: {', '.join(sorted(known))}"
            + ("" if impl else " (and with --impl DIR your own, as mine:NAME); library kernels: --peers")
        )
    contenders: list[Contender] = []
    remarks: list[str] = []
    for name in versions:
        mine = f"mine:{name}"
        if wanted and not wanted & {name, mine}:
            continue
        if name not in runnable:
            where = "a GPU other than Hopper" if versions[name].hopper and device == "cuda" else device
            remarks.append(f"{name} is left out: it does not run on {where}")
            continue
        version = runnable[name]
        if not wanted or name in wanted:
            contenders.append(_contender(version, None))
        if impl is not None and version.chapter is not None and (not wanted or wanted & {name, mine}):
            if find_version(version, impl) is None:
                remarks.append(f"{mine} is left out: {impl} has no {version.file}")
            else:
                contenders.append(_contender(version, impl))
    if impl is not None and not any(c.group == "mine" for c in contenders):
        raise ValueError(f"impl: {impl} holds no version that runs on {device}; looked for chapter folders and files")
    return contenders, remarks
