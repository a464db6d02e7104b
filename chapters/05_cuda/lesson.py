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
# # Chapter 5: CUDA, FlashAttention-2 in four steps
#
# Triton hid the threads. From here on you place every number yourself: which thread holds it, in which register, at
# which address of shared memory. You write FlashAttention-2 in CUDA, in four steps that differ by as little as
# possible:
#
# | step | file | new |
# |---|---|---|
# | a | `scalar.cu` | grid, block, thread, pointers, bounds |
# | b | `tiles.cu` | shared memory, barriers, coalesced loads |
# | c | `tensor_cores.cu` | `mma`, `ldmatrix`, swizzle, softmax in fragments |
# | d | `fa2.cu` | `cp.async`, two stages, causal skipping, 32 rows a warp |
#
# Beside them: `layouts.py`, small pure functions that are graded exactly on any machine, and `fa2_cuda.py`, the host's
# side, where you say how many threads run. No CUDA toolkit is needed: NVRTC compiles in seconds, also without a GPU.

# %%
import difflib
import html
import json

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, Markdown, display

from fa_reference.course import ROOT, chapter
from fa_reference.grading.cuda import ARCH
from fa_reference.kernels import count_instructions
from fa_reference.lesson import answer, solution, style

style()
here = chapter(5)


def recorded(kind):
    """The newest measurement of a kind in results/05_cuda; None if there is none."""
    found = [json.loads(file.read_text()) for file in (ROOT / "results" / here.folder).glob(f"{kind}_*.json")]
    return max(found, key=lambda record: record["provenance"]["date"], default=None)


host = solution(5, "fa2_cuda.py")
layouts = answer(5, "layouts.py")
steps, tuning = recorded("steps"), recorded("tuning")

# %% [markdown]
# ## Why bother: what the four steps are worth
#
# The same algorithm, the same number of floating-point operations, one GPU. Only where the numbers lie differs.

# %%
NAMES = {
    "scalar": "(a) one thread a row",
    "tiles": "(b) shared-memory tiles",
    "tensor_cores": "(c) tensor cores",
    "fa2": "(d) FlashAttention-2",
    "split_k": "split-K, merged once",
    "split_k_fa1": "split-K, merged every block",
    "torch_fa2": "torch's FlashAttention-2",
}
TUNED = "fewer keys"


def cell(record, head_dim, causal, length):
    """Speeds of one row of a record, by step; in the tuning record "fewer keys" stands for step (d)."""
    row = next(r for r in record["rows"] if (r["head_dim"], r["causal"], r["length"]) == (head_dim, causal, length))
    speeds = dict(row["tflops"])
    if TUNED in speeds:
        speeds["fa2"] = speeds[TUNED]
    return {name: speeds[name] for name in NAMES if name in speeds}


record = steps or tuning
print("from", "the recorded steps" if steps else "the run in which fa2.cu was tuned", "on", record["provenance"]["gpu"])
speeds = cell(record, 64, False, 2048)
fig, axis = plt.subplots(figsize=(8, 3.4))
axis.barh([NAMES[n] for n in speeds], list(speeds.values()), color="#0072B2")
for place, value in enumerate(speeds.values()):
    axis.text(value * 1.1, place, f"{value:.3g}", va="center")
axis.set(xscale="log", xlabel="TFLOP/s (log scale)", title="N 2048, d 64, no mask, bf16", xlim=(0.3, 2000))
axis.invert_yaxis()
plt.show()

# %% [markdown]
# ## Step (a): one thread a row
#
# **Idea.** A launch starts a *grid* of *blocks* of *threads*. All run the same function; `blockIdx` and `threadIdx`
# tell them apart. 32 threads with neighbouring numbers form a *warp*: they execute each instruction together, and a
# thread's number in its warp is its *lane*. Every block runs on one SM from start to end; an SM has 65,536 registers
# and about 100 to 228 KB of shared memory for all blocks on it.

# %%
fig, axis = plt.subplots(figsize=(8, 3.2))
block_q, rows, heads = 128, 300, 3
blocks = host.grid(host.STEPS["scalar"], 1, heads, rows)[2]
for head in range(heads):
    for block in range(blocks):
        start, stop = block * block_q, (block + 1) * block_q
        axis.add_patch(plt.Rectangle((start, head), block_q, 0.8, color=plt.cm.Blues(0.25 + 0.2 * block), ec="white"))
        axis.text(
            (start + stop) / 2,
            head + 0.4,
            f"blockIdx.x {head}\nblockIdx.z {block}",
            ha="center",
            va="center",
            fontsize=9,
        )
        if stop > rows:
            axis.add_patch(plt.Rectangle((rows, head), stop - rows, 0.8, fill=False, hatch="///", ec="#D55E00"))
axis.set(
    xlim=(0, blocks * block_q), ylim=(heads, -0.2), xlabel="row of Q (= blockIdx.z x 128 + threadIdx.x)", yticks=[]
)
axis.set_title(f"{heads} heads, {rows} rows: the hatched threads have no row and must not touch memory")
axis.grid(False)
plt.show()

# %% [markdown]
# **Algorithm.** Chapter 2's update, one key at a time, in one thread: a score, the running maximum and sum, and
# HEAD_DIM numbers of O. Tensors arrive as a pointer and three distances: element (b, h, i, c) lies at
# `data + b * batch + h * head + i * row + c`. The 16-bit inputs are converted to float and back by given functions.
#
# `float O_rmem[HEAD_DIM]` looks like an array, but registers have no addresses: it stays in registers only if the
# compiler knows every index, so loops over it must be unrolled (`#pragma unroll`). Otherwise it moves to *local
# memory*, which is global memory under another name. The check reads that from the compiler's log.
#
# **Predict.** 32 lanes of a warp read the same column of 32 different rows of Q. Memory is moved in sectors of 32
# bytes. How many sectors does one such load touch, and what share of the bytes moved is used? Write it down, then run
# the cell.

# %%
my_prediction_sectors = None  # your number


def sectors(addresses, bytes_each=2):
    """32-byte sectors that the addresses of one warp's load touch."""
    return len({(a + b) // 32 for a in addresses for b in range(bytes_each)})


row_bytes = 64 * 2
column = sectors(lane * row_bytes for lane in range(32))
along = sectors(lane * 2 for lane in range(32))
print(f"one column of 32 rows: {column} sectors, {32 * 2 / (32 * column):.0%} of the bytes are used")
print(f"32 neighbouring columns of one row: {along} sectors, {32 * 2 / (32 * along):.0%}")

# %% [markdown]
# **Exercise.** Write `attention` in `scalar.cu`, and `grid`, `threads`, `shared_bytes` in `fa2_cuda.py`. Delete the
# TODO comment when you are done: as long as it stands there, the file counts as not written; the check shows the
# compiler's errors all the same. `make check CHAPTER=5 ONLY=scalar.cu` checks this file alone, `make check CHAPTER=5`
# all; `make hint CHAPTER=5`.
#
# **When it fails.** Only the first rows right: the bound, or `row` computed from the wrong index. NaN in rows without
# keys: 0 / 0. All heads after the first wrong: a distance in bytes instead of elements, or the head's offset missing.
# Wrong for GQA only: `head` where `head / p.group` belongs.
#
# ## Step (b): tiles in shared memory
#
# **Idea.** All rows of a block need the same keys. Read each key once per block, together and coalesced, into shared
# memory; then every thread reads it from there.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, title, place in (
    (axes[0], "step (a): lane reads its own row", lambda lane: (lane, 0)),
    (axes[1], "step (b): lanes read along a row", lambda lane: (0, lane)),
):
    picture = np.full((32, 64), np.nan)
    for lane in range(32):
        y, x = place(lane)
        first = x // 16 * 16
        picture[y, first : first + 16] = 0.3
    for lane in range(32):
        picture[place(lane)] = 1.0
    axis.imshow(picture, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
    axis.set(title=title, xlabel="column (16 bits each)", ylabel="row of Q")
    axis.grid(False)
fig.suptitle("dark: elements that one load of a warp asks for; light: what is moved with them", fontsize=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# **Barriers.** `__syncthreads()` waits for all threads of the block. Two are needed for every block of keys: one
# before the tiles are read (someone may still be writing), one before they are overwritten (someone may still be
# reading). A missing one is a *race*: the result changes from run to run, or only on another GPU. All threads must
# reach each barrier, so a thread without a row must not return before the loop has ended.
#
# **Banks.** Shared memory has 32 banks of 4 bytes; the word at address a is in bank a / 4 mod 32. If lanes of one load
# want different words of one bank, they take turns. If all want the same word, it is broadcast: that is how all rows
# read the same K. But Q_smem is read by 32 lanes in 32 rows at the same column:

# %%


def turns(pitch):
    """How many turns 32 lanes take that read one float each, a row apart."""
    banks = [lane * pitch % 32 for lane in range(32)]
    return max(banks.count(b) for b in set(banks))


for pitch in (64, 65, 128, 129):
    print(f"rows {pitch} floats apart: {turns(pitch):2} turn(s)")

# %% [markdown]
# Hence `Q_PITCH = HEAD_DIM + 1`.
#
# **Predict.** How many times fewer bytes does step (b) ask global memory for than step (a), counting K and V only?
# (Every row of step (a) reads every key; the 32 lanes of a warp read the same key at the same time, which counts
# once.)

# %%
my_prediction_traffic = None  # your factor
block_rows = host.STEPS["tiles"].block_q
print(f"(a): once per warp of 32 rows; (b): once per block of {block_rows} rows: {block_rows / 32:.0f} times fewer")

# %% [markdown]
# That is not much, and K's rows were in the cache anyway: what step (b) wins is mostly Q, whose column-wise reads are
# gone, and independent work: BLOCK_K scores at once instead of one after the other.
#
# **Exercise.** `load_tile` and `attention` in `tiles.cu`. **When it fails:** different numbers on every run: a barrier.
# Hangs: a thread returned early. Rows that see no key of the first block give NaN: -inf minus -inf.
#
# ## Step (c): tensor cores
#
# One instruction, `mma.m16n8k16`, lets a warp multiply A (16, 16) by B (16, 8) and add to D (16, 8): 4096
# floating-point operations, where a warp's `FFMA` does 64. The price: the matrices must lie in the warp's registers
# in a prescribed way, the *fragments*. Four lanes that share their rows are a *quad*.

# %%


def draw(axis, shape, places, title):
    """Colour by register, number by lane."""
    owner = np.zeros(shape, int)
    register = np.zeros(shape)
    for place, (lane, r) in places.items():
        owner[place], register[place] = lane, r
    axis.imshow(
        register,
        cmap=plt.matplotlib.colors.ListedColormap(["#cfe3f3", "#f8dfc3", "#cdebdd", "#f0d3e4"]),
        vmin=0,
        vmax=3,
    )
    for (y, x), lane in np.ndenumerate(owner):
        axis.text(x, y, lane, ha="center", va="center", fontsize=6.5)
    axis.set(title=title, xticks=range(0, shape[1], 4), yticks=range(0, shape[0], 4))
    axis.grid(False)


fig, axes = plt.subplots(1, 3, figsize=(11, 5), width_ratios=(2, 1, 1))
lanes = range(32)
a_places = {layouts.a_fragment(n, r, h): (n, r) for n in lanes for r in range(4) for h in range(2)}
b_places = {layouts.b_fragment(n, r, h): (n, r) for n in lanes for r in range(2) for h in range(2)}
c_places = {layouts.c_fragment(n, r): (n, r) for n in lanes for r in range(4)}
draw(axes[0], (16, 16), a_places, "A (16, 16): Q or P")
draw(axes[1], (16, 8), b_places, "B (16, 8): K$^T$ or V")
draw(axes[2], (16, 8), c_places, "D (16, 8): S or O")
fig.suptitle("number: lane; colour: register 0 blue, 1 orange, 2 green, 3 pink", fontsize=10)
plt.show()

# %% [markdown]
# Two things follow from the picture. A row of S lies in one quad: row maxima and sums need two shuffles, no shared
# memory. And two neighbouring D tiles, packed in pairs, *are* an A fragment: P never leaves the registers.

# %%
for r in range(4):
    tile, first = layouts.p_register(r)
    print(f"A register {r} = pack(D tile {tile} register {first}, register {first + 1})")

# %% [markdown]
# ### ldmatrix and the swizzle
#
# `ldmatrix_x4` loads four 8 x 8 matrices. Lane l hands in the address of one row of 8 numbers (16 bytes, a *chunk*):
# lanes 0 to 7 for matrix 0, 8 to 15 for matrix 1, and so on. Each matrix is delivered in one register of every lane,
# laid out like a quarter of A. Which addresses must the lanes give?

# %%
fig, axes = plt.subplots(1, 3, figsize=(9, 4.2))
for axis, name, words in (
    (axes[0], "q_address", "Q -> A"),
    (axes[1], "k_address", "K -> B, two tiles of keys"),
    (axes[2], "v_address", "V -> B (transposed)"),
):
    for lane in lanes:
        row, chunk = getattr(layouts, name)(lane)
        colour = ["#cfe3f3", "#f8dfc3", "#cdebdd", "#f0d3e4"][lane // 8]
        axis.add_patch(plt.Rectangle((chunk, row), 1, 1, fc=colour, ec="white"))
        axis.text(chunk + 0.5, row + 0.5, f"lane {lane}", ha="center", va="center", fontsize=7)
    axis.set(xlim=(0, 2), ylim=(16, 0), title=f"{name}: {words}", xticks=[0.5, 1.5], xticklabels=["chunk 0", "chunk 1"])
    axis.title.set_fontsize(9)
    axis.grid(False)
fig.suptitle("which lane names which row of 16 bytes; colour: the register it arrives in", fontsize=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# The eight rows of a matrix are read at once: 8 x 16 bytes, all 32 banks exactly once if all goes well. But rows of a
# tile are 128 or 256 bytes apart, a multiple of 32 banks, so chunk 0 of all rows starts in bank 0. Padding would cure
# it, but costs memory and breaks the alignment of larger tiles. The *swizzle* costs nothing: it moves chunk c of row
# r to another place in the same row.
#
# A byte address in a tile of 64 columns has these bits: `rrrr ccc bbbb`: row, chunk (3 bits), byte in the chunk (4
# bits). Banks are decided by address bits 2 to 6, so a chunk's banks are decided by `ccc` alone. Each bit of the XOR
# does one thing:
#
# - row bit 0 flips chunk bit 0: rows 0 and 1 differ,
# - row bit 1 flips chunk bit 1: rows 0-1 and 2-3 differ,
# - row bit 2 flips chunk bit 2: rows 0-3 and 4-7 differ.
#
# Eight rows thus give eight different `ccc`; rows 8 to 15 repeat them, which is harmless, as they are read by another
# matrix. With 128 columns there is a fourth chunk bit, which the XOR leaves alone.

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4.2))
for axis, name, place in ((axes[0], "as it comes", lambda r, c: c), (axes[1], "swizzled", layouts.swizzle)):
    for r in range(8):
        for c in range(8):
            at = place(r, c)
            mark = c == 2
            axis.add_patch(
                plt.Rectangle((at, r), 1, 1, fc="#0072B2" if mark else plt.cm.Greys(0.08 + 0.05 * c), ec="white")
            )
            axis.text(
                at + 0.5,
                r + 0.5,
                f"chunk {c}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if mark else "black",
            )
    banks = [place(r, 2) % 8 for r in range(8)]
    worst = max(banks.count(b) for b in banks)
    axis.set(xlim=(0, 8), ylim=(8, 0), ylabel="row", yticks=[i + 0.5 for i in range(8)], yticklabels=range(8))
    axis.set_xticks([i + 0.5 for i in range(8)], [f"{4 * i}-{4 * i + 3}" for i in range(8)], fontsize=8)
    axis.set(xlabel="banks", title=f"{name}: {worst} turn(s) for chunk 2")
    axis.grid(False)
plt.show()

# %% [markdown]
# **Exercise.** All of `layouts.py` first (no GPU needed, graded exactly: any swizzle without conflicts passes), then
# `tensor_cores.cu`. A warp owns 16 rows, four warps share the tiles of K and V.
#
# **When it fails.** All checks of `layouts.py` pass and S is wrong: were the 16-row offsets of the warp and of the
# tile added to the *row* before the swizzle? O wrong, lse right: V's addresses or `p_register`. Wrong only at large
# scores: the maximum of the quad. Wrong from block 2 on: alpha not applied to O, or l summed over the quad too early.
#
# **Predict.** How many `HMMA` (that is `mma` in machine code) does one block of keys take per warp at d 64, with 16
# rows and 64 keys? Then let the compiler answer.

# %%
my_prediction_hmma = None  # your number
SHOWN = ("FFMA", "HMMA", "LDSM", "LDG", "LDGSTS", "STS", "LDS", "BAR", "MUFU", "SHFL")


def compiled(step, head_dim=64):
    return host.build(step, head_dim, torch.bfloat16, True, ARCH)


built = {step: compiled(step) for step in ("scalar", "tiles", "tensor_cores", "fa2")}
lines = ["| step | registers | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
for step, kernel in built.items():
    counts = count_instructions(kernel.cubin)
    used = kernel.report.kernels["attention"]
    lines.append(f"| {NAMES[step]} | {used.registers} | " + " | ".join(str(counts[name]) for name in SHOWN) + " |")
display(
    Markdown("How often an instruction stands in the solution's machine code (d 64, causal):\n\n" + "\n".join(lines))
)

# %% [markdown]
# 16 rows x 64 keys x 64 columns are 1 x 8 x 4 `mma` for S, and as many for O. Every `LDSM` brings two B fragments.
# In step (c) each of those serves one `mma`, in step (d) two: that is why a warp takes 32 rows there.
#
# ## Step (d): FlashAttention-2
#
# **Idea.** Step (c) waits for memory twice a block: `load`, barrier, compute, barrier. `cp.async` copies in the
# background, past the registers. With two pairs of tiles, block j + 1 arrives while block j is computed, and one
# barrier a block is enough. (A schematic, not a measurement:)

# %%
fig, axis = plt.subplots(figsize=(9, 2.6))
copy, compute = 1.0, 1.6
for j in range(4):
    serial = j * (copy + compute)
    axis.barh(1, copy, left=serial, color="#E69F00", ec="white")
    axis.barh(1, compute, left=serial + copy, color="#0072B2", ec="white")
    axis.text(serial + copy + compute / 2, 1, f"block {j}", ha="center", va="center", color="white", fontsize=8)
    axis.barh(-0.1, compute, left=copy + j * compute, color="#0072B2", ec="white", height=0.4)
    axis.text(copy + (j + 0.5) * compute, -0.1, f"block {j}", ha="center", va="center", color="white", fontsize=8)
    axis.barh(0.3, copy, left=0 if j == 0 else copy + (j - 1) * compute, color="#E69F00", ec="white", height=0.3)
axis.set_title("orange: copy of a block of K and V; blue: computing with it", fontsize=10)
axis.set(yticks=[1, 0.1], yticklabels=["(c) one stage", "(d) two stages"], xlabel="time (schematic)", xticks=[])
axis.grid(False)
plt.show()

# %% [markdown]
# **Causal blocks.** The first row of a block decides how many blocks of keys need no mask, the last one how many are
# visited. Blocks of queries at the end see the most keys: they start first, so that no long one is left over.
#
# **Who gets what: split Q or split K.** Four warps can share a block in two ways. FlashAttention-1 gave every warp
# all the rows and a quarter of the keys; its warps must add up their outputs through shared memory. FlashAttention-2
# gives every warp all the keys and a quarter of the rows: nothing to add up.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3))
colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]
for axis, title in ((axes[0], "split Q (fa2.cu)"), (axes[1], "split K (split_k.cu)")):
    for w in range(4):
        box = (0, w, 4, 1) if axis is axes[0] else (w, 0, 1, 4)
        axis.add_patch(plt.Rectangle(box[:2], box[2], box[3], color=colours[w], ec="white", lw=2))
        axis.text(box[0] + box[2] / 2, box[1] + box[3] / 2, f"warp {w}", color="white", ha="center", va="center")
    axis.set(
        xlim=(0, 4), ylim=(4, 0), xlabel="keys of the block", ylabel="rows of Q", xticks=[], yticks=[], title=title
    )
    axis.grid(False)
plt.show()

# %% [markdown]
# `split_k.cu` is given; open it after you have written `fa2.cu`, whose steps it shares. Its block has 32 rows, not 128,
# because each warp's accumulator covers all rows: at the same number of registers, every key that is copied serves a
# quarter of the rows. It is built in two ways: merging after every block, as FlashAttention-1 did, and merging once at
# the end, each warp with its own maximum until then.
#
# **Predict.** Order the four by speed, with factors: (c), (d), split-K merged once, split-K merged every block.
#
# **Exercise.** `fa2.cu`: copy what stays the same from your `tensor_cores.cu`; new are `load_tile`, the two counts,
# and the loop.
#
# **When it fails.** Right for one block of keys, wrong for two: the stage. Different from run to run: the copy of
# block j + 1 starts before the barrier. Wrong for len_q != len_k only: `len_k - len_q` missing in one of the counts.
# Slow, but right: look for spills in the compiler's log and for the mask being applied to every block.
#
# ## What these checks do not see without a GPU
#
# They read machine code, they do not run it. They see that the kernel compiles, keeps its values in registers, and
# contains the instructions of the technique, the pure functions are graded exactly, and nothing else: not a wrong
# address, a wrong mask, a missing wait, a barrier in the wrong place, a bank conflict in the kernel itself, or the
# speed. These are graded on a GPU with compute capability 8.0 or newer and reported as *not graded here* elsewhere;
# compiling alone earns no points.
#
# ## Measured

# %%


def table(record, names):
    lines = ["| d | mask | N | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for row in record["rows"]:
        mask = "causal" if row["causal"] else "none"
        yardstick = row["tflops"]["torch_fa2"]
        values = []
        for name in names:
            speed = row["tflops"].get(name)
            values.append("" if speed is None else f"{speed:.3g} ({speed / yardstick:.2f})")
        lines.append(f"| {row['head_dim']} | {mask} | {row['length']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def provenance(record):
    p = record["provenance"]
    return f"{p['gpu']}, {p['date'][:10]}, torch {p['torch']}, {p['compiler']}; bf16, 16k tokens, hidden size 2048. "


if steps:
    text = "TFLOP/s, and in brackets the share of torch's FlashAttention-2 in the same run. " + provenance(steps)
    display(Markdown(text + "\n\n" + table(steps, list(NAMES))))
else:
    display(
        Markdown(
            "The steps as they stand are **not recorded yet**: `python chapters/05_cuda/measure.py` on a GPU does it."
        )
    )

# %% [markdown]
# ### How step (d) was tuned
#
# Every column is one change against fa2.cu as it was first written.

# %%
variants = list(tuning["variants"])
shown = [n for n in variants if n != "split_k, other keys"]
words = "\n".join(f"- *{name}*: {text}" for name, text in tuning["variants"].items() if name in shown)
text = provenance(tuning) + tuning["provenance"]["note"]
display(Markdown(f"{text}\n\n{words}\n\n{table(tuning, ['torch_fa2', *shown])}"))


def gain(name, base, head_dim, causal, length):
    row = next(
        r["tflops"] for r in tuning["rows"] if (r["head_dim"], r["causal"], r["length"]) == (head_dim, causal, length)
    )
    return row[name] / row[base] - 1


def gains(name, causal, digits=0):
    return ", ".join(f"{gain(name, 'first', d, causal, 8192):+.{digits}%} (d {d})" for d in (64, 128))


fewer, longest, lazy = gains("fewer keys", False), gains("longest first", True), gains("lazy rescale", False, 1)
display(
    Markdown(
        f"- Fewer keys at once: {fewer} without a mask at N 8192. Smaller tiles of S take fewer registers, which the "
        "compiler probably spends on fetching fragments earlier; that is a guess from the register counts, not a "
        "measurement.\n"
        f"- Longest blocks of all heads first: {longest} with a causal mask. Before, the blocks went head by head, so "
        "that the long blocks of the last head started late and finished alone.\n"
        f"- Rescaling O only where a maximum has moved: {lazy}. On paper it saves a multiplication for most elements "
        "of O in most blocks; it gained nothing worth a branch, and why was not looked into.\n"
    )
)
merged = {d: cell(record, d, False, 8192) for d in (64, 128)}
for d, s in merged.items():
    print(
        f"d {d}, N 8192: split-Q is {s['fa2'] / s['split_k']:.2f} times as fast as split-K merged once, "
        f"{s['fa2'] / s['split_k_fa1']:.2f} times as fast as merged every block"
    )

# %% [markdown]
# Why split-Q wins: merging after every block writes all of O to shared memory and reads it back, four times 32 rows of
# floats for 32 rows of results, between two more barriers. Merging once at the end removes that and is still slower: 32
# rows a block instead of 128 mean that K and V are copied into shared memory four times as often. How the two variants
# of split-K compare with each other is less clear: at $d = 128$ merging once is twice as fast, at $d = 64$ and long
# sequences without a mask it is the slower one, and why was not looked into.

# %% [markdown]
# ### A bug that only long sequences showed
#
# An earlier version of steps (c) and (d) passed every check at lengths up to 4096 and broke the error rule from about
# $N = 8192$ on: O was right, lse was not. On an H200 its error at $d = 128$ grew from 9e-6 at 4096 keys to 3e-5 at
# 8192 and 6e-5 at 16384. It kept m as a raw score: `subtract = m_new * scale_log2`, then `alpha = exp2(m_old *
# scale_log2 - subtract)`.
#
# Where the maximum stays, that reads as $x - x = 0$. The compiler fuses the product and the difference into one
# multiply-add, which does not round the product, while `subtract` was rounded: what is left is the rounding error of
# `subtract`, up to $2^{-22}$ here. Its alpha is almost 1, in every block the same side of 1, and hundreds of blocks
# multiply it up. O = acc / l hides it, as both are scaled alike; lse does not. Now m is kept in units of log2, and
# `m_old - m_new` is exactly 0 where it should be. Small cases cannot see this; that is why lse is graded, and why one
# check has 32768 keys.

# %%
m, scale_log2 = np.float32(51.3), np.float32(128**-0.5 * np.log2(np.e))
subtract = np.float32(m * scale_log2)
left_over = float(m) * float(scale_log2) - float(subtract)  # what the fused multiply-add returns
for blocks in (1, 85, 341):
    drift = blocks * left_over * np.log(2)
    print(f"raw maximum {m:.1f}: after {blocks:3d} blocks that keep the maximum, lse is off by {drift:+.1e}")

# %% [markdown]
# ## The differences, line by line
#
# Open these after you have written a step: they show the solutions.

# %%


def difference(old, new):
    """A folded, coloured diff of two kernels, without the markers of the exercises."""
    texts = []
    for name in (old, new):
        path = here.solution / name if (here.solution / name).exists() else here.room / name
        kept = [x for x in path.read_text().splitlines() if "SOLUTION" not in x and not x.strip().startswith("//:")]
        texts.append(kept)
    changes = list(difflib.unified_diff(*texts, old, new, lineterm="", n=1))
    count = sum(x[0] in "+-" and x[:3] not in ("+++", "---") for x in changes)
    colours = {"+": "#e6f4ea", "-": "#fce8e6", "@": "#eef1f8"}
    body = "".join(
        f'<div style="background:{colours.get(x[:1], "none")}">{html.escape(x) or "&nbsp;"}</div>' for x in changes
    )
    return HTML(
        f"<details><summary><b>{old} &rarr; {new}</b>: {count} changed lines, {len(texts[1])} in all</summary>"
        f'<pre style="font-size:11px;line-height:1.25;text-align:left">{body}</pre></details>'
    )


for old, new in (
    ("scalar.cu", "tiles.cu"),
    ("tiles.cu", "tensor_cores.cu"),
    ("tensor_cores.cu", "fa2.cu"),
    ("fa2.cu", "split_k.cu"),
):
    display(difference(old, new))

# %% [markdown]
# ## What would you add next?
#
# - Hopper's tensor cores have an instruction of their own, `wgmma`, which reads shared memory by itself, and a copy
#   engine that does the addressing: chapter 6.
# - Rescaling only when a maximum grew by more than a threshold is exact after the division, and rarer still. Try it.
# - Two blocks share an SM here and hide each other's softmax by luck. Chapters 7 to 9 do it on purpose.
