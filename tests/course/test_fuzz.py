"""Random problems for every version that runs without a GPU, held to the error rule; hypothesis shrinks what fails.

Short here, and the same problems every time; FUZZ=1000 tries that many new ones for each version. On a GPU:
`python -m fa_reference.fuzz`.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fa_reference.fuzz import draw_case, run_case
from fa_reference.triton_cpu import INTERPRETED
from fa_reference.versions import VERSIONS, load_version

LONG = "FUZZ" in os.environ
EXAMPLES = int(os.environ.get("FUZZ", "20"))
# In Python a step of the tiled versions takes a millisecond, a block in Triton's interpreter a tenth of a second.
LONGEST = {
    "naive": 600,
    "online_softmax": 600,
    "fa1_tiled": 200,
    "fa2_tiled": 200,
    "fa1_triton": 200,
    "fa2_triton": 200,
}
# What a version's forward takes besides the problem.
OPTIONS = {
    "online_softmax": {"block_k": (1, 16, 50, 128)},
    "fa1_tiled": {"block_q": (5, 16, 64), "block_k": (7, 16, 64)},
    "fa2_tiled": {"block_q": (5, 16, 64), "block_k": (7, 16, 64)},
}


@pytest.mark.parametrize("name", [n for n, v in VERSIONS.items() if "cpu" in v.devices])
def test_random_problems(name: str):
    if "triton" in name and not INTERPRETED:
        pytest.skip("this machine runs Triton on a GPU: python -m fa_reference.fuzz")
    version, forward = VERSIONS[name], load_version(name).forward
    examples = EXAMPLES if name in ("naive", "online_softmax") else max(1, EXAMPLES // 4)

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=not LONG,
    )
    @given(st.data())
    def holds(data: st.DataObject):
        def pick(values):
            return data.draw(st.sampled_from(values))

        case = draw_case(pick, version, LONGEST[name], heads=(1, 2))
        options = {key: pick(values) for key, values in OPTIONS.get(name, {}).items()}
        assert run_case(forward, case, "cpu", **options) is None, (case, options)

    holds()


def test_a_wrong_version_is_found():
    def forward(q, k, v, *, causal, scale):
        return load_version("naive").forward(q, k[:, :, :-1], v[:, :, :-1], causal=causal, scale=scale)

    chosen = iter([1, 16, 32, 1, 1, 64, "float32", False, None, "normal", "bhnd", 0])
    case = draw_case(lambda values: next(chosen), VERSIONS["naive"], 64)
    assert (case.len_q, case.len_k, case.kind, case.seed) == (16, 32, "normal", 0)
    assert run_case(load_version("naive").forward, case, "cpu") is None
    assert "times what the error rule allows" in run_case(forward, case, "cpu")


def test_nothing_is_drawn_that_a_version_refuses():
    for version in VERSIONS.values():
        for choice in (0, -1):
            case = draw_case(lambda values, n=choice: values[n], version, 256)
            assert all(torch.isfinite(x).all() for x in case.but(layout="bhnd").make())
            assert version.head_dims is None or case.head_dim in version.head_dims
