# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chapter 3: FlashAttention-1, or tiling
#
# Chapter 1 found that naive attention is limited by memory: it writes the $N \times N$ scores to HBM and reads them
# back, several times. Chapter 2 found that softmax does not need a whole row at once. Put together, the two give
# FlashAttention: **cut the matrices in tiles, keep a few tiles on chip, and never build the $N \times N$ matrix.**
#
# You will write it twice:
#
# | file | what | where it runs |
# |---|---|---|
# | `chapters/03_fa1/fa1_tiled.py` | Algorithm 1 of the paper in Python, with every byte counted | CPU |
# | `chapters/03_fa1/fa1_triton.py` | the same as a GPU kernel in Triton | GPU, or Triton's interpreter on the CPU |
#
# The paper is [Dao, Fu, Ermon, Rudra and Ré, 2022](https://arxiv.org/abs/2205.14135); its notation is used throughout:
# $N$ rows, head dimension $d$, on-chip memory of $M$ numbers, row blocks of size $B_r$, column blocks of size $B_c$.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from fa_reference import lesson
from fa_reference.counts import H100, fa1_hbm_bytes, naive_hbm_bytes
from fa_reference.memory import Memory, OffChipAccess, SramOverflow, sram_budget
from fa_reference.triton_cpu import DEVICES, compile_forward, tl, triton

lesson.style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. Measure first: where do the bytes go?
#
# `Memory` is one SM's view of a GPU's memory. A tensor in HBM has a shape but no arithmetic; to compute, you load rows
# of it as a *tile*, and what you compute from tiles is on chip too. Loads and stores are counted, and the tiles that
# are alive at once must fit the on-chip memory ("SRAM": shared memory and registers).

# %%
memory = Memory(sram_bytes=100 * 1024)
Q = memory.hbm("Q", torch.randn(512, 64))
try:
    Q @ Q
except OffChipAccess as error:
    print("no arithmetic in HBM:", error)

Q_i = memory.load(Q, slice(0, 64))
print("\nloaded so far:", memory.loaded, "| on chip now:", memory.sram_in_use, "bytes")
try:
    Q_all = memory.load(Q, slice(0, 256))
    S = Q_all @ Q_all.T
except SramOverflow as error:
    print("\nno room for the scores:", str(error).split(". ")[0])

# %% [markdown]
# Now naive attention through the same meter. Scores do not fit on chip, so they go to HBM; a block of rows at a time
# is loaded, turned into probabilities, stored, and loaded again.

# %%


def naive_counted(q, k, v, memory, rows_at_once=8):
    """Naive attention of one head: S and P pass through HBM. Returns O."""
    n, d = q.shape
    Q, K, V = memory.hbm("Q", q), memory.hbm("K", k), memory.hbm("V", v)
    o = torch.empty(n, d)
    S, P, O = memory.hbm("S", torch.empty(n, n)), memory.hbm("P", torch.empty(n, n)), memory.hbm("O", o)
    blocks = [slice(a, min(a + rows_at_once, n)) for a in range(0, n, rows_at_once)]
    K_all = memory.load(K, slice(0, n))
    for rows in blocks:
        memory.store(S, rows, memory.load(Q, rows) @ K_all.T * d**-0.5)
    del K_all
    for rows in blocks:
        memory.store(P, rows, torch.softmax(memory.load(S, rows), dim=1))
    V_all = memory.load(V, slice(0, n))
    for rows in blocks:
        memory.store(O, rows, memory.load(P, rows) @ V_all)
    return o


n, d = 512, 64
q, k, v = torch.randn(3, n, d)
naive_memory = Memory(sram_bytes=10**6)  # generous: this is about traffic
naive_o = naive_counted(q, k, v, naive_memory)

moved = {name: naive_memory.loaded.get(name, 0) + naive_memory.stored.get(name, 0) for name in "QKVSPO"}
for name, size in moved.items():
    print(f"{name}: {size:>9,} bytes  {size / naive_memory.traffic_bytes:6.1%}")
print(f"sum: {naive_memory.traffic_bytes:,} bytes; formula of chapter 1: {naive_hbm_bytes(n, n, d, 4):,}")

# %% [markdown]
# At $N = 512$ already, S and P are nine tenths of the traffic; they grow with $N^2$ and the rest with $N$. On a GPU
# this is what a memory-bound kernel looks like (`explicit`: chapter 1's three 16-bit kernels). It was recorded on a
# real card, if this copy of the course has results:

# %%


def recorded_table(columns, head_dim=64, causal=False):
    """Print recorded TFLOP/s of some versions on the paper's shapes."""
    record = lesson.recorded("forward", columns)
    if record is None:
        print("Not recorded yet: results/ holds no forward benchmark. `make bench` on a GPU makes one.")
        return
    where = record["provenance"]
    print(f"TFLOP/s on {where['device']}, {where['date'][:10]}; d {head_dim}, causal {causal}, 16k tokens, hidden 2048")
    print("".join(["batch heads      N  ", *(f"{name:>12}" for name in columns)]))
    for cell in record["cells"]:
        if (cell["group"], cell["head_dim"], cell["causal"], cell["dtype"]) != ("paper", head_dim, causal, "bf16"):
            continue
        entries = [cell["results"].get(name, {}) for name in columns]
        texts = [f"{e['tflops']:.0f}" if "tflops" in e else e.get("status", "-") for e in entries]
        print(f"{cell['batch']:5} {cell['heads_q']:5} {cell['len_q']:6}  " + "".join(f"{t:>12}" for t in texts))


recorded_table(["naive", "explicit", "fa1_triton", "fa2_triton"])

# %% [markdown]
# ## 2. The idea in a picture
#
# Cut K and V in $T_c = \lceil N / B_c \rceil$ blocks of $B_c$ rows, Q and O in $T_r = \lceil N / B_r \rceil$ blocks of
# $B_r$ rows. One pair of blocks needs a $B_r \times B_c$ piece of S, and that fits on chip. The paper's outer loop runs
# over blocks of K and V, its inner loop over blocks of Q:

# %%


def draw_tiles(ax, t_r, t_c, i, j, outer="K"):
    """Where Q, K, V, S and O are during one step: blue tiles are on chip."""
    chip, hbm, seen = "#56B4E9", "#eeeeee", "#bcd9ea"

    def box(x, y, w, h, colour, text=""):
        ax.add_patch(plt.Rectangle((x, y), w, h, facecolor=colour, edgecolor="black", linewidth=1))
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9)

    for row in range(t_r):
        y = t_r - 1 - row
        box(-2.2, y, 1.2, 1, chip if row == i else hbm, f"$Q_{row + 1}$")
        box(t_c + 1, y, 1.2, 1, chip if row == i else hbm, f"$O_{row + 1}$")
        for col in range(t_c):
            step = col * t_r + row if outer == "K" else row * t_c + col
            now = j * t_r + i if outer == "K" else i * t_c + j
            colour = chip if step == now else seen if step < now else "white"
            ax.add_patch(plt.Rectangle((col, y), 1, 1, facecolor=colour, edgecolor="black", linestyle=":"))
            ax.text(col + 0.5, y + 0.5, str(step + 1), ha="center", va="center", fontsize=9)
    for col in range(t_c):
        box(col, t_r + 1.7, 1, 0.9, chip if col == j else hbm, f"$K_{col + 1}$")
        box(col, t_r + 0.6, 1, 0.9, chip if col == j else hbm, f"$V_{col + 1}$")
    ax.set_xlim(-2.6, t_c + 2.6)
    ax.set_ylim(-0.3, t_r + 3)
    ax.set_aspect("equal")
    ax.axis("off")


figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
for ax, (i, j) in zip(axes, [(0, 0), (2, 0), (1, 1)]):
    draw_tiles(ax, 4, 3, i, j)
    ax.set_title(f"step {j * 4 + i + 1}: $j$ = {j + 1}, $i$ = {i + 1}", fontsize=11)
figure.suptitle("FlashAttention-1: blue is on chip; numbers are the order of the steps; S itself is never stored")
plt.show()

# %% [markdown]
# $K_j$ and $V_j$ stay while all of Q passes by. In every pass, each $O_i$ comes in, is improved by what the new keys
# add, and goes out again, together with its running maximum $m_i$ and sum $l_i$. That is the price of this loop order;
# keep it in mind.
#
# ## 3. The algorithm
#
# Initialise in HBM $O = 0$, $l = 0$, $m = -\infty$. Then, with $s = 1/\sqrt d$:
#
# **for** $j = 1 \dots T_c$: load $K_j, V_j$ $\quad(B_c \times d)$
# <br>&emsp; **for** $i = 1 \dots T_r$: load $Q_i, O_i$ $\quad(B_r \times d)$ and $l_i, m_i$ $\quad(B_r)$
#
# $$
# \begin{aligned}
# S_{ij} &= s\, Q_i K_j^T &&\in \mathbb{R}^{B_r \times B_c}\\
# m_i^{new} &= \max(m_i, \mathrm{rowmax}(S_{ij}))\\
# P_{ij} &= \exp(S_{ij} - m_i^{new})\\
# l_i^{new} &= e^{m_i - m_i^{new}}\, l_i + \mathrm{rowsum}(P_{ij})\\
# O_i &\leftarrow \mathrm{diag}(l_i^{new})^{-1}
#        \left( \mathrm{diag}(l_i)\, e^{m_i - m_i^{new}}\, O_i + P_{ij} V_j \right)
# \end{aligned}
# $$
#
# &emsp;&emsp; store $O_i$, $l_i \leftarrow l_i^{new}$, $m_i \leftarrow m_i^{new}$
#
# This is chapter 2's update with one change: O is kept *normalised* ($O_i$ is already the correct output for the keys
# seen so far), so the old $O_i$ is multiplied by the old sum $l_i$ before the new part is added, and everything is
# divided by the new one. (The paper first takes the maximum of the block alone and corrects P afterwards; the result
# is the same.)
#
# Two details decide whether it works on all inputs:
# - the last block may be shorter than $B_c$ or $B_r$;
# - a causal row may see no key at all (the first rows if $N_q > N_k$). Then $m = -\infty$, and $-\infty - (-\infty)$
#   is NaN.
#
# ## 4. Count before you write
#
# How many numbers does this move? K and V once: $2Nd$. In each of the $T_c$ outer steps all of Q in, and all of O, l
# and m in *and* out: $Nd + 2(Nd + 2N)$. So
#
# $$ \text{elements} = 2 N d + T_c\,(3 N d + 4 N), \qquad T_c = \lceil N / B_c \rceil . $$
#
# $B_r$ does not appear. $B_c$ does: the larger the block of keys, the fewer passes over O. On chip there must be room
# for $K_j, V_j, Q_i, O_i$; the paper sets $B_c = \lceil M / 4d \rceil$, $B_r = \min(B_c, d)$, so that
# $T_c \approx 4 d N / M$ and
#
# $$ \text{elements} \approx \frac{12\,N^2 d^2}{M} = \Theta\!\left(\frac{N^2 d^2}{M}\right)
# \qquad\text{against}\qquad 4N^2 + 4Nd = \Theta(N d + N^2) \text{ for naive.} $$
#
# ### Your prediction
#
# One head, $N = 4096$, all numbers in float32, $M = 25{,}600$ numbers (100 KB). Naive attention moves how many times
# the bytes of FlashAttention-1 for $d = 64$? And for $d = 128$? Write your guesses here **before** you go on; a ratio
# below 1 would mean that naive moves less.

# %%
my_ratio_d64 = None  # for example 10.0
my_ratio_d128 = None

# %% [markdown]
# ## 5. Exercise one: `fa1_tiled.py`
#
# Open `chapters/03_fa1/fa1_tiled.py` and write three functions:
#
# | function | what |
# |---|---|
# | `block_sizes` | $(B_r, B_c)$ from $M$ and $d$ |
# | `fa1_hbm_elements` | the exact count above |
# | `fa1_head` | Algorithm 1 for one head, through `memory.load` and `memory.store` |
#
# `forward`, which loops over heads, is given. Then, in a terminal:
#
#     make check CHAPTER=3        # grade both files
#     make hint CHAPTER=3         # one more hint each time
#     make watch CHAPTER=3        # grade whenever you save
#
# When a check fails, look here:
# - **right with one block, wrong with several**: the rescaling. Which of `O_i` and `l_i` did you forget?
# - **wrong only for ragged lengths**: the last slice; `min(start + block, len)`.
# - **NaN in rows without keys**: guard `m_new` against $-\infty$, and `l_new` against 0.
# - **`SramOverflow`**: a tile that you no longer need is still bound to a name; `del` it.
# - **bytes too high**: is something loaded in the inner loop that could be loaded in the outer one, or twice?
#
# ## 6. Measure yours
#
# The cells below run your file once it passes its checks, and the course's solution until then.

# %%
fa1 = lesson.answer(3, "fa1_tiled.py")
block_q, block_k = 64, 64
fa1_memory = Memory(sram_budget(block_q, block_k, d))
o, lse = fa1.forward(q[None, None], k[None, None], v[None, None], block_q=64, block_k=64, memory=fa1_memory)
print(f"largest difference to naive: {(o[0, 0] - naive_o).abs().max():.1e}\n")

print("tensor    loaded    stored   (bytes)")
for name in ("Q", "K", "V", "O", "l", "m"):
    print(f"{name:>3} {fa1_memory.loaded.get(name, 0):12,} {fa1_memory.stored.get(name, 0):9,}")
formula = 4 * fa1.fa1_hbm_elements(n, n, d, block_q, block_k)
print(f"\ncounted {fa1_memory.traffic_bytes:,} bytes, formula {formula:,}; naive {naive_memory.traffic_bytes:,}")

# %% [markdown]
# ### Traffic over the size of the on-chip memory
#
# The paper's figure, on the meter: the same head with several $M$. Dots are counted, lines are formulas. Blocks follow
# `block_sizes(M, d)`. $M$ pays for the four tiles only, as in the paper; the meter also gets room for S, P and
# temporaries (`sram_budget`).

# %%
n_small, d_small = 256, 32
small = torch.randn(3, 1, 1, n_small, d_small)
sizes = [1024, 2048, 4096, 8192, 16384]
counted = []
for sram_elements in sizes:
    b_r, b_c = fa1.block_sizes(sram_elements, d_small)
    meter = Memory(sram_budget(b_r, b_c, d_small))
    fa1.forward(*small, block_q=b_r, block_k=b_c, memory=meter)
    counted.append(meter.traffic_bytes)

meter = Memory(10**7)
naive_counted(*small[:, 0, 0], meter)
naive_bytes = meter.traffic_bytes

grid = np.geomspace(sizes[0], 4 * sizes[-1], 2000)  # fine enough to show the steps of ceil(N / B_c)
exact = [4 * fa1.fa1_hbm_elements(n_small, n_small, d_small, *fa1.block_sizes(int(m), d_small)) for m in grid]
theta = [4 * 12 * n_small**2 * d_small**2 / m for m in grid]
figure, ax = plt.subplots()
ax.loglog(grid, exact, color=lesson.COLOURS["fa1"], label="FA1, exact formula")
ax.loglog(sizes, counted, "o", color=lesson.COLOURS["fa1"], label="FA1, counted")
ax.loglog(grid, theta, ":", color="grey", label=r"$12 N^2 d^2 / M$")
ax.axhline(naive_bytes, color=lesson.COLOURS["naive"], label="naive, counted")
ax.axvline(3 * d_small**2, color="grey", linewidth=0.8)
ax.text(3 * d_small**2 * 1.05, 2.2 * max(exact) / 3, r"$M = 3 d^2$", color="grey")
ax.set_xlabel("on-chip memory M (numbers)")
ax.set_ylabel("HBM bytes of one head")
ax.set_title(f"N = {n_small}, d = {d_small}, float32")
ax.legend()
plt.show()

# %% [markdown]
# Left of the crossing, near $M = 3d^2$, FlashAttention-1 moves *more* than naive attention: with too little memory on
# chip, passing O in and out costs more than writing S. Right of it traffic falls like $1/M$ until one block holds all
# keys.
#
# ### "FlashAttention moves about ten times fewer bytes"
#
# You may have read that. It is not one number. Your predictions, and what the formula says:

# %%


def ratio(length, head_dim, sram_elements):
    """Naive bytes over FA1 bytes for one head, float32, exact formulas."""
    b_r, b_c = fa1.block_sizes(sram_elements, head_dim)
    return naive_hbm_bytes(length, length, head_dim, 4) / (4 * fa1.fa1_hbm_elements(length, length, head_dim, b_r, b_c))


for head_dim, guess in ((64, my_ratio_d64), (128, my_ratio_d128)):
    said = "no prediction written down" if guess is None else f"you predicted {guess:g}"
    print(f"d = {head_dim:3}, N = 4096, M = 25,600 numbers: naive / FA1 = {ratio(4096, head_dim, 25_600):.2f} ({said})")

lengths = [2**e for e in range(7, 15)]
figure, ax = plt.subplots()
for head_dim, marker in ((32, "^"), (64, "o"), (128, "s")):
    for sram_kb, style in ((100, "--"), (228, "-")):
        ratios = [ratio(x, head_dim, sram_kb * 256) for x in lengths]
        ax.plot(lengths, ratios, style, marker=marker, markersize=4, label=f"d = {head_dim}, SRAM {sram_kb} KB")
ax.axhline(1, color="black", linewidth=0.8)
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_ylim(0.4, 90)
ax.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
ax.set_xlabel("sequence length N")
ax.set_ylabel("naive bytes / FA1 bytes")
ax.set_title("How many times fewer bytes? It depends (float32, one head)")
ax.legend(fontsize=9, ncols=2, loc="upper left")
plt.show()

# %% [markdown]
# For large $N$ the ratio tends to $M / (3d^2 + 4d)$: it is set by how $M$ compares with $d^2$. With $d = 128$ and
# 100 KB it is *below one*. (A real kernel holds Q, K and V in 16 bits and O in registers, which shifts the curves; the
# Triton kernel below is counted with its own numbers. Chapter 4 changes the loop order and removes the O traffic.)
#
# ### "It needs O(N d) shared memory"
#
# HBM holds Q, K, V, O and two numbers a row: $O(Nd)$, no $N^2$. On chip there is a *constant* number of tiles:

# %%
print("   N    peak on chip (bytes)   tensors in HBM (bytes)   S alone would be (bytes)")
for length in (64, 128, 256, 512):
    x = torch.randn(3, 1, 1, length, 32)
    meter = Memory(sram_budget(32, 32, 32))
    fa1.forward(*x, block_q=32, block_k=32, memory=meter)
    print(f"{length:4} {meter.peak_sram_bytes:23,} {4 * (4 * length * 32 + 2 * length):24,} {4 * length**2:26,}")

# %% [markdown]
# ## 7. Triton in four cells
#
# CUDA makes you think in threads. [Triton](https://triton-lang.org) (Tillet, Kung and Cox, 2019) makes you think in
# *programs*, each of which works on whole blocks of numbers; the compiler spreads a block over threads. You launch a
# *grid* of programs, and each asks for its number.
#
# There may be no GPU here: then the same kernels run in Triton's interpreter, one program after the other. Import
# Triton from `fa_reference.triton_cpu`, which takes care of that.
#
# **Programs, blocks, masks.** A pointer plus a block of offsets is a block of addresses. Sizes of blocks are powers of
# two, so the end of a tensor needs a mask.

# %%
device = DEVICES[0]


@triton.jit
def double_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK  # which part is mine?
    offsets = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < length, other=0.0)  # nothing is read where the mask is False
    tl.store(y_ptr + offsets, 2 * x, mask=offsets < length)


x = torch.arange(10.0, device=device)
y = torch.zeros_like(x)
double_kernel[(triton.cdiv(10, 4),)](x, y, 10, BLOCK=4)  # a grid of 3 programs
print(y)

# %% [markdown]
# **A tile.** Two ranges, one as a column and one as a row, make a grid of offsets `row * stride + column`. The stride
# is how far apart rows are in memory; it need not be the width, so a transposed view works without a copy.

# %%
rows, columns, stride = np.arange(2, 6), np.arange(0, 8), 12
offsets = rows[:, None] * stride + columns[None, :]
figure, ax = plt.subplots(figsize=(9, 3.4))
for address in range(6 * stride):
    r, c = divmod(address, stride)
    inside = address in offsets
    masked = inside and r == 5
    colour = "#f3d9cb" if masked else "#56B4E9" if inside else "white"
    ax.add_patch(plt.Rectangle((c, 5 - r), 1, 1, facecolor=colour, edgecolor="grey", linewidth=0.6))
    ax.text(c + 0.5, 5.5 - r, str(address), ha="center", va="center", fontsize=8)
ax.set_xlim(0, stride)
ax.set_ylim(0, 6)
title = "rows 2..5, columns 0..7, stride 12: offsets = rows[:, None] * 12 + columns[None, :]\n"
title += "the tensor has 5 rows of 8: row 5 is masked, columns 8..11 belong to someone else"
ax.set_title(title, fontsize=10)
ax.axis("off")
plt.show()

# %% [markdown]
# **A product.** `tl.dot` multiplies two tiles on the tensor cores: 16-bit inputs, float32 sums.

# %%


@triton.jit
def tile_product_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i[:, None] * N + i[None, :])
    b = tl.load(b_ptr + i[:, None] * N + i[None, :])
    tl.store(c_ptr + i[:, None] * N + i[None, :], tl.dot(a, tl.trans(b)))  # like Q K^T


a, b = torch.randn(2, 32, 32, device=device).bfloat16()
c = torch.empty(32, 32, device=device)
tile_product_kernel[(1,)](a, b, c, N=32)
print("largest error:", (c - a.float() @ b.float().T).abs().max().item())

# %% [markdown]
# **A loop and reductions.** Loops are Python loops; `tl.max(x, axis=1)` and `tl.sum(x, axis=1)` reduce a tile. Here is
# chapter 2's online log-sum-exp of rows that are longer than a block. `exp2` is what the hardware has, so scores are
# multiplied by $\log_2 e$ first, and the result by $\ln 2$.

# %%


@triton.jit
def lse_kernel(x_ptr, lse_ptr, columns, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + rows[:, None] * stride + j[None, :], mask=j[None, :] < columns, other=float("-inf"))
        x *= 1.4426950408889634  # log2(e)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(x - m_new[:, None]), axis=1)
        m = m_new
    tl.store(lse_ptr + rows, (m + tl.log2(l)) * 0.6931471805599453)  # ln(2)


x = 30 * torch.randn(8, 100, device=device)
lse = torch.empty(8, device=device)
lse_kernel[(2,)](x, lse, 100, x.stride(0), ROWS=4, BLOCK=32)
print("largest error:", (lse - torch.logsumexp(x, 1)).abs().max().item())

# %% [markdown]
# **Masks in the scores, dtypes, constants, more axes.** `tl.where` chooses element by element; mask scores, not K
# (0 * -inf is NaN). `.to(dtype)` rounds. An `if` on a `tl.constexpr` is decided by the compiler. A grid may have up to
# three axes: `tl.program_id(1)` is the number along the second.

# %%


@triton.jit
def masked_kernel(s_ptr, y_ptr, columns, CAUSAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # the first axis of the grid: which rows
    j = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)  # the second: which columns
    inside = j[None, :] < columns
    S = tl.load(s_ptr + i[:, None] * columns + j[None, :], mask=inside, other=0.0)
    S = tl.where(j[None, :] < columns, S, float("-inf"))
    if CAUSAL:
        S = tl.where(j[None, :] <= i[:, None], S, float("-inf"))
    tl.store(y_ptr + i[:, None] * columns + j[None, :], S.to(y_ptr.dtype.element_ty), mask=inside)


s = torch.arange(24.0, device=device).reshape(4, 6)
y = torch.empty(4, 6, device=device, dtype=torch.bfloat16)
masked_kernel[(2, 2)](s, y, 6, CAUSAL=True, ROWS=2, WIDTH=4)  # 2 x 2 programs of 2 x 4 numbers
print(y)

# %% [markdown]
# ## 8. Exercise two: `fa1_triton.py`
#
# Write `fa1_kernel` in `chapters/03_fa1/fa1_triton.py`, and `launch_grid`: one program per (batch, head). The kernel is
# `fa1_head` with addresses: the same two loops, the same update. What is different:
#
# - Q, K, V are 16-bit; O between visits is a float32 buffer `acc` in HBM, l and m are float32. P is rounded to V's
#   dtype before `tl.dot`.
# - Tiles do not get shorter at the end: rows beyond $N_q$ and keys beyond $N_k$ are masked on loading, storing, *and*
#   in the scores (a key that was loaded as zeros would still have score 0, and $e^0 = 1$).
# - Query head `h` reads key head `h // group` (grouped-query attention).
# - Threads of a program run side by side: `tl.debug_barrier()` after the inner loop makes one pass's stores visible to
#   the next pass's loads.
# - Offsets of large tensors exceed 32 bits: `batch.to(tl.int64) * stride`.
#
# Without a GPU the interpreter forgives what the compiler refuses: `break`, and globals that are not `tl.constexpr`
# (that is why `LN_2` is declared so); one check therefore compiles your kernel for a Hopper GPU.
#
# `make check CHAPTER=3` again. When it fails:
# - **right for one block, wrong for two**: as before, the rescaling; or `k_start` is missing in an address.
# - **NaN in a padded layout**: something is read beyond the end; every load needs its mask.
# - **only later heads or batches wrong**: a stride, or `head // group`.
# - **right in fp16, wrong in bf16, or the other way**: something is rounded to a fixed dtype.
#
# ### "FlashAttention-1 computes in FP32 and hardly uses tensor cores"
#
# You may have read that, too. The matrix products take 16-bit inputs on tensor cores; float32 is for the sums and the
# softmax. No GPU is needed to see it: the compiler can be asked for the machine code of a GPU that is not there.

# %%
fa1_triton = lesson.answer(3, "fa1_triton.py")
kernel = compile_forward(fa1_triton.__file__, "sm_90")[0]  # an H100
products = {line.split()[0] for line in kernel.assembly.splitlines() if "wgmma.mma_async" in line}
print(f"{kernel.name}: {kernel.count('wgmma.mma_async')} tensor-core instructions of these kinds:")
print("\n".join(f"  {name}" for name in sorted(products)))
print("name = shape m x n x k, dtype of the sums, dtype of the two inputs")

# %%
q16, k16, v16 = torch.randn(3, 1, 2, 100, 64, device=device).bfloat16()
o16, lse16 = fa1_triton.forward(q16, k16, v16, causal=True)
want = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in (q16, k16, v16)), is_causal=True)
print(f"bf16, causal, N = 100: largest error against float64 {(o16 - want).abs().max():.1e}")

# %% [markdown]
# ## 9. What the GPU says
#
# Bytes first. Counted for the Triton kernel ($B_c = 2d$, 16-bit Q, K, V; O, l, m in float32) against naive attention
# with 16-bit scores (`explicit`), which moves at least $8 N^2$ bytes a head:

# %%
print("  d      N    naive (MB)   FA1 (MB)   ratio     (one head)")
for head_dim in (64, 128):
    for length in (1024, 4096, 16384):
        naive, tiled = (
            naive_hbm_bytes(length, length, head_dim, 2),
            fa1_hbm_bytes(length, length, head_dim, 2 * head_dim),
        )
        print(f"{head_dim:3} {length:6} {naive / 1e6:13.1f} {tiled / 1e6:10.1f} {naive / tiled:7.2f}")

profile = lesson.recorded("hbm_bytes")
if profile is None:
    print("\nHBM bytes measured on a GPU: not recorded yet.")
else:
    cell = profile["cells"][0]
    print(f"\nMeasured on {profile['provenance']['device']}, {profile['provenance']['date'][:10]}: {cell['name']}")
    heads = cell["batch"] * cell["heads_q"]
    print(f"{cell['batch']} x {cell['heads_q']} heads, so {heads} times the table; fa2_triton is chapter 4")
    for entry in cell["entries"]:
        if entry["name"] in ("explicit", "fa1_triton", "fa2_triton") and "measured_bytes" in entry:
            measured, asked = entry["measured_bytes"] / 1e9, entry["counted_bytes"] / 1e9
            print(f"  {entry['name']:12} {measured:8.3f} GB between L2 and HBM; counted {asked:8.3f} GB")

# %% [markdown]
# Fewer bytes. And the speed?

# %%
recorded_table(["explicit", "fa1_triton", "fa2_triton", "torch_fa2"], head_dim=64)
recorded_table(["explicit", "fa1_triton", "fa2_triton", "torch_fa2"], head_dim=128)

# %% [markdown]
# ### Where the speed goes
#
# One program per (batch, head). An H100 has 132 SMs, and so has the H200; a program runs on one of them. With 16 heads,
# 116 SMs watch. The paper's grid at long sequences is exactly this case ($d$ = 128; 32 programs for $d$ = 64): 16k
# tokens in all means batch 1 at $N = 16{,}384$. Go back to the table: as $N$ doubles, the number of programs halves.
# From which $N$ on does the speed halve, too, and how many programs are that?

# %%
sms = H100.sms
heads = np.arange(1, 3 * sms + 1)
busy = heads / (np.ceil(heads / sms) * sms)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1.5, 1])
left.plot(heads, busy, color=lesson.COLOURS["fa1"])
for b_h, label in ((16, "batch 1, 16 heads"), (32, "batch 1, 32 heads"), (128, "batch 4, 32 heads")):
    left.plot(b_h, b_h / (np.ceil(b_h / sms) * sms), "o", color="black")
    left.annotate(
        label, (b_h, b_h / (np.ceil(b_h / sms) * sms)), xytext=(8, -4), textcoords="offset points", fontsize=9
    )
left.set_xlabel("programs = batch x heads")
left.set_ylabel("fraction of SMs at work")
left.set_title("One program per head, one program on an SM at a time")
for sm in range(sms):
    y, x = divmod(sm, 12)
    right.add_patch(plt.Rectangle((x, -y), 0.9, 0.9, color=lesson.COLOURS["fa1"] if sm < 16 else "#e6e6e6"))
right.set_xlim(-0.2, 12.2)
right.set_ylim(-10.3, 1.2)
right.set_aspect("equal")
right.axis("off")
right.set_title(f"batch 1, 16 heads: 16 of {sms} SMs")
plt.show()

# %% [markdown]
# Two more costs are in the loop order itself: $O_i$ is divided by $l_i^{new}$ in *every* step, which is work that is
# not a matrix product, and O, l, m go out to HBM and back $T_c$ times.
#
# ## 10. What to add next
#
# - Could several programs share a head, without changing the loop order? Each would take some blocks of K and V, and
#   all would update the same $O_i$: who goes first? (This is what chapter 2's `merge` is for; decoding kernels do it.)
# - Could they share it if the *loops changed places*? Then every $O_i$ belongs to one program, which can keep it on
#   chip from start to end. That is chapter 4.
# - Causal attention computes blocks that are masked away in full. Which? Also chapter 4.
