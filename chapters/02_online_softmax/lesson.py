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
# # 2. Online softmax
#
# A softmax seems to need its whole row: the maximum first, then the sum, then the result. It does not. You will write
# attention that looks at every score once, keeps three running quantities a row, and can stop, continue and merge at
# any point. Every FlashAttention is this algorithm with a different order of loops. Reading: 25 minutes. Writing: one
# to two hours.
#
# ## A measurement first
#
# Chapter 1 counted the traffic of $S$ and $P$. They also have to exist. Here is the largest amount of memory alive at
# any moment inside naive attention, measured on this machine for one head of $d = 64$ in float32. The `Meter` of
# chapter 1 also knows which buffers are alive.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch

from fa_reference.lesson import answer, recorded, style
from fa_reference.meter import Meter

style()
torch.manual_seed(0)
torch.set_num_threads(1)  # one core, for steadier timings


def measured(forward, N, d=64, **options):
    """(peak bytes alive, bytes moved, milliseconds) of one call on a head of N queries and keys."""
    q, k, v = (torch.randn(1, 1, N, d) for _ in range(3))
    with Meter() as meter:
        forward(q, k, v, **options)
    began = time.perf_counter()
    forward(q, k, v, **options)
    return meter.peak, meter.moved_bytes, 1e3 * (time.perf_counter() - began)


naive = answer(1, "naive.py")
lengths = (256, 512, 1024, 2048)
peaks = [measured(naive.forward, N)[0] for N in lengths]
for N, peak in zip(lengths, peaks):
    result = 4 * N * 64
    print(f"N = {N:5d}: output {result / 2**20:5.2f} MiB, peak {peak / 2**20:6.2f} MiB, {peak / result:5.0f} x as much")

# %% [markdown]
# Twice the length, four times the memory, for an output that only doubles. To escape, process the keys in *blocks*
# and keep no scores. The obvious attempt: run attention on each block of keys and average the outputs. Does it work?

# %%
q, k, v = (torch.randn(1, 1, 512, 64) for _ in range(3))
whole, _ = naive.forward(q, k, v)
parts = [naive.forward(q, k[:, :, j : j + 128], v[:, :, j : j + 128]) for j in range(0, 512, 128)]
average = torch.stack([o for o, _ in parts]).mean(0)
lses = torch.stack([lse for _, lse in parts])
error = float((average - whole).square().mean().sqrt() / whole.square().mean().sqrt())
print(f"average of 4 blocks: relative error {error:.0%}")
print("lse of the first query in the 4 blocks:", [round(x, 2) for x in lses[:, 0, 0, 0].tolist()])

# %% [markdown]
# Wrong, though not by much: random inputs are kind. Every block divided by its own denominator. A block with a larger
# denominator deserves a larger share, and the lse of the blocks, which you returned in chapter 1, says how much
# larger. The picture shows what must be remembered.
#
# ## The idea in a picture
#
# One row of 32 scores arrives in four blocks of eight. Above: the scores $s_j$ and the running maximum $m$. Below:
# the running sum $l = \sum_j e^{s_j - m}$. Whenever $m$ grows, all earlier terms were computed relative to a maximum
# that is no longer the right one: they are multiplied by $e^{m_\text{old} - m_\text{new}}$, which is the drop drawn
# in orange. Nothing else about the earlier scores is needed.

# %%
generator = torch.Generator().manual_seed(20)
s = torch.randn(32, generator=generator).double() + torch.linspace(0, 1.5, 32)
block = 8
m, l = -torch.inf, 0.0
fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5.4), sharex=True, height_ratios=(1.2, 1))
for start in range(0, 32, block):
    piece = s[start : start + block]
    m_new = max(m, float(piece.max()))
    rescaled = l * float(np.exp(m - m_new)) if l else 0.0
    l_new = rescaled + float(torch.exp(piece - m_new).sum())
    middle = start + block / 2 - 0.5
    top.plot([start - 0.4, start + block - 0.6], [m_new, m_new], color="#D55E00", lw=2.5)
    top.text(start + block - 0.6, m_new + 0.12, f"m = {m_new:.2f}", ha="right", color="#D55E00", fontsize=10)
    if m_new > m > -torch.inf:
        bottom.bar(middle - 2, l, width=1.7, color="#0072B2", alpha=0.35)
        bottom.bar(middle, rescaled, width=1.7, color="#0072B2", alpha=0.7)
        bottom.annotate(
            "",
            (middle - 0.9, rescaled),
            (middle - 1.1, l),
            arrowprops={"arrowstyle": "->", "color": "#D55E00", "lw": 1.8},
        )
        bottom.text(
            middle - 0.9, max(l, rescaled) + 0.25, f"× {rescaled / l:.2f}", color="#D55E00", ha="center", fontsize=10
        )
    bottom.bar(middle + 2, rescaled, width=1.7, color="#0072B2", alpha=0.7)
    bottom.bar(middle + 2, l_new - rescaled, bottom=rescaled, width=1.7, color="#009E73", alpha=0.8)
    bottom.text(middle + 2, l_new + 0.25, f"l = {l_new:.2f}", ha="center", fontsize=10)
    m, l = m_new, l_new
top.plot(range(32), s, "o", color="black", ms=5)
for axis in (top, bottom):
    for edge in range(block, 32, block):
        axis.axvline(edge - 0.5, color="#999999", lw=0.8, ls=":")
    axis.grid(False)
top.set_ylim(float(s.min()) - 0.4, float(s.max()) + 0.7)
top.set_ylabel("score")
top.set_title("running maximum", fontsize=11, loc="left")
bottom.set_title(
    "running sum: before (pale), rescaled (blue), with the new block's terms (green)", fontsize=11, loc="left"
)
bottom.set_ylim(0, l + 2.5)
bottom.set_ylabel("l")
bottom.set_xlabel("key j")
fig.tight_layout()
direct = float(torch.exp(s - s.max()).sum())
print(f"l from four blocks: {l:.12f}; from the whole row: {direct:.12f}")

# %% [markdown]
# ## The algorithm
#
# For one row, with value rows $v_j$: let $m$, $l$ and $\mathrm{acc}$ belong to the keys seen so far. A block $B$ of
# new keys with scores $s_j$ updates them to
#
# $$m' = \max\big(m, \max_{j \in B} s_j\big), \qquad
# l' = e^{m - m'}\, l + \sum_{j \in B} e^{s_j - m'}, \qquad
# \mathrm{acc}' = e^{m - m'}\, \mathrm{acc} + \sum_{j \in B} e^{s_j - m'} v_j .$$
#
# Start: $m = -\infty$, $l = 0$, $\mathrm{acc} = 0$. After the last block: $O = \mathrm{acc} / l$ and $\mathrm{lse} =
# m + \log l$.
#
# **Why it is right.** Claim: after any set $A$ of keys, with $m = \max_{j \in A} s_j$,
#
# $$l = \sum_{j \in A} e^{s_j - m}, \qquad \mathrm{acc} = \sum_{j \in A} e^{s_j - m}\, v_j . \tag{1}$$
#
# For $A = \emptyset$ both sums are empty. If (1) holds for $A$ and $B$ is a new block, then $m'$ is the maximum over
# $A \cup B$, and
#
# $$l' = e^{m - m'} \sum_{j \in A} e^{s_j - m} + \sum_{j \in B} e^{s_j - m'}
# = \sum_{j \in A} e^{s_j - m'} + \sum_{j \in B} e^{s_j - m'}
# = \sum_{j \in A \cup B} e^{s_j - m'},$$
#
# and the same for $\mathrm{acc}$ with a factor $v_j$ in every term. By induction (1) holds after the last block,
# where $\mathrm{acc} / l$ is $\sum_j e^{s_j} v_j / \sum_j e^{s_j}$: the factor $e^{-m}$ cancels. $\square$
#
# Every exponent is at most 0, so nothing overflows, for the reason given in chapter 1.
#
# **By hand.** Chapter 1's $\mathrm{softmax}([4, 10])$, one key at a time: $m$ goes $-\infty \to 4 \to 10$, and $l$
# goes $0 \to 1 \to e^{4 - 10} \cdot 1 + 1 = 1.00248$. So $P = [e^{-6} / 1.00248,\; 1 / 1.00248] = [0.00247,
# 0.99753]$, as it must be.
#
# **An empty row.** While every key of a row has been hidden, $m = m' = -\infty$, and $e^{m - m'}$ would be
# $e^{-\infty + \infty}$, NaN. Subtract a finite number in place of $-\infty$ there: every $e^{-\infty - 0}$ is 0, so
# $l$ and $\mathrm{acc}$ stay 0. At the end, $l = 0$ must give $O = 0$, not $0/0$.
#
# ### Two states merge
#
# Let $a$ and $b$ be the states of two disjoint sets of keys. With $m = \max(m_a, m_b)$,
#
# $$\mathrm{merge}(a, b) = \big(m,\;\; e^{m_a - m}\, l_a + e^{m_b - m}\, l_b,\;\;
# e^{m_a - m}\, \mathrm{acc}_a + e^{m_b - m}\, \mathrm{acc}_b\big).$$
#
# This is *associative* and *commutative*, and the empty state is its identity. Proof: write a state as $(m, \lambda,
# \alpha)$ with $\lambda = e^{m} l$ and $\alpha = e^{m} \mathrm{acc}$. Multiply the second and third entry of the
# merge by $e^m$: $\lambda = \lambda_a + \lambda_b$, $\alpha = \alpha_a + \alpha_b$. In these coordinates merge is
# (max, +, +), and each of the three is associative and commutative; $(-\infty, 0, 0)$ is neutral for all three.
# $\square$
#
# ($\lambda$ is the sum that overflows, so a computer keeps $l$; the two differ by a known factor.) The consequence is
# large: keys may be split among blocks, programs or GPUs in any way and merged in any order. Splitting one long KV
# cache over many processors (Flash-Decoding) and passing K/V around a ring of GPUs (Ring Attention) are this merge.
# `update` is the merge with the state of one block.
#
# ### Normalised or not?
#
# FlashAttention-1 keeps the divided output, $O = \mathrm{acc} / l$, and its update multiplies by the old $l$ and
# divides by the new one, for all $d$ entries, in every block. FlashAttention-2 keeps $\mathrm{acc}$ and divides once
# at the end. The results are the same; the work outside the matrix products is not, and on a GPU such work is
# expensive: an H100's tensor cores do about fifteen times as many operations a second as its other units. We keep
# $\mathrm{acc}$. A normalised result is still a state: for any row, $(m{=}\mathrm{lse},\; l{=}1,\; \mathrm{acc}{=}O)$
# describes the same keys, since $e^{\mathrm{lse}} \cdot 1 = \sum_j e^{s_j}$. So the four blocks above *can* be
# combined from their outputs and their lse alone:

# %%
weights = torch.softmax(lses.squeeze(), 0)  # each block's share of the denominator, per query
combined = sum(w[:, None] * o for w, (o, _) in zip(weights, parts))
error = float((combined - whole).abs().max())
print(f"4 blocks combined by their lse: largest difference to the whole {error:.1e}")

# %% [markdown]
# ## One pass against three
#
# Suppose that the scores are stored in memory, as in chapter 1, and count trips of the $N \times N$ matrix from $S$
# to $O$.
#
# | | reads of $S$ | $P$ written and read | trips |
# |---|---|---|---|
# | safe softmax: maximum; sum; divide | 3 | 2 | 5 |
# | online sum, then divide (Milakov and Gimelshein) | 2 | 2 | 4 |
# | online sum *and* accumulated output | 1 | 0 | 1 |
#
# On this count chapter 1's three kernels make three trips (its fourth was the writing of $S$), because its softmax
# kernel keeps a whole row on chip and reads it once. That works while a row fits. The one-pass form needs no such
# luck: it holds one block of a row, however long the row is. And since it needs each score only once, the score need
# not be stored: compute it, use it, forget it. That is the step from one trip to none.

# %% [markdown]
# ## Predict
#
# Rescaling costs work whenever the maximum grows. A row of 4,096 independent random scores arrives one key at a time.
# The first one sets the maximum. **How often in all will the maximum change, on average?** And if the keys arrive in
# 32 blocks of 128: in how many blocks does it change?

# %%
my_prediction_keys = 100  # your number, out of 4096
my_prediction_blocks = 16  # your number, out of 32

# %% [markdown]
# ## The exercise
#
# Open `chapters/02_online_softmax/online_softmax.py`, and work in this order:
#
# | function | what to write | lines in our solution |
# |---|---|---|
# | `empty_state` | the state of no keys | 3 |
# | `update` | one block more | 8 |
# | `merge` | two states into one | 7 |
# | `finalize` | output and lse | 2 |
# | `softmax_hbm_bytes` | the table above, in bytes | 2 |
# | `forward` | the loop over blocks of keys | 9 |
#
# `State` is a named tuple: `state.m`, `state.l`, `state.acc`. Functions return a *new* state. `finite(m)` is given:
# it is the trick for rows that have seen nothing. In `forward`, GQA and the causal limit of each query are given.
# The state is float32 throughout, and unlike in chapter 1 $P$ stays in float32 here: only $O$ is rounded, at the end.
#
#     make check CHAPTER=2     # grade: says which property fails, on the smallest case
#     make hint CHAPTER=2      # one hint more each time
#     make watch CHAPTER=2     # grade again whenever you save
#
# ### What to look at when it fails
#
# | symptom | look at |
# |---|---|
# | one block is right, two are wrong | `l` *and* `acc` are multiplied by $e^{m - m'}$; the exponent's sign |
# | only very negative scores are wrong | the state must start from $m = -\infty$: from 0 it never moves |
# | NaN with hidden keys | `finite` in both exponents; the division in `finalize` |
# | "merge" fails for equal maxima only, or for unequal only | bring *both* states to the common maximum |
# | only lengths that are no multiple of `block_k` fail | the last block is shorter: `min(start + block_k, len_k)` |
# | causal fails from the second block on | key numbers of a block start at `start`, not at 0 |
#
# ## Measure: your prediction

# %%
online = answer(2, "online_softmax.py")


def changes(scores, block):
    """In how many blocks of a row does the running maximum change? Mean over rows, using your State and update."""
    rows, n = scores.shape
    state = online.empty_state((rows,), 1)
    changed = torch.zeros(rows)
    for start in range(0, n, block):
        new = online.update(state, scores[:, start : start + block], torch.zeros(min(block, n - start), 1))
        changed += new.m > state.m
        state = new
    return float(changed.mean())


random_scores = torch.randn(200, 4096)
keys, blocks = changes(random_scores, 1), changes(random_scores, 128)
print(f"one key at a time: {keys:5.2f} changes; you predicted {my_prediction_keys}")
print(f"32 blocks of 128:  {blocks:5.2f} changes; you predicted {my_prediction_blocks}")
for n in (4096, 32):
    print(f"1 + 1/2 + ... + 1/{n} = {sum(1 / i for i in range(1, n + 1)):.2f}")

# %% [markdown]
# The $i$-th of $n$ independent scores is the largest so far with probability $1/i$, so the expected number of changes
# is the harmonic number $H_n \approx \ln n + 0.58$. The rescaling is needed rarely. (Recent kernels exploit it:
# FlashAttention-4 skips the multiplication while the maximum has grown by little.) Real rows are not independent:
# here are those of a language model, from the activations that come with the course.

# %%
from fa_reference.activations import LAYERS, load_activations

names, counts = ["random"], [changes(random_scores[:, :2048], 128)]
hidden = torch.arange(2048) > torch.arange(1920, 2048)[:, None]  # the causal mask of the last 128 of 2,048 queries
for layer in LAYERS:
    real = load_activations(layer)
    scores = real.q[0, :, -128:].float() @ real.k[0, 0].float().T / 8
    names.append(f"layer {layer}")
    largest = scores.masked_fill(hidden, -torch.inf).argmax(-1)
    first = float((largest == 0).float().mean())
    latest = float((torch.arange(1920, 2048) - largest < 128).float().mean())
    print(f"layer {layer:2d}: the largest score of a row is that of the very first token in {first:4.0%} of the rows,")
    print(f"          of one of the latest 128 tokens in {latest:4.0%}")
    counts.append(changes(scores.masked_fill(hidden, -torch.inf).flatten(0, 1), 128))
fig, ax = plt.subplots(figsize=(8, 3))
ax.bar(names, counts, color=["#999999"] + ["#0072B2"] * len(LAYERS), width=0.6)
for index, count in enumerate(counts):
    ax.text(index, count + 0.08, f"{count:.1f}", ha="center")
ax.set_ylabel("blocks in which\nthe maximum changes")
ax.set_title(
    "16 blocks of 128 keys: the last 128 queries of SmolLM2-135M on 2,048 tokens, and random scores", fontsize=11
)
fig.tight_layout()

# %% [markdown]
# In the deeper layers most rows have their largest score at the first token (an *attention sink*): one block sets the
# maximum for good. In the first layer the largest scores belong to the latest tokens, and the maximum keeps growing.
# Neither looks like random numbers, which is why the checks use real activations as well.
#
# ### Measure: memory, and bytes

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
results = {"naive": [], "online, block_k = 128": []}
for N in lengths:
    results["naive"].append(measured(naive.forward, N))
    results["online, block_k = 128"].append(measured(online.forward, N, block_k=128))
for (name, rows), colour in zip(results.items(), ("#D55E00", "#CC79A7")):
    left.plot(lengths, [row[0] / 2**20 for row in rows], "o-", color=colour, label=name)
    right.plot(lengths, [row[1] / 2**20 for row in rows], "o-", color=colour, label=name)
fused = [4 * 4 * N * 64 / 2**20 for N in lengths]
right.plot(lengths, fused, "k--", label="Q, K, V, O once")
for ax, title in ((left, "peak of memory alive, MiB"), (right, "bytes moved, MiB, one kernel an operation")):
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(lengths, lengths)
    ax.set_xlabel("N")
    ax.set_title(title, fontsize=11)
    ax.legend(frameon=False, fontsize=9)
fig.tight_layout()
for name, rows in results.items():
    peak, moved, t = rows[-1]
    print(
        f"N = {lengths[-1]}, {name:22s} peak {peak / 2**20:6.1f} MiB, moved {moved / 2**20:6.0f} MiB, {t:6.1f} ms here"
    )

# %% [markdown]
# The memory now grows with $N$ instead of $N^2$. The traffic did not shrink: it *grew*. Each small PyTorch operation
# still reads its block of scores from memory and writes it back, and now `acc` makes the trip in every block as well.
# The algorithm allows one pass; only a program that keeps its state *on the chip* between blocks turns that into
# fewer bytes. That is chapter 3.
#
# ### Measure: the block size changes nothing but rounding

# %%
from fa_reference.gold import gold_attention

q, k, v = (torch.randn(1, 1, 512, 64) for _ in range(3))
gold, _ = gold_attention(q, k, v)
for block_k in (1, 7, 64, 128, 512, 10_000):
    o, _ = online.forward(q, k, v, block_k=block_k)
    print(f"block_k = {block_k:6d}: RMS error against float64 {float((o - gold).square().mean().sqrt()):.1e}")

# %%
sizes = {passes: online.softmax_hbm_bytes(4096, 4096, 64, passes, 2) for passes in (3, 2, 1)}
for passes, moved in sizes.items():
    print(
        f"{passes} pass{'es' if passes > 1 else ''}: {moved / 2**20:6.1f} MiB from S to O at N = 4096, d = 64, 16-bit"
    )

# %% [markdown]
# ## Measured on an H100 or H200
#
# Recorded results of `make bench`. On a GPU this chapter's loop runs as a dozen kernels a block, so expect it to save
# memory, not time.

# %%
columns = ("naive", "online_softmax", "explicit", "torch_fa2")
record = recorded("forward", columns)


def print_times(record, group, causal):
    titles = {c["name"]: c["title"] for c in record["columns"] if c["name"] in columns}
    print("batch heads   d      N " + "".join(f"{title[:20]:>20s}" for title in titles.values()))
    for cell in record["cells"]:
        if (cell["group"], cell["causal"], cell["dtype"]) == (group, causal, "bf16"):
            entries = [cell["results"].get(name, {}) for name in titles]
            texts = [f"{e['median_ms']:.2f}" if "median_ms" in e else e.get("status", "-") for e in entries]
            shape = f"{cell['batch']:5d} {cell['heads_q']:5d} {cell['head_dim']:3d} {cell['len_q']:6d} "
            print(shape + "".join(f"{text:>20s}" for text in texts))


if record is None:
    print("Not recorded yet. On a machine with an NVIDIA GPU, `make bench` measures and records it.")
else:
    print(
        f"{record['provenance']['device']}, {record['provenance']['date'][:10]}: ms forward, bf16; oom = out of memory"
    )
    print("\nthe paper's grid, not causal")
    print_times(record, "paper", causal=False)
    print("\nLlama-3-8B prefill (32 query heads, 8 KV heads), causal")
    print_times(record, "llama", causal=True)

# %% [markdown]
# Look for the longest sequence in the second table: where a version runs out of memory, and which version it is. Then
# look at the times: a kernel that never stores $S$ (the last column) does the same arithmetic (in the causal table
# less of it) in a small part of them. (`explicit 16-bit` from $N = 8192$ to $N = 16384$ is the unexplained jump of
# chapter 1.)
#
# ## What to add next
#
# Keep a block's state on the chip. That needs a tile of $Q$, a tile of $K$ and $V$, and room for their scores, all in
# the few hundred kilobytes that one processor of a GPU has; and a decision which loop is the outer one.
# FlashAttention-1 made it one way, FlashAttention-2 the other. Chapter 3 counts what that costs.
#
# Before you go on: `merge` needs both maxima. What breaks if every worker uses the constant $m = 0$, and what if it
# uses an upper bound of its scores, such as $\lVert q \rVert \max_j \lVert k_j \rVert$?
#
# <details>
# <summary>Answers</summary>
#
# With $m = 0$ everywhere the states merge by plain addition, and the formulas stay true; float32 does not. One score
# above 88.7 makes $l$ infinite. And if all scores of a row are below about $-104$, every $e^{s_j}$ is 0, so $l = 0$ and
# the row looks as if it had seen no key.
#
# With an upper bound (times the scale) nothing can overflow, no maximum has to be found, and nothing is ever rescaled.
# But the bound may lie far above the true maximum: the further, the more digits and keys are lost to underflow, and
# from a distance of about 104 on the whole row. The true maximum is the one reference for which $l \ge 1$ is certain.
#
# </details>
#
# ## Sources
#
# - M. Milakov, N. Gimelshein, *Online normalizer calculation for softmax*, 2018 (arXiv:1805.02867): the recurrence
#   for $m$ and $l$, and its merge.
# - M. N. Rabe, C. Staats, *Self-attention Does Not Need O(n²) Memory*, 2021 (arXiv:2112.05682): carrying the weighted
#   values along.
# - T. Dao et al., *FlashAttention*, 2022 (arXiv:2205.14135): notation, and the normalised form.
# - T. Dao, *FlashAttention-2*, 2023 (arXiv:2307.08691): the accumulator that is divided once, and why work outside
#   matrix products matters.
# - T. Dao et al., *Flash-Decoding for long-context inference*, 2023, and H. Liu et al., *Ring Attention*, 2023
#   (arXiv:2310.01889): uses of the merge.
