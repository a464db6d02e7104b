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
# # Chapter 6: Hopper's engines
#
# In chapter 5 every thread worked for every byte: it computed addresses, copied 16 bytes at a time, loaded fragments,
# multiplied them. A Hopper SM (H100, H200) has two engines that take this off its hands:
#
# - **TMA**, the copy engine: one thread asks for a whole tile of a tensor, and gets on with its work.
# - **wgmma**, the matrix engine: 128 threads start a product of tiles in shared memory, and get on with theirs.
#
# Both are *asynchronous*: an instruction only starts something. You must know when it is over, and that is what
# *mbarriers*, fences and waits are for. You write the wrappers of all of them yourself, then use them:
#
# | step | file | what |
# |---|---|---|
# | first | `schedule.py` | the whole kernel in Python, on a model of an SM that catches every forgotten wait |
# | a | `tma_engine.cuh`, `tma_tile.cu` | mbarrier and TMA: load tiles, find every element |
# | b | `wgmma_engine.cuh`, `wgmma_tile.cu` | descriptors and products: one tile of $QK^T$, one of $PV$ |
# | a, b | `layouts.py` | swizzle (a), descriptors and fragments (b): pure functions, graded exactly on any machine |
# | c | `attention.cu` | attention by one warpgroup |
#
# The host's side (`engines.py`, `attention.py`) is given. `attention.cu` includes the course's wrappers from
# `cuda/hopper/`, and so do the chapters after this one: they are the ones that you write here, for every size. Do not
# open its `mbarrier.cuh`, `tma.cuh` and `wgmma.cuh` before step (c). `make check CHAPTER=6 ONLY=layouts.py` checks one
# file alone.

# %%
import json
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

from fa_reference import lesson_hopper as hopper
from fa_reference.course import ROOT, chapter
from fa_reference.hopper import SM, RuleBroken, run_attention
from fa_reference.hopper.predict import simulate
from fa_reference.inputs import Case
from fa_reference.kernels import KernelDeadlock, LoadedKernel, count_instructions
from fa_reference.lesson import COLOURS, answer, difference, recorded, solution, style

style()
schedule = answer(6, "schedule.py")
layouts = answer(6, "layouts.py")
host = solution(6, "attention.py")
SOFT = ["#cfe3f3", "#f8dfc3", "#cdebdd", "#f0d3e4", "#fbf3c4", "#dcd6f0", "#d9d9d9", "#f6cfc7"]

# %% [markdown]
# ## First: the whole kernel, on a model of an SM
#
# Asynchronous code goes wrong in ways that a GPU does not tell you about. Read a tile a moment before it has arrived,
# and the result is wrong, sometimes. Wait for a phase that never completes, and the card hangs without a word. So first
# you write the *schedule* of the kernel in Python: what is started when, who waits for what. It runs on
# `fa_reference.hopper`, a model of one SM that has the instructions you will use, under their own names. The model
#
# - computes real numbers, so the result is judged like any other;
# - keeps time: every unit (tensor cores, exponentials, FP32, TMA) works at its rate;
# - knows, for every warpgroup, *what it has been told is over*. Using a tile that one was not told about is an error,
#   even if by luck it has arrived.
#
# A kernel is one `async` function for each warpgroup. Every instruction is awaited; those with `wait` or `sync` in
# their name block, the others only start something. Here a warpgroup loads a tile $X$ and computes $S = X X^T$:


# %%
async def square(wg, X, tile, full, forget=""):
    await wg.mbarrier_arrive_expect_tx(full, tile.bytes)  # one arrival, and so many bytes will come
    await wg.tma_load(tile, X, 0, full)  # started; returns at once
    if forget != "mbarrier_wait":
        await wg.mbarrier_wait(full, 0)  # until phase 0 is complete: the tile is there
    S = wg.accumulator(64)  # 64 x 64 in registers
    await wg.wgmma_fence()
    await wg.wgmma(S, tile, tile, scale_d=False)  # started
    await wg.wgmma_commit_group()
    if forget != "wait_group":
        await wg.wgmma_wait_group(0)  # until no group is in flight: S is there
    S.row_max()


def run_square(forget=""):
    sm = SM()
    X = sm.gmem("X", torch.randn(64, 64).half().float().numpy(), "float16")
    tile, full = sm.smem("tile", (64, 64), "float16"), sm.mbarrier("full", count=1)
    return sm.run({"warpgroup": partial(square, X=X, tile=tile, full=full, forget=forget)})


print(run_square().table())

# %% [markdown]
# Leave out a wait, and the model says who did what, and which rule that breaks:

# %%
for forget in ("mbarrier_wait", "wait_group"):
    try:
        run_square(forget)
    except RuleBroken as error:
        print(f"without {forget}:\n{error}\n")

# %% [markdown]
# On the GPU neither would be reported. The first reads what was in shared memory before, the second takes the maximum
# of registers that the tensor cores have not written yet.
#
# ### Attention by one warpgroup
#
# One tile of Q, one of K, one of V; one mbarrier for each. Block $j$ completes phase $j$ of `K_full` and of `V_full`,
# so the parity to wait for is $j \bmod 2$. The tiles are used again for every block, and that is the crux: **a load may
# overwrite a tile as soon as the product that reads it is over, and not before.** The next K can thus be loaded while
# the warpgroup is in its softmax, though there is only one tile for it.

# %%
case = Case(len_q=64, len_k=8 * 128, head_dim=128, dtype="bfloat16")
report = run_attention(schedule, *case.make()).report
display(report.plot(start=0.45 * report.cycles, stop=0.8 * report.cycles))

# %% [markdown]
# The upper row is the warpgroup: light grey where it waits, dark grey where it issues products, orange where it
# computes. Below it are the units. Numbers are blocks.
#
# **Predict.** In how many percent of the cycles do the tensor cores work? While they do, what does the warpgroup do?

# %%
my_prediction_tensor_cores = None  # your number, in percent
print(report.table())

# %% [markdown]
# The loads hide behind softmax and products, but softmax and products do not hide behind each other: one warpgroup does
# one thing at a time. A second block of threads on the same SM, with a schedule of its own, fills part of the gaps;
# chapters 7 to 9 fill them on purpose.
#
# **Exercise: `schedule.py`.** Write `load`, `store` and `attention`. `make check CHAPTER=6 ONLY=schedule` runs them on
# lengths that fill no block, under masks, and 200 times with random latencies, in which a load may take eight times as
# long as usual: a schedule that is right only by luck meets a run without it. The figure above is then yours.
#
# **When it fails.** The exception names the warpgroup, the iteration, the buffer, the rule, and what is likely.
# *ReadTooEarly*: a wait at a barrier is missing. *OverwriteInUse*: a load is issued before the product that reads the
# tile is known to be over. On a GPU, where the copy takes longer than what is left of the product, such a kernel passes
# its tests, until one day it does not. *WrongParity*: phase n has parity n mod 2. *RegistersInFlight*: an
# accumulator is used before the wait that covers it. *Deadlock*: who waits for what, since when, and who has not come.
#
# The latencies and rates of the model are in `fa_reference/hopper/timing.py`, with their sources; what it leaves out is
# listed in `fa_reference/hopper/__init__.py`.
#
# ## Step (a): TMA and the mbarrier that counts bytes
#
# **What TMA needs to know.** The host describes the tensor once, in 128 bytes: sizes, strides, and the box that one
# load brings (`cuTensorMapEncodeTiled`; the descriptor goes to the kernel as a parameter). A load then only names the
# corner of a box. The engine computes addresses, fills what lies outside the tensor with zeros, and stores the box to
# shared memory.
#
# A box may be 128 bytes wide, 64 numbers of 16 bits, if it is to be swizzled over 128 bytes. So a tile of
# `rows` x 128 numbers is a box of `rows` x 64 x 2, with the halves of a row in a dimension of their own.

# %%
q = torch.empty(2, 300, 16, 128, dtype=torch.bfloat16).transpose(1, 2)  # (B, H, N, d), stored as (B, N, H, d)
sizes, strides, box = layouts.tma_view(tuple(q.shape), q.stride(), 64)
names = ("columns of a block", "rows (N)", "blocks of 64 columns", "heads", "batch")
lines = ["| dimension | size | bytes to the next | box |", "|---|---|---|---|"]
for name, size, stride, part in zip(names, sizes, (2, *strides), box, strict=True):
    lines.append(f"| {name} | {size} | {stride} | {part} |")
display(Markdown(f"Q of shape {tuple(q.shape)}, strides {q.stride()}, as TMA sees it:\n\n" + "\n".join(lines)))

# %% [markdown]
# Rows past the end of a head come as zeros, not as the next head's first rows: that is what heads and batch being
# dimensions of their own buys. Loads need no code for ragged lengths.
#
# **Predict.** `fa2.cu` copies a tile of K with `cp.async`, 16 bytes an instruction and thread. How many instructions do
# its 128 threads issue together for a tile of 128 keys at d 128? How many does `attention.cu`?

# %%
my_prediction_copies = None  # your number
print(f"cp.async: {128 * 128 * 2 // 16} times 16 bytes; TMA: 1 instruction, issued by 1 thread")

# %% [markdown]
# ### When has it arrived? The mbarrier
#
# An *mbarrier* is eight bytes in shared memory that count two things down: *arrivals* of threads, and *bytes* that TMA
# still has to deliver. When both are zero the phase is over, and the next begins by itself. Phases are numbered 0, 1,
# 2, ...; a waiter names the one it waits for by its *parity*, 0 or 1.
#
# A model of it in a few lines, and what happens to it when two tiles come one after the other:

# %%


class Barrier:
    """What an mbarrier counts."""

    def __init__(self, arrivals):
        self.arrivals, self.pending, self.bytes, self.phase = arrivals, arrivals, 0, 0

    def arrive_expect_tx(self, announced):
        self.bytes += announced
        self.pending -= 1
        self._turn()

    def complete_tx(self, delivered):  # TMA does this
        self.bytes -= delivered
        self._turn()

    def try_wait(self, parity):
        """True once the phase of this parity is over: the current phase has the other parity."""
        return self.phase % 2 != parity

    def _turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals


barrier, lines = (
    Barrier(arrivals=1),
    ["| event | arrivals | bytes | phase | wait(0) | wait(1) |", "|---|---|---|---|---|---|"],
)


def note(event):
    waits = " | ".join("passes" if barrier.try_wait(parity) else "blocks" for parity in (0, 1))
    lines.append(f"| {event} | {barrier.pending} | {barrier.bytes} | {barrier.phase} | {waits} |")


note("init(1)")
for tile in (0, 1):
    barrier.arrive_expect_tx(16384)
    note(f"tile {tile}: arrive.expect_tx(16384)")
    barrier.complete_tx(8192)
    note("TMA delivers 8192 bytes")
    barrier.complete_tx(8192)
    note("TMA delivers 8192 bytes")
display(Markdown("\n".join(lines)))

# %% [markdown]
# Read the two last columns. On a fresh barrier wait(1) passes: "the phase before the first" counts as over. (Chapter 7
# makes use of that.) Tile n is phase n, so its reader waits for parity n mod 2. A reader that always waits for parity 0
# passes at once for tile 1, and reads tile 0 again, or half of each. A waiter must never fall two phases behind.
#
# **Announce before you arrive.** If the bytes were announced after the arrival, the phase could end before a byte has
# come. The instruction `mbarrier.arrive.expect_tx` does both in the right order. That it stands before the load, too,
# is a good habit and no more: until the arrival the phase cannot end, whatever has been delivered. Zeros that fill what
# is outside the tensor count as bytes, so the number is always that of the whole box.
#
# ### What each instruction guarantees
#
# | wrapper | guarantee | PTX ISA |
# |---|---|---|
# | `mbarrier_init` | counts are set; nobody else knows yet | mbarrier.init |
# | `mbarrier_init_fence` | TMA, on its own path to memory (the *async proxy*), sees the barrier | fence.mbarrier_init |
# | `mbarrier_arrive_expect_tx` | bytes are announced, then one arrival counted | mbarrier.arrive |
# | `tma_load_5d` | nothing but that the load will happen, and report its bytes to the barrier | cp.async.bulk.tensor |
# | `mbarrier_wait` | what TMA wrote in that phase is visible to this thread | mbarrier.try_wait |
# | `__syncthreads` after reading | all threads have read the slot: TMA may overwrite it | bar.sync |
#
# ### Where is it? The swizzle
#
# Chapter 5 moved 16-byte chunks around inside a row, by exclusive or with the row, so that eight rows of one chunk lie
# in different banks. TMA does the same on its way in. Hopper's version is defined on the address: bits 7 to 9 are added
# to bits 4 to 6, without carry. As a row of a block is 128 bytes and tiles start at multiples of 1024, that is
# `chunk ^ (row % 8)` again.

# %%
fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.6))
rows = 8
for axis, title in ((axes[0], "the tile: 8 rows, 128 columns"), (axes[1], "in shared memory, 128 bytes a line")):
    for row in range(rows):
        for chunk in range(16):
            offset = layouts.tile_offset(row, 8 * chunk, rows)
            x, y = (chunk, row) if axis is axes[0] else (offset % 128 // 16, offset // 128)
            strong = chunk in (2, 10)
            colour = ("#0072B2" if chunk == 2 else "#D55E00") if strong else SOFT[0 if chunk < 8 else 1]
            axis.add_patch(plt.Rectangle((x, y), 1, 1, fc=colour, ec="white"))
            text = f"{row}.{chunk}"
            axis.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color="white" if strong else "black"
            )
    axis.set(title=title, xlim=(0, 16 if axis is axes[0] else 8), ylim=(8 if axis is axes[0] else 16, 0))
    axis.grid(False)
axes[0].set(xlabel="chunk of 8 columns", ylabel="row", yticks=np.arange(8) + 0.5, yticklabels=range(8))
axes[0].set_xticks(np.arange(16) + 0.5, range(16))
axes[1].set_xticks(np.arange(8) + 0.5, [f"{4 * i}-{4 * i + 3}" for i in range(8)], fontsize=8)
axes[1].set(xlabel="banks", ylabel="line of 128 bytes", yticks=np.arange(16) + 0.5, yticklabels=range(16))
fig.suptitle("row.chunk; chunks 2 and 10 stand out: one column of chunks, in eight different places", fontsize=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# **Exercise.** `tma_view`, `swizzle` and `tile_offset` in `layouts.py`; the wrappers in `tma_engine.cuh`; then
# `tma_tile.cu`, which copies a tensor through one slot in shared memory and takes every tile apart with your formula.
# An asm statement reads
#
# `asm volatile("text with %0, %1" : outputs : inputs : "memory");`
#
# where the operands are numbered in the order in which they are listed, outputs first.
#
# **When it fails.** Compile errors out of the assembler name your line, too. *KernelDeadlock*: the barrier waits for
# bytes that nobody sends (a wrong number), or for a phase that nobody completes. First tile right, the others wrong:
# the parity, or no `__syncthreads` before the next load. Elements in the right row and the wrong place: the swizzle, or
# the block of 64 columns.
#
# The debug build runs first: its waits end after a second and the kernel writes down who waited for what. An invented
# record shows what you would read:

# %%


class Example(LoadedKernel):
    """A kernel whose record of a deadlock is made up."""

    def __init__(self):
        self.name = "attention"

    def read_global(self, name, count):
        return [1, 17, 70, 1, 0, 2]  # happened, block, thread, barrier, parity, iteration


try:
    Example().check_deadlock(host.KERNEL.barriers)
except KernelDeadlock as sentence:
    print(sentence)

# %% [markdown]
# ## Step (b): wgmma
#
# `mma.sync` multiplied what a warp held in registers. `wgmma` is started by a *warpgroup*, four warps whose first one
# has a number divisible by four, and computes D (64, N) += A (64, 16) B (16, N) with N up to 256. B is always read out
# of shared memory by the engine itself, A too, or out of registers; D stays in the warpgroup's registers. No
# `ldmatrix`: the engine needs to be told what the tile looks like.
#
# ### The descriptor
#
# An operand in shared memory is described by one 64-bit number. All tiles of this course use the 128-byte swizzle,
# whose unit is 8 lines of 128 bytes. Two distances say how units are put together.

# %%
FIELDS = (
    (0, 14, "address / 16"),
    (16, 14, "leading offset / 16"),
    (32, 14, "stride offset / 16"),
    (49, 3, "base\noffset"),
    (62, 2, "swiz-\nzle"),
)
value = layouts.mn_major_descriptor(0x8400, 128, 3)  # V: 128 keys, d 128, the fourth step of 16 keys
fig, axis = plt.subplots(figsize=(10, 1.7))
axis.add_patch(plt.Rectangle((0, 0), 64, 1, fc="#eeeeee", ec="white"))
for place, (low, width, name) in enumerate(FIELDS):
    number = value >> low & (1 << width) - 1
    axis.add_patch(plt.Rectangle((low, 0), width, 1, fc=SOFT[place], ec="black", lw=0.8))
    axis.text(low + width / 2, 0.66, name, ha="center", va="center", fontsize=8)
    axis.text(low + width / 2, 0.2, f"{number}", ha="center", va="center", fontsize=9, weight="bold")
axis.set(xlim=(64, 0), ylim=(0, 1), yticks=[], xlabel="bits")
axis.set_xticks([low + width / 2 for low, width, _ in FIELDS], [f"{low + width - 1}-{low}" for low, width, _ in FIELDS])
axis.grid(False)
axis.set_title(f"{value:#018x}: V at 0x8400, 128 keys, keys 48 to 63", fontsize=10)
plt.show()

# %% [markdown]
# **K-major** is how Q and K are read for $QK^T$: neighbours in memory are neighbours along the summed dimension. A step
# of 16 columns is 32 bytes of every line. **MN-major** is how V is read for $PV$: the summed dimension are the keys,
# which go from line to line, and a step is 16 whole lines, in every block of 64 columns. It is the same tile in memory,
# as TMA delivered it; only the reading differs. (`mma.sync` needed `ldmatrix.trans` for this.)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10.5, 6))
for axis, rows, title, step_of in (
    (axes[0], 16, "K-major: 16 rows of K, 8 steps of 16 columns", lambda row, column: column // 16),
    (axes[1], 32, "MN-major: 32 rows of V, 2 steps of 16 keys", lambda row, column: row // 16),
):
    picture = np.zeros((2 * rows, 8))
    for row in range(rows):
        for column in range(0, 128, 8):
            offset = layouts.tile_offset(row, column, rows)
            picture[offset // 128, offset % 128 // 16] = step_of(row, column)
    axis.imshow(picture, cmap=plt.matplotlib.colors.ListedColormap(SOFT), vmin=0, vmax=7, aspect="auto")
    for (y, x), step in np.ndenumerate(picture):
        if rows == 16 or y % 2:
            axis.text(x, y, int(step), ha="center", va="center", fontsize=6.5)
    axis.axhline(rows - 0.5, color="black", lw=2)
    axis.set(title=title, xlabel="chunk of 16 bytes in the line", ylabel="line of 128 bytes")
    axis.title.set_fontsize(11)
    axis.grid(False)
fig.suptitle("tiles of 128 columns in shared memory; number and colour: the step that reads the chunk", fontsize=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# The line across is where the second block of 64 columns begins. Left: a K-major operand jumps there after four steps.
# Right: an MN-major operand finds it at the *leading* offset. In both, the next eight lines are at the *stride* offset,
# 1024 bytes. The swizzle is no concern of yours when you move a descriptor on: add 32 bytes to the address, and the
# hardware applies the same exclusive or to what comes out.

# %%
lines = ["| operand | step | address | leading | stride |", "|---|---|---|---|---|"]
for name, make, steps in (("K", layouts.k_major_descriptor, 8), ("V", layouts.mn_major_descriptor, 8)):
    for step in range(steps):
        value = make(0x8400, 128, step)
        parts = [(value >> low & 0x3FFF) * 16 for low in (0, 16, 32)]
        leading = parts[1] if name == "V" else "(not used)"
        lines.append(f"| {name} | {step} | 0x8400 + {parts[0] - 0x8400} | {leading} | {parts[2]} |")
display(Markdown("128 keys, d 128, tile at 0x8400, in bytes:\n\n" + "\n".join(lines)))

# %% [markdown]
# ### Fragments: who holds what
#
# D's registers are chapter 5's, warp by warp: each of the four warps has 16 of the 64 rows, and every four registers
# are the next eight columns. A quad still shares a row.

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 5.2), width_ratios=(0.8, 1.5, 1.5))
warps = np.zeros((64, 16))
for thread in range(128):
    for register in range(8):
        warps[layouts.accumulator_place(thread, register)] = thread // 32
axes[0].imshow(warps, cmap=plt.matplotlib.colors.ListedColormap(SOFT[:4]), aspect="auto")
for warp in range(4):
    axes[0].text(7.5, 16 * warp + 7.5, f"warp {warp}", ha="center", va="center")
axes[0].set(title="D: rows of the warps", xlabel="column", ylabel="row", yticks=range(0, 64, 16))
for axis, title, places in (
    (
        axes[1],
        "D, columns 0-15, warp 0",
        {layouts.accumulator_place(t, r): (t, r, r // 2) for t in range(32) for r in range(8)},
    ),
    (
        axes[2],
        "A (64, 16) in registers, warp 0",
        {layouts.a_place(t, r, h): (t, r, r) for t in range(32) for r in range(4) for h in (0, 1)},
    ),
):
    colour = np.zeros((16, 16))
    for place, (thread, register, shade) in places.items():
        colour[place] = shade
        axis.text(place[1], place[0], f"{thread}:{register}", ha="center", va="center", fontsize=5.5)
    axis.imshow(colour, cmap=plt.matplotlib.colors.ListedColormap(SOFT[:4]), vmin=0, vmax=3, aspect="auto")
    axis.set(title=title, xlabel="column", xticks=range(0, 16, 2))
for axis in axes:
    axis.grid(False)
fig.suptitle("lane:register; colour: registers 2 r and 2 r + 1 of D, register r of A", fontsize=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# The colours agree: what a thread holds of S in registers 8 k to 8 k + 7 is, packed in pairs, what wgmma expects of it
# as A for step k. So P goes from softmax into the next product without leaving the thread. (For FP8 they do not agree:
# chapter 10.)
#
# ### Order: fence, products, commit, wait
#
# | wrapper | guarantee | PTX ISA |
# |---|---|---|
# | `wgmma_fence` | products that follow see what was written to accumulators and A registers before | wgmma.fence |
# | the product | it will run, in order with others on the same accumulators | wgmma.mma_async |
# | `wgmma_commit` | all products since the last commit are one group | wgmma.commit_group |
# | `wgmma_wait<n>` | all but the n newest groups are over, and what they used is yours again | wgmma.wait_group |
#
# Between product and wait neither accumulators nor A registers may be touched. If the compiler finds that you do, it
# puts a wait of its own there and says so, with a number such as C7514; the checks show you its meaning. Right numbers,
# but nothing is asynchronous any more. TMA's tiles need no fence before wgmma reads them: the wait at the mbarrier is
# enough, as both engines use the async proxy.
#
# **Predict.** How many wgmma does one block of 128 keys take at d 128, $QK^T$ and $PV$ together? How many `mma.sync`
# would the four warps of `fa2.cu` need for the same 64 rows?

# %%
my_prediction_products = None  # your two numbers
products = 128 // 16 + 128 // 16
print(f"wgmma: {products}, started by 128 threads together; mma.sync: {2 * (64 // 16) * (128 // 8) * (128 // 16)}")

# %% [markdown]
# **Exercise.** The rest of `layouts.py`, the wrappers in `wgmma_engine.cuh`, then `wgmma_tile.cu`. One product you
# write out in full, 64 x 64 in bf16; other sizes are the same text with longer lists (`cuda/hopper/wgmma_shapes.cuh`).
#
# **When it fails.** The check uses small whole numbers, so wrong elements are exactly wrong and it can often say why. S
# right, O wrong: `round_p`, V's leading offset, or the step of 2048 bytes. Only the last 16 columns count: every step
# overwrites. Zeros or garbage everywhere: a field of the descriptor; print yours beside `layouts.py`'s.
#
# ## Step (c): attention
#
# `attention.cu` is your schedule in CUDA. One block is one warpgroup with 64 rows of Q; S, P and O live in registers;
# there is one slot for K and one for V. The one order that works:
#
# 1. wait for K, issue $S = QK^T$, wait for it; now nobody reads K's slot, so thread 0 asks for the next K;
# 2. mask, softmax, rescale O, round P, while that K is on its way;
# 3. wait for V, issue $O \mathrel{+}= PV$, wait for it; ask for the next V.
#
# Mask, softmax and the epilogue are given: they are chapter 5's, in the registers that you now know.
#
# **Predict.** A block of 128 keys at d 128: the two products are $2 \cdot 64 \cdot 128 \cdot 128$ multiply-adds, and a
# Hopper SM does 2048 a cycle. The exponentials are $64 \cdot 128$, and it does 16 a cycle. If nothing overlaps, what
# share of the time can the matrix engine work at best?

# %%
my_prediction_share = None  # your share
matrix, exponentials = 2 * 64 * 128 * 128 / 2048, 64 * 128 / 16
print(f"products {matrix:.0f} cycles, exponentials {exponentials:.0f}: {matrix / (matrix + exponentials):.0%} at best")

# %% [markdown]
# And softmax is more than exponentials. That is why two blocks share an SM here (65,536 registers are enough for two
# warpgroups of this kind, and the checks watch that): while one computes its softmax, the other may use the matrix
# engine. Nobody arranges it; it happens, or not. Chapters 7 to 9 arrange it.
#
# **Exercise.** `issue_qk`, `issue_pv` and the loop in `attention`.
#
# **When it fails.** KernelDeadlock names the barrier and the iteration. Iteration 1 of `k_full`: the next K was never
# asked for. Right for one block of keys, wrong for two: parity; or O was not rescaled; or V was overwritten before the
# wait for $PV$. Other numbers in every run: the next load is issued before the wait for the product that reads the
# slot. (After the wait, is `__syncthreads` needed too? A `wgmma` is one operation of the whole warpgroup, and so is the
# group that is waited for: by PTX's words, what one thread finds complete is complete for all. Chapter 7 makes use of
# that. Here the barrier is the plain rule of chapter 5: all have read, so it may be overwritten.) C75xx notes: an
# accumulator is touched between product and wait.
#
# ## What these checks do not see without a GPU
#
# `layouts.py`, `schedule.py`, the descriptors and `tile_offset` of the kernels are graded exactly on any machine. The
# wrappers are compared with the course's as machine code: a swapped operand shows, a forgotten `"memory"` does not. Of
# the kernels they see that these compile for `sm_90a`, keep to their registers, let nothing be serialised by the
# compiler, contain the instructions of both engines, and how far the steps of `attention.cu` move their descriptors (if
# one descriptor is moved on; not, if a new one is made for every step). A `wgmma_commit` left out of `attention.cu`
# cannot be seen here: as the wait is for all groups, today's compiler closes the group itself, and the machine code is
# the same to the letter. They do not see: wrong descriptors to begin with, wrong coordinates of a load, a wrong number
# of bytes, a wrong parity, a `__syncthreads` in the wrong place, a load issued too early, `round_p` and `store` with
# wrong registers, a wrong order of steps, and the speed. These are graded on an H100 or H200 and reported as *not
# graded here* elsewhere.
#
# ## What has become of the instructions
#
# The solutions of chapters 5 and 6 as machine code, d 128, bf16, no mask. Where 48 keys took `fa2.cu` hundreds of
# fragment loads and products, 128 keys take this kernel 16 products:

# %%
SHOWN = {
    "LDGSTS": "cp.async",
    "UTMALDG": "TMA load",
    "LDSM": "ldmatrix",
    "HMMA": "mma.sync",
    "HGMMA": "wgmma",
    "SYNCS": "mbarrier",
    "MUFU": "exponentials (and others)",
}
fa2 = solution(5, "fa2_cuda.py").build("fa2", 128, torch.bfloat16, False, "sm_90a")
mine = host.KERNEL.build(128, torch.bfloat16, False)
counts = {"fa2.cu": count_instructions(fa2.cubin), "attention.cu": count_instructions(mine.cubin)}
lines = ["| | what | fa2.cu | attention.cu |", "|---|---|---|---|"]
lines += [
    f"| {name} | {words} | {counts['fa2.cu'][name]} | {counts['attention.cu'][name]} |" for name, words in SHOWN.items()
]
used = [kernel.report.kernels["attention"].registers for kernel in (fa2, mine)]
lines.append(f"| | registers a thread | {used[0]} | {used[1]} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Measured

# %%
record = recorded("ablation")
BARS = {
    "torch_fa2": "FlashAttention-2 (torch)",
    "attention": "this chapter: one warpgroup",
    "cudnn": "cuDNN",
    "fa3_official": "FlashAttention-3 (official)",
    "fa3_forward": "cuda/fa3_forward.cu",
}
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3), sharey=True)
cells = {cell["causal"]: cell for cell in record["cells"] if cell["len_q"] == 8448}
for axis, causal in zip(axes, (False, True), strict=True):
    results = cells[causal]["results"]
    speeds = [results[name]["tflops"] for name in BARS]
    colours = [
        "#CC79A7" if name == "attention" else COLOURS.get({"fa3_official": "fa3"}.get(name, name)) for name in BARS
    ]
    axis.barh(list(BARS.values()), speeds, color=colours)
    for place, speed in enumerate(speeds):
        axis.text(speed + 8, place, f"{speed:.0f}", va="center", fontsize=9)
    axis.set(title="causal" if causal else "no mask", xlabel="TFLOP/s", xlim=(0, 950))
axes[0].invert_yaxis()
p = record["provenance"]
fig.suptitle(f"batch 4, N 8448, 16 heads, d 128, bf16; {p['device']}, {p['date'][:10]}, one run", fontsize=10)
fig.tight_layout()
plt.show()

# %%
steps = json.loads((ROOT / "results" / "05_cuda" / "steps_NVIDIA_H100_80GB_HBM3.json").read_text())
row = next(r for r in steps["rows"] if (r["head_dim"], r["causal"], r["length"]) == (128, False, 8192))
before, ratio = row["tflops"]["fa2"], row["tflops"]["fa2"] / row["tflops"]["torch_fa2"]
now = cells[False]["results"]["attention"]["tflops"]
yardstick = cells[False]["results"]["torch_fa2"]["tflops"]
display(
    Markdown(
        f"This kernel reaches {now:.0f} TFLOP/s without a mask, {now / yardstick:.2f} times torch's FlashAttention-2 "
        f"in the same run. Chapter 5's `fa2.cu` reached {before:.0f} TFLOP/s, {ratio:.2f} times torch's, on a card of "
        "the same kind, but in another run and at another shape (N 8192, 16k tokens): compare the factors, not the "
        "numbers."
    )
)

# %% [markdown]
# One warpgroup without any finesse, two of them sharing an SM by luck, and it is far past FlashAttention-2.
#
# **A prediction that failed.** Before the first run, 400 TFLOP/s were predicted, for an H200 (`cuda/ABLATION.md`): a
# block has only 64 rows, so K and V are read from the L2 cache once for every 64 rows, and at 500 TFLOP/s that would be
# 8 TB/s, which was thought to be more than L2 gives.

# %%
flops_per_byte = 4 * 64 * 128 * 128 / (2 * 128 * 128 * 2)  # of one block of 128 keys: both products; K and V
print(f"{flops_per_byte:.0f} FLOP a byte: {now:.0f} TFLOP/s ask for {now / flops_per_byte:.1f} TB/s of K and V")

# %% [markdown]
# Either the cache gives more than was thought, or neighbouring blocks, which ask for the same tiles at about the same
# time, are served together. Which of the two was not looked into.
#
# **How much two blocks on an SM help.** The H100's own clock says how long a block of threads takes for 64 blocks of
# keys, in the middle of a grid that fills the GPU. Beside it is the model, alone and with two on the SM
# (`cuda/CALIBRATION.md` says how it was calibrated, and how far off it is for which kernel):

# %%
calibration = json.loads((ROOT / "results" / "calibration_h100-80gb-hbm3.json").read_text())
runs = [calibration["kernels"], *calibration["kernels_before"]]
measured = sorted(clocks for run in runs for clocks in run["chapter 6, d 128"]["block_of_64"])
predictions = json.loads((ROOT / "results" / "model_prediction_h100-80gb-hbm3.json").read_text())["predictions"]
two = next(x["predicted"] for x in predictions if (x["chapter"], x["head_dim"]) == (6, 128))
alone = run_attention(schedule, *case.but(len_k=64 * 128).make()).report.cycles
lines = ["| | clocks | matrix engine at work |", "|---|---|---|"]
for words, clocks, blocks in (
    ("one block of threads alone, model", alone, 1),
    ("two on an SM, model", two, 2),
    (f"two on an SM, H100, fastest of {len(measured)} blocks in {len(runs)} runs", measured[0], 2),
    ("two on an SM, H100, slowest of them", measured[-1], 2),
):
    lines.append(f"| {words} | {clocks:,.0f} | {64 * blocks * matrix / clocks:.0%} |")
p = calibration["provenance"]
display(Markdown(f"64 blocks of 128 keys, d 128, no mask; {p['device']}, {p['date'][:10]}:\n\n" + "\n".join(lines)))

# %% [markdown]
# The same kernel on the same card takes one time or the other, depending on how the two blocks on an SM fall in with
# each other. That is what luck is worth.
#
# **The timeline.** At the beginning you saw the schedule on the model, alone on its SM. Here is the model with two
# blocks of threads, and below it the kernel on an H100, which noted how long its waits took and when it issued its
# products, by the SM's clock (`cuda/hopper/trace.cuh`). Only one of the two blocks on its SM is shown. A product
# counts as in flight from its issue to the end of the wait for it, which is an upper bound.
#
# **Predict.** In which share of its time does a block have a product in flight?

# %%
my_prediction_in_flight = None
model = simulate("one warpgroup", 128, key_blocks=16, blocks=2)
display(hopper.picture(model.spans, "two blocks of threads, on the model", *hopper.middle(model.spans, 3)))
spans, facts = hopper.gpu_trace(6)
display(hopper.picture(spans, f"{facts['kernel']}, one of two blocks, {facts['source']}", *hopper.middle(spans, 3)))
shares = facts["shares"]["warpgroup"]
parts = {
    "softmax (and loading the next K)": ("softmax",),
    "waiting for products": ("wait wgmma QK", "wait wgmma PV"),
    "issuing them, or held while doing so": ("issue QK", "issue PV", "held"),
    "meeting, and loading the next V": ("sync, load",),
    "asking for K and V": ("wait K_full", "wait V_full"),
    "a product of this block in flight": ("wgmma in flight",),
}
lines = ["| share of a block's time, H100 | |", "|---|---|"]
lines += [f"| {words} | {sum(shares.get(name, 0) for name in names):.0%} |" for words, names in parts.items()]
display(Markdown("\n".join(lines)))

# %% [markdown]
# Half of the time is softmax, and while it lasts nothing of this block's runs: that is when the other block can
# multiply. Nobody waits for memory: to ask for a tile that is there costs some 60 clocks, and no more was spent.
#
# ## The difference, line by line
#
# Open this after you have written `attention.cu`: it shows the solution.

# %%
display(difference(chapter(5).solution / "fa2.cu", chapter(6).solution / "attention.cu"))

# %% [markdown]
# ## What would you add next?
#
# - The loads of K and V begin only when the slot is free, and the warpgroup that waits for them is the one that should
#   compute. A second slot and a warp that does nothing but load: chapter 7.
# - O leaves through registers here, 4 bytes a thread. It could go through shared memory and a TMA store.
# - `wgmma` with N = 256 reads A once for twice as many columns. What would have to give way?
#
# **Sources.** PTX ISA, sections named above; the FlashAttention-3 paper (Shah et al., 2024), sections 2.2 and 3; the
# layouts of CUTLASS (`cute/arch/mma_sm90_desc.hpp`, `cute/atom/mma_traits_sm90_gmma.hpp`).
