// Tracing build (-DFA_TRACE): the wrappers of this folder note how long they took, so that a kernel needs no marks of
// its own. Release builds contain none of it.
//   FA_TRACE=1  only trace_start and trace_end, which bracket the kernel's work: for counting cycles
//   FA_TRACE=2  waits at mbarriers, at named barriers and for wgmma, and the moment of each wgmma commit as well
// One thread writes for its warpgroup: its first, or whichever runs the producer's code (FA_TRACE_PRODUCER=1: warpgroup
// 0 is a producer, and one elected thread of it does everything).
//
// An event is one 16-byte store to global memory, and nobody waits for it. There is no counter of events, which would
// have to live in a register of every kernel: the time itself is the place. Events of a warpgroup never begin within
// the same four clocks, so one that began at clock t goes to slot t / 4, modulo the number of slots; the host sorts.
// Recording costs 15 to 35 clocks an event all the same; the host measures how much slower the kernel became.
// fa_reference/kernels/trace.py reads the events, spans.py says what lies between them.
// PTX ISA: "Special Registers: %clock".
#pragma once
#include "base.cuh"

enum TraceEvent : u32 {  // the host has the same list
    TRACE_START = 1,
    TRACE_END,
    TRACE_MBARRIER,  // mbarrier_wait; detail: the barrier's name
    TRACE_BARRIER,   // named_barrier_sync; detail: the barrier's number
    TRACE_COMMIT,    // wgmma_commit
    TRACE_WGMMA,     // wgmma_wait; detail: groups that may stay unfinished
};

#ifdef FA_TRACE
#ifndef FA_TRACE_FIRST_BLOCK  // the blocks that are recorded, counted through the grid, x fastest
#define FA_TRACE_FIRST_BLOCK 0
#endif
#ifndef FA_TRACE_BLOCKS
#define FA_TRACE_BLOCKS 4
#endif
#ifndef FA_TRACE_PRODUCER
#define FA_TRACE_PRODUCER 0
#endif
#ifndef FA_TRACE_SLOTS  // a power of two: 65536 are enough for 262144 clocks
#define FA_TRACE_SLOTS 65536
#endif
constexpr u32 kTraceWarpgroups = 4;
constexpr u32 kTraceSlots = FA_TRACE_SLOTS;

// (block, warpgroup, slot) of (clock at the beginning, clock at the end, event | detail << 4, 0); zeros: empty.
extern "C" __device__ uint4 fa_trace_events[FA_TRACE_BLOCKS * kTraceWarpgroups * kTraceSlots] = {};

__device__ __forceinline__ u32 trace_now() {
    u32 now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    return now;
}

__device__ __forceinline__ void trace_record(u32 event, u32 detail, u32 began, u32 ended) {
    const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x - FA_TRACE_FIRST_BLOCK;
    const u32 warpgroup = threadIdx.x / 128;
    const bool mine = block < FA_TRACE_BLOCKS && (threadIdx.x % 128 == 0 || (FA_TRACE_PRODUCER && warpgroup == 0));
    char* const base = reinterpret_cast<char*>(fa_trace_events + (block * kTraceWarpgroups + warpgroup) * kTraceSlots);
    const u32 quarter = began & (4 * kTraceSlots - 4);  // of slot x 16 bytes
    // A predicated store and no branch: between a wgmma and its wait control flow must stay as it is.
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}" ::"r"(u32(mine)),
        "l"(base + 4ull * quarter), "r"(began), "r"(ended), "r"(event | detail << 4), "r"(0)
        : "memory");
}
#endif

// Something that takes no time, recorded from this level of FA_TRACE on.
template <int kLevel = 2>
__device__ __forceinline__ void trace_moment(u32 event) {
#ifdef FA_TRACE
    if constexpr (FA_TRACE >= kLevel) {
        const u32 now = trace_now();
        trace_record(event, 0, now, now);
    }
#endif
}

// The kernel's work begins and ends here; the host inserts these two calls into the source of a tracing build.
__device__ __forceinline__ void trace_start() {
#ifdef FA_TRACE
    if (threadIdx.x % 128 == 0) trace_moment<1>(TRACE_START);
#endif
}

__device__ __forceinline__ void trace_end() {
#ifdef FA_TRACE
    if (threadIdx.x % 128 == 0) trace_moment<1>(TRACE_END);
#endif
}

// For the wrappers: the clock where something begins (0 in other builds), and the note that it is over.
__device__ __forceinline__ u32 trace_begin() {
#if defined(FA_TRACE) && FA_TRACE >= 2
    return trace_now();
#else
    return 0;
#endif
}

__device__ __forceinline__ void trace_over(u32 event, u32 detail, u32 began) {
#if defined(FA_TRACE) && FA_TRACE >= 2
    trace_record(event, detail, began, trace_now());
#endif
}

