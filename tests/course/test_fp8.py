"""FP8 numerics: the format, scales, rotation, register layouts, and the emulated kernel."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fa_reference.fp8 import experiment, figures, layouts, schemes, sixteen_bit, tables
from fa_reference.fp8.accumulate import tensor_core_matmul
from fa_reference.fp8.attention import attention_fp8, forward_fp8
from fa_reference.fp8.e4m3 import MAX, decode_e4m3, encode_e4m3, round_e4m3
from fa_reference.fp8.hadamard import hadamard_transform, random_signs, rotate, unrotate
from fa_reference.fp8.online import Arithmetic, online_attention
from fa_reference.fp8.scales import GRANULARITIES, Quantized, amax_scale, quantize, quantize_with
from fa_reference.gold import gold_attention
from fa_reference.inputs import KINDS

ALL_CODES = torch.arange(256, dtype=torch.uint8)
NAN_CODES = (0x7F, 0xFF)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiles this small run faster, and the sums are the same every time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(*shape, kind="normal", seed=0):
    return KINDS[kind](shape, torch.Generator().manual_seed(seed))


def rms(x):
    return float(x.double().square().mean().sqrt())


# The format


def test_decode_equals_torch_on_every_code():
    ours, theirs = decode_e4m3(ALL_CODES), ALL_CODES.view(torch.float8_e4m3fn).float()
    assert torch.equal(ours.view(torch.int32)[~ours.isnan()], theirs.view(torch.int32)[~theirs.isnan()])  # -0 too
    assert ours.isnan().nonzero().flatten().tolist() == list(NAN_CODES) == theirs.isnan().nonzero().flatten().tolist()


def test_every_value_encodes_to_its_code():
    codes = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F]
    assert torch.equal(encode_e4m3(decode_e4m3(codes)), codes)


def test_halfway_cases_go_to_the_even_code_and_their_neighbours_to_the_nearer():
    low = torch.arange(0x7E, dtype=torch.uint8)
    halfway = (decode_e4m3(low) + decode_e4m3(low + 1)) / 2
    even = torch.where(low % 2 == 0, low, low + 1)
    for sign, bit in ((1, 0), (-1, 0x80)):
        assert torch.equal(encode_e4m3(sign * halfway), even | bit)
        assert torch.equal((sign * halfway).to(torch.float8_e4m3fn).view(torch.uint8), even | bit)
        below = torch.nextafter(halfway, torch.zeros(()))
        above = torch.nextafter(halfway, torch.full((), torch.inf))
        assert torch.equal(encode_e4m3(sign * below), low | bit)
        assert torch.equal(encode_e4m3(sign * above), (low + 1) | bit)


def test_random_floats_encode_as_torch_casts_them():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32)
    spread = torch.randn(300_000, generator=generator) * torch.exp2(torch.rand(300_000, generator=generator) * 24 - 14)
    for x in (bits.view(torch.float32), spread):
        x = x[x.isfinite()]
        expected = x.clamp(-MAX, MAX).to(torch.float8_e4m3fn)
        assert torch.equal(encode_e4m3(x), expected.view(torch.uint8))
        assert torch.equal(round_e4m3(x), expected.float())
    for dtype in (torch.float16, torch.bfloat16):
        x = spread.to(dtype)
        assert torch.equal(encode_e4m3(x), encode_e4m3(x.float()))


def test_saturation_infinity_and_nan_as_the_instruction_has_them():
    x = torch.tensor([448.0, 463.9, 464.0, 1e30, torch.inf, torch.nan])
    assert encode_e4m3(x).tolist() == [0x7E] * 5 + [0x7F]
    assert encode_e4m3(-x).tolist() == [0xFE] * 5 + [0x7F]
    assert encode_e4m3(torch.tensor([2.0**-10, 2.0**-10 * 1.001, -0.0, 1e-45])).tolist() == [0, 1, 0x80, 0]
    with pytest.raises(ValueError, match="float64; allowed: torch.float32"):
        encode_e4m3(x.double())
    with pytest.raises(ValueError, match="torch.uint8"):
        decode_e4m3(x)


# Scales


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_are_the_largest_magnitude_over_448(granularity):
    x = draw(2, 3, 300, 64, kind="outliers")
    scale, rows = amax_scale(x, granularity, 128)
    spread = Quantized(torch.empty(2, 3, 300, 64), scale, rows)
    shapes = {"tensor": (2, 3, 1), "head": (2, 3, 1), "block": (2, 3, 3), "token": (2, 3, 300), "channel": (2, 3, 64)}
    assert scale.shape == shapes[granularity] and scale.dtype == torch.float32
    expected = {
        "tensor": x.abs().amax().expand(2, 3, 1),
        "head": x.abs().amax((2, 3))[..., None],
        "block": torch.stack([x[:, :, i : i + 128].abs().amax((2, 3)) for i in (0, 128, 256)], -1),
        "token": x.abs().amax(3),
        "channel": x.abs().amax(2),
    }[granularity]
    assert torch.equal(scale, expected / 448)
    if rows is not None:
        assert spread.row_scale.shape == (2, 3, 300, 1)
    error = (quantize(x, granularity, 128).dequantized() - x).abs()
    # Relative error at most 2^-4 above the subnormal range; there at most half of 2^-9 times the scale.
    allowed = torch.maximum(x.abs() * 2.0**-4, scale.amax() * 2.0**-10) * 1.0001
    assert (error <= allowed).all() and error.max() > 0


def test_zeros_and_extremes_stay_finite():
    x = draw(1, 1, 256, 64)
    x[:, :, :128] = 0
    quantised = quantize(x, "block", 128)
    assert quantised.scale[0, 0, 0] == 1 and (quantised.dequantized()[:, :, :128] == 0).all()
    for size in (1e-45, 1e-38, 3e38):
        for granularity in GRANULARITIES:
            tiny = quantize(torch.full((1, 1, 4, 64), size), granularity, 2)
            assert tiny.scale.isfinite().all() and (tiny.scale > 0).all() and tiny.dequantized().isfinite().all()
    empty = quantize(torch.zeros(1, 2, 0, 64), "block", 128)
    assert empty.scale.tolist() == [[[1.0], [1.0]]]


def test_bad_input_to_the_quantiser_is_refused_by_name():
    x = draw(1, 1, 4, 64)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[0, 0, 2, 5] = bad
        with pytest.raises(ValueError, match=r"^k holds .* at position \(0, 0, 2, 5\)"):
            quantize(spoiled, "head", name="k")
    with pytest.raises(ValueError, match="granularity is 'row'"):
        quantize(x, "row")
    with pytest.raises(ValueError, match="block is None"):
        quantize(x, "block")
    with pytest.raises(ValueError, match=r"k has shape \(4, 64\)"):
        quantize(x[0, 0], "head", name="k")
    with pytest.raises(ValueError, match="channel scales"):
        _ = quantize(x, "channel").row_scale


# Rotation


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rotation_keeps_scores_and_norms_and_has_an_inverse(head_dim):
    q, k = draw(2, 5, head_dim).double(), draw(2, 7, head_dim, seed=1).double()
    signs = random_signs(head_dim, seed=3)
    assert set(signs.tolist()) == {1.0, -1.0} and torch.equal(signs, random_signs(head_dim, seed=3))
    turned_q, turned_k = rotate(q, signs), rotate(k, signs)
    torch.testing.assert_close(turned_q @ turned_k.mT, q @ k.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(unrotate(turned_q, signs), q, rtol=1e-12, atol=1e-13)
    assert (turned_q - q).abs().max() > 0.1
    outlier = torch.zeros(1, head_dim)
    outlier[0, 5] = 100.0
    assert torch.allclose(rotate(outlier, signs).abs(), torch.full((1, head_dim), 100 / head_dim**0.5))


def test_the_fast_transform_is_the_matrix():
    i = torch.arange(64)
    bits = i[:, None] & i[None, :]
    parity = sum((bits >> b) & 1 for b in range(6)) % 2
    matrix = (1 - 2 * parity).double() / 8
    torch.testing.assert_close(hadamard_transform(torch.eye(64).double()), matrix, rtol=0, atol=0)


def test_rotation_refuses_what_it_cannot_do():
    for head_dim in (96, 0, 3):
        with pytest.raises(ValueError, match=f"head_dim is {head_dim}; allowed: a power of two"):
            random_signs(head_dim)
    with pytest.raises(ValueError, match="head_dim is 96"):
        rotate(torch.zeros(4, 96), torch.ones(96))
    with pytest.raises(ValueError, match=r"signs has shape \(64,\); allowed: \(128,\)"):
        rotate(torch.zeros(4, 128), torch.ones(64))
    with pytest.raises(ValueError, match="other than"):
        rotate(torch.zeros(4, 64), torch.zeros(64))


# Register layouts, by enumeration


def test_both_fragments_cover_their_tile_once():
    accumulator = {layouts.accumulator_position(t, r) for t in range(128) for r in range(32)}
    assert accumulator == {(row, col) for row in range(64) for col in range(64)}
    operand = {layouts.a_fragment_fp8_position(t, r, b) for t in range(128) for r in range(4) for b in range(4)}
    assert operand == {(row, k) for row in range(64) for k in range(32)}


def test_the_key_order_of_sixteen_keys():
    assert layouts.kv_order(16).tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    order = layouts.kv_order(224)
    assert sorted(order.tolist()) == list(range(224))
    assert torch.equal(order[layouts.inverse_order(order)], torch.arange(224))
    with pytest.raises(ValueError, match="keys is 24; allowed: a multiple of 16"):
        layouts.kv_order(24)
    with pytest.raises(ValueError, match="8 registers"):
        layouts.pack_p(torch.zeros(8))


@pytest.mark.parametrize("keys", [32, 64, 224])
def test_packed_accumulators_are_the_operand_in_key_order(keys):
    order = layouts.kv_order(keys)
    for thread in range(128):
        positions = torch.tensor([layouts.accumulator_position(thread, r) for r in range(keys // 2)])
        rows, columns = layouts.pack_p(positions[:, 0]), layouts.pack_p(positions[:, 1])
        for step in range(keys // 32):
            for register in range(4):
                for byte in range(4):
                    row, k = layouts.a_fragment_fp8_position(thread, register, byte)
                    assert rows[step, register, byte] == row
                    assert columns[step, register, byte] == order[32 * step + k]


def test_v_transposed_in_key_order_gives_the_same_product():
    p, v = draw(64, 96).double(), draw(96, 32, seed=1).double()
    vt = layouts.transpose_v(v)
    assert vt.shape == (32, 96)
    torch.testing.assert_close(p[:, layouts.kv_order(96)] @ vt.mT, p @ v)
    assert not torch.allclose(p @ vt.mT, p @ v)


def test_the_transposition_by_instructions_is_the_transposition():
    tile = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(layouts.transpose_v_16x16(tile), layouts.transpose_v(tile))
    with pytest.raises(ValueError, match="0x8420"):
        layouts.byte_perm(tile[:, :4], tile[:, :4], 0x8420)


# The tensor core's sums


def test_tensor_core_sums_keep_fourteen_bits():
    one = torch.ones(1, 32)
    small = torch.zeros(32, 1)
    small[0] = 1.0
    # 2^13 + 1 still has 14 bits; 2^14 + 1 has 15: the small term is cut off, however often it is added.
    for size, kept in ((2.0**13, 1.0), (2.0**14, 0.0)):
        assert tensor_core_matmul(one, small, torch.full((1, 1), size)).item() == size + kept
        assert tensor_core_matmul(one, -small, torch.full((1, 1), -size)).item() == -size - kept
    many = small.repeat(8, 1)
    assert tensor_core_matmul(one.repeat(1, 8), many, torch.full((1, 1), 2.0**14)).item() == 2.0**14
    # Within one step too. 448 = 1.75 x 2^8 twice: the exponents add up to 16 (though the product is beyond 2^17), and
    # 2^3 is the last bit kept. As an accumulator the same number has exponent 17.
    a, b = torch.tensor([[448.0, 15.0, 16.0]]), torch.tensor([[448.0], [1.0], [1.0]])
    assert tensor_core_matmul(a, b).item() == 448 * 448 + 8 + 16
    assert tensor_core_matmul(a, b, terms=1).item() == 448 * 448 + 0 + 16


def test_tensor_core_sums_of_few_bits_are_exact():
    a, b = torch.randint(-8, 9, (40, 96)).float(), torch.randint(-8, 9, (96, 24)).float()
    assert torch.equal(tensor_core_matmul(a, b), a @ b)
    assert torch.equal(tensor_core_matmul(torch.zeros(3, 40), torch.zeros(40, 5)), torch.zeros(3, 5))
    x, y = round_e4m3(draw(16, 4096)), round_e4m3(draw(4096, 16, seed=1) + 1)
    exact = x.double() @ y.double()
    error, single = rms(tensor_core_matmul(x, y) - exact), rms(x @ y - exact)
    assert 10 * single < error < 0.05 * rms(exact)


# The emulated kernel


def random_case(data):
    heads_q, heads_kv = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    len_q, len_k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 150))
    seed = data.draw(st.integers(0, 10**6))
    q = draw(2, heads_q, len_q, 64, seed=seed)
    k, v = draw(2, heads_kv, len_k, 64, seed=seed + 1), draw(2, heads_kv, len_k, 64, seed=seed + 2)
    return q, k, v, data.draw(st.booleans())


def dequantised_gold(q, k, v, causal):
    return gold_attention(*(x.dequantized() for x in (q, k, v)), causal=causal)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_only_p_and_the_output_are_rounded(data):
    """Against float64 attention of the dequantised tensors nothing is left but the rounding of P and of O."""
    q, k, v, causal = random_case(data)
    choose = st.sampled_from(["tensor", "head", "block", "token"])
    codes = [quantize(x, data.draw(choose), 32) for x in (q, k)]
    codes.append(quantize(v, data.draw(st.sampled_from(["head", "channel"]))))
    arithmetic = Arithmetic(block_k=data.draw(st.sampled_from([16, 64, 128])), descending=data.draw(st.booleans()))
    gold, gold_lse = dequantised_gold(*codes, causal)
    o, lse = attention_fp8(*codes, causal=causal, arithmetic=arithmetic)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    empty = gold_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and (o[empty] == 0).all()
    assert not (~empty).any() or float((lse.double() - gold_lse)[~empty].abs().max()) < 1e-4
    # P's relative error is at most 2^-4, O's 2^-9.
    largest = float(v.abs().max())
    assert float((o.double() - gold).abs().max()) <= 0.07 * largest
    exact, _ = online_attention(
        *(x.data.float() for x in codes),
        causal=causal,
        scale=0.125,
        arithmetic=replace(arithmetic, p_format="fp32"),
        q_scale=codes[0].row_scale,
        k_scale=codes[1].row_scale,
    )
    v_scale = codes[2].scale[:, :, None, :].repeat_interleave(q.shape[1] // k.shape[1], 1)
    torch.testing.assert_close(exact.double() * v_scale, gold, rtol=1e-4, atol=1e-4)


def test_p_is_really_rounded_to_e4m3_after_the_factor():
    """Two keys, scores 0 and -t: the weights are exact fractions of e4m3 values."""
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 1.0
    k, v = torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 2, 64)
    k[0, 0, 1, 0], v[0, 0, 1] = -1.0, 1.0
    codes = [Quantized(x.to(torch.float8_e4m3fn), torch.ones(1, 1, 1), x.shape[2]) for x in (q, k, v)]
    for scale in (1.0, 3.0, 9.0, 11.0):
        weight = torch.exp(torch.tensor(-scale))
        for offset, lost in ((8, False), (0, scale > 6.94)):  # e4m3 holds nothing below 2^-10 = exp(-6.93)
            o, _ = attention_fp8(*codes, scale=scale, arithmetic=Arithmetic(p_offset=offset))
            expected = round_e4m3(weight * 2.0**offset) / 2.0**offset / (1 + weight)
            assert (expected == 0) == lost
            torch.testing.assert_close(o[0, 0, 0, 0].float(), expected, rtol=2.0**-8, atol=0)


def test_v_scales_along_the_keys_are_folded_into_p():
    q, k, v = (draw(1, 1, n, 64, seed=n) for n in (50, 256, 257))
    v = v[:, :, :256] * torch.tensor([1.0, 30.0]).repeat_interleave(128)[:, None]
    codes = [quantize(q, "head"), quantize(k, "head"), quantize(v, "block", 128)]
    gold, _ = dequantised_gold(*codes, False)
    o, _ = attention_fp8(*codes)
    assert rms(o.double() - gold) < 0.04 * rms(gold)


def test_smoothing_and_rotating_change_nothing_but_rounding():
    q, k, v = (draw(1, h, n, 64, seed=h) + 2 for h, n in ((2, 40), (1, 90), (1, 90)))
    exact = schemes.PLAIN.but("", "", qk="fp32", v="fp32", arithmetic=Arithmetic("fp32"))
    gold, gold_lse = gold_attention(q, k, v, causal=True)
    for change in (
        (),
        ("smooth_k",),
        ("smooth_v",),
        ("smooth_q",),
        ("smooth_q", "smooth_k", "rotate_qk"),
        ("rotate_v", "smooth_v"),
    ):
        o, lse = schemes.attend(replace(exact, **dict.fromkeys(change, True)), q, k, v, causal=True)
        torch.testing.assert_close(o.double(), gold, rtol=2.0**-8, atol=1e-3)
        torch.testing.assert_close(lse.double(), gold_lse, rtol=1e-5, atol=1e-4)
    k, v = k[:, :, :20], v[:, :, :20]
    o, lse = schemes.attend(replace(schemes.PLAIN, smooth_v=True, smooth_k=True), q, k, v, causal=True)
    assert (o[:, :, :20] == 0).all() and (lse[:, :, :20] == -torch.inf).all() and lse[:, :, 20:].isfinite().all()
    mean = v.mean(2)
    codes = [quantize(q, "head"), quantize(k, "head"), quantize(v - mean[:, :, None], "head")]
    again, _ = attention_fp8(*codes, causal=True, v_mean=mean)
    o, _ = schemes.attend(
        schemes.PLAIN.but("", "", qk_scales="head", v_scales="head", smooth_v=True), q, k, v, causal=True
    )
    torch.testing.assert_close(again, o, rtol=2.0**-7, atol=1e-3)


def test_the_plain_scheme_is_the_emulated_kernel():
    q, k, v = (draw(2, h, n, 64, kind="outliers", seed=h) for h, n in ((4, 33), (2, 200), (2, 200)))
    expected = attention_fp8(*(quantize(x, "tensor") for x in (q, k, v)), causal=True)
    for mine, theirs in zip(schemes.attend(schemes.PLAIN, q, k, v, causal=True), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_two_level_accumulation_helps_where_sums_are_long():
    q, k = draw(1, 1, 16, 64), draw(1, 1, 4096, 64, seed=1)
    codes = [quantize(x, "head") for x in (q, k, draw(1, 1, 4096, 64, seed=2) + 1)]
    gold, _ = dequantised_gold(*codes, False)
    exact, plain, two_level = (
        rms(attention_fp8(*codes, arithmetic=a)[0].double() - gold)
        for a in (Arithmetic(), Arithmetic(pv="tensor_core"), Arithmetic(pv="tensor_core", two_level=True))
    )
    assert plain > 3 * exact and two_level < 0.5 * plain


def test_the_kernel_entry_takes_every_scale_shape_and_refuses_the_rest():
    q, k, v = draw(2, 4, 200, 64), draw(2, 2, 300, 64, seed=1), draw(2, 2, 300, 64, seed=2)
    q8, k8, v8 = quantize(q, "head"), quantize(k, "head"), quantize(v, "head")
    data = (q8.data, k8.data, v8.data)
    scales = {"q_scale": q8.scale[..., 0], "k_scale": k8.scale[..., 0], "v_scale": v8.scale[..., 0]}
    expected = attention_fp8(q8, k8, v8, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(forward_fp8(*data, **scales, causal=True), expected))
    qb, kb, vc = quantize(q, "block", 128), quantize(k, "block", 128), quantize(v, "channel")
    o, _ = forward_fp8(qb.data, kb.data, vc.data, q_scale=qb.scale, k_scale=kb.scale, v_scale=vc.scale)
    assert torch.equal(o, attention_fp8(qb, kb, vc)[0])

    for name, bad, message in (
        ("q_scale", torch.ones(2, 4, 3), r"q_scale has shape \(2, 4, 3\); allowed: \(2, 4\) .* or \(2, 4, 2\)"),
        ("v_scale", torch.ones(2, 2, 3), r"v_scale has shape \(2, 2, 3\); allowed: \(2, 2\) .* or \(2, 2, 64\)"),
        ("k_scale", torch.ones(2, 2).double(), "k_scale has dtype torch.float64"),
        ("k_scale", torch.zeros(2, 2), r"k_scale holds 0.0 at \(0, 0\); allowed: positive"),
        ("v_scale", torch.full((2, 2), torch.nan), "v_scale holds nan"),
        ("q_scale", 1.0, "q_scale is a float"),
    ):
        with pytest.raises(ValueError, match=message):
            forward_fp8(*data, **(scales | {name: bad}))
    with pytest.raises(ValueError, match="q has dtype torch.float32; allowed: torch.float8_e4m3fn"):
        forward_fp8(q, k, v, **scales)
    with pytest.raises(ValueError, match="p_format is 'e5m2'"):
        Arithmetic(p_format="e5m2")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e15]))
def test_finite_input_never_gives_nan(seed, size):
    q, k, v = (size * draw(1, 2, n, 64, kind="outliers", seed=seed + n) for n in (20, 70, 71))
    v = v[:, :, :70]
    k[:, :, :16], v[:, :1] = 0, 0
    for scheme in (
        schemes.PLAIN,
        schemes.BOTH,
        replace(schemes.BOTH, qk_scales="token", v_scales="block", smooth_v=True),
    ):
        o, lse = schemes.attend(scheme, q, k, v, causal=True)
        assert o.isfinite().all() and lse.isfinite().all(), scheme.name


# The experiment


def test_sixteen_bit_rows_order_as_in_the_paper():
    q, k, v = experiment.paper_input(experiment.Shape(128, 1024, 128), 0)
    gold, _ = gold_attention(q, k, v)
    standard, flash = sixteen_bit.standard_fp16(q, k, v), sixteen_bit.flash_fp16(q, k, v)
    assert standard.dtype == flash.dtype == torch.float16
    assert rms(flash.double() - gold) < 0.9 * rms(standard.double() - gold)
    assert rms(standard.double() - gold) < 0.1 * rms(sixteen_bit.baseline_fp8(q, k, v).double() - gold)


def test_where_outliers_meet_rotation_and_token_scales_help_and_block_scales_do_not():
    """What the whole table turns on, in one score: the outlier pair's own rounding error."""
    q, k = torch.ones(1, 1, 1, 128), torch.ones(1, 1, 1, 128)
    q[..., 3], k[..., 3] = 30.5, 29.5
    exact = float((q * k).sum())

    def worst(turn, granularity):
        errors = []
        for size in torch.linspace(1.0, 2.0, 41):  # the rest of the tensor sets the scale: any rounding may come up
            other = torch.zeros(1, 1, 1, 128)
            other[..., 0] = 40 * size
            codes = []
            for x in (q, k):
                both = torch.cat((x, other), 2)
                codes.append(quantize(rotate(both, random_signs(128)) if turn else both, granularity, 2))
            a, b = (c.dequantized()[0, 0, 0] for c in codes)
            errors.append(abs(float(a @ b) - exact))
        return max(errors) / exact

    assert worst(False, "tensor") > 0.03 and worst(False, "block") == worst(False, "tensor")
    assert worst(False, "token") < 0.01  # the row's largest value is 448 scales, and 448 is an e4m3 number
    assert worst(True, "tensor") < 0.5 * worst(False, "tensor")


def test_clipped_scales_never_raise_the_error():
    x = draw(1, 2, 300, 64, kind="outliers")
    for granularity in ("tensor", "head", "block", "channel"):
        clipped = quantize_with(x, *schemes.mse_scale(x, granularity, 128))
        assert rms(clipped.dequantized() - x) <= rms(quantize(x, granularity, 128).dequantized() - x)


def test_the_experiment_runs_and_its_tables_and_figures_come_from_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "LAYERS", (18,))
    monkeypatch.setattr(experiment, "HEAD_DIMS", (64,))
    monkeypatch.setattr(experiment, "SEEDS", (0,))
    record = experiment.run(quick=True, processes=1)
    again = json.loads(json.dumps(record))
    assert record["complete"] and record["provenance"]["torch"] and record["settings"]["seeds"] == [0]
    text = tables.everything(again)
    assert "9.3e-03" in text and "nan" not in text
    changed = json.loads(json.dumps(record))
    changed["random"]["0"]["both"] = 123.0
    assert "1.23e+02" in tables.everything(changed)
    paths = figures.save_all(again, tmp_path, dpi=40)
    assert len(paths) == 4 and all(p.stat().st_size > 3000 for p in paths)
