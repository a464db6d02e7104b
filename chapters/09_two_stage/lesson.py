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
# # Chapter 9: two-stage pipelining, FlashAttention-3 in FP16 and BF16
#
# Pingpong overlaps one warpgroup's softmax with *the other's* products. Algorithm 2 of the paper ([arXiv
# 2407.08608](https://arxiv.org/abs/2407.08608)) overlaps it with *its own*: S of the next block is computed one step
# ahead, so that while the softmax of block j runs, O += P V of block j - 1 is under way. Together with chapters 7 and
# 8 this is the paper's kernel.
#
# | exercise | file | graded |
# |---|---|---|
# | the pipeline | `schedule.py` | anywhere, on the model |
# | the kernel | `fa3.cu` | compiled anywhere, run on an H100 or H200 |

# %%
import json
import statistics

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from fa_reference import lesson_hopper as hopper
from fa_reference.course import ROOT, chapter
from fa_reference.grading import cuda
from fa_reference.grading.hopper import exponentials_beside_pv
from fa_reference.hopper.schedules import load_schedule
from fa_reference.kernels import cache_folder
from fa_reference.lesson import answer, difference, solution, style

style()
here = chapter(9)
schedule = answer(9, "schedule.py")
host = solution(9, "fa3.py")

# %% [markdown]
# ## First: the schedule, on the model of an SM
#
# Inside a warpgroup everything still waits for everything: S, then softmax, then O. But the softmax of block j needs
# S of j and not O, and O += P V of block j - 1 needs the softmax of j - 1, which is over. So both products can be
# issued together, and while the second runs, the warpgroup is in its softmax:
#
# ```
# chapter 8, block n                         chapter 9, block n
#   issue S_n, wait for it                     issue S_n                        two groups under way
#   softmax_n                                  issue O += P_(n-1) V_(n-1)
#   issue O += P_n V_n, wait for it            wait for S_n alone: wgmma_wait<1>
#                                              softmax_n                        O += ... runs beside it
#                                              wait for O: wgmma_wait<0>
#                                              rescale O, round P_n
# ```
#
# The model, with your schedule once it passes. Look at one consumer: its softmax (orange) runs while the tensor cores
# work on *its own* product with V, in the same shade of blue.

# %%
two_stage = hopper.model_run(schedule)
display(hopper.picture(two_stage.spans, "chapter 9, on the model", *hopper.middle(two_stage.spans, 3)))

# %% [markdown]
# **Predict.** Alone, without a second consumer, how many percent of the cycles does this order save? And with two
# consumers, where the other's products already cover most of the softmax?

# %%
my_prediction_alone, my_prediction_both = None, None
plain, turns = load_schedule("warp-specialised"), load_schedule("pingpong")
for words, old_schedule, options in (
    ("one consumer", plain, {"consumers": 1}),
    ("two consumers without turns", plain, {}),
    ("two consumers with turns", turns, {}),
):
    old = hopper.model_run(old_schedule, **options)
    new = hopper.model_run(schedule, pingpong=old_schedule is turns, **options)
    busy = f"tensor cores {old.utilisation('wgmma'):.0%} -> {new.utilisation('wgmma'):.0%}"
    print(f"{words}: {old.cycles:,.0f} -> {new.cycles:,.0f} cycles ({new.cycles / old.cycles - 1:+.1%}); {busy}")

# %% [markdown]
# **Predict.** In chapter 7 one slot for K and one for V were enough, on the model. And here?

# %%
my_prediction_one_slot = None
cycles = {stages: hopper.model_run(schedule, stages=stages).cycles for stages in (1, 2, 3)}
for stages, n in cycles.items():
    print(f"{stages} slots: {n:,.0f} cycles ({n / cycles[2] - 1:+.1%})")

# %% [markdown]
# K of block n is wanted while V of block n - 1 is still being read, and the producer, which loads in one order, is
# stuck behind that V. Two slots are what the pipeline runs on; a third adds nothing.
#
# ## What it takes
#
# `wgmma_wait<N>` waits until at most the N newest groups are unfinished. Groups finish in the order in which they
# were committed, so S must be issued first.
#
# The loop now lags by one: before it S and softmax of block 0, behind it the P V of the last block. That is the price
# in code. The price in registers is none, if P is rounded only when the product that reads the last P is over, and a
# second P otherwise.
#
# **Two things may not be touched while O += P V runs:** O (so rescaling waits), and the registers of P (so rounding
# the next P waits, or goes elsewhere). The order of rescaling is right all the same: O of block n - 1 is complete
# before it is multiplied by the factor of block n.
#
# Here schedule and kernel differ. On the model `softmax.step` returns a new P, in registers of its own, so that the one
# in use stays as it is (the time for rounding is counted after the wait all the same). The kernel has one array for P
# and rounds into it after the wait; before it, the compiler would answer with C7513 and wait for every product.
#
# ## Registers, and why three stages lose
#
# **Predict.** How many registers does a thread need for O, S and P in this kernel, at d 128 and 128 keys? How many
# would a three-stage pipeline need, in which the softmax has a whole step for itself: S of n + 1 is being computed, S
# of n is in its softmax, P of n - 1 is in its product?

# %%
my_prediction_two, my_prediction_three = None, None
THREADS, ROWS = 128, 64


def registers(head_dim, keys, scores, probabilities):
    """Registers a thread for O, some tiles of S (fp32) and some of P (16 bits)."""
    return ROWS * (head_dim + scores * keys + probabilities * keys / 2) / THREADS


print(f"two stages:   {registers(128, 128, 1, 1):.0f} of 240")
print(f"three stages: {registers(128, 128, 2, 1):.0f} of 240, and nothing left for addresses, maxima, loop counters")
for keys in (96, 80, 64):
    print(f"three stages with {keys} keys: {registers(128, keys, 2, 1):.0f}")

# %% [markdown]
# So three stages need smaller blocks of keys, and small blocks cost: each step has its fixed waits, and `wgmma` reads
# Q from shared memory again for fewer columns. The paper (appendix B.3) built it and found it slower: the registers,
# and a compiler that overlapped only the first of its products with the softmax. An earlier experiment of ours kept
# the tensor cores of an H100 busy for 68 to 72% of the time with three stages, against about 84% with two. This
# course has no three-stage kernel.
#
# **Exercise: `schedule.py`.** Write the body of `consumer`; turns and the two issuing functions are given. `make
# check CHAPTER=9 ONLY=schedule` checks, besides the numbers and 200 random timings, that P V is under way during
# every softmax but the first.
#
# **Exercise: `fa3.cu`.** Producer, barriers and roles are yours from chapter 7, the turns from chapter 8. `make check
# CHAPTER=9`, `make hint CHAPTER=9`.
#
# ## The compiler takes it away again
#
# Write the loop as above, and it compiles to a kernel *without* the overlap: right results, no message. The compiler
# knows that waiting takes no registers, sees that nothing of the softmax is needed before `wgmma_wait<0>`, and moves
# the wait up, or the softmax down. An empty `asm volatile` does not hold it. What holds is a branch, even one that is
# never taken:
#
# ```
# softmax(s, rows, c);
# if (never) pin(s);      // never = problem.len_k < 0, which the compiler cannot know
# wgmma_wait<0>();
# ```
#
# A check counts the exponentials that stand between the two waits in the machine code. The solution, and the same
# without that line:

# %%
source = host.KERNEL.source.read_text()
unpinned = cache_folder() / "lessons" / "unpinned.cu"
unpinned.parent.mkdir(parents=True, exist_ok=True)
unpinned.write_text(source.replace("        if (never) pin(s);\n", ""))
for words, file in (("with the branch", None), ("without", unpinned)):
    compiled = host.KERNEL.build(128, torch.bfloat16, False, source=file)
    built = cuda.read_build("fa3.cu", compiled.cubin, compiled.log)
    print(f"{words}: {exponentials_beside_pv(built)[0]} exponentials a thread stand beside P V")

# %% [markdown]
# (64 of them are the scores of a block, 64 x 128 / 128 threads; two are the rescaling factors.)
#
# **When it fails.**
#
# | message or symptom | suspect |
# |---|---|
# | "never waits for S alone" | `wgmma_wait<0>` where `<1>` belongs, or P V issued before S |
# | "only 0 of 64 exponentials" | no branch between softmax and wait |
# | right for one block of keys, wrong for two | P rounded before P V was done, O rescaled with the wrong factor |
# | wrong from the third block on | V's slot and parity: P V is one block behind, `(n - 1) % kStages` |
# | waited for v_empty | V is released in the loop but the last one never needs to be; or not released at all |
# | C7514, C7513 | S copied into another array and back; P written while P V reads it |
#
# ## What these checks do not see without a GPU
#
# The schedule is graded fully, but for a slot lost: to release V of j where V of j - 1 has been read is right, as the
# producer fills slots in order, but it runs ahead by one slot less. Of the kernel they see what they saw in
# chapters 7 and 8, and where the exponentials stand. Not: parities one block apart, O rescaled at the wrong moment, P
# overwritten too early, masks, speed.
#
# ## Measured: the whole ablation
#
# The paper's table 2 takes its kernel apart: 661 TFLOP/s; 582 without two-stage pipelining; 570 with it but without
# specialised warps. You may also have read that two stages give "up to 30%"; the paper's own numbers give 13.6%.
# **Predict** the order of these before you run the cell: chapter 6, the paper's unspecialised variant
# (`solutions/09_two_stage/two_stage_unspecialised.cu`), chapters 7, 8, 9.

# %%
my_prediction_order = None
NAMES = [
    "attention",
    "two_stage_unspecialised",
    "warp_specialised",
    "pingpong",
    "fa3",
    "fa3_forward",
    "fa3_official",
    "cudnn",
    "torch_fa2",
]
SHAPES = [(8448, False), (8448, True), (2048, False), (16384, False)]
fig, axis = plt.subplots(figsize=(8, 4))
hopper.bars(
    axis, NAMES, highlight=["attention", "two_stage_unspecialised", "warp_specialised", "pingpong", "fa3"], paper=True
)
axis.set_title("batch 4, N 8448, 16 heads, d 128, no mask; orange: the paper (FP16)", fontsize=10)
plt.show()
display(Markdown(hopper.provenance() + ". TFLOP/s:"))
display(Markdown(hopper.table(NAMES, SHAPES)))

# %% [markdown]
# The order is not quite the paper's, and two steps are far smaller than one would hope. Take the variants to it: each
# is one of these kernels with a few lines exchanged (`solutions/09_two_stage/ablation.py`; predictions in
# `cuda/ABLATION.md`).

# %%
VARIANTS = [
    "two_stage_unspecialised:no_pin",
    "two_stage_unspecialised",
    "warp_specialised",
    "warp_specialised:deferred",
    "pingpong",
    "pingpong:deferred",
    "fa3",
    "fa3:no_pin",
    "fa3:no_turns",
    "fa3:176",
]
fig, axis = plt.subplots(figsize=(8, 4))
hopper.bars(axis, VARIANTS, highlight=["two_stage_unspecialised", "warp_specialised", "pingpong", "fa3"])
axis.set_title("variants, at the paper's shape", fontsize=10)
plt.show()
display(Markdown(hopper.table(VARIANTS, SHAPES, paper=False)))
now = hopper.speeds()


def over(name, base):
    return f"{hopper.titles()[name]} over {hopper.titles()[base]}: {now[name] / now[base] - 1:+.1%}"


for pair in (
    ("two_stage_unspecialised", "two_stage_unspecialised:no_pin"),
    ("fa3", "fa3:no_pin"),
    ("fa3", "pingpong"),
    ("fa3:no_turns", "warp_specialised"),
    ("fa3:no_turns", "fa3"),
    ("pingpong:deferred", "fa3"),
):
    print(over(*pair))

# %% [markdown]
# What is known, and what is not:
#
# - **Overlap inside a warpgroup is real, where there is no other.** In the kernel without specialisation both
#   warpgroups meet at a barrier in every step, so nothing else can fill the gaps. There the pinned softmax is worth a
#   lot (first line above).
# - **Here it is worth nothing.** With a producer and two free consumers the other's products already fill the tensor
#   cores. Where the softmax stands makes no difference any more (second line).
# - **What two stages gain, the later wait gains too.** "Waits for P V together with the next S" only keeps two
#   products under way, and has as much. With 128 keys, two stages without turns and pingpong with the later wait are
#   the fastest of these.
# - **Turns and two stages do not add up here; with turns, two stages are a little slower than without.** In the paper
#   they add up. The timeline below rules out the obvious reason: nobody waits for a turn. What it is, was not found
#   out. `cuda/fa3_forward` gained 15% from turns in its first version and 2 to 3% later (`cuda/LOG.md`): what a
#   technique is worth depends on what is already there.
# - **176 keys instead of 128** amortise the fixed waits of a step over more work. The official kernel does that.

# %% [markdown]
# ## On the H100
#
# **Predict** the last three rows for chapter 9, from chapter 8's.

# %%
my_prediction_own, my_prediction_clocks = None, None
hopper.show_gpu_timeline(8, 9)

# %% [markdown]
# The overlap is there: while a consumer is in its softmax, its own P V runs, and most of the time the other's turn
# too. S is there when it is asked for. And yet a step is only a few percent shorter, because the time has moved: the
# softmax is still as long, rescaling and rounding now stand alone behind it, where nothing of this consumer's runs,
# and issuing two products at once holds the warpgroup: the second is taken when the first is nearly done. The tensor
# cores need 2048 clocks for a step; the last row says how far that is.
#
# ## What if?
#
# On the model one can change what no kernel can: give the SM a faster unit, or more memory. How far can it be trusted?
# It was calibrated on single instructions and on softmax steps, never on a kernel. Then it was asked for kernels that
# nobody had looked at: other blocks of keys, other rings, other turns.

# %%
record = json.loads((ROOT / "results" / "model_prediction_h100-80gb-hbm3.json").read_text())
head = ["| kernel | clocks of a block, H100 | model | error |", "|---|---|---|---|"]
rows = [(f"chapter {r['chapter']}, d {r['head_dim']}", r) for r in record["predictions"] if r["chapter"] in (7, 8, 9)]
rows += [(r["name"], r) for r in record["held_out"] if r["name"].startswith("chapter 9")]
lines = [f"| {name} | {r['measured']:,} | {r['predicted']:,} | {r['error']:+.0%} |" for name, r in rows]
errors = [abs(r["error"]) for r in record["held_out"]]
display(Markdown("\n".join(head + lines)))
print(f"all {len(errors)} that nobody had looked at: off by {statistics.mean(errors):.1%} on average,", end=" ")
print(f"by {max(errors):.0%} at most")

# %% [markdown]
# **Predict** before you look: which one gains most from an exponential unit twice as fast?

# %%
my_prediction_what_if = None
lines = ["| what if | clocks for 128 x 128 | tensor cores busy | exponential unit busy |", "|---|---|---|---|"]
for row in record["what_if"]:
    numbers = f"{row['clocks']:,} | {row['tensor']:.0%} | {row['exp']:.0%}" if row["clocks"] else "does not fit | |"
    lines.append(f"| {row['name']} | {numbers} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# With one slot the pipeline stalls, as above. Larger blocks of keys help, up to 128. At d 64 products are half as long
# and the softmax is not: there a faster exponential unit would be worth a third. And tensor cores twice as fast are
# worth nothing here, on the model: both softmaxes then run at the same time, and that is what takes so long. Where the
# model is furthest off for kernels that exist, do not believe it about others: blocks of 64 keys in this chapter, of
# 176 in chapter 7, and chapter 10. `cuda/CALIBRATION.md` says more.
#
# ## From here to the kernel one would ship
#
# `cuda/fa3_forward.cu` is the same algorithm and a quarter faster at this shape. It differs in these points; what
# each was worth when it was built is in `cuda/LOG.md`, measured on an H200 and in another order than a course would
# choose:
#
# | what | why it helps |
# |---|---|
# | a block of threads takes tile after tile | the next tile is loaded while this one's output is stored |
# | exponentials first, with the old maximum; again if too large | no maximum at the head of the chain |
# | two steps of the loop written out | P changes buffers without copies, and can be rounded before the wait |
# | only one consumer asks the mbarriers | the other's turn says the same; asking costs 60 clocks |
# | tiles of few heads at a time, longest first | with a mask: K, V stay in L2; some tiles compute while others load |
# | $d = 64$, short sequences: three one-consumer blocks an SM | one computes where another begins or ends a tile |
#
# None of them is a new idea about attention. They are what is left when the schedule is right. Two of them go at just
# what the timeline shows: rounding P before the wait, and a shorter chain in front of the exponentials.

# %% [markdown]
# ## The difference, line by line
#
# Open these after you have written the kernel: they show the solution.

# %%
display(difference(chapter(8).solution / "pingpong.cu", here.solution / "fa3.cu"))
display(difference(here.solution / "two_stage_unspecialised.cu", here.solution / "fa3.cu"))

# %% [markdown]
# ## What would you add next?
#
# - Race your kernel: `make bench IMPL=chapters/09_two_stage`.
# - Hand the turn on only while there is something to order: does the loss against "without pingpong" go away?
# - Eight bits instead of sixteen double the products and leave the softmax as it is. Then it really is the softmax
#   that counts: chapter 10.
