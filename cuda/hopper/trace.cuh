// Tracing build (-DFA_TRACE): the wrappers of this folder note when they begin and end, so that a kernel needs no marks
// of its own. Release builds contain none of it.
//   FA_TRACE=1  only trace_start and trace_end, which bracket the kernel's work: for counting cycles
//   FA_TRACE=2  waits at mbarriers and named barriers, and wgmma's fence, commit and wait as well
// One thread writes for its warpgroup: its first, or whichever runs the producer's code (FA_TRACE_PRODUCER=1: warpgroup
// 0 is a producer, and one elected thread of it does everything).
//
// An event is one 8-byte store to global memory, and nobody waits for it. There is no counter of events, which would
// have to live in a register of every kernel: the time itself is the place. Two events of a warpgroup are never within
// the same four clocks, so an event at clock t goes to slot t / 4, modulo the number of slots; the host sorts them.
// fa_reference/kernels/trace.py reads them and says what the spans between them are.
// PTX ISA: "Special Registers: %clock".
#pragma once
#include "base.cuh"

enum TraceEvent : u32 {  // the host has the same list
    TRACE_START = 1,
    TRACE_END,
    TRACE_MBARRIER,    // begin and end of mbarrier_wait; detail: the barrier's name
    TRACE_MBARRIER_DONE,
    TRACE_BARRIER,     // begin and end of named_barrier_sync; detail: the barrier's number
    TRACE_BARRIER_DONE,
    TRACE_WGMMA_FENCE,  // a batch of wgmmas begins
    TRACE_WGMMA_COMMIT,
    TRACE_WGMMA_WAIT,  // begin and end of wgmma_wait; detail: groups that may stay unfinished
    TRACE_WGMMA_DONE,
};

#ifdef FA_TRACE
#ifndef FA_TRACE_FIRST_BLOCK  // the blocks that are recorded, counted through the grid, x fastest
#define FA_TRACE_FIRST_BLOCK 0
#endif
#ifndef FA_TRACE_BLOCKS
#define FA_TRACE_BLOCKS 4
#endif
#ifndef FA_TRACE_SLOTS
#define FA_TRACE_SLOTS 65536  // a power of two: 262144 clocks
#endif
#ifndef FA_TRACE_PRODUCER
#define FA_TRACE_PRODUCER 0
#endif
constexpr u32 kTraceWarpgroups = 4;

// (block, warpgroup, slot) of (clock, event | detail << 4 | iteration << 12); an empty slot is (0, 0).
extern "C" __device__ uint2 fa_trace_events[FA_TRACE_BLOCKS * kTraceWarpgroups * FA_TRACE_SLOTS] = {};

__device__ __forceinline__ void trace_record(u32 event, u32 detail, u32 iteration) {
    const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x - FA_TRACE_FIRST_BLOCK;
    const u32 warpgroup = threadIdx.x / 128;
    u32 now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    const bool mine = block < FA_TRACE_BLOCKS && (threadIdx.x % 128 == 0 || (FA_TRACE_PRODUCER && warpgroup == 0));
    const u32 slot = (block * kTraceWarpgroups + warpgroup) * FA_TRACE_SLOTS + now / 4 % FA_TRACE_SLOTS;
    // A predicated store and no branch: between a wgmma and its wait control flow must stay as it is.
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v2.u32 [%1], {%2, %3};\n}" ::"r"(u32(mine)),
        "l"(fa_trace_events + slot), "r"(now), "r"(event | detail << 4 | iteration << 12)
        : "memory");
}
#endif

// The kernel's work begins and ends here; the host inserts these two calls into the source of a tracing build.
__device__ __forceinline__ void trace_start() {
#ifdef FA_TRACE
    if (threadIdx.x % 128 == 0) trace_record(TRACE_START, 0, 0);
#endif
}

__device__ __forceinline__ void trace_end() {
#ifdef FA_TRACE
    if (threadIdx.x % 128 == 0) trace_record(TRACE_END, 0, 0);
#endif
}

// Called by the wrappers.
__device__ __forceinline__ void trace_event(u32 event, u32 detail = 0, u32 iteration = 0) {
#if defined(FA_TRACE) && FA_TRACE >= 2
    trace_record(event, detail, iteration);
#endif
}
