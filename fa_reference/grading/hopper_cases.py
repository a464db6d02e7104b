"""The cases that every Hopper attention kernel is held to, by what goes wrong in them; smallest first.

Lengths are chosen around tiles of 64 or 128 rows and blocks of 128 keys, in rings of a few slots.
"""

from fa_reference.grading.properties import fresh_seed
from fa_reference.inputs import Case


def _cases(*cases: Case, **common: object) -> list[Case]:
    seed = fresh_seed()
    return [case.but(**{"dtype": "bfloat16", "head_dim": 128, "seed": seed, **common}) for case in cases]


def whole_blocks() -> list[Case]:
    """One tile, with fewer blocks of keys than a ring has slots, as many, and more; then more tiles and d 64."""
    ring = _cases(Case(128, 128), Case(128, 256), Case(128, 384), Case(128, 1152), Case(512, 640, batch=2, heads_q=3))
    return [*ring, *_cases(Case(128, 128), Case(256, 640, heads_q=2), head_dim=64)]


def ragged() -> list[Case]:
    """Lengths that fill no tile and no block; what lies around the tensors is NaN."""
    shapes = (Case(1, 1), Case(5, 3), Case(70, 129), Case(129, 130), Case(257, 391), Case(1, 999))
    return _cases(*shapes, layout="padded", dtype="float16")


def causal() -> list[Case]:
    """Masks aligned bottom-right, with rows that see no key at all; and no key for anybody."""
    shapes = ((8, 8), (128, 128), (70, 200), (200, 70), (300, 300), (257, 391), (1000, 200))
    return [
        *_cases(*(Case(*shape, causal=True) for shape in shapes)),
        *_cases(Case(300, 500, causal=True), head_dim=64),
        *_cases(Case(3, 0), Case(130, 0, causal=True)),
    ]


def large_scores() -> list[Case]:
    """Scores that overflow, underflow, grow with every block, and outliers."""
    return [c for kind in ("rising", "large", "shifted", "outliers") for c in _cases(Case(130, 600), kind=kind)]


def layouts() -> list[Case]:
    """Grouped heads, strides, a scale of one's own, real activations."""
    grouped = Case(150, 300, batch=2, heads_q=4, heads_kv=2)
    return [
        *_cases(grouped, grouped.but(layout="bnhd"), grouped.but(heads_kv=1, layout="padded", scale=0.3)),
        *_cases(Case(40, 160, heads_q=3, kind="smollm2", causal=True), head_dim=64),
    ]


def full_size() -> list[Case]:
    """Many blocks of threads on every SM, and hundreds of blocks of keys, in which small errors would add up."""
    return _cases(
        Case(1000, 1000, heads_q=2, causal=True),
        Case(4096, 4096, batch=2, heads_q=8, heads_kv=2),
        Case(128, 32768),
        layout="bnhd",
    )


def repeated() -> Case:
    """One problem for many runs: tiles with one block and with many, on all SMs."""
    return _cases(Case(1111, 1333, batch=2, heads_q=8, heads_kv=2, causal=True))[0]
