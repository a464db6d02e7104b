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
# # Chapter 4: FlashAttention-2, or who does what
#
# FlashAttention-2 computes the same tiles as FlashAttention-1. It changes the order of the loops, what happens in the
# inner one, and how the work is given to the GPU:
#
# 1. **Q outside, K and V inside.** A block of O is finished by one program, on chip, and written once.
# 2. **Divide once.** O stays unnormalised until the end.
# 3. **Skip what is masked.** Blocks above the causal diagonal are not visited; only those on it are masked.
# 4. **Split over the sequence.** One program per block of queries, not per head.
#
# | file | what | where it runs |
# |---|---|---|
# | `chapters/04_fa2/fa2_tiled.py` | the paper's Algorithm 1 in Python, with every byte counted | CPU |
# | `chapters/04_fa2/fa2_triton.py` | the same in Triton | GPU, or Triton's interpreter on the CPU |
#
# The paper is [Dao, 2023](https://arxiv.org/abs/2307.08691). Notation as in chapter 3.

# %%
import ast
import difflib
import heapq
import inspect
from math import ceil

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fa_reference import lesson
from fa_reference.counts import H100, fa1_hbm_bytes, fa2_hbm_bytes, naive_hbm_bytes
from fa_reference.memory import Memory, sram_budget
from fa_reference.triton_cpu import DEVICES, TensorDescriptor, compile_forward, tl, triton

lesson.style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. Measure first: what FlashAttention-1 spends its bytes and its GPU on
#
# Chapter 3's algorithm on the meter: which tensors travel?

# %%
fa1 = lesson.answer(3, "fa1_tiled.py")
n, d, block_q, block_k = 512, 64, 64, 64
q, k, v = torch.randn(3, 1, 1, n, d)
fa1_memory = Memory(sram_budget(block_q, block_k, d))
o1, lse1 = fa1.forward(q, k, v, block_q=block_q, block_k=block_k, memory=fa1_memory)
for name in ("Q", "K", "V", "O", "l", "m"):
    moved = fa1_memory.loaded.get(name, 0) + fa1_memory.stored.get(name, 0)
    print(f"{name}: {moved:>9,} bytes  {moved / fa1_memory.traffic_bytes:6.1%}")

# %% [markdown]
# Three fifths are O, which goes out unfinished and comes back, $T_c$ times. And on a GPU, with one program per head,
# most SMs may have nothing to do:

# %%


def recorded_speed(columns, head_dim, causal, lengths=(2048, 4096, 8192, 16384)):
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
        if cell["len_q"] not in lengths:
            continue
        entries = [cell["results"].get(name, {}) for name in columns]
        texts = [f"{e['tflops']:.0f}" if "tflops" in e else e.get("status", "-") for e in entries]
        print(f"{cell['batch']:5} {cell['heads_q']:5} {cell['len_q']:6}  " + "".join(f"{t:>12}" for t in texts))


recorded_speed(["explicit", "fa1_triton", "torch_fa2"], head_dim=64, causal=False)

# %% [markdown]
# ## 2. The idea in a picture
#
# Turn the loops inside out. One row of tiles is one program, from left to right; $Q_i$ and $O_i$ stay on chip:

# %%


def draw_row(ax, t_r, t_c, i, j, causal):
    """Where Q, K, V and O are when the program of row block i is at key block j: blue tiles are on chip."""
    chip, hbm, seen, skipped = "#56B4E9", "#eeeeee", "#bcd9ea", "#f7f7f7"

    def box(x, y, w, h, colour, text=""):
        ax.add_patch(plt.Rectangle((x, y), w, h, facecolor=colour, edgecolor="black", linewidth=1))
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9)

    for row in range(t_r):
        y = t_r - 1 - row
        box(-2.2, y, 1.2, 1, chip if row == i else hbm, f"$Q_{row + 1}$")
        box(t_c + 1, y, 1.2, 1, chip if row == i else hbm, f"$O_{row + 1}$")
        for col in range(t_c):
            hidden = causal and col > row
            colour = chip if (row, col) == (i, j) else seen if row == i and col < j else "white"
            face = skipped if hidden else colour
            ax.add_patch(plt.Rectangle((col, y), 1, 1, facecolor=face, edgecolor="black", linestyle=":"))
            if hidden:
                ax.text(col + 0.5, y + 0.5, "skip", ha="center", va="center", fontsize=8, color="grey")
            else:
                ax.text(col + 0.5, y + 0.5, str(col + 1), ha="center", va="center", fontsize=9)
                if causal and col == row:
                    ax.plot([col, col + 1], [y + 1, y], color="#D55E00")
    for col in range(t_c):
        box(col, t_r + 1.7, 1, 0.9, chip if col == j else hbm, f"$K_{col + 1}$")
        box(col, t_r + 0.6, 1, 0.9, chip if col == j else hbm, f"$V_{col + 1}$")
    ax.set_xlim(-2.6, t_c + 2.6)
    ax.set_ylim(-0.3, t_r + 3)
    ax.set_aspect("equal")
    ax.axis("off")


figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
for ax, (i, j, causal) in zip(axes, [(1, 0, False), (1, 2, False), (2, 1, True)]):
    draw_row(ax, 4, 4, i, j, causal)
    ax.set_title(f"program {i + 1} at $j$ = {j + 1}" + (", causal" if causal else ""), fontsize=11)
figure.suptitle("FlashAttention-2: a row of tiles is one program; all rows can run at once")
plt.show()

# %% [markdown]
# No program waits for another and none writes what another reads. The price: K and V are read by every row block, $T_r$
# times instead of once. On a GPU the programs of one head run at about the same time, and the L2 cache (50 MB on an
# H100) serves most of these reads: K and V of one head are $2 N d$ numbers, 4 MB at $N = 16{,}384$, $d = 64$ in 16
# bits.
#
# ## 3. The algorithm
#
# **for** $i = 1 \dots T_r$ (in parallel): load $Q_i$; on chip $O_i = 0$, $l_i = 0$, $m_i = -\infty$
# <br>&emsp; **for** $j = 1 \dots T_c$, as far as row block $i$ sees keys: load $K_j$, $V_j$
#
# $$
# \begin{aligned}
# S_{ij} &= s\, Q_i K_j^T &&\text{masked only if the block is seen in part}\\
# m_i^{new} &= \max(m_i, \mathrm{rowmax}(S_{ij}))\\
# P_{ij} &= \exp(S_{ij} - m_i^{new})\\
# l_i &\leftarrow e^{m_i - m_i^{new}}\, l_i + \mathrm{rowsum}(P_{ij})\\
# O_i &\leftarrow \mathrm{diag}(e^{m_i - m_i^{new}})\, O_i + P_{ij} V_j &&\text{no division}
# \end{aligned}
# $$
#
# &emsp; $O_i \leftarrow \mathrm{diag}(l_i)^{-1} O_i$, $\; L_i = m_i + \log l_i$; store $O_i$ and $L_i$, once
#
# Why the division may wait: the unnormalised $O_i$ is $\sum_j e^{S_{ij} - m_i} V_j$ over the keys seen so far, and
# $l_i$ is the same sum without V. Both are corrected by the same factor when $m_i$ grows, so their quotient, taken once
# at the end, is the same.
#
# ### What the division costs
#
# Tensor cores do 989 TFLOP/s on an H100; everything else runs on ordinary units at 67 (data sheet, float32), so a FLOP
# outside a matrix product is about 15 times as expensive. Let us count how many numbers the two algorithms compute
# outside of matrix products. Torch tells us about every operation that it runs:

# %%


class CountElements(TorchDispatchMode):
    """Adds up how many numbers every elementwise operation and reduction works on; matrix products are left out."""

    ARITHMETIC = set("add mul div sub rsub exp log sum amax max maximum where eq masked_fill".split())

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.ARITHMETIC:
            results = result if isinstance(result, tuple | list) else (result,)  # max gives values and indices
            work = max(t.numel() for t in (*args, *results) if isinstance(t, torch.Tensor))
            self.elements[name] = self.elements.get(name, 0) + work
        return result


def count_elements(module, **blocks):
    """Numbers computed outside of matrix products, by operation."""
    memory = Memory(sram_budget(blocks["block_q"], blocks["block_k"], d))
    with CountElements() as counter:
        module.forward(q, k, v, memory=memory, **blocks)
    return counter.elements


fa2_solution = lesson.solution(4, "fa2_tiled.py")
work1 = count_elements(fa1, block_q=64, block_k=64)
work2 = count_elements(fa2_solution, block_q=64, block_k=64)
print("operation    FA1        FA2     (numbers, one head, N = 512, d = 64)")
for name in sorted(work1 | work2, key=lambda x: -work1.get(x, 0)):
    print(f"{name:10} {work1.get(name, 0):9,} {work2.get(name, 0):9,}")
print(
    f"{'sum':10} {sum(work1.values()):9,} {sum(work2.values()):9,}   ({sum(work2.values()) / sum(work1.values()):.0%})"
)

# %% [markdown]
# The division of all of O in every step is gone (in the Triton kernel one more multiplication goes: the scale is folded
# into the exponential). What remains is the softmax itself, and that will be chapter 8's subject.
#
# ## 4. Which blocks does a causal mask leave?
#
# Query $i$ sees key $j$ if $j \le i + N_k - N_q$ (aligned bottom-right: the last query sees all keys). A block of
# queries meets three kinds of blocks of keys: seen in full (no mask needed), seen in part (on the diagonal), not seen
# (skip).
#
# ### Your prediction
#
# $N_q = N_k = 4096$, $B_r = B_c = 64$, causal. What fraction of the $64 \times 64$ blocks must be visited, and what
# fraction of the *visited* ones needs a mask?

# %%
my_visited_fraction = None  # between 0 and 1
my_masked_fraction = None

# %% [markdown]
# ## 5. Exercise one: `fa2_tiled.py`
#
# Open `chapters/04_fa2/fa2_tiled.py`:
#
# | function | what |
# |---|---|
# | `key_blocks` | for one block of queries: how many blocks of keys need no mask, how many to visit |
# | `visited_blocks` | their number for a whole head |
# | `fa2_hbm_elements` | exact count of the numbers that move |
# | `fa2_head` | the algorithm above, through the meter |
#
#     make check CHAPTER=4
#     make hint CHAPTER=4
#
# When a check fails:
# - **`key_blocks`**: draw a $6 \times 8$ mask on paper. The *first* query of the block decides what is seen in full,
#   the *last* one what is seen at all. Both numbers of keys lie between 0 and $N_k$.
# - **NaN where a row has no keys**: a block of queries may visit nothing, and must still store O = 0 and L = $-\infty$.
# - **right with one block of keys, wrong with several**: `O_i` is rescaled by $e^{m_i - m_i^{new}}$ alone, not by
#   $l_i$.
# - **bytes too high**: O, l and m must not be loaded or stored in the inner loop; skipped blocks must not be loaded.
#
# ## 6. Measure yours
#
# ### Blocks

# %%
fa2 = lesson.answer(4, "fa2_tiled.py")


def block_map(len_q, len_k, block_q, block_k):
    """(T_r, T_c) matrix: 0 skipped, 1 masked, 2 seen in full, from key_blocks."""
    t_r, t_c = ceil(len_q / block_q), ceil(len_k / block_k)
    kinds = np.zeros((t_r, t_c))
    for row in range(t_r):
        stop = min((row + 1) * block_q, len_q)
        unmasked, visited = fa2.key_blocks(row * block_q, stop, len_q, len_k, block_k, True)
        kinds[row, :visited] = 1
        kinds[row, :unmasked] = 2
    return kinds


shapes = [(1024, 1024, 64, 64), (512, 1024, 64, 64), (1024, 512, 64, 64), (1024, 1024, 128, 32)]
figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.6), layout="constrained")
colours = plt.matplotlib.colors.ListedColormap(["#f2f2f2", "#E69F00", "#56B4E9"])
for ax, (len_q, len_k, b_r, b_c) in zip(axes, shapes):
    kinds = block_map(len_q, len_k, b_r, b_c)
    ax.imshow(kinds, cmap=colours, vmin=0, vmax=2, aspect=(b_r / b_c), interpolation="nearest")
    ax.set_title(
        f"{len_q} queries, {len_k} keys\n$B_r$ = {b_r}, $B_c$ = {b_c}: {np.mean(kinds > 0):.0%} visited", fontsize=9
    )
    ax.set_xlabel("block of keys")
    ax.grid(False)
    ax.yaxis.get_major_locator().set_params(integer=True)
axes[0].set_ylabel("block of queries")
figure.suptitle("blue: no mask; orange: masked; grey: skipped")
plt.show()

visited = fa2.visited_blocks(4096, 4096, 64, 64, True)
kinds = block_map(4096, 4096, 64, 64)


def said(guess):
    return "no prediction written down" if guess is None else f"you predicted {guess:.3f}"


print(f"N = 4096: {visited} of {kinds.size} blocks visited: {visited / kinds.size:.3f} ({said(my_visited_fraction)})")
masked = (kinds == 1).sum() / visited
print(f"of these, masked: {masked:.3f} ({said(my_masked_fraction)})")

# %% [markdown]
# $T(T+1)/2$ of $T^2$: a little over half. So a causal kernel can be almost twice as fast, *if* it skips; and all but
# one block in a row (for $B_r = B_c$) need no comparisons at all, if it has two loops.
#
# ### Bytes

# %%
fa2_memory = Memory(sram_budget(block_q, block_k, d))
o2, lse2 = fa2.forward(q, k, v, block_q=block_q, block_k=block_k, memory=fa2_memory)
print(f"largest difference to FlashAttention-1: {(o1 - o2).abs().max():.1e}\n")
print("tensor     FA1 (bytes)   FA2 (bytes)")
for name in ("Q", "K", "V", "O", "l", "m", "L"):
    both = [m.loaded.get(name, 0) + m.stored.get(name, 0) for m in (fa1_memory, fa2_memory)]
    print(f"{name:>3} {both[0]:16,} {both[1]:13,}")
formula = 4 * fa2.fa2_hbm_elements(n, n, d, block_q, block_k, False)
print(f"sum {fa1_memory.traffic_bytes:16,} {fa2_memory.traffic_bytes:13,}   (formula {formula:,})")

lengths = [2**e for e in range(9, 15)]
figure, ax = plt.subplots()
for label, colour, count in (
    ("naive, 16-bit S and P", "naive", lambda x: naive_hbm_bytes(x, x, 64, 2)),
    ("FA1, $B_c$ = 128", "fa1", lambda x: fa1_hbm_bytes(x, x, 64, 128)),
    ("FA2, $B_r$ = 64", "fa2", lambda x: fa2_hbm_bytes(x, x, 64, 64)),
    ("FA2, $B_r$ = 128", "torch_fa2", lambda x: fa2_hbm_bytes(x, x, 64, 128)),
):
    ax.loglog(lengths, [count(x) / 1e6 for x in lengths], "o-", color=lesson.COLOURS[colour], label=label)
ax.loglog(lengths, [(8 * x * 64 + 4 * x) / 1e6 for x in lengths], ":", color="grey", label="every matrix once")
ax.set_xlabel("sequence length N")
ax.set_ylabel("MB moved, one head")
ax.set_title("Bytes that each algorithm asks for (d = 64, 16-bit inputs)")
ax.legend()
plt.show()

# %% [markdown]
# FA2's bytes are mostly repeated reads of K and V, which L2 can serve; FA1's are mostly partial results, which are too
# many to stay there. A larger $B_r$ means fewer reads; registers set the limit, as $O_i$ lives there. What a GPU's
# counters say:

# %%
profile = lesson.recorded("hbm_bytes")
if profile is None:
    print("HBM bytes measured on a GPU: not recorded yet.")
else:
    cell = profile["cells"][0]
    print(f"{profile['provenance']['device']}, {profile['provenance']['date'][:10]}: {cell['name']}")
    for entry in cell["entries"]:
        if entry["name"] in ("fa1_triton", "fa2_triton") and "measured_bytes" in entry:
            asked, measured = entry["counted_bytes"] / 1e9, entry["measured_bytes"] / 1e9
            print(f"  {entry['name']:12} {asked:7.3f} GB asked for, {measured:7.3f} GB between L2 and HBM")

# %% [markdown]
# ### "FlashAttention-2 is limited to 8k tokens"
#
# You may have read that. Nothing in the algorithm depends on $N$: on chip there are always the same few tiles. One
# block of queries against 8k and against 64k keys:

# %%
for length in (8192, 65536):
    q_few, k_long, v_long = torch.randn(1, 1, 16, 32), *torch.randn(2, 1, 1, length, 32)
    meter = Memory(sram_budget(16, 256, 32))
    o_long, _ = fa2.forward(q_few, k_long, v_long, block_q=16, block_k=256, memory=meter)
    want = torch.softmax(q_few.double() @ k_long.double().mT * 32**-0.5, -1) @ v_long.double()
    print(f"{length:6} keys: peak on chip {meter.peak_sram_bytes:,} bytes, error {(o_long - want).abs().max():.1e}")

# %% [markdown]
# ## 7. Who does what: programs, SMs, and a queue
#
# FlashAttention-1 launches one program per head, FlashAttention-2 one per head and block of queries. 132 SMs, one
# program on each at a time (real SMs take two or three of these, which only raises the numbers that are needed):

# %%
cases = [(1, 1), (1, 8), (1, 16), (1, 32), (2, 32), (4, 32)]
sms, length, b_r = H100.sms, 8192, 64


def at_work(programs):
    """Fraction of SM time that is used if all programs take equally long."""
    return programs / (ceil(programs / sms) * sms)


figure, ax = plt.subplots()
places = np.arange(len(cases))
for offset, name, rows in ((-0.2, "fa1", 1), (0.2, "fa2", length // b_r)):
    heights = [at_work(b * h * rows) for b, h in cases]
    ax.bar(
        places + offset,
        heights,
        0.38,
        color=lesson.COLOURS[name],
        label=f"{name.upper()}: {rows} program{'s' * (rows > 1)} a head",
    )
    for place, height, (b, h) in zip(places, heights, cases):
        ax.text(place + offset, height + 0.02, f"{b * h * rows}", ha="center", fontsize=8)
ax.set_xticks(places, [f"{b} x {h}" for b, h in cases])
ax.set_ylim(0, 1.25)
ax.set_xlabel("batch x heads")
ax.set_ylabel("fraction of SMs at work")
ax.set_title(f"N = {length}, $B_r$ = {b_r}; number of programs above each bar")
ax.legend(loc="upper left", ncols=2)
plt.show()

# %% [markdown]
# With a causal mask the programs are not equally long: the last block of queries sees 128 blocks of keys, the
# first sees 1. Programs start in the order of their numbers, each on the next SM that is free. What if the long ones
# come last?

# %%


def schedule(durations, workers):
    """Time at which the last program ends, if each starts on the worker that is free first."""
    free = [0.0] * workers
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


print("batch x heads    ideal   short first   long first    (time, in blocks of keys)")
for b_h in (4, 8, 16, 32):
    row = np.arange(1, length // b_r + 1)
    short_first = np.repeat(row, b_h)
    ideal = short_first.sum() / sms
    print(f"{b_h:8} {ideal:13.0f} {schedule(short_first, sms):12.0f} {schedule(short_first[::-1], sms):12.0f}")

# %% [markdown]
# Long programs first: that is one line in the kernel (`block = last - program_id`), and heads on axis 0 of the grid.
#
# ### GQA
#
# In grouped-query attention several query heads share a K and V head. The kernel needs nothing but `head // group` in
# an address; repeating K and V to the number of query heads would multiply what must be stored and read. For one layer
# of Llama-3-8B (32 query heads, 8 key heads, $d$ = 128) at 8,192 tokens in 16 bits:

# %%
for heads in (32, 8):
    print(f"K and V with {heads:2} heads: {2 * heads * 8192 * 128 * 2 / 2**20:5.0f} MiB")

# %% [markdown]
# ## 8. Tiles by descriptor
#
# Chapter 3 spelled out every address. For a whole tile, a *tensor descriptor* says it once: base, shape, strides, and
# the shape of a tile. `load` takes the tile's first coordinates, and elements beyond the ends come as zeros. Hopper has
# an engine for this, the Tensor Memory Accelerator (TMA): one thread asks, the engine copies. Elsewhere Triton turns a
# descriptor into pointers and masks.

# %%
device = DEVICES[0]


@triton.jit
def tile_kernel(x_desc, y_ptr, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile = x_desc.load([0, row, 0]).reshape(ROWS, COLUMNS)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(y_ptr + i[:, None] * COLUMNS + j[None, :], tile)


x = torch.arange(2 * 5 * 8, device=device).reshape(2, 5, 8).half()
y = torch.empty(4, 8, device=device).half()
tile_kernel[(1,)](TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 4, 8]), y, 3, ROWS=4, COLUMNS=8)
print(y)  # rows 3 and 4 of x[0], then zeros

# %% [markdown]
# ## 9. Exercise two: `fa2_triton.py`
#
# Write `visit_blocks` (the inner loop, compiled twice: with and without a mask), `fa2_kernel` (which block and head,
# which keys, two calls of `visit_blocks`, division, stores) and `launch_grid`. Descriptors and block sizes are given.
#
# - `MASKED` is a `tl.constexpr`: an `if` on it is decided by the compiler, so the unmasked loop has no trace of a mask.
# - The tail is a mask, too: the last block of keys may reach beyond $N_k$. Zeros from the descriptor are not enough: a
#   key of zeros has score 0, and $e^0 = 1$. Here the tail needs a mask, so `unmasked` counts only whole blocks, unlike
#   in `key_blocks`.
# - `tl.dot(P, V, O_i)` adds to `O_i` in the tensor cores: the addition costs nothing.
# - Offsets of large tensors exceed 32 bits: `batch.to(tl.int64) * stride`.
#
# `make check CHAPTER=4`. When it fails:
# - **wrong in the last block of rows only**: rows beyond $N_q$ must not be stored.
# - **right without a mask, wrong with one**: which keys are `unmasked`? All rows of the block must see them.
# - **NaN only if causal and $N_q > N_k$**: the first rows see no key at all: guard the maximum in the masked loop.
# - **GQA**: `head // group` for K and V, `head` for Q, O and lse.

# %%
fa2_triton = lesson.answer(4, "fa2_triton.py")
q16, k16, v16 = (torch.randn(1, h, 100, 64, device=device).bfloat16() for h in (4, 2, 2))
o16, lse16 = fa2_triton.forward(q16, k16, v16, causal=True)
repeated = (t.double().repeat_interleave(2, dim=1) for t in (k16, v16))
want = torch.nn.functional.scaled_dot_product_attention(q16.double(), *repeated, is_causal=True)
print(f"bf16, GQA 4/2, causal, N = 100: largest error against float64 {(o16 - want).abs().max():.1e}")

# %% [markdown]
# ### One source, two vendors
#
# The kernel names no hardware. For an H100 the compiler turns `tl.dot` into `wgmma` and descriptor loads into TMA
# copies; for AMD's MI300X (gfx942) the same file becomes `mfma` matrix instructions and ordinary loads. No GPU is
# needed to see it:

# %%
for target, card in (("sm_90", "H100"), ("gfx942", "MI300X")):
    kernel = compile_forward(fa2_triton.__file__, target)[0]
    names = {
        "wgmma": "wgmma.mma_async",
        "TMA copies": r"cp\.async\.bulk\.tensor",
        "mfma": "v_mfma",
        "exp2": r"ex2\.approx|v_exp_f32",
    }
    counts = ", ".join(f"{name} {kernel.count(pattern)}" for name, pattern in names.items() if kernel.count(pattern))
    registers = "" if kernel.registers is None else f"; {kernel.registers} registers a thread"
    print(f"{card:7} ({target}): {counts}; {kernel.shared_bytes:,} bytes of shared memory{registers}")

# %% [markdown]
# (Compiled, not run: this course has no AMD card. Before Hopper the descriptors become pointers, which is correct but
# not tuned; the block sizes in the file were chosen by timing a few dozen on one H200.)
#
# ## 10. What the GPU says

# %%
columns = ["explicit", "fa1_triton", "fa2_triton", "torch_fa2", "cudnn"]
for head_dim in (64, 128):
    for causal in (False, True):
        recorded_speed(columns, head_dim, causal)
        print()

# %% [markdown]
# Read the table against three things that are often said:
#
# - *"FlashAttention-1 was slow because it did not use tensor cores."* Both kernels use the same instructions (chapter 3
#   counted them). What changed from `fa1_triton` to `fa2_triton` is the order of loops and who does what,
#   and that tiles now come by TMA.
# - *"FlashAttention-2 reaches 500 to 600 TFLOP/s on an H100."* The column `torch_fa2` is that code, written for the
#   A100: compare it with the card's 989. The Triton kernel is the same algorithm, but its compiler emits Hopper's
#   `wgmma` and TMA. An algorithm has no TFLOP/s; a kernel on a card has.
# - *"Causal attention costs half."* Half the FLOPs; the TFLOP/s above already count only those. Ends of rows and masks
#   make up the difference.
#
# What the ratio is, if it was recorded:

# %%
record = lesson.recorded("forward", ["fa2_triton", "torch_fa2"])
if record is None:
    print("Not recorded yet.")
else:
    pairs = []
    for cell in record["cells"]:
        mine, theirs = (cell["results"].get(name, {}).get("median_ms") for name in ("fa2_triton", "torch_fa2"))
        if mine and theirs and cell["group"] == "paper" and cell["len_q"] >= 2048:
            pairs.append((theirs / mine, cell["name"]))
    for ratio, name in (min(pairs), max(pairs)) if pairs else ():
        print(f"fa2_triton is {ratio:.2f} times as fast as torch's FA2 backend on {name}")
    print(f"over {len(pairs)} shapes with N >= 2048, on {record['provenance']['device']}")

# %% [markdown]
# ## 11. The diff (read on when your checks pass)
#
# The whole step from chapter 3 to chapter 4, in the course's Python versions, without comments:

# %%


def code_lines(function):
    """A function's code without docstring and comments."""
    tree = ast.parse(inspect.getsource(function))
    tree.body[0].body = [x for x in tree.body[0].body if not isinstance(x, ast.Expr) or isinstance(x.value, ast.Call)]
    return ast.unparse(tree).splitlines()[1:]


fa1_solution = lesson.solution(3, "fa1_tiled.py")
before, after = code_lines(fa1_solution.fa1_head), code_lines(fa2_solution.fa2_head)
print(
    "\n".join(line for line in difflib.unified_diff(before, after, lineterm="", n=1) if line[:3] not in ("---", "+++"))
)

# %% [markdown]
# And the arithmetic of the two Triton kernels, from the scores to the new O:

# %%


def arithmetic(number, file, kernel):
    """The kernel's lines between the scores and the new O, without comments and indentation."""
    lines = [x.strip() for x in inspect.getsource(getattr(lesson.solution(number, file), kernel).fn).splitlines()]
    start = next(i for i, x in enumerate(lines) if x.startswith("S_ij = tl.dot"))
    stop = max(i for i, x in enumerate(lines) if x.startswith("O_i = "))
    return [x for x in lines[start : stop + 1] if x and not x.startswith(("#", "tl.store", "acc"))]


step1 = arithmetic(3, "fa1_triton.py", "fa1_kernel")
step1 = step1[: next(i for i, x in enumerate(step1) if x.startswith("O_i = O_i /")) + 1]
step2 = arithmetic(4, "fa2_triton.py", "visit_blocks")
print(
    "\n".join(
        line for line in difflib.unified_diff(step1, step2, lineterm="", n=0) if line[:2] not in ("--", "++", "@@")
    )
)

# %% [markdown]
# ## 12. What to add next
#
# - **Decoding.** With one query row there is one block of queries, and one program a head again. Split the *keys* over
#   programs and merge the partial results with chapter 2's `merge`.
# - **Persistent programs.** Launch one program per SM and let it fetch blocks from a list: the end of one block can
#   then overlap the start of the next.
# - **What the compiler hides.** Which thread holds which element of $S_{ij}$? How do tiles get to shared memory?
#   Chapter 5 writes this kernel in CUDA, from a scalar loop to tensor cores, and chapter 6 takes Hopper's engines by
#   hand.
