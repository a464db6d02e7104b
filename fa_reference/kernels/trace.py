"""Record an in-kernel timeline: compile a tracing build of a chapter's kernel, run it, read its marks, draw them.

On an H100 or H200:

    python -m fa_reference.kernels.trace                  # chapters 6 to 10 into results/
    python -m fa_reference.kernels.trace 9 --head-dim 64 --out folder

writes trace_<chapter>_<device>.json (format: fa_reference/hopper/trace.py; ui.perfetto.dev opens it) and a figure, and
prints what the consumers' time went to. The kernels are not changed: the wrappers in cuda/hopper note how long
waits took (trace.cuh), and start and end of the kernel are inserted into a copy of its source.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fa_reference.bench.record import RESULTS, provenance, slug
from fa_reference.course import ROOT
from fa_reference.hopper.trace import Span, plot_trace, read_trace, write_trace
from fa_reference.kernels.attention_host import AttentionKernel, loaded
from fa_reference.kernels.compile import CompiledKernel, cache_folder
from fa_reference.kernels.spans import Event, Kind, TraceBroken, shares, spans_of
from fa_reference.versions import load_file

KERNELS = {  # chapter -> host file
    6: "06_hopper_engines/attention.py",
    7: "07_warp_specialised/warp_specialised.py",
    8: "08_pingpong/pingpong.py",
    9: "09_two_stage/fa3.py",
    10: "10_fp8/fp8.py",
}
E4M3 = torch.float8_e4m3fn
# What the builds that record everything change in a kernel: chapter 10's producer has no registers left for the marks.
MORE_REGISTERS = {
    "fp8.cu": (
        "kProducerRegisters = 40, kConsumerRegisters = 232",
        "kProducerRegisters = 56, kConsumerRegisters = 224",
    )
}
WARPGROUPS = 4  # as in trace.cuh
BLOCKS = 4  # recorded, from FIRST_BLOCK on: by then every SM has finished some
KEY_BLOCKS, HEADS = 64, 16
CYCLES, EVERYTHING = 1, 2  # levels of FA_TRACE
SLOTS = {CYCLES: 4096, EVERYTHING: 65536}  # places for marks; two of a warpgroup need few


def kernel_of(chapter: int) -> AttentionKernel:
    """The solution's kernel of a chapter, 6 to 10."""
    return load_file(ROOT / "solutions" / KERNELS[chapter]).KERNEL


def input_type(kernel: AttentionKernel) -> torch.dtype:
    """What a kernel is recorded with: bfloat16, or e4m3 if it takes nothing else."""
    return E4M3 if kernel.dtypes == (E4M3,) else torch.bfloat16


def instrument(source: Path, *, level: int, producer: bool, first_block: int, blocks: int = BLOCKS) -> Path:
    """A copy of a kernel's file, in the cache, that records; ValueError if the places for the two marks are not there.

    level: CYCLES or EVERYTHING. producer: the work of warpgroup 0 is done by one thread, whichever is elected.
    first_block, blocks: which are recorded.
    """
    text = source.read_text()
    if level == EVERYTHING and source.name in MORE_REGISTERS:
        before, after = MORE_REGISTERS[source.name]
        if text.count(before) != 1:
            raise ValueError(f"{source.name} has {text.count(before)} times, not once: {before!r}")
        text = text.replace(before, after)
    entry = text.find("__global__")
    anchor = "*reinterpret_cast<Shared*>(shared_bytes);\n"
    place = text.find(anchor, entry)
    if min(entry, place) < 0 or not text.rstrip().endswith("}"):
        raise ValueError(f"{source.name} has no `{anchor.strip()}` in its kernel, or does not end with it")
    place += len(anchor)
    defines = {
        "FA_TRACE": level,
        "FA_TRACE_PRODUCER": int(producer),
        "FA_TRACE_FIRST_BLOCK": first_block,
        "FA_TRACE_BLOCKS": blocks,
        "FA_TRACE_SLOTS": SLOTS[level],
    }
    text = (
        "".join(f"#define {name} {value}\n" for name, value in defines.items())
        + '#include "hopper/trace.cuh"\n#line 1\n'
        + text[:place]
        + "    trace_start();\n"
        + text[place:].rstrip()[:-1]
        + "    trace_end();\n}\n"
    )
    file = cache_folder() / "trace" / f"{source.stem}_{level}_{first_block}_{blocks}.cu"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


def traced_source(kernel: AttentionKernel, level: int, first_block: int, blocks: int = BLOCKS) -> Path:
    """`instrument` for a chapter's kernel. One that elects a thread lets it produce."""
    producer = "elect_one()" in kernel.source.read_text()
    return instrument(kernel.source, level=level, producer=producer, first_block=first_block, blocks=blocks)


def middle_of_grid(kernel: AttentionKernel, key_blocks: int, heads: int, sms: int) -> int:
    """The first block to record, with as many queries as keys: every SM has finished some by then."""
    tiles = -(-key_blocks * kernel.block_k // kernel.block_q)
    return min(4 * sms, max(0, heads * tiles // 2 - BLOCKS))


def build(kernel: AttentionKernel, head_dim: int, level: int = EVERYTHING) -> CompiledKernel:
    """A tracing build without running it: needs no GPU."""
    return kernel.build(head_dim, input_type(kernel), False, source=traced_source(kernel, level, 0))


def decode(words: Sequence[Sequence[int]]) -> list[Event]:
    """Events of one warpgroup, in order, from its slots: (slots, 4) of 32-bit words, zeros where nothing was noted."""
    noted = [(start, stop, code) for start, stop, code, _ in words if code]
    starts = sorted(start for start, _, _ in noted)
    # The clock has 32 bits: if it came round meanwhile, the widest gap is where the record begins.
    gaps = [(b - a, b) for a, b in zip(starts, starts[1:] + [starts[0] + 2**32], strict=True)] if starts else []
    first = max(gaps)[1] % 2**32 if gaps else 0
    events = [
        Event((start - first) % 2**32 + first, (stop - first) % 2**32 + first, Kind(code & 15), code >> 4)
        for start, stop, code in noted
    ]
    return sorted(events, key=lambda event: event.start)


def launcher(
    kernel: AttentionKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[Path | None], object]:
    """A function that launches the build of a file (None: the kernel's own) on bfloat16 tensors.

    For chapter 10's kernel they are quantised once, and its three scales are parameters of their own.
    """
    if input_type(kernel) != E4M3:
        return lambda source: kernel.forward(q, k, v, source=source)
    host = load_file(kernel.source.with_suffix(".py"))
    inputs = host.quantised(q, k, v)
    codes = [inputs[name] for name in "qkv"]
    pointers = (inputs[f"{name}_scale"].data_ptr() for name in "qkv")
    scales = host.Scales(*pointers, *(inputs[f"{name}_scale"].shape[2] for name in "qk"))
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)

    def launch(source: Path | None) -> object:
        options = {"causal": False, "scale": q.shape[-1] ** -0.5, "source": source, "extra": [scales]}
        kernel.launch(*codes, o, lse, **options)
        return inputs  # the scales must live until the kernel has run

    return launch


def record(
    kernel: AttentionKernel,
    head_dim: int,
    *,
    level: int = EVERYTHING,
    key_blocks: int = KEY_BLOCKS,
    heads: int = HEADS,
) -> list[list[list[Event]]]:
    """Run a tracing build on random input, not causal; events by recorded block and warpgroup. Needs a Hopper GPU.

    The keys fill key_blocks blocks, the queries are as many. With few heads the GPU is not full: a block is alone.
    """
    length = key_blocks * kernel.block_k
    shape = (1, length, heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    launch = launcher(kernel, q, k, v)
    sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    source = traced_source(kernel, level, middle_of_grid(kernel, key_blocks, heads, sms))
    for _ in range(3):
        launch(None)  # the release build, so that clocks and caches are as in a benchmark
    launch(source)
    found = loaded(kernel, head_dim, input_type(kernel), False, False, source)
    found.clear_global("fa_trace_events")
    launch(source)
    words = found.read_global("fa_trace_events", 4 * BLOCKS * WARPGROUPS * SLOTS[level])
    slots = torch.tensor(words, dtype=torch.int64).view(BLOCKS, WARPGROUPS, SLOTS[level], 4)
    used = kernel.threads // 128
    return [[decode(one[one[:, 2] != 0].tolist()) for one in block[:used]] for block in slots]


def name_warpgroups(kernel: AttentionKernel, events: Sequence[Sequence[Event]]) -> dict[str, Sequence[Event]]:
    """Events of a block by track: "producer" and "consumer 0", "consumer 1", or "warpgroup"."""
    if len(events) == 1:
        return {"warpgroup": events[0]}
    return {"producer" if w == 0 else f"consumer {w - 1}": events[w] for w in range(len(events))}


def cycles_of(events: Sequence[Sequence[Event]]) -> int:
    """Clocks from a block's start to its end."""
    clocks = [event.start for one in events for event in one if event.kind in (Kind.START, Kind.END)]
    if len(clocks) < 2:
        raise TraceBroken(f"a block has {len(clocks)} marks for start and end")
    return max(clocks) - min(clocks)


def middle(spans: Sequence[Span], iterations: int = 4) -> tuple[float, float]:
    """From when to when a figure should show: some iterations from the middle of a block."""
    softmax = [s for s in spans if s.name == "softmax"]
    first = softmax[0].track
    starts = [s.start for s in softmax if s.track == first]
    at = len(starts) // 2
    return starts[at], starts[min(at + iterations, len(starts) - 1)]


def draw(path: Path) -> None:
    """The figure of a recorded trace, from the middle of the block, as PNG and SVG beside its file."""
    spans, about = read_trace(path), json.loads(path.read_text())["otherData"]
    start, stop = middle(spans)
    figure = plot_trace(spans, start=start, stop=stop)
    title = f"{about['kernel']}, head_dim {about['shape']['head_dim']}, on {about['source']}"
    figure.axes[0].set_title(f"{title}; recording made it {about['slower_by']:.1%} slower", fontsize=9)
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Record in-kernel timelines of the chapters' kernels on a Hopper GPU.")
    parser.add_argument("chapters", nargs="*", type=int, default=list(KERNELS))
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for chapter in options.chapters:
        kernel = kernel_of(chapter)
        everything = record(kernel, options.head_dim, heads=options.heads)
        cycles = [cycles_of(block) for block in everything]
        release = statistics.median(
            cycles_of(block) for block in record(kernel, options.head_dim, level=CYCLES, heads=options.heads)
        )
        slower = statistics.median(cycles) / release - 1
        chosen = sorted(range(BLOCKS), key=lambda b: cycles[b])[BLOCKS // 2]
        spans = spans_of(name_warpgroups(kernel, everything[chosen]), kernel.barriers)
        tracks = list(dict.fromkeys(s.track for s in spans if s.name == "softmax"))
        went_to = {track: {k: round(v, 4) for k, v in shares(spans, track).items()} for track in tracks}
        device = provenance([])["device"]
        suffix = "" if options.head_dim == 128 else f"_d{options.head_dim}"
        path = options.out / f"trace_{chapter:02}{suffix}_{slug(device)}.json"
        write_trace(
            path,
            spans,
            source=device,
            chapter=chapter,
            kernel=kernel.source.name,
            shape={
                "len": KEY_BLOCKS * kernel.block_k,
                "heads": options.heads,
                "head_dim": options.head_dim,
                "dtype": "e4m3" if input_type(kernel) == E4M3 else "bf16",
            },
            cycles=cycles[chosen],
            cycles_of_blocks=cycles,
            cycles_without_marks=release,
            slower_by=round(slower, 4),
            shares=went_to,
            provenance=provenance(["python", "-m", "fa_reference.kernels.trace", *map(str, options.chapters)]),
        )
        draw(path)
        print(f"chapter {chapter}: {cycles[chosen]:,} cycles a block, {release:,.0f} without marks ({slower:+.1%})")
        for track, parts in went_to.items():
            print(f"  {track}: " + ", ".join(f"{name} {share:.1%}" for name, share in parts.items()))
        print(f"  {path}", flush=True)


if __name__ == "__main__":
    main()
