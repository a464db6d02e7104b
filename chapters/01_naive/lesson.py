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
# # 1. Naive attention and the roofline
#
# You will write attention the way its formula reads, make its softmax safe, and work out what it costs in arithmetic
# and in bytes. The two numbers together explain why this version is slow on every GPU, and what the rest of the
# course is about. Reading: 25 minutes. Writing: about an hour.
#
# ## A measurement first
#
# Attention is two matrix products with a softmax between them. For a head of dimension $d = 64$ the products do $4d =
# 256$ floating-point operations for each score; the softmax does about five (compare, subtract, exponentiate, add,
# divide). So the softmax is 2% of the arithmetic. How much of the time is it? Here is the answer for the machine that
# runs this notebook, with the softmax written out as you would write it in PyTorch.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter

from fa_reference.lesson import answer, recorded, style

style()
torch.manual_seed(0)
torch.set_num_threads(1)  # one core, for steadier timings


def milliseconds(run, repeats=7):
    """Median wall-clock time of run() after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


N, d = 2048, 64
q, k, v = (torch.randn(N, d) for _ in range(3))


def softmax_written_out(scores):
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


S = q @ k.T / d**0.5
P = softmax_written_out(S)
took = {
    "Q Kᵀ": milliseconds(lambda: q @ k.T / d**0.5),
    "softmax": milliseconds(lambda: softmax_written_out(S)),
    "P V": milliseconds(lambda: P @ v),
}
operations = {"Q Kᵀ": 2 * d, "softmax": 5, "P V": 2 * d}
for name, t in took.items():
    print(f"{name:8s} {t:6.1f} ms   {operations[name]:4d} operations a score")

# %%
fig, ax = plt.subplots(figsize=(8, 2.3))
for row, (label, parts) in enumerate((("time, measured", took), ("arithmetic", operations))):
    left = 0.0
    for name, colour in zip(took, ("#0072B2", "#D55E00", "#56B4E9")):
        share = 100 * parts[name] / sum(parts.values())
        ax.barh(row, share, left=left, color=colour, label=name if row else None, height=0.6)
        if share > 6:
            ax.text(left + share / 2, row, f"{share:.0f}%", ha="center", va="center", color="white", fontsize=11)
        left += share
ax.set_yticks([0, 1], ["time, measured", "arithmetic"])
ax.set_xlim(0, 100)
ax.set_xlabel("share in %")
ax.set_title(f"one head, N = {N}, d = {d}, one core of this machine", fontsize=11)
ax.grid(False)
fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
fig.subplots_adjust(right=0.84)

# %% [markdown]
# Arithmetic does not explain the time. Something else costs, and the next picture shows what. ($Q K^\top$ includes the
# division by $\sqrt d$, one more pass over $S$; that is why it takes longer than $P V$.)
#
# ## The idea in a picture
#
# The matrices of one head, drawn to scale: $N$ rows, $d$ columns. We want $O$ from $Q$, $K$ and $V$, which are thin.
# On the way we make $S$ and $P$, which are not.

# %%
fig, ax = plt.subplots(figsize=(9, 3.6))
side, thin, gap = 1.0, 64 / 512, 0.22
blocks = [
    ("Q", thin, side, "#0072B2"),
    ("Kᵀ", side, thin, "#0072B2"),
    ("S", side, side, "#D55E00"),
    ("P", side, side, "#D55E00"),
    ("V", thin, side, "#0072B2"),
    ("O", thin, side, "#009E73"),
]
symbols = ["×", "=", "softmax\n→", "×", "="]
x = 0.0
for index, (name, width, height, colour) in enumerate(blocks):
    ax.add_patch(plt.Rectangle((x, side - height), width, height, facecolor=colour, alpha=0.75, edgecolor="black"))
    big = min(width, height) > 0.5
    ax.text(x + width / 2, side - height / 2, name, ha="center", va="center", fontsize=15 if big else 11, color="white")
    x += width
    if index < len(symbols):
        wide = 0.5 if "softmax" in symbols[index] else gap
        ax.text(x + wide / 2, side / 2, symbols[index], ha="center", va="center", fontsize=11)
        x += wide
ax.annotate("N × N: written to memory, then read back, twice", (2.41, -0.06), ha="center", va="top", color="#D55E00")
ax.annotate("N × d", (thin / 2, -0.06), ha="center", va="top", color="#0072B2")
ax.set_title(
    "N = 512, d = 64. At N = 8192 all is 16 times longer, and the orange squares 16 times wider too", fontsize=11
)
ax.set_xlim(-0.1, x + 0.1)
ax.set_ylim(-0.25, 1.08)
ax.set_aspect("equal")
ax.axis("off")
fig.tight_layout()

# %% [markdown]
# ## The algorithm
#
# In the notation of the FlashAttention paper (Dao et al. 2022), for one head with $Q, K, V \in \mathbb{R}^{N \times
# d}$ and scale $\tau = 1/\sqrt d$:
#
# $$S = \tau\, Q K^\top \in \mathbb{R}^{N \times N}, \qquad P = \mathrm{softmax}(S) \text{ row by row}, \qquad
# O = P V \in \mathbb{R}^{N \times d}.$$
#
# A GPU library runs this as three kernels. Each one reads its inputs from the GPU's main memory (HBM) and writes its
# result back there:
#
# 1. read $Q$, $K$; write $S$
# 2. read $S$; write $P$
# 3. read $P$, $V$; write $O$
#
# ### By hand
#
# Four queries, four keys, $d = 2$. You will meet this example online with wrong numbers, so do it with a pencil:
#
# $$Q = \begin{pmatrix}1&2\\3&4\\5&6\\7&8\end{pmatrix}, \quad K = \begin{pmatrix}2&1\\4&3\\6&5\\8&7\end{pmatrix}, \quad
# (QK^\top)_{1,0} = 3\cdot2 + 4\cdot1 = 10, \quad (QK^\top)_{1,1} = 3\cdot4 + 4\cdot3 = 24.$$

# %%
Q = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
K = torch.tensor([[2.0, 1], [4, 3], [6, 5], [8, 7]])
raw = Q @ K.T
print(raw.int())

printed = torch.tensor([[4.0, 10, 16, 22], [10, 25, 40, 55]])
print("often printed for rows 0 and 1:", printed.int().tolist())
print("often printed, row 1 / row 0:  ", (printed[1] / printed[0]).tolist())
print("true, row 1 / row 0:           ", [round(x, 3) for x in (raw[1] / raw[0]).tolist()])
assert torch.equal(raw[1], torch.tensor([10.0, 24, 38, 52]))

# %% [markdown]
# The version often printed has 25, 40, 55 in row 1. That is row 0 times 2.5, which would need $Q$'s row 1 to be 2.5
# times row 0; $(3, 4)$ is not a multiple of $(1, 2)$. (Another version has only two columns, $[[4, 10], [8, 22],
# \dots]$. $S$ has one column a *key*, so four here, and its second row starts with 10.)
#
# Now the softmax. Only differences between scores matter:
#
# $$\mathrm{softmax}([4, 10]) = \frac{[e^{4}, e^{10}]}{e^4 + e^{10}}
# = \Big[\frac{1}{1 + e^{6}}, \frac{1}{1 + e^{-6}}\Big], \qquad e^6 \approx 403.4, \quad 1/404.4 \approx 0.00247.$$
#
# The answer often printed, $[0.12, 0.88]$, belongs to a difference of 2, not 6. And that version forgets $\tau =
# 1/\sqrt 2$. Both matter: the difference becomes $6/\sqrt2 \approx 4.24$ and the weight of the smaller score almost
# six times as large.

# %%
for scores in ([4.0, 10.0], [4 / 2**0.5, 10 / 2**0.5], [8.0, 10.0]):
    shown = [round(s, 3) for s in scores]
    print(f"softmax({shown}) =", [round(p, 5) for p in torch.softmax(torch.tensor(scores), -1).tolist()])

S_example = raw / 2**0.5
P_example = torch.softmax(S_example, -1)
mask = torch.ones(4, 4).tril() == 0  # a causal mask hides the keys after the query: j > i
P_causal = torch.softmax(S_example.masked_fill(mask, -torch.inf), -1)

fig, axes = plt.subplots(1, 3, figsize=(10, 3.5))
panels = (("S = Q Kᵀ / √2", S_example, "{:.1f}"), ("P", P_example, "{:.3f}"), ("P, causal", P_causal, "{:.3f}"))
for ax, (title, matrix, form) in zip(axes, panels):
    ax.imshow(matrix, cmap="Blues", vmax=float(matrix.max()) * 1.15)
    for i in range(4):
        for j in range(4):
            hidden = title.endswith("causal") and j > i
            dark = matrix[i, j] > 0.6 * matrix.max()
            tiny = title.startswith("P") and matrix[i, j] < 1e-3
            text = "·" if hidden else f"{matrix[i, j]:.0e}" if tiny else form.format(matrix[i, j])
            ax.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    ax.set_title(title)
    ax.set_xlabel("key j")
    ax.set_xticks(range(4))
    ax.set_yticks(range(4))
    ax.grid(False)
axes[0].set_ylabel("query i")
fig.tight_layout()

# %% [markdown]
# Every row of $P$ sums to one. With a causal mask a query sees itself and earlier keys only. If there are fewer
# queries than keys, as in generation with a KV cache, the queries are the *last* ones of the sequence: query $i$ sees
# key $j$ if $j \le i + N_k - N_q$. That is "aligned bottom-right", and it is what this course uses everywhere.
# (PyTorch's `is_causal=True` is aligned top-left: the two agree only if $N_q = N_k$.)
#
# ### A softmax that cannot overflow
#
# $e^{x}$ exceeds the largest float16, 65504, at $x > 11.1$, and the largest float32 at $x > 88.7$ (bfloat16 has
# float32's range). How large do scores become? The course comes with queries and keys of a real language model:

# %%
from fa_reference.activations import LAYERS, load_activations

for layer in LAYERS:
    real = load_activations(layer)
    visible = torch.ones(real.q.shape[2], real.k.shape[2]).tril() == 1
    real_scores = (real.q[0].float() @ real.k[0].float().mT / real.q.shape[-1] ** 0.5)[:, visible]
    low, high = real_scores.aminmax()
    print(f"SmolLM2-135M, layer {layer:2d}: scores from {float(low):6.1f} to {float(high):5.1f}")

# %% [markdown]
# Even this small model exceeds what float16 can exponentiate; that it stays below 88.7 is luck, not a law. The remedy
# is to subtract each row's maximum $m = \max_j s_j$ first, which changes nothing:
#
# $$\frac{e^{s_j - m}}{\sum_i e^{s_i - m}} = \frac{e^{-m}\, e^{s_j}}{e^{-m} \sum_i e^{s_i}}
# = \frac{e^{s_j}}{\sum_i e^{s_i}}.$$
#
# After it every exponent is at most 0, so no term exceeds 1, and one exponent is exactly 0, so the denominator $l =
# \sum_j e^{s_j - m}$ lies between 1 and $N$: it can neither overflow nor vanish. What underflows to 0 is smaller than
# $10^{-37}$ beside a sum of at least 1.

# %%
scores = 40 * torch.randn(48, generator=torch.Generator().manual_seed(3)) + 60
grid = np.linspace(-170, 165, 400)
fig, ax = plt.subplots(figsize=(8.5, 4.2))
ax.plot(grid, grid / np.log(10), color="black", lw=1.3, label="$e^x$")
for name, top in (("float16: 65504", 65504.0), ("float32, bfloat16: 3.4e38", 3.4e38)):
    ax.axhline(np.log10(top), color="#999999", lw=1, ls="--")
    ax.text(-168, np.log10(top) + 2, "largest " + name, fontsize=10, color="#555555")
for shift, colour, label in ((0.0, "#D55E00", "$e^{s_j}$"), (float(scores.max()), "#0072B2", "$e^{s_j - m}$")):
    moved = (scores - shift).numpy()
    lost = int(torch.exp(torch.from_numpy(moved)).isinf().sum())
    label += f": {lost} of {len(moved)} overflow in float32"
    ax.plot(moved, moved / np.log(10), "o", ms=6, color=colour, alpha=0.8, label=label)
ax.set_xlabel("exponent")
ax.set_ylabel("$\\log_{10}$ of the result")
ax.legend(loc="lower right", frameon=False)
ax.set_title("the same 48 scores before and after subtracting their maximum", fontsize=11)
fig.tight_layout()

# %% [markdown]
# Beside $P$ your softmax returns one more number a row, the *log-sum-exp*
#
# $$\mathrm{lse} = \log \sum_j e^{s_j} = m + \log l .$$
#
# It is a row's whole history in one number: $P_{ij} = e^{S_{ij} - \mathrm{lse}_i}$. Chapter 2 merges partial results
# with it, and a backward pass needs nothing else beside $Q$ and $K$ to recompute $P$.
#
# One trap: a row in which every key is hidden. Its maximum is $-\infty$, and $(-\infty) - (-\infty)$ is NaN. We
# define such a row's output as 0 and its lse as $-\infty$ (the logarithm of an empty sum).

# %% [markdown]
# ## What it costs
#
# **Arithmetic.** $Q K^\top$ has $N^2$ entries with $d$ multiplications and $d$ additions each; $P V$ has $N d$
# entries with $N$ of each. Together $4 N^2 d$ FLOPs. You may read "$2N^2d + N^2$"; PyTorch's own counter can settle
# it:

# %%
from torch.utils.flop_counter import FlopCounterMode

x, y, z = (torch.randn(1, 512, 64, requires_grad=True) for _ in range(3))
with FlopCounterMode(display=False) as forward_count:
    out = torch.softmax(x @ y.mT / 8, -1) @ z
with FlopCounterMode(display=False) as backward_count:
    out.sum().backward()
counted, printed = forward_count.get_total_flops(), 2 * 512**2 * 64 + 512**2
print(f"forward:  {counted:,} counted; 4 N² d = {4 * 512**2 * 64:,}; 2 N² d + N² = {printed:,}")
print(f"backward: {backward_count.get_total_flops() / counted:.1f} x forward (four matrix products, with P kept)")

# %% [markdown]
# By convention the softmax's $O(N^2)$ is left out, and a causal mask counts half. A FlashAttention backward
# recomputes $S$ instead of keeping $P$: five products against two, 2.5 times the forward pass. Every TFLOP/s in this
# course uses these counts, whatever a kernel really executes.
#
# **Bytes.** The three kernels above read and write $S$ and $P$: four trips of an $N \times N$ matrix, beside $Q, K,
# V, O$. At 2 bytes a number that is $2 \cdot (4 N^2 + 4 N d)$ bytes.
#
# **Arithmetic intensity** is their quotient, FLOPs per byte:
#
# $$\frac{4 N^2 d}{2\,(4 N^2 + 4 N d)} = \frac{d}{2} \cdot \frac{N}{N + d} \;<\; \frac d2 .$$
#
# It hardly grows with $N$: for $d = 64$ it is at most 32 operations a byte. An H100 can do 989 TFLOP/s on 16-bit
# numbers but moves 3.35 TB/s: it needs $989 / 3.35 \approx 295$ operations a byte to be kept busy. Nearly all of it
# waits. This is what *memory-bound* means. If $S$ and $P$ never left the chip, $8 N d$ bytes would do, and the
# intensity would be $N/2$.
#
# The roofline (Williams, Waterman and Patterson 2009) draws this: at intensity $I$ a chip reaches at most
# $\min(\text{peak},\; I \times \text{bandwidth})$.

# %%
from fa_reference.counts import H100, H200

intensities = np.geomspace(4, 20000, 300)
fig, ax = plt.subplots(figsize=(8.5, 4.8))
for device, colour, dash in ((H100, "black", "-"), (H200, "#009E73", "--")):
    roof = np.minimum(device.tflops_16bit, intensities * device.hbm_tb_s)
    label = f"{device.name}: {device.tflops_16bit:.0f} TFLOP/s, {device.hbm_tb_s} TB/s, ridge at {device.ridge:.0f}"
    ax.plot(intensities, roof, color=colour, ls=dash, lw=2, label=label)
n = 4096
for dim, marker in ((64, "o"), (128, "s"), (256, "D")):
    for kind, moved, colour in (
        ("S and P in HBM", 2 * (4 * n * n + 4 * n * dim), "#D55E00"),
        ("Q, K, V, O only", 2 * 4 * n * dim, "#0072B2"),
    ):
        intensity = 4 * n * n * dim / moved
        bound = min(H100.tflops_16bit, intensity * H100.hbm_tb_s)
        ax.plot(intensity, bound, marker, ms=8, color=colour, label=kind if dim == 64 else None, ls="none")
        if kind.startswith("S"):
            ax.annotate(f"d = {dim}: at most {bound:.0f}", (intensity, bound), (8, -12), textcoords="offset points")
ax.annotate("any d: at most 989", (2048, 989), (-10, -18), textcoords="offset points", ha="center")
ax.set_xscale("log")
ax.set_yscale("log")
ax.set_xlabel("arithmetic intensity, FLOP per byte of HBM traffic")
ax.set_ylabel("attainable TFLOP/s")
ax.set_title(f"data-sheet rooflines; bounds for N = {n}, 16-bit", fontsize=11)
ax.legend(loc="lower right", frameon=False, fontsize=10)
fig.tight_layout()

# %% [markdown]
# The orange points are *upper bounds* for naive attention with the best imaginable three kernels. They also judge a
# claim: "standard attention reaches 200-400 TFLOP/s on an H100". For $d = 64$ the bound is about 100, for $d = 128$
# about 200: most of that range is out of reach before anything is measured. (While $S$ and $P$ still fit into the 50
# MB of L2 cache, HBM traffic can be less than counted here. At $N = 4096$ one 16-bit $S$ has 32 MiB, and there is one
# a head.)
#
# ## Predict
#
# The formula says four trips of an $N \times N$ matrix. It assumes that the softmax is one kernel. Yours will be
# several PyTorch operations, each of which reads its inputs from memory and writes its result back.
#
# **How many trips of an $N \times N$ matrix will your `forward` make?** One read or one write of the whole matrix
# counts as one trip: `S * scale` makes two. Think through the steps, write your number here, and run the cell.

# %%
my_prediction = 4  # your number

# %% [markdown]
# ## The exercise
#
# Open `chapters/01_naive/naive.py`. Five functions, in this order:
#
# | function | what to write | lines in our solution |
# |---|---|---|
# | `stable_softmax` | the safe softmax, and lse | 7 |
# | `attention_flops` | $4 N_q N_k d$, for any lengths | 1 |
# | `naive_hbm_bytes` | the bytes of the three kernels | 4 |
# | `attainable_tflops` | the roofline | 1 |
# | `forward` | attention by its definition | 11 |
#
# `forward` takes what a model has: a batch and heads, a causal mask, $N_q \ne N_k$, and *grouped-query attention*
# (GQA): with fewer KV heads than query heads, consecutive query heads share one. With 6 query heads and 2 KV heads,
# query heads 0, 1, 2 read KV head 0, and 3, 4, 5 read KV head 1. Checking the arguments is written already.
#
# Precision, here and in the kernels of chapters 3 and 4: scores, softmax and all sums in float32; $P$ is rounded to
# the input's dtype before $P V$, as tensor cores want it; $O$ is returned in the input's dtype.
#
#     make check CHAPTER=1     # grade: says which property fails, on the smallest case
#     make hint CHAPTER=1      # one hint more each time
#     make watch CHAPTER=1     # grade again whenever you save
#
# ### What to look at when it fails
#
# | symptom | look at |
# |---|---|
# | "softmax of large scores does not overflow" fails | is the maximum taken per row, and subtracted *before* `exp`? |
# | NaN only in "rows without keys" | $(-\infty) - (-\infty)$ in the exponent; $0 / 0$ in the division |
# | `lse` is off by a factor of 1.44, or too small by the maximum | base 2 instead of $e$; $m$ was not added back |
# | square causal cases pass, others fail | the mask needs $N_k - N_q$: aligned bottom-right |
# | only GQA fails, half of the heads are right | `repeat` tiles the heads 0 1 0 1; you want 0 0 1 1 |
# | only float16 or bfloat16 fails | something ran in 16 bits too early: convert *before* the product |

# %%
naive = answer(1, "naive.py")
q4, k4, v4 = Q.view(1, 1, 4, 2), K.view(1, 1, 4, 2), torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]]).view(1, 1, 4, 2)
o, lse = naive.forward(q4, k4, v4)
print("the example's output with V = [[1, 0], [0, 1], [1, 0], [0, 1]]:")
print(o[0, 0])
print("lse:", lse[0, 0].tolist())

# %% [markdown]
# Check the first row with the pencil: its scores over $\sqrt2$ are 2.83, 7.07, 11.31, 15.56. Relative to the largest,
# the weights are $e^{-12.73}, e^{-8.49}, e^{-4.24}, 1$, which add up to $l = 1.0146$. So $O_0 = [(e^{-12.73} +
# e^{-4.24}) / l,\ (e^{-8.49} + 1) / l] = [0.0142, 0.9858]$ and $\mathrm{lse} = 15.556 + \log 1.0146 = 15.571$.
#
# ## Measure: your prediction
#
# PyTorch can show every operation that it runs to a *dispatch mode*. `Meter` is one (`fa_reference/meter.py`, 60
# lines): it adds up the bytes of the inputs and outputs, which is the traffic that a GPU would have, one kernel an
# operation.

# %%
from fa_reference.meter import Meter

N, d = 2048, 64
q, k, v = (torch.randn(1, 1, N, d) for _ in range(3))
square = 4 * N * N  # bytes of one N x N float32 matrix
with Meter() as ours:
    naive.forward(q, k, v)
with Meter() as fused_softmax:
    torch.softmax((q * d**-0.5) @ k.mT, -1) @ v
with Meter() as fused_all:
    torch.nn.functional.scaled_dot_product_attention(q, k, v)

for name, moved in ours.moved.items():
    if moved > 0.5 * square:
        print(f"{name:12s} {moved / square:5.2f} trips")
trips = {
    "naive.forward": ours.moved_bytes / square,
    "matmul, torch.softmax, matmul": fused_softmax.moved_bytes / square,
    "naive_hbm_bytes": naive.naive_hbm_bytes(N, N, d, 4) / square,
    "one fused operation": fused_all.moved_bytes / square,
}
print()
for name, count in trips.items():
    print(f"{name:30s} {count:6.2f} trips of an N x N matrix")
print(f"\nyou predicted {my_prediction}; measured {trips['naive.forward']:.1f}")

# %% [markdown]
# Few people guess twelve, which is what our solution makes. PyTorch's own softmax kernel brings it down to the four
# of your formula, and the fused operation (an attention that never stores $S$) to a small fraction of one. That
# fraction is $4d/N$: it shrinks as $N$ grows.
#
# ### Does time follow bytes?
#
# If naive attention were limited by arithmetic, its time would double when $d$ doubles. Its bytes hardly change with
# $d$. Here is a roofline of one core of this machine, with a large matrix product as its peak, a large copy as its
# bandwidth, and your `forward` on it at five head dimensions.

# %%
a = torch.randn(1536, 1536)
source = torch.randn(2**24)
target = torch.empty_like(source)
peak = 2 * 1536**3 / milliseconds(lambda: a @ a) / 1e6
bandwidth = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6
print(f"here: {peak:.0f} GFLOP/s in a matrix product, {bandwidth:.1f} GB/s in a copy: ridge at {peak / bandwidth:.0f}")

points = []
for dim in (16, 32, 64, 128, 256):
    q, k, v = (torch.randn(1, 1, N, dim) for _ in range(3))
    with Meter() as traffic:
        naive.forward(q, k, v)
    t = milliseconds(lambda q=q, k=k, v=v: naive.forward(q, k, v), repeats=5)
    flops = naive.attention_flops(N, N, dim)
    points.append((dim, flops / traffic.moved_bytes, flops / t / 1e6))
    print(f"d = {dim:3d}: {t:6.1f} ms for {flops / 1e9:5.2f} GFLOP, {points[-1][1]:5.1f} FLOP/byte")

fig, ax = plt.subplots(figsize=(8.5, 4.2))
reach = np.geomspace(0.5, 60, 200)
# attainable_tflops works in any consistent unit: here GFLOP/s and GB/s
ax.plot(
    reach,
    [naive.attainable_tflops(i, peak, bandwidth) for i in reach],
    color="black",
    lw=2,
    label="this core's roof",
)
for dim, intensity, speed in points:
    ax.plot(intensity, speed, "o", ms=8, color="#D55E00", label="naive.forward" if dim == 16 else None)
    ax.annotate(f"d = {dim}", (intensity, speed), (6, -12), textcoords="offset points")
ax.set_xscale("log")
ax.set_yscale("log")
ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
ax.set_xlabel("FLOP per byte, counted")
ax.set_ylabel("GFLOP/s, measured")
ax.legend(loc="lower right", frameon=False)
fig.tight_layout()

# %% [markdown]
# From $d = 16$ to $d = 256$ the arithmetic grows sixteen times; the time grows far less, so the points climb. They
# follow the slanted part only roughly: timings of small $d$ are noisy, and $d = 16$ can come out slower than $d = 32$;
# a point can touch or pass the slant where a cache serves part of the traffic, and stays below it where PyTorch spends
# time on allocating the big matrices. The largest $d$ may lie right of the ridge, where arithmetic is the limit.
# Compare the ridge printed above with the H100's 295: a CPU is a forgiving place.
#
# ## Measured on an H100 or H200
#
# These are recorded results of `make bench`, with the device and the date they come from.

# %%
columns = ("naive", "explicit", "math", "torch_fa2")
record = recorded("forward", columns)
if record is None:
    print("Not recorded yet. On a machine with an NVIDIA GPU, `make bench` measures and records it.")
else:
    from fa_reference.bench.roofline import data_sheet

    device = data_sheet(record)
    titles = {c["name"]: c["title"] for c in record["columns"] if c["name"] in columns}
    print(f"{record['provenance']['device']}, {record['provenance']['date'][:10]}: TFLOP/s forward, bf16, not causal\n")
    print("  d      N " + "".join(f"{title[:20]:>20s}" for title in titles.values()) + "   bound of three kernels")
    explicit = {}
    for cell in record["cells"]:
        if cell["group"] != "paper" or cell["causal"] or cell["dtype"] != "bf16":
            continue
        dim, n = cell["head_dim"], cell["len_q"]
        entries = [cell["results"].get(name, {}) for name in titles]
        texts = [f"{e['tflops']:.0f}" if "tflops" in e else e.get("status", "-") for e in entries]
        bound = "-"
        if device is not None:
            intensity = naive.attention_flops(n, n, dim) / naive.naive_hbm_bytes(n, n, dim, 2)
            bound = f"{naive.attainable_tflops(intensity, device.tflops_16bit, device.hbm_tb_s):.0f}"
        explicit[dim, n] = cell["results"].get("explicit", {}).get("tflops", 0.0)
        print(f"{dim:3d} {n:6d} " + "".join(f"{text:>20s}" for text in texts) + f"{bound:>25s}")
    reached = [f"d {dim}, N {n}" for (dim, n), speed in explicit.items() if speed >= 200]
    print(f"\nexplicit 16-bit attention reaches 200 TFLOP/s in {len(reached)} of {len(explicit)} shapes:", *reached)

# %%
if record is None:
    print("Not recorded yet: the roofline with measured points needs a recorded run of `make bench`.")
else:
    from fa_reference.bench.roofline import draw_roofline
    from fa_reference.bench.roofline import points as measured_points

    shown = measured_points(record, head_dim=128, length=4096, names=columns)
    if shown:
        fig, ax = plt.subplots(figsize=(9, 5.2))
        draw_roofline(ax, record, shown)
        ax.set_title(
            f"{record['provenance']['device']}, {record['provenance']['date'][:10]}: d 128, N 4096, bf16, forward"
        )
        fig.tight_layout()
    else:
        print("The recorded run has no timed cell with d 128, N 4096.")

# %% [markdown]
# Which column is which: `explicit 16-bit` is the three kernels of the formula, a matrix product, `torch.softmax`, a
# matrix product, all in 16 bits. Its bound is the roofline's, with the bandwidth of this card's data sheet (an H200
# is an H100 with faster memory), so read the claimed "200-400 TFLOP/s" against these two columns. `naive` is the file
# of this chapter: it makes three times as many trips, in float32, and multiplies in float32, outside the tensor
# cores. (In the figure its bytes are those of three kernels; by all its trips its point would lie three to four times
# further left.) `torch math` is PyTorch's own unfused attention, which also works in float32 inside; the figure
# leaves it out because the kernels inside it, and so its bytes, are not counted. `FA2` never stores $S$ or $P$; it is
# where chapter 4 ends.
#
# One thing in the recorded H200 table is unexplained: from $N = 8192$ to $N = 16384$ `explicit 16-bit` becomes about
# 1.7 times as fast at every $d$, and its one shape above 200 TFLOP/s is there. Bytes and operations say nothing of
# the kind; a profile of the two lengths would show which of the three kernels changes.
#
# ## What to add next
#
# $S$ and $P$ are the problem: make them disappear. Nothing stops us from computing $S$ for a *block* of keys at a
# time and throwing it away after use, except the softmax: it needs a row's maximum and sum before its first output.
# Or does it?
#
# Before you go on: what would change if the softmax were one kernel that also did the scaling and the masking? (Count
# the trips.) And why does a larger batch or more heads not raise the intensity?
#
# <details>
# <summary>Answers</summary>
#
# The twelve trips would become four: $S$ is written by the first kernel and read by the second, $P$ is written by the
# second and read by the third. That is the count of `naive_hbm_bytes`, and it is as far as this goes: while $S$ and $P$
# exist in HBM, the intensity of 16-bit attention stays below $d/2$.
#
# Every head of every sequence has a $Q$, $K$, $V$, $S$, $P$ and $O$ of its own, so operations and bytes both grow by
# the factor $B H$, which cancels in their quotient. (With GQA several query heads share $K$ and $V$, but these are
# small beside $S$ and $P$.)
#
# </details>
#
# ## Sources
#
# - A. Vaswani et al., *Attention Is All You Need*, 2017: attention, and why the scale is $1/\sqrt d$.
# - T. Dao, D. Fu, S. Ermon, A. Rudra, C. Ré, *FlashAttention*, 2022 (arXiv:2205.14135): standard attention as three
#   kernels and its HBM traffic.
# - S. Williams, A. Waterman, D. Patterson, *Roofline: An Insightful Visual Performance Model*, CACM 2009.
# - J. Ainslie et al., *GQA*, 2023 (arXiv:2305.13245): grouped-query attention.
# - NVIDIA, data sheets of the H100 and H200 (SXM): peak rates and bandwidths, without sparsity.
