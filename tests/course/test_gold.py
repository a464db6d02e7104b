"""Gold attention, the error rule and the inputs they are used on."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fa_reference import gold
from fa_reference.error_rule import judge
from fa_reference.gold import baseline_attention, gold_attention
from fa_reference.inputs import KINDS, LAYOUTS, Case

CASES = st.builds(
    Case,
    len_q=st.integers(1, 70),
    len_k=st.integers(1, 140),
    batch=st.integers(1, 2),
    heads_q=st.sampled_from([2, 4]),
    heads_kv=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    causal=st.booleans(),
    kind=st.sampled_from(sorted(KINDS)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 10**6),
)


def blockwise(q, k, v, causal, scale=None, block=48):
    """A correct attention that differs from the baseline wherever it may: online, normalised last."""
    group = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    m = torch.full((*q.shape[:3], 1), -torch.inf)
    l, o = torch.zeros_like(m), torch.zeros(q.shape)
    for start in range(0, k.shape[2], block):
        s = q.float() @ k[:, :, start : start + block].mT * scale
        if causal:
            j = torch.arange(start, start + s.shape[-1])
            s = s.masked_fill(j > torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], -torch.inf)
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        safe = m_new.nan_to_num(neginf=0.0)
        p, alpha = torch.exp(s - safe), torch.exp(m - safe)
        l, m = l * alpha + p.sum(-1, keepdim=True), m_new
        o = o * alpha + p.to(q.dtype).float() @ v[:, :, start : start + block]
    return (o / torch.where(l == 0, 1, l)).to(q.dtype), (m + l.log()).squeeze(-1)


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_a_correct_attention_keeps_the_rule(case):
    q, k, v = case.make()
    report = judge(*blockwise(q, k, v, case.causal), q, k, v, causal=case.causal)
    assert report.passed, f"{case}: {report}"


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_gold_equals_torch_in_float64(case):
    q, k, v = (x.double() for x in case.but(causal=False).make())
    o, lse = gold_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
    group = case.heads_q // case.heads_kv
    scores = q @ k.repeat_interleave(group, 1).mT * case.head_dim**-0.5
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1), rtol=1e-12, atol=1e-9)


def test_causal_is_aligned_bottom_right():
    case = Case(len_q=3, len_k=5, causal=True)
    q, k, v = case.make()
    o, _ = gold_attention(q, k, v, causal=True)
    for i in range(3):
        seen = i + 5 - 3 + 1
        alone, _ = gold_attention(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen])
        torch.testing.assert_close(o[:, :, i : i + 1], alone)


def test_rows_without_keys_give_zero_and_minus_infinity():
    q, k, v = Case(len_q=5, len_k=2, causal=True).make()
    for attention in (gold_attention, baseline_attention):
        o, lse = attention(q, k, v, causal=True)
        assert (o[:, :, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all()
        assert lse[:, :, 3:].isfinite().all()
    o, lse = gold_attention(q, k[:, :, :0], v[:, :, :0])
    assert (o == 0).all() and (lse == -torch.inf).all()


def test_gold_in_chunks_is_gold(monkeypatch):
    q, k, v = Case(len_q=37, len_k=53, causal=True).make()
    whole = gold_attention(q, k, v, causal=True)
    monkeypatch.setattr(gold, "SCORES_AT_ONCE", 200)
    for a, b in zip(gold_attention(q, k, v, causal=True), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [64, 1024])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_rule_rejects_what_a_fixed_tolerance_accepts(length, dtype):
    q, k, v = Case(length, length, dtype=dtype).make()
    o, lse = baseline_attention(q, k, v)
    assert judge(o, lse, q, k, v).passed
    assert not judge(torch.zeros_like(o), lse, q, k, v).passed
    shorter = baseline_attention(q, k[:, :, :-1], v[:, :, :-1])
    assert not judge(*shorter, q, k, v).passed
    assert not judge(o, lse / 0.6931, q, k, v).passed
    poisoned = o.clone()
    poisoned[0, 0, -1, -1] = torch.nan
    assert not judge(poisoned, lse, q, k, v).passed


def test_real_activations_are_an_input():
    for seed in range(4):
        q, k, v = Case(64, 128, heads_q=3, heads_kv=1, kind="smollm2", dtype="float16", seed=seed).make()
        assert q.shape == (1, 3, 64, 64) and k.shape == v.shape == (1, 1, 128, 64)
        assert all(x.isfinite().all() for x in (q, k, v))
    with pytest.raises(ValueError, match="at most 2048 tokens"):
        Case(64, 4096, heads_q=3, heads_kv=1, kind="smollm2").make()


def test_padded_layout_is_surrounded_by_nan():
    q, _, _ = Case(5, 7, layout="padded").make()
    around = q.as_strided((1, 1, 5, 65), q.stride(), q.storage_offset())
    assert around[..., 64].isnan().all() and q.isfinite().all()
