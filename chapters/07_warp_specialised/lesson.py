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
# # Chapter 7: warp specialisation
#
# Chapter 6's kernel does everything with one warpgroup: it asks for tiles, waits for them, multiplies, takes the
# softmax, and asks for the next ones. Now the work is divided by *kind*. One warpgroup only copies. Two others only
# compute. They share nothing but tiles in shared memory and barriers that say who may touch which tile. This is
# Algorithm 1 of the FlashAttention-3 paper ([arXiv 2407.08608](https://arxiv.org/abs/2407.08608)), and the frame in
# which chapters 8 and 9 happen.
#
# | exercise | file | graded |
# |---|---|---|
# | the schedule: who waits for whom | `schedule.py` | anywhere, on the model of an SM |
# | the budget: slots that fit, registers that can be claimed | `budget.py` | anywhere, exactly |
# | the kernel | `warp_specialised.cu` | compiled anywhere, run on an H100 or H200 |
#
# `warp_specialised.py`, the host's side, is given. From here on the wrappers that you wrote in chapter 6 come from
# `cuda/hopper/`.

# %%
import json
import textwrap

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from fa_reference import lesson_hopper as hopper
from fa_reference.course import ROOT, chapter
from fa_reference.hopper import RuleBroken, covered, overlap
from fa_reference.hopper.schedules import load_schedule
from fa_reference.kernels import cache_folder
from fa_reference.lesson import answer, difference, style
from fa_reference.versions import load_file

style()
here = chapter(7)
budget = answer(7, "budget.py")
schedule = answer(7, "schedule.py")

# %% [markdown]
# ## First: the schedule, on the model of an SM
#
# In chapter 6 one warpgroup loads, multiplies and exponentiates. Now these are different warpgroups: a *producer*
# that does nothing but ask TMA for tiles, and two *consumers* that do nothing but compute, each for 64 queries of its
# own. They meet in shared memory, at two rings of slots, one for K and one for V.
#
# The model of an SM (`fa_reference/hopper/`) runs your `schedule.py` once it passes and draws what happened: grey is
# waiting, blue the tensor cores, orange to red the softmax, green the copies. Light and dark tell the two consumers
# apart; a number is the block of keys.

# %%
before, after = hopper.model_run(load_schedule("one warpgroup")), hopper.model_run(schedule)
display(hopper.picture(after.spans, "chapter 7, on the model", *hopper.middle(after.spans, 3)))
print(after.table())

# %%
lines = ["| on the model, d 128 | tensor cores busy | cycles for 64 rows x 128 keys |", "|---|---|---|"]
for words, run, rows in (("chapter 6, one block of threads on the SM", before, 64), ("chapter 7", after, 128)):
    lines.append(f"| {words} | {run.utilisation('wgmma'):.0%} | {run.cycles / (16 * rows / 64):,.0f} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# The producer waits nearly all the time, which costs nothing: a waiting warpgroup issues no instructions, and it has
# given most of its registers away. Two consumers hide part of each other's softmax without having been told to. How
# large a part is left to chance; that will be chapter 8. The comparison is not fair to chapter 6: on the GPU two of
# its blocks of threads share an SM and hide each other's softmax too. The price of that: each loads all of K and V
# for only 64 rows.
#
# ## Why a warpgroup of its own for copies?
#
# One thread can issue a TMA load in a few cycles. Why not let a consumer do it, as in chapter 6?
#
# - **Who copies must wait for empty slots.** A consumer that waits for a slot does not multiply. A producer may wait
#   as long as it likes, and runs ahead as far as there are slots.
# - **Nobody waits for everybody.** Chapter 6 needed `__syncthreads` before a tile could be overwritten: every warp
#   stops until the slowest arrives. An *empty* barrier only tells the producer; the consumers go on.
# - **Registers go where they are needed.** The producer needs two dozen, a consumer nearly the 255 that a thread can
#   have.
#
# ## Two rings, two barriers a slot
#
# | barrier | who arrives, how often in a phase | who waits | means |
# |---|---|---|---|
# | `full` | the producer once (`arrive_expect_tx`), and the bytes | the consumers | the tile is there |
# | `empty` | each consumer once | the producer | all have read it: overwrite it |
#
# Tile j goes to slot j mod stages. It is that slot's tile number j / stages (rounded down), and this *round* is the
# phase of both barriers: its load completes that phase of `full`, its release the same phase of `empty`. A waiter
# names only the parity of a phase. The producer does not wait for the release of tile j, but of the tile that was in
# the slot before, one round earlier. In round 0 there was none: it waits for "phase -1", of parity 1, and on a fresh
# barrier that returns at once.
#
# **Predict.** Three slots. With which parity does a consumer wait for tile 4 at `full`, and the producer for its slot
# at `empty`?

# %%
my_prediction_consumer, my_prediction_producer = None, None
STAGES = 3
lines = ["| tile | slot | round | consumer waits at `full` for parity | producer waits at `empty` for parity |"]
lines.append("|---" * 5 + "|")
for j in range(8):
    slot, parity = schedule.position(j, STAGES)
    lines.append(f"| {j} | {slot} | {j // STAGES} | {parity} | {parity ^ 1} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# A waiter must never fall two phases behind, or the parity means the wrong one. The rings guarantee it: a slot is not
# filled again before all its readers have released it.
#
# **Predict.** With one slot for K and one for V the producer can hardly be ahead. How many percent more cycles will
# that take than two slots each? And three, how many less?

# %%
my_prediction_one_stage, my_prediction_three_stages = None, None
cycles = {stages: hopper.model_run(schedule, stages=stages).cycles for stages in (1, 2, 3)}
for stages, n in cycles.items():
    print(f"{stages} slots: {n:,.0f} cycles ({n / cycles[2] - 1:+.1%})")

# %% [markdown]
# Surprised? K's slot is released as soon as S is there, and all through softmax and P V nobody needs a K: the next
# one has time to arrive. In this schedule more slots only insure against loads that come late, which a model of one
# SM without neighbours hardly has. Keep the question for chapter 9, where S of the next block is wanted earlier.

# %% [markdown]
# ### What goes wrong without a word on the GPU
#
# The model finds the classic mistakes at once. Here a consumer gives a slot back before its product is over:

# %%
right = (here.solution / "schedule.py").read_text()
wait, release = "        await wg.wgmma_wait_group(0)\n", "        await wg.mbarrier_arrive(at.K_empty[slot])\n"
assert wait + release in right
wrong_file = cache_folder() / "lessons" / "released_too_early.py"
wrong_file.parent.mkdir(parents=True, exist_ok=True)
wrong_file.write_text(right.replace(wait + release, release + wait))
try:
    hopper.model_run(load_file(wrong_file))
except RuleBroken as error:
    print(error)

# %% [markdown]
# **Exercise: `schedule.py`.** Write `make_barriers`, `position`, `producer` and `consumer`, in PTX's own words, in
# Python. `make check CHAPTER=7 ONLY=schedule` tries one to four stages, one to eight blocks (so also fewer blocks
# than stages), and more than 200 random timings, because a schedule that is right by luck is wrong. If nobody can go
# on, it says who waits for whom, since when, and in which line. Once it passes, the CUDA kernel is a translation
# (it walks from the last keys to the first, that is all). The model itself is worth reading; two of its files,
# `ring.py` and `two_stage.py`, hold the answers of this chapter and of chapter 9.
#
# ## The budget
#
# **Shared memory.** A block may have 227 KiB. Q takes one tile; the rest holds slots.
#
# **Registers.** An SM has 65,536. The kernel is launched with the same number for every thread: 384 threads with
# `__launch_bounds__(384, 1)` get 168 each. A consumer holds S (64 x 128 floats), O (64 x 128 floats) and P (64 x 128
# 16-bit numbers) in the registers of 128 threads: 64 + 64 + 32 = 160 before the first address or loop counter.
# `setmaxnreg` moves registers while the kernel runs: the producer's warpgroup gives back all but 24, the consumers
# take them.
#
# **Predict.** How many registers can each of two consumers claim? Multiples of 8 only.

# %%
my_prediction_registers = None
print("slots for K and for V at d 128, 128 rows, 128 keys:", budget.stages_that_fit(128, 128, 128))
print("                   with 176 keys:", budget.stages_that_fit(128, 128, 176))
print("registers a consumer thread can claim:", budget.consumer_registers(168, 2, 24))
print("without specialisation, 256 threads:", min(255, 65536 // 256 // 8 * 8), "for everybody")

# %% [markdown]
# The last line is a surprise: with 256 threads the register file gives everybody all they can use. At two consumers
# `setmaxnreg` only repays what the third warpgroup costs. With three consumers (512 threads, 128 registers at
# launch), as the official kernel has at d 64, nothing works without it.
#
# Two traps. `setmaxnreg.inc` *waits* until the registers are there: ask for more than the block has, and the kernel
# hangs. And `setmaxnreg` is ignored, with a note (C7508) that nobody reads, unless the launch bounds have the second
# number.
#
# **Exercise: `budget.py`**, two functions.
#
# ## The kernel
#
# What is new against `attention.cu` is short:
#
# ```
# if (warpgroup == 0) {               // producer                      | consumer w = 0, 1
#     release registers               //                               |     claim registers
#     one thread:                     //                               |     wait Q full
#       load Q                        //                               |     for every block n:
#       for every block n:            //                               |       wait K full, S = Q K^T, arrive K empty
#         wait K empty, expect, load  //                               |       softmax, rescale O, round P
#         wait V empty, expect, load  //                               |       wait V full, O += P V, arrive V empty
# ```
#
# - *One* thread produces: `elect_one` under a warp-uniform branch. The others of its warpgroup are done.
# - The bytes are announced *before* the load is issued, on the barrier that the load reports to.
# - A consumer arrives at `empty` when its `wgmma` has *finished reading*: after `wgmma_wait<0>`, not after the issue.
#   One thread arrives for its warpgroup, so `empty` expects 2 arrivals, not 256. May it speak for the other 127? A
#   `wgmma` is *one* operation of the whole warpgroup: all four warps must issue it, commit makes one group of it for
#   the warpgroup, and the wait is for that group, not for a warp's quarter of it (PTX ISA: wgmma.commit_group,
#   wgmma.wait_group). So what one thread finds complete no longer reads the slot for anybody. That is how PTX's words
#   read, and CUTLASS's pipelines and the official FA3 rely on it as well: one arrival for each warpgroup, after the
#   wait. It holds for tiles that only `wgmma` reads. A tile that the threads read themselves, as in chapter 6's
#   `tma_tile.cu`, is free only when each of them has read it.
# - All four warps of a warpgroup must come to `setmaxnreg` and to `wgmma`. The warpgroup's number goes through
#   `warp_uniform`, so that the compiler knows that it is the same for a whole warp.
#
# **Exercise: `warp_specialised.cu`.** Five regions: `produce`, the loop of `consume`, and three in `attention`. One
# difference to your schedule: the kernel visits the blocks of keys from the last to the first. `make check CHAPTER=7`,
# `make hint CHAPTER=7`. On an H100 the debug build runs first: each wait at a barrier ends after a second, and the
# message says which warpgroup waited for which barrier, in which iteration, with which parity.
#
# **When it fails.**
#
# | message or symptom | suspect |
# |---|---|
# | waited for k_full, iteration 0 | the load was never issued, or fewer bytes arrive than were announced |
# | waited for k_empty, iteration 0 | the producer began with parity 0 instead of 1 |
# | waited for k_empty, iteration 2 | nobody releases K, or `empty` was initialised with the number of threads |
# | waited for k_full or v_full, iteration 2 | the parity does not change after the ring's first round |
# | every message says iteration 0 | name and iteration, the last two arguments of `mbarrier_wait`, were left out |
# | right in short sequences, wrong in long ones | a slot released before `wgmma_wait` |
# | different bits from run to run | the same, or a tile read before its barrier |
# | does not end, in no barrier | `setmaxnreg` claims more than there is |
# | C7517, C7514 | an accumulator is touched before the wait |
#
# The first sentence of a deadlock names whose time was up first, the second where the other warpgroups stood: read
# both, and look for the one that waits for something that nobody owes it. An H100 said this of a kernel whose producer
# began with parity 0:

# %%
matrix = json.loads((ROOT / "results" / "kill_matrix_h100-80gb-hbm3.json").read_text())
said = {a["answer"]: a["message"].splitlines() for a in matrix["answers"]}
for line in said["warp_specialised.cu: the producer begins with the wrong parity"][:2]:
    print(textwrap.fill(line, 100))

# %% [markdown]
# ## What these checks do not see without a GPU
#
# The schedule is graded fully, but for how early K is released: at the end of the iteration is right too, and leaves
# the next K less time to arrive. Of the kernel they see that it compiles, takes no local memory, claims no more
# registers than there are, copies only in the producer and multiplies only in the consumers, that neither waits at a
# `__syncthreads`, that there are enough barriers, waits and arrivals, and that `wgmma` was not serialised. They do not
# see a wrong parity or arrival count, four threads that load instead of one (`elect_one` in every warp), a release in
# the wrong place, wrong bytes announced, a wrong mask, a wrong head, registers of P in the wrong order, or the speed.
# Those are graded on an H100 or H200 and reported as *not graded here* elsewhere; compiling alone earns no points for
# correctness.
#
# ## Measured
#
# **Predict** the speed in TFLOP/s at the paper's shape (batch 4, 8448 tokens, 16 heads, d 128, no mask) from chapter
# 6's. The course's own prediction, written down before any of these kernels ran, was 400 for chapter 6 and 525 for
# chapter 7, on an H200.

# %%
my_prediction_tflops = None
fig, axis = plt.subplots(figsize=(8, 2.6))
names = ["attention", "warp_specialised", "warp_specialised:deferred", "fa3_official"]
hopper.bars(axis, names, highlight=["warp_specialised"], paper=True)
axis.set_title("orange: the paper's kernel without two-stage pipelining", fontsize=10)
plt.show()
display(Markdown(hopper.provenance() + ". TFLOP/s:"))
shapes = [(8448, False), (8448, True), (2048, False), (16384, False)]
display(Markdown(hopper.table(names, shapes)))

# %% [markdown]
# Read it honestly: **specialisation by itself gained next to nothing here**, and at N 2048 it lost.
#
# What is known:
#
# - Chapter 6's kernel was predicted much too slow. The prediction feared that L2 could not deliver K and V for every
#   64 rows. The cell below counts the bytes: it delivered them.
# - Two blocks of threads on an SM hide each other's softmax too, and they also hide each other's start and end. Here
#   one block of threads has the SM to itself: while it waits for its first tiles or stores its output, nothing else
#   runs. The shorter the sequence, the more that weighs.
# - One more line of overlap is worth more than the whole change: the variant "deferred" waits for O += P V only
#   together with the next S, so that the tensor cores have two products queued. Nothing else differs.
#
# How the distance to that variant comes about, and what the two consumers really do, shows in the timeline below.
#
# So why specialise? For what it makes possible: a consumer without copies to issue can be *scheduled*, and that is
# what chapters 8 and 9 do.


# %%
def bytes_from_l2(rows):
    """K and V bytes that all blocks of threads of the paper's shape load, if each has this many rows."""
    batch, heads, length, head_dim = 4, 16, 8448, 128
    return batch * heads * (length / rows) * 2 * length * head_dim * 2


for name, rows in (("attention", 64), ("warp_specialised", 128)):
    flops = 4 * 4 * 16 * 8448**2 * 128
    seconds = flops / (hopper.speeds()[name] * 1e12)
    total = bytes_from_l2(rows)
    rate = total / seconds / 1e12
    print(f"{hopper.titles()[name]}: {total / 1e9:.0f} GB of K and V in {seconds * 1e3:.2f} ms: {rate:.1f} TB/s")

# %% [markdown]
# ## On the H100
#
# The same kernel, recorded on the device: a tracing build notes how long each wait took and when products were
# issued, by the SM's clock (`cuda/hopper/trace.cuh`); the rest is derived. A product counts as in flight from its
# issue to the end of the wait for it, which is an upper bound. **Predict** before you run the cell: for which share
# of the time of one consumer's softmax do the other's products run?

# %%
my_prediction_covered = None
softmaxes = after.select("consumer 0", "softmax")[1:-1]
under = overlap(softmaxes, after.select("wgmma", owner="consumer 1")) / covered(softmaxes)
print(f"on the model: {under:.0%}")
hopper.show_gpu_timeline(7)

# %% [markdown]
# The consumers do fall into step, but into a bad one. For more than half of their time in the softmax, both are in it
# and the tensor cores have nothing to do. Then both want them at once: Q K^T of one takes nearly twice as long as P
# V, because P V of the other is still running, and the warpgroup that comes second is held while it issues.
#
# Two more things are worth a look. Nobody waits for memory: asking for K and V takes a few percent, because even a
# barrier that has long been completed costs some 60 clocks to ask. And the producer waits for empty slots nearly all
# the time, as it should.

# %% [markdown]
# ## The difference, line by line
#
# Open these after you have written the kernel: they show the solution.

# %%
display(difference(ROOT / "solutions" / "06_hopper_engines" / "attention.cu", here.solution / "warp_specialised.cu"))

# %% [markdown]
# ## What would you add next?
#
# - The two consumers run whenever they can. Sometimes both want the tensor cores, sometimes neither. A rule for
#   taking turns costs two instructions: chapter 8.
# - Three slots fit at d 128. Try `STAGES = 3` in `warp_specialised.py`. Predict first: is the producer ever late?
