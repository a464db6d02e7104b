# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chapter 10: FP8
#
# Hopper's tensor cores multiply 8-bit numbers twice as fast as 16-bit ones. Chapter 9's kernel could become twice as
# fast. Three things stand in the way, and each is a part of this chapter:
#
# 1. **Error.** An 8-bit number has three mantissa bits. What does attention look like after that, and what helps?
# 2. **Layout.** FP8 products take their operands in one layout only, and neither P nor V has it.
# 3. **Softmax.** It does not get faster.
#
# | step | file | what |
# |---|---|---|
# | first | `schedule.py` | the kernel's schedule on the model of an SM: a producer that turns V round |
# | a | `quantise.py` | the format by hand, scales, rotation |
# | b | `emulate.py` | FP8 attention, rounded exactly where the kernel rounds |
# | c | `layouts.py` | which thread holds what; V turned round |
# | d | `fp8.cu` | the kernel: chapter 9's with e4m3 numbers |
#
# Steps (a) to (c) are graded exactly on any machine, and so is the schedule. The host's side of the kernel (`fp8.py`)
# is given.

# %%
import inspect
import json
import sys
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

from fa_reference import fp8
from fa_reference import lesson_hopper as hopper
from fa_reference.course import ROOT, chapter
from fa_reference.fp8 import Arithmetic, figures, tables
from fa_reference.fp8.experiment import Shape, paper_input
from fa_reference.fp8.schemes import BLOCK, BOTH, PLAIN, attend
from fa_reference.gold import gold_attention
from fa_reference.hopper import RuleBroken, run_attention
from fa_reference.inputs import KINDS, Case
from fa_reference.kernels import count_instructions
from fa_reference.lesson import answer, difference, recorded, solution, style
from fa_reference.versions import load_file

style()
here = chapter(10)
quantise, layouts, emulate = (answer(10, file) for file in ("quantise.py", "layouts.py", "emulate.py"))
host = solution(10, "fp8.py")
errors = json.loads((ROOT / "results" / "fp8_error_cpu.json").read_text())
CHAPTER_9 = ROOT / "solutions" / "09_two_stage"
SOFT = ["#cfe3f3", "#f8dfc3", "#cdebdd", "#f0d3e4"]


def rms(x):
    return float(x.double().square().mean().sqrt())


# %% [markdown]
# ## First: the schedule, on the model of an SM
#
# FP8 doubles the rate of the tensor cores, and takes one freedom away: a wgmma on 8-bit numbers reads its B operand
# only with the summed dimension contiguous. $S = Q K^T$ sums over $d$, and K's rows are contiguous in $d$: nothing to
# do. $O \mathrel{+}= P V$ sums over keys, and V's rows are contiguous in $d$, not in keys. Somebody has to turn every
# block of V round, inside the kernel, and the producer's warps have time: in chapter 9 three of the four have nothing
# to do.

# %%
schedule = answer(10, "schedule.py")
case = Case(len_q=128, len_k=12 * 128, head_dim=128, dtype="float8_e4m3fn")
report = run_attention(schedule, *case.make()).report
display(report.plot(start=0.45 * report.cycles, stop=0.7 * report.cycles))

# %% [markdown]
# **Predict.** The tensor cores do the same products in half the time. By how much does the whole block get faster
# than chapter 9's in bf16? Which unit is busiest now?

# %%
my_prediction_faster, my_prediction_unit = None, None
bf16 = run_attention(load_file(CHAPTER_9 / "schedule.py"), *case.but(dtype="bfloat16").make()).report
print(f"bf16 {bf16.cycles:,.0f} cycles, fp8 {report.cycles:,.0f}: {bf16.cycles / report.cycles:.2f} times as fast")
for unit in ("wgmma", "exp", "FP32"):
    print(f"{unit:6} busy {bf16.utilisation(unit):.0%} in bf16, {report.utilisation(unit):.0%} in fp8")

# %% [markdown]
# The exponentials did not get faster. At $d = 128$ a block of them takes the special-function units as long as its
# two products take the tensor cores in FP8: whatever does not overlap is lost.
#
# ### Through shared memory twice
#
# TMA loads V as it is stored into a tile `V_rows`, and reports at `V_rows_full`. The producer's four warps wait for
# that, read the tile, turn it round and write it to a slot of `V`, for which they wait as chapter 7's producer did
# for a slot to load into: `V_empty`. Then they arrive at `V_full`. Between write and arrival stands a **proxy
# fence**: what ordinary stores wrote is not visible to wgmma, which reads shared memory through the async proxy,
# until `fence.proxy.async` says so. Without it the GPU multiplies, now and then, what was in the slot before.

# %%
right = inspect.getsource(solution(10, "schedule.py"))
wrong = ModuleType("wrong")
sys.modules["wrong"] = wrong  # dataclasses look their module up
exec(right.replace("    await wg.fence_proxy_async()\n", ""), wrong.__dict__)
try:
    run_attention(wrong, *case.make())
except RuleBroken as error:
    print(error)

# %% [markdown]
# Who waits for `V_rows` to be read before the next load overwrites it? The same warpgroup read it, so it needs no
# mbarrier. In CUDA its four warps must still agree, at a named barrier of 128 threads; in the model a warpgroup is
# one agent.
#
# **Exercise: `schedule.py`.** Write `make_barriers`, `turn_round` and the loop of `producer`. The consumers are
# chapter 9's and notice nothing. `make check CHAPTER=10 ONLY=schedule` judges the numbers against the emulated FP8
# kernel.

# %% [markdown]
# ## Step (a): the format
#
# `e4m3` is a floating-point number in a byte: a sign, 4 bits of exponent, 3 bits of mantissa.
#
# | bits | value |
# |---|---|
# | `s eeee mmm` | $\pm\,2^{e-7}\,(1 + m/8)$ |
# | `s 0000 mmm` | $\pm\,m \cdot 2^{-9}$ (subnormal) |
# | `s 1111 111` | NaN; there is no infinity |
#
# The largest value is therefore `0 1111 110` $= 448$, the smallest positive one $2^{-9}$. torch calls the type
# `float8_e4m3fn`: *fn* for "finite, with NaN".
#
# **Predict.** How large is the relative error of rounding a number to e4m3, at worst, between $2^{-6}$ and 448? How
# much larger is it than bfloat16's, which has 7 mantissa bits?

# %%
my_prediction_relative_error = None  # your number
x = torch.exp2(torch.linspace(-14, 8.8, 40001))
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for dtype, colour in ((torch.float8_e4m3fn, "#0072B2"), (torch.bfloat16, "#D55E00"), (torch.float16, "#009E73")):
    relative = (x.to(dtype).float() - x).abs() / x
    worst = relative.reshape(1, 1, -1)
    worst = torch.nn.functional.max_pool1d(worst, 1751, 1, 875)[0, 0]  # about one power of two wide
    left.plot(x, worst, color=colour, label=str(dtype).removeprefix("torch."))
left.set(xscale="log", yscale="log", xlabel="x", ylabel="largest relative error of rounding", ylim=(1e-4, 2))
left.set_xscale("log", base=2)
left.legend()
normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
shifts, found = np.arange(-16, 3), []
for shift in shifts:
    factor = 448 / float(normal.abs().max()) * 2.0 ** int(shift)
    found.append(rms(quantise.decode_e4m3(quantise.encode_e4m3(normal * factor)) / factor - normal) / rms(normal))
right.plot(shifts, found, "o-")
right.set_xticks(range(-16, 3, 2))
right.axvline(0, color="black", linewidth=1)
right.set(yscale="log", xlabel="log2 of the largest number over 448", ylabel="RMSE / RMS")
right.set_title("normal numbers: how good is the scale?", fontsize=11)
fig.tight_layout()
plt.show()
print(f"at worst just below 2^-4 = {2**-4:.1%} in e4m3, 2^-8 = {2**-8:.1%} in bfloat16: 16 times as much")

# %% [markdown]
# The right picture holds a surprise for those who know 8-bit *integers*: **the scale hardly matters.** Make it a
# thousand times too small, and the error stays the same, because a floating-point number has the same relative error at
# any size. It rises when so much falls below $2^{-6}$ that it matters, and it explodes when numbers are cut off at 448.
#
# So a scale for e4m3 has one job: nothing beyond 448. It needs the largest magnitude of whatever shares it,
# $\text{scale} = \max|x| / 448$, and nothing else. No minimum, no zero point: the format is symmetric.
#
# | one scale for | what the kernel has to do |
# |---|---|
# | a tensor, or a head | nothing: one number goes into the softmax scale |
# | a block of rows (128 of Q, 128 of K) | one more factor a block of keys |
# | a token | one more multiplication a score |
#
# V is different. Its rows are *summed over* in $PV$: a scale that changes along the keys cannot be pulled out of the
# sum, it would have to go into P. The kernel's V therefore has one scale a head.
#
# **Exercise.** `decode_e4m3`, `encode_e4m3`, `block_scales` and `quantise` in `quantise.py`. torch's own cast is what
# you are compared with, so do not use it.
#
# **When it fails.** Only halfway cases wrong: `torch.round` goes to the even number, `+ 0.5` does not. Wrong below
# $2^{-6}$: the step no longer shrinks there. NaN in a block of zeros: $0 / 0$.
#
# ## Why outliers hurt, and what a rotation does about it
#
# Large language models have a few channels with far larger numbers than the others. In an integer format the whole
# block would pay for them. In e4m3, we just saw, it does not. They hurt in another way. Look at one score in which an
# outlier of $q$ meets an outlier of $k$ in the same channel:
#
# $$s = q_1 k_1 + \dots + \underbrace{q_j k_j}_{\text{nearly all of } s} + \dots + q_d k_d$$
#
# The huge product is as wrong as its two factors, several percent. All other errors are small beside it. And softmax
# picks exactly such scores: they are the largest.
#
# *Incoherent processing* rotates the rows of Q and K by the same matrix $M = D H / \sqrt{d}$, with random signs $D$ and
# the Hadamard matrix $H$. As $M M^T = 1$, $(QM)(KM)^T = QK^T$: nothing changes, before rounding. But the outlier is
# spread over all $d$ channels, the score becomes a sum of $d$ products of similar size, and **their rounding errors
# average out**.

# %%
generator = torch.Generator().manual_seed(0)
trials, d = 4000, 128
q, k = (torch.randn(1, 1, trials, d, generator=generator) for _ in range(2))
q[..., 3] = 20 + 12 * torch.rand(1, 1, trials, generator=generator)  # an outlier in channel 3 of both
k[..., 3] = 20 + 12 * torch.rand(1, 1, trials, generator=generator)
signs = quantise.random_signs(d)


def score_errors(q, k):
    """Relative error of q . k after quantisation, in every row."""
    exact = (q.double() * k.double()).sum(-1)
    rounded = []
    for x in (q, k):
        codes, scale = quantise.quantise(x, 128)
        rounded.append(quantise.decode_e4m3(codes) * scale.repeat_interleave(128, 2)[:, :, :trials, None])
    return (((rounded[0].double() * rounded[1].double()).sum(-1) - exact) / exact).flatten()


before, after = score_errors(q, k), score_errors(quantise.rotate(q, signs), quantise.rotate(k, signs))
bins = np.linspace(-0.1, 0.1, 81)
fig, axis = plt.subplots(figsize=(8, 3.2))
axis.hist(before, bins, alpha=0.7, label=f"as they are: RMS {rms(before):.1%}")
axis.hist(after, bins, alpha=0.7, label=f"rotated: RMS {rms(after):.1%}")
axis.set(xlabel="relative error of the score", ylabel="of 4000 scores", title="an outlier of q meets one of k")
axis.legend()
plt.show()

# %% [markdown]
# The transform costs $d \log_2 d$ additions a row instead of $d^2$ multiplications: in each of $\log_2 d$ rounds, pairs
# become their sum and their difference. A kernel that reads Q and K anyway, to quantise them, does it on the way.
#
# Where do outliers sit in a real model? Below are the keys of SmolLM2-135M (128 tokens of three layers), and numbers
# drawn as the paper draws them. In the model they sit in *channels*, token after token; in the paper's test, anywhere.

# %%
figures.outliers()
plt.show()

# %% [markdown]
# **Exercise.** `hadamard`, `rotate`, `unrotate`. **When it fails.** $QK^T$ changes: is the factor $1/\sqrt{d}$ there,
# once? Signs on the wrong side of $H$ flip whole channels of the result, which does nothing. On the right side they
# guard against the one kind of row that $H$ alone makes worse. (Which? Transform a row of ones.)
#
# ## The paper's experiment
#
# The FlashAttention-3 paper draws Q, K and V from $N(0, 1) + N(0, 100) \cdot \text{Bernoulli}(0.001)$: one number in a
# thousand is an outlier. It reports the root mean square error against float64.
#
# **Predict.** Which of the two, block scales or rotation, gives how much of the gain? Reviews of the paper like to say
# that FP8 needs both.

# %%
my_prediction_block_scales, my_prediction_rotation = None, None  # error with each, over the error with neither
figures.error_table(errors)
plt.show()
display(Markdown(tables.paper_table(errors)))

# %% [markdown]
# The rotation gives nearly all of it. Block scales alone give a few percent here, and nothing in the paper's own table.
# After the last two sections that is no surprise: scales do little for a floating-point format.
#
# The paper does not state the shape of this test. Ours is 512 queries, 8192 keys, $d = 128$, because it comes nearest;
# with other shapes the error without rotation lies between half and 1.4 times the paper's.
#
# You can do one seed of it yourself:

# %%
q, k, v = paper_input(Shape(256, 2048, 128), seed=1)
gold, _ = gold_attention(q, k, v)
for name, (o, _) in (
    ("one scale a tensor", attend(PLAIN, q, k, v)),
    ("block scales", attend(BLOCK, q, k, v)),
    ("block scales and rotation", attend(BOTH, q, k, v)),
    ("emulate.py", emulate.forward(q, k, v)),
):
    print(f"{name:26s} RMSE {rms(o.double() - gold):.2e}")

# %% [markdown]
# ### Which rounding costs what
#
# One operand in e4m3, everything else exact. Q and K make nearly all of the error, as they stand in the exponent. P,
# which sounds the most delicate, is harmless: its errors average out in the sum.

# %%
display(Markdown(tables.sources_table(errors)))

# %% [markdown]
# ## On a real model
#
# The same on SmolLM2's activations, $d = 64$, causal, 2048 tokens; the error is relative to the output's size.

# %%
display(Markdown(tables.smollm2_table(errors)))

# %% [markdown]
# Two lessons. First, random numbers flatter FP8: with one scale a tensor, an error of 9 to 19 % of the output is left
# in the deeper layers. Second, the rotation helps less than on random numbers, and in layer 0 not at all. Rotated keys
# are still as wrong as three mantissa bits make them; only the *concentration* of the error in a few products is gone.
#
# ### What should you take?
#
# Everything that was tried on the same inputs, relative to one scale a tensor. Costs are argued from what a kernel has
# to do, not measured.

# %%
figures.alternatives(errors)
plt.show()
display(Markdown(tables.alternatives_table(errors)))

# %%


def gain(name):
    random, real = tables.gain(errors, name)
    return f"{random:.2f} / {real:.2f}"


display(
    Markdown(
        "| if you | take | error: random / SmolLM2 |\n|---|---|---|\n"
        f"| can only choose scales | one a head; it costs nothing, and blocks gain little | {gain('head')} |\n"
        f"| quantise in a kernel of your own | rotation, with block scales | {gain('both')} |\n"
        f"| can add a vector to the scores | the same, and Q without its block means | {gain('both smooth q')} |\n"
        f"| can afford half of the speed-up | $QK^T$ in BF16, $PV$ in FP8 | {gain('bf16 qk')} |\n"
        f"| need BF16's error | BF16 | {gain('bf16')} |\n"
        f"| are offered $PV$ in BF16 instead | do not: the error is in Q and K | {gain('bf16 pv')} |\n"
        f"| calibrate scales beforehand | beware: what is beyond 448 is cut off | {gain('static')} |"
    )
)

# %% [markdown]
# ## Step (b): everything that the kernel rounds
#
# `emulate.py` is chapter 2's online softmax with three things more. It runs anywhere, and it is what the kernel is held
# to: on the same inputs, the kernel's error may be 1.1 times the emulation's.
#
# 1. **Factors.** The kernel multiplies *codes*. A score is $s = \text{scale} \cdot \sigma_q \sigma_k \cdot
# (\text{code}_q \cdot \text{code}_k)$, where $\sigma_k$ changes from block to block. m is kept in units of log2, of
# finished scores: blocks with different scales are then comparable.
# 2. **$2^8$.** P lies in $[0, 1]$, and in e4m3 all up to $2^{-10}$ rounds to zero. So $P = 2^8 e^{s - m}$, in
# $[0, 256]$. The factor is in l too, and cancels in O. Only lse has to take it out.
# 3. **Rounding.** P is rounded before it meets V. l sums P as it was.

# %%
score = torch.linspace(-14, 0, 1401)
p = torch.exp(score)
fig, axis = plt.subplots(figsize=(8, 3.2))
for offset, colour in ((0, "#D55E00"), (8, "#0072B2")):
    rounded = quantise.decode_e4m3(quantise.encode_e4m3(p * 2.0**offset)) / 2.0**offset
    axis.plot(score, rounded, color=colour, label=f"$2^{{{offset}}}$ P rounded to e4m3")
axis.plot(score, p, color="black", linewidth=1, label="P")
axis.set(yscale="log", ylim=(3e-7, 2), xlabel="score minus the row's maximum", ylabel="P")
axis.legend()
plt.show()
print(f"smallest P that is kept: {2**-10:.1e} without, {2**-18:.1e} with the factor")

# %% [markdown]
# **Predict.** 16384 keys with equal scores except one, which is 7 higher. What is the output if P has no factor $2^8$?
# (What is $e^{-7}$ rounded to?)

# %%
my_prediction_output = None  # of V = 1 for all keys but the high one, whose V is 0
n = 16384
p_low = torch.exp(torch.tensor(-7.0))
exact = float(n * p_low / (n * p_low + 1))
for offset in (0, 8):
    rounded = quantise.decode_e4m3(quantise.encode_e4m3(p_low[None] * 2.0**offset))[0] / 2.0**offset
    print(f"factor 2^{offset}: {float(n * rounded / (n * p_low + 1)):.3f}, exactly {exact:.3f}")

# %% [markdown]
# **Exercise.** `round_p`, `attention_fp8`, `forward` in `emulate.py`. **When it fails.** lse off by 5.545: that is
# $8 \ln 2$. Right for one block, wrong for two: alpha must not contain $2^8$. The error is *smaller* than the
# emulation's: P was not rounded.
#
# **What is not emulated.** Hopper's FP8 tensor cores do not add in float32. Measurements by others find about 14 bits
# in the accumulator: all 32 products of a step and the old sum are aligned to the largest and cut off. Emulated, with
# V around 1 (a mean that all tokens share), the error grows with the number of keys; adding each block's product to O
# in float32 ("two-level") cures it.

# %%
display(Markdown(tables.accumulation_table(errors)))

# %% [markdown]
# ## Step (c): layouts
#
# A 16-bit product takes V as it lies in memory and transposes it on the way. For 8-bit numbers there is no such thing:
# **both operands need the summed dimension contiguous.** For $QK^T$ that is so. For $PV$ the sum runs over keys, and
# neither operand fits:
#
# - **P** is made of accumulators. A thread's registers hold keys 0, 1 and 8, 9 of a row; operand A wants four
#   neighbouring positions in one register.
# - **V** is stored key by key, each with all channels.
#
# FlashAttention-3's answer to the first: do not move P at all. A sum does not care about its order. Pack what the
# thread has, and call the result positions 0, 1, 2, 3. That defines an order of the keys; V has to follow it.

# %%
fig, axes = plt.subplots(2, 1, figsize=(10, 3.0))
for axis, title, cell in (
    (axes[0], "accumulator S, one row: which lane of the quad holds key 0 .. 15", lambda i: (i % 8 // 2, i)),
    (axes[1], "operand A, one row: which lane holds position 0 .. 15, and the key that lands there", None),
):
    for i in range(16):
        lane, key = cell(i) if cell else (i // 4, layouts.key_at(i))
        axis.add_patch(plt.Rectangle((i, 0), 1, 1, fc=SOFT[lane], ec="white", lw=2))
        axis.text(i + 0.5, 0.5, f"key {key}\nlane {lane}", ha="center", va="center", fontsize=8.5)
    axis.set(xlim=(0, 16), ylim=(0, 1), yticks=[], xticks=[])
    axis.set_title(title, fontsize=10)
    axis.grid(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# Every key stays in its lane: only registers are exchanged.
#
# ### Turning V round
#
# V comes by TMA as it is. The producer's four warps, idle so far, turn each block round: shared memory to registers to
# shared memory, while the consumers compute with the block before.
#
# - `ldmatrix.trans` transposes 8 x 8 *units of two bytes*: here two neighbouring channels of one key. A lane gets two
#   units of two neighbouring keys: four bytes, two keys x two channels.
# - `prmt` picks four of eight bytes. From the registers of keys 0 to 7 and of keys 8 to 15 it takes one channel's four
#   keys: $2t, 2t+1, 8+2t, 8+2t+1$. That is the order of P, for nothing.
# - `stmatrix` writes rows of 16 bytes: one channel, 16 keys.

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for axis, title, channel in (
    (axes[0], "all lanes pick the even channel", lambda r: 2 * r),
    (axes[1], "lanes 16 to 31 pick the odd one", lambda r: layouts.store_place(r)),
):
    places = [channel(r) % 8 for r in range(8)]  # 16-byte chunk 0 of row c lies at place c % 8
    for r, place in enumerate(places):
        axis.add_patch(plt.Rectangle((place, r), 1, 1, fc="#0072B2", ec="white"))
        axis.text(place + 0.5, r + 0.5, f"ch. {channel(r)}", ha="center", va="center", fontsize=8, color="white")
    turns = max(places.count(p) for p in places)
    axis.set(xlim=(0, 8), ylim=(8, 0), xlabel="banks", ylabel="row of the matrix")
    axis.set_yticks([i + 0.5 for i in range(8)], range(8))
    axis.set_xticks([i + 0.5 for i in range(8)], [f"{4 * i}-{4 * i + 3}" for i in range(8)], fontsize=8)
    axis.set_title(f"{title}: {turns} turn{'s' if turns > 1 else ''}", fontsize=10)
    axis.grid(False)
fig.suptitle("one matrix of stmatrix, keys 0 to 15: where its eight rows go under the 128-byte swizzle", fontsize=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# **Bank conflicts.** The swizzle moves chunk c of row r to place c ^ (r % 8). The rows here are channels. Eight *even*
# channels have only four different remainders modulo 8, so two rows meet in the same banks. The official kernel avoids
# that by permuting the channels of V, and undoing it on O at the end. There is a cheaper way: `prmt` takes its selector
# from a register, so lanes 16 to 31 may exchange even and odd. No instruction more, and nothing to undo.
#
# **Exercise.** All of `layouts.py`. Any order of the keys passes, if P, `key_at` and the transposition agree on it.
#
# ## Step (d): the kernel
#
# What changes from chapter 9's kernel, and what does not: the ring, the turns, the two stages and the masks stay.
#
# | part | chapter 9 | chapter 10 |
# |---|---|---|
# | bytes of a tile of 128 keys | 32 KiB | 16 KiB; V's twice, as it comes and turned round |
# | `issue_qk`, `issue_pv` | 16 columns, 16 keys a step | 32 |
# | `softmax` | factor $c$ | $c$ times the scale of the block of keys; exponents + 8 |
# | `round_p` | neighbours to 16 bits | four registers of a row to one of e4m3 |
# | producer | one thread, 24 registers a thread | one thread loads, four warps turn V round, 40 registers |
# | `store` | $O / l$ | $O \sigma_v / l$, lse without $2^8$ |
#
# **Three kinds of memory access meet in one tile of V**, and each handover needs its own thing: TMA wrote the rows
# (`mbarrier_wait` is enough); ordinary stores wrote the turned tile, and wgmma reads it through the asynchronous proxy
# (every writing thread executes `fence_proxy_async`, then arrives); TMA overwrites rows that other warps were reading
# (they meet at a named barrier first).
#
# **Exercise.** The regions of `fp8.cu`. `consume` is given: it is chapter 9's. Start with `issue_qk`, `round_p` and
# `issue_pv`, then the scales, then the producer.
#
# **When it fails.** O wrong and lse right: the order of the keys, or V's transposition. Wrong only on inputs with
# outliers: a scale of the wrong block or head. Different from run to run: the fence or the barrier in `produce`. A
# deadlock at `v_full`: how many threads arrive there? A crash or a hang at ldmatrix or stmatrix: its warp is
# divergent, as some lanes still wait at an mbarrier; `__syncwarp()` is missing. A hang at `q_full`: who loads Q?

# %%
built = host.KERNEL.build(128, host.E4M3, False)
fa3 = load_file(CHAPTER_9 / "fa3.py").KERNEL.build(128, torch.bfloat16, False)
SHOWN = ("QGMMA", "HGMMA", "MUFU", "F2FP", "PRMT", "LDSM", "STSM", "UTMALDG", "SYNCS", "BAR")
lines = ["| kernel | registers | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
for name, kernel in (("fa3.cu, bf16", fa3), ("fp8.cu", built)):
    counts, used = count_instructions(kernel.cubin), kernel.report.kernels["attention"]
    lines.append(f"| {name} | {used.registers} | " + " | ".join(str(counts[x]) for x in SHOWN) + " |")
display(Markdown("Instructions in the solutions' machine code (d 128, no mask):\n\n" + "\n".join(lines)))

# %% [markdown]
# Half as many products, each twice as deep; as many exponentials as before.
#
# Open this after you have written the kernel: it shows the solution.

# %%
display(difference(CHAPTER_9 / "fa3.cu", here.solution / "fp8.cu"))

# %% [markdown]
# ### What these checks do not see without a GPU
#
# They read the kernel's machine code. They see registers, spills, notes of the compiler, that the products are e4m3
# ones, that the producer and nobody else transposes, that a fence and a barrier are there. They do not see whether
# these are in the right place, nor any number. Numbers, determinism and speed are graded on an H100 or H200.
#
# ## Why twice the tensor core is not twice the speed
#
# Count cycles of one SM for 64 rows and 128 keys: products at 4096 (16-bit) or 8192 (FP8) operations a cycle,
# exponentials at 16 a cycle.

# %%
lines = ["| d | products, bf16 | products, FP8 | exponentials | ceiling rises |", "|---|---|---|---|---|"]
rows, keys = 64, 128
for d in (64, 128, 256):
    sixteen, eight = 4 * rows * keys * d / 4096, 4 * rows * keys * d / 8192
    exponentials = rows * keys / 16
    speed_up = max(sixteen, exponentials) / max(eight, exponentials)
    lines.append(f"| {d} | {sixteen:.0f} | {eight:.0f} | {exponentials:.0f} | {speed_up:.1f}x |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# At $d = 64$ the exponentials alone take twice as long as the FP8 products, and as long as the 16-bit ones: the ceiling
# does not rise, as long as all exponentials run on that unit. (Some may be computed as polynomials on the FMA units.) A
# kernel below its ceiling may still gain, since products that do not overlap with anything take half of the time. At
# $d = 128$ both take equally long: to come near the limit they would have to overlap perfectly, and nothing else, no
# maximum, no rounding, may take time. At $d = 256$ the tensor cores are the limit again.
#
# ## Measured

# %%


files = sorted((ROOT / "results" / here.folder).glob("kernel_*.json"))
record = json.loads(files[-1].read_text()) if files else None
if record:
    p = record["provenance"]
    lines = ["| N | mask | " + " | ".join(record["titles"].values()) + " | FP8 / bf16 |"]
    lines += ["|---" * (len(record["titles"]) + 3) + "|"]
    for row in record["rows"]:
        speeds = [row["tflops"][name] for name in record["titles"]]
        mask = "causal" if row["causal"] else "none"
        values = " | ".join(f"{speed:.0f}" for speed in speeds)
        lines.append(f"| {row['length']} | {mask} | {values} | {speeds[1] / speeds[0]:.2f} |")
    where = f"{p['device']}, {p['date'][:10]}; d 128, 16 heads, 16k tokens in all, attention alone (codes made before)."
    ratios = [e["rmse_kernel"] / e["rmse_emulation"] for e in record["errors"]]
    text = (
        f"The kernel's RMSE against float64 over the emulation's, on {len(ratios)} problems (ragged, causal, GQA, "
        f"outliers, large scores): {min(ratios):.3f} to {max(ratios):.3f}."
    )
    display(Markdown("TFLOP/s. " + where + "\n\n" + "\n".join(lines) + "\n\n" + text))
else:
    print("this chapter's kernel: not recorded yet")

# %% [markdown]
# The emulation, with nothing but torch, predicts the kernel's error to a thousandth. That is why three of the steps
# could be graded exactly without a GPU.
#
# One thing it does not predict: lse, which is sharper than O, differs from the kernel's by up to some hundredths where
# scores are large. Are these the short sums of the tensor core? Take the same inputs, emulate $QK^T$ once in float32
# and once with 14 bits, and compare the two:

# %%


def same_inputs(e):
    """Codes and scales of a problem of the recorded run."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for name, heads, length in (("q", "heads_q", "len_q"), ("k", "heads_kv", "len_k"), ("v", "heads_kv", "len_k")):
        kind = "outliers" if name == "v" and e["kind"] == "outliers" else "normal" if name == "v" else e["kind"]
        tensors.append(KINDS[kind]((e["batch"], e[length], e[heads], 128), generator).transpose(1, 2).bfloat16())
    return host.quantised(*tensors)


if record:
    lines = ["| problem | kernel - float32 emulation (H100) | 14-bit - float32 emulation |", "|---|---|---|"]
    for e in record["errors"]:
        if (e["len_q"], e["causal"]) in ((128, False), (257, False), (400, False)):
            codes = same_inputs(e)
            lse, short = (fp8.forward_fp8(**codes, arithmetic=Arithmetic(qk=way))[1] for way in ("fp32", "tensor_core"))
            found = float((lse - short).abs().max())
            name = f"{e['len_q']} x {e['len_k']}, {e['kind']}"
            lines.append(f"| {name} | {e['lse_difference']:.1e} | {found:.1e} |")
    display(Markdown("Largest difference of lse:\n\n" + "\n".join(lines)))

# %% [markdown]
# They are. What others measured about the accumulator explains this kernel's lse to two digits.
#
# The speed is sobering. Here is what the model of the SM says about it:

# %%
if record:
    ratios = [row["tflops"]["fp8"] / row["tflops"]["fa3"] for row in record["rows"]]
    print(
        f"FP8 over bf16: the model {bf16.cycles / report.cycles:.2f}, measured {min(ratios):.2f} to {max(ratios):.2f}"
    )

# %% [markdown]
# The products' time has halved. Everything else of chapter 9 is still there: exponentials, maxima, sums, conversions.
# Where does the time go? Chapter 9's kernel and this one, recorded on the device.
#
# **Predict.** What does the producer do most of the time: load, turn V round, or wait? And is a softmax as long as in
# chapter 9?

# %%
my_prediction_producer, my_prediction_softmax = None, None
hopper.show_gpu_timeline(9, 10)

# %%
spans, facts = hopper.gpu_trace(10)
turning = [s.stop - s.start for s in spans if s.name == "turn V round"]
waiting = [s.stop - s.start for s in spans if s.track == "producer" and s.name == "V_empty"]
print(f"turning a block of V round takes the producer {np.median(turning):,.0f} clocks;", end=" ")
print(f"before that it waits {np.median(waiting):,.0f} for a slot. A block of threads:")
record_9_10 = json.loads((ROOT / "results" / "model_prediction_h100-80gb-hbm3.json").read_text())["predictions"]
for row in record_9_10:
    if row["chapter"] >= 9 and row["head_dim"] == 128:
        print(f"chapter {row['chapter']}: {row['measured']:,} clocks a block, model {row['predicted']:,}", end=" ")
        print(f"({row['error']:+.0%})")

# %% [markdown]
# Nobody waits for V: the producer is done long before its next slot is free. But the softmax is longer than chapter
# 9's, and that eats what the products saved. With the products half as long the two consumers are in their softmax
# together most of the time, and share its units; and the producer's four warps, which slept in chapter 9, now issue
# instructions beside them for almost half of the time. How much of it is due to the one and how much to the other was
# not measured. The model has the first reason and hardly any of the second (turning V round takes it some 430 clocks),
# and of all chapters' kernels it is furthest off here.
#
# ### The kernel that one would ship
#
# `cuda/fa3_forward_fp8.cu` goes on from here: persistent, three head dimensions, causal tiles dealt out dynamically,
# and `cuda/quantise_fp8.cu` rotates and quantises in one pass. Its record, beside the official kernel and cuDNN:

# %%
shipped = recorded("forward_fp8")
if shipped is None:
    print("not recorded yet")
else:
    first = shipped["cells"][0]["results"]
    raced = ("fa3_forward", "fa3_forward_fp8", "turned", "whole")
    raced = [n for n in first if n in raced or n.startswith(("fa3_fp8", "cudnn"))]
    lines = ["| d | mask | N | " + " | ".join(first[n].get("title", n) for n in raced) + " |"]
    lines += ["|---" * (len(raced) + 3) + "|"]
    for cell in shipped["cells"]:
        speeds = [cell["results"].get(name, {}).get("tflops") for name in raced]
        values = " | ".join("-" if speed is None else f"{speed:.0f}" for speed in speeds)
        mask = "causal" if cell["causal"] else "full"
        lines.append(f"| {cell['head_dim']} | {mask} | {cell['len_q']} | {values} |")
    p = shipped["provenance"]
    remark = "cuDNN writes O in e4m3, half of the bytes: it has FP8 attention with 16-bit output on Blackwell only."
    where = f"TFLOP/s, {p['device']}, {p['date'][:10]}, one run in shuffled order. {remark}"
    display(Markdown(where + "\n\n" + "\n".join(lines)))

# %% [markdown]
# The same run tried two-level accumulation at 65,536 keys: each block's $PV$ is added to O in float32. Look at V
# around 1.

# %%
if shipped is not None and "accumulation" in shipped:
    lines = [
        "| d | V around | float32 sums | one level | two levels | TFLOP/s, one level | two levels |",
        "|---" * 7 + "|",
    ]
    for row in shipped["accumulation"]["two-level accumulation"]:
        errors_of = [row[n] / row["output"] for n in ("emulation, float32 sums", "one level", "two levels")]
        speeds = [row["tflops"][n] for n in ("one level", "two levels")]
        cells = [f"{x:.1e}" for x in errors_of] + [f"{x:.0f}" for x in speeds]
        lines.append(f"| {row['head_dim']} | {row['v_mean']:g} | " + " | ".join(cells) + " |")
    display(Markdown("RMSE over the RMS of the output:\n\n" + "\n".join(lines)))

# %% [markdown]
# Is that a laboratory case? Here is the kernel's RMSE on the two families of inputs that this chapter began with,
# against float64, beside what the emulation predicts with float32 sums and with the tensor core's 14 bits:

# %%
checked = recorded("checks_fp8")
if checked is None:
    print("not recorded yet")
else:
    columns = ("emulation, float32 sums", "emulation, 14-bit sums", "kernel", "kernel, two levels")
    lines = ["| input | " + " | ".join(columns) + " |", "|---" * 5 + "|"]
    for row in checked["checks"]["error"]:
        if "seed 1" not in row["input"]:
            errors_of = (f"{row[c] / row['output']:.2%}" if c in row else "-" for c in columns)
            lines.append(f"| {row['input'].replace(', seed 0', '')} | " + " | ".join(errors_of) + " |")
    cases, p = checked["checks"]["random cases"], checked["provenance"]
    text = (
        f"In percent of the output's RMS; {p['device']}, {p['date'][:10]}. On {cases['cases']} random problems the "
        f"kernel's error is at most {cases['ratio']:.3f} times the emulation's; the quantiser's codes and scales equal "
        "the emulation's bit for bit."
    )
    display(Markdown("\n".join(lines) + "\n\n" + text))

# %% [markdown]
# Layer 0 of the real model: 2048 tokens are enough. Its error is small there, a percent; but more than half of its
# values' power lies in a mean that all tokens share, so the sums of $PV$ grow instead of cancelling, and each step
# cuts off its last bits. The error triples. The emulation with 14 bits predicts that to a fraction of a percent, and
# two levels take it away. The layers behind hardly notice: there, the three mantissa bits of Q and K are what hurts.
#
# The official code, by the way, contains neither block scales nor the rotation: it takes one scale for each batch and
# KV head, and leaves the rest to its caller. The paper's FP8 errors need a caller who rotates Q and K.
#
# ## What would you add next?
#
# - Two-level accumulation in this chapter's kernel: which registers does it take?
# - Part of the exponentials as a polynomial on the FMA units, for $d = 64$.
# - Q without its block means: the best error in the table that still multiplies only FP8. Where would the extra vector
#   of scores be added?
#
# **Sources.** Shah et al. 2024, FlashAttention-3 (section 3.3: layouts, block scales, incoherent processing; table 3);
# Micikevicius et al. 2022, FP8 formats for deep learning; Chee et al. 2023, QuIP (rotation with random signs);
# SageAttention and SageAttention2 (means taken out of K and Q, short sums of the tensor core); Khattak and Mikaitis
# 2025 and the DeepSeek-V3 report (how the tensor core adds).
