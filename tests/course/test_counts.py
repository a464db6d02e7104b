"""Counted bytes and FLOPs equal what is counted step by step."""

import pytest

from fa_reference.counts import (
    H100,
    attainable_tflops,
    attention_flops,
    fa1_hbm_bytes,
    fa2_hbm_bytes,
    naive_hbm_bytes,
)


def test_flops_are_two_matmuls():
    assert attention_flops(2, 3, 5, 7, 11) == 2 * 3 * (2 * 5 * 7 * 11 + 2 * 5 * 11 * 7)
    assert attention_flops(1, 1, 8, 8, 64, causal=True) == attention_flops(1, 1, 8, 8, 64) / 2


def test_naive_bytes_are_three_kernels():
    n, m, d = 5, 7, 11
    first, second, third = n * d + m * d + n * m, 2 * n * m, n * m + m * d + n * d
    assert naive_hbm_bytes(n, m, d, element=2) == 2 * (first + second + third)


def test_fa1_and_fa2_bytes_follow_the_loops():
    n, m, d, b_r, b_c = 100, 90, 64, 32, 16
    fa1 = 0
    for j in range(0, m, b_c):
        fa1 += 2 * 2 * (min(j + b_c, m) - j) * d
        for i in range(0, n, b_r):
            rows = min(i + b_r, n) - i
            fa1 += 2 * rows * d + 2 * 4 * (rows * d + 2 * rows)
    assert fa1_hbm_bytes(n, m, d, b_c) == fa1
    fa2 = 0
    for i in range(0, n, b_r):
        rows = min(i + b_r, n) - i
        fa2 += 2 * 2 * rows * d + 4 * rows
        fa2 += sum(2 * 2 * (min(j + b_c, m) - j) * d for j in range(0, m, b_c))
    assert fa2_hbm_bytes(n, m, d, b_r) == fa2


def test_roofline_bends_at_the_ridge():
    assert attainable_tflops(H100.ridge, H100) == pytest.approx(H100.tflops_16bit)
    assert attainable_tflops(H100.ridge / 2, H100) == pytest.approx(H100.tflops_16bit / 2)
    assert attainable_tflops(10 * H100.ridge, H100) == H100.tflops_16bit
