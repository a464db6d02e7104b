"""The chapters' kernels with other tiles, or changed in one point: measured, but never used for the model.

Each can be built (for the GPU) and simulated (a schedule with the same change), so that the model can be asked about
kernels that nobody looked at while it was made.
"""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

from fa_reference.course import ROOT
from fa_reference.hopper.schedules import schedule_file
from fa_reference.versions import load_file

if TYPE_CHECKING:
    from fa_reference.kernels.attention_host import AttentionKernel

SHARED_OF_AN_SM, SHARED_OF_A_BLOCK = 228 * 1024, 227 * 1024  # of each block the system takes 1 KiB

_WAIT = "        await wg.wgmma_wait_group(0)\n"
_HAND_ON = "        await your_turn(wg, w, block.consumers)\n"
_TURN = "        await my_turn(wg, w)\n"
_RELEASE_K = "        await wg.mbarrier_arrive(at.K_empty[slot])\n"
# What solutions/09_two_stage/ablation.py does to a kernel, done to its schedule: text and its replacement, in pairs.
CHANGES: dict[tuple[int, str], tuple[tuple[str, str], ...]] = {
    (7, "deferred"): (
        (
            _RELEASE_K,
            f"{_RELEASE_K}        if j > 0:\n"
            "            await wg.mbarrier_arrive(at.V_empty[position(j - 1, stages)[0]])\n",
        ),
        (
            f"{_WAIT}        await wg.mbarrier_arrive(at.V_empty[slot])\n    # END",
            "    await wg.wgmma_wait_group(0)\n    # END",
        ),
    ),
    (8, "late"): ((_HAND_ON + _WAIT, _WAIT + _HAND_ON),),
    (8, "qk_only"): (
        ("    await my_turn(wg, w)\n    for j", "    for j"),
        (
            "        await wg.wgmma_fence()\n        await wg.wgmma(S,",
            f"{_TURN}        await wg.wgmma_fence()\n        await wg.wgmma(S,",
        ),
        (_TURN + "        V =", "        V ="),
        (_HAND_ON + _WAIT, f"        if (w, j) != (block.consumers - 1, block.key_blocks - 1):\n    {_HAND_ON}{_WAIT}"),
        (f"    if w < block.consumers - 1:\n{_HAND_ON}    # END", "    # END"),
    ),
}


@dataclass(frozen=True)
class Variant:
    """A chapter's kernel with other tiles than its own.

    change: a name of CHANGES, or "no_turns". blocks_on_sm: so much more shared memory is asked for that only so many
    fit (0: as many as do). key_blocks: of block_k keys.
    """

    chapter: int
    head_dim: int
    block_k: int = 128
    stages: int = 2
    change: str = ""
    blocks_on_sm: int = 0
    key_blocks: int = 64

    @property
    def name(self) -> str:
        """In words."""
        parts = [f"chapter {self.chapter}, d {self.head_dim}"]
        parts += [f"blocks of {self.block_k} keys"] * (self.block_k != 128)
        parts += [f"{self.stages} slot{'s' * (self.stages > 1)}"] * (self.stages != 2)
        parts += [self.change.replace("_", " ")] * bool(self.change)
        parts += [f"{self.blocks_on_sm} on an SM"] * bool(self.blocks_on_sm)
        parts += [f"{self.key_blocks} blocks of keys"] * (self.key_blocks != 64)
        return ", ".join(parts)

    def kernel(self) -> "AttentionKernel":
        """The host side of the kernel."""
        from fa_reference.kernels import trace

        module = load_file(ROOT / "solutions" / trace.KERNELS[self.chapter])
        module.BLOCK_K, module.STAGES = self.block_k, self.stages  # which shared_bytes reads
        changes: dict = {"block_k": self.block_k, "stages": self.stages}
        if self.change:
            ablation = load_file(ROOT / "solutions" / "09_two_stage" / "ablation.py")
            changes["source"] = ablation.source(f"{module.KERNEL.source.stem}:{self.change}")
        if self.blocks_on_sm:
            share = SHARED_OF_AN_SM // self.blocks_on_sm - 1024
            changes["shared_bytes"] = lambda _: min(share, SHARED_OF_A_BLOCK)
        return replace(module.KERNEL, **changes)

    def schedule(self) -> ModuleType:
        """The schedule with the same change, as a fresh module."""
        file = schedule_file(self.chapter)
        module, text = load_file(file), file.read_text()
        for before, after in CHANGES.get((self.chapter, self.change), ()):
            if text.count(before) != 1:
                raise ValueError(f"{self.name}: {file.name} has {text.count(before)} times, not once: {before!r}")
            text = text.replace(before, after)
        exec(compile(text, str(file), "exec"), module.__dict__)
        return module

    @property
    def options(self) -> dict[str, int]:
        """What the schedule's `kernel` is called with."""
        if self.chapter == 6:
            return {}
        return {"stages": self.stages} | ({"pingpong": False} if self.change == "no_turns" else {})


VARIANTS = [
    *(Variant(6, d, blocks_on_sm=n) for d, n in ((64, 1), (64, 2), (128, 1))),
    *(Variant(chapter, d, block_k=n) for chapter in (7, 8, 9) for d in (64, 128) for n in (64, 96, 176)),
    *(Variant(chapter, d, stages=3, block_k=n) for chapter in (7, 8, 9) for d, n in ((64, 128), (128, 64))),
    *(Variant(7, d, stages=1) for d in (64, 128)),
    *(Variant(9, d, change="no_turns") for d in (64, 128)),
    *(Variant(7, d, change="deferred") for d in (64, 128)),
    *(Variant(8, d, change=change) for d in (64, 128) for change in ("late", "qk_only")),
    *(Variant(chapter, d, key_blocks=16) for chapter in (7, 8, 9) for d in (64, 128)),
]
