"""Bad input is refused in words that name the argument, its value and what is allowed."""

import pytest
import torch

from fa_reference.validation import check_attention_inputs

GOOD = torch.zeros(2, 4, 8, 64)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "words"),
    [
        (GOOD[0], GOOD, GOOD, {}, "q has shape (4, 8, 64), rank 3; allowed: (batch, heads, len, head_dim)"),
        ([1.0], GOOD, GOOD, {}, "q is a list; allowed: a torch.Tensor"),
        (GOOD.double(), GOOD, GOOD, {}, "q has dtype torch.float64; allowed: torch.float16 or"),
        (GOOD, GOOD.half(), GOOD, {}, "k has dtype torch.float16 but q has torch.float32"),
        (GOOD, GOOD.to("meta"), GOOD, {}, "k is on device meta; allowed: cpu or cuda"),
        (GOOD, GOOD, GOOD, {"devices": ("cuda",)}, "q is on device cpu; allowed: cuda"),
        (GOOD.clone().requires_grad_(), GOOD, GOOD, {}, "q has requires_grad=True"),
        (GOOD.mT.contiguous().mT, GOOD, GOOD, {}, "q has strides"),
        (GOOD[:0], GOOD[:0], GOOD[:0], {}, "batch = 0"),
        (GOOD[:, :0], GOOD, GOOD, {}, "heads_q = 0"),
        (GOOD[:, :, :0], GOOD, GOOD, {}, "len_q = 0"),
        (GOOD, GOOD, GOOD, {"head_dims": (128,)}, "q has head_dim = 64; allowed: 128"),
        (GOOD, GOOD, GOOD[:, :, :7], {}, "v has shape (2, 4, 7, 64) but k has (2, 4, 8, 64)"),
        (GOOD, GOOD[:1], GOOD[:1], {}, "k has batch 1 but q has 2"),
        (GOOD, GOOD[..., :32], GOOD[..., :32], {}, "k has head_dim 32 but q has 64"),
        (GOOD, GOOD[:, :3], GOOD[:, :3], {}, "k has heads_kv = 3 for heads_q = 4; allowed: a divisor"),
        (GOOD, GOOD[:, :0], GOOD[:, :0], {}, "k has heads_kv = 0"),
        (GOOD, GOOD, GOOD, {"causal": 1}, "causal is 1; allowed: True or False"),
        (GOOD, GOOD, GOOD, {"scale": 0.0}, "scale is 0.0; allowed: None"),
        (GOOD, GOOD, GOOD, {"scale": float("nan")}, "scale is nan"),
        (GOOD, GOOD, GOOD, {"scale": "1"}, "scale is '1'"),
    ],
)
def test_refused(q, k, v, options, words):
    with pytest.raises(ValueError) as raised:
        check_attention_inputs(q, k, v, **options)
    assert words in str(raised.value)


def test_accepted():
    assert check_attention_inputs(GOOD, GOOD[:, :2], GOOD[:, :2]) == 0.125
    assert check_attention_inputs(GOOD, GOOD[:, :, :0], GOOD[:, :, :0], scale=2) == 2.0
    transposed = torch.zeros(2, 8, 4, 64).transpose(1, 2)
    assert check_attention_inputs(transposed, transposed, transposed) == 0.125
    with torch.no_grad():
        check_attention_inputs(GOOD.clone().requires_grad_(), GOOD, GOOD)
