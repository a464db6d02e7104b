"""Which tile sizes of a kernel suit a problem: the scores that its tiles compute, and what a tile costs beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class TileSizes(Protocol):
    """What is asked of a kernel's configuration."""

    @property
    def block_q(self) -> int:
        """Query rows of a tile."""

    @property
    def block_k(self) -> int:
        """Keys of a block."""


@dataclass(frozen=True)
class Speed:
    """What was measured of a configuration."""

    relative: float
    """Speed at which scores are computed where sequences are long, relative to the other choices."""
    scores_a_tile: int
    """What the beginning and the end of a tile cost, in scores computed at that speed."""


Config = TypeVar("Config", bound=TileSizes)


def computed_scores(config: TileSizes, len_q: int, len_k: int, causal: bool) -> int:
    """Scores that one head's tiles compute, needed or not."""
    blocks = 0
    for start in range(0, len_q, config.block_q):
        seen = len_k if not causal else max(0, min(len_k, min(start + config.block_q, len_q) + len_k - len_q))
        blocks += math.ceil(seen / config.block_k)
    return blocks * config.block_q * config.block_k


def fastest(configs: Sequence[Config], speeds: Sequence[Speed], len_q: int, len_k: int, causal: bool) -> Config:
    """The one of `configs`, whose speeds are `speeds`, that should take the least time for these lengths."""

    def time(choice: tuple[Config, Speed]) -> float:
        config, speed = choice
        tiles = math.ceil(len_q / config.block_q)
        return (computed_scores(config, len_q, len_k, causal) + tiles * speed.scores_a_tile) / speed.relative

    return min(zip(configs, speeds, strict=True), key=time)[0]
