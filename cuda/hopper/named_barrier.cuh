// Named barriers: the 16 hardware barriers of a block (number 0 is __syncthreads). A barrier opens when `threads`
// threads, counted warp by warp, have come to it; `sync` waits for that, `arrive` only counts and goes on. That
// asymmetry hands a turn from one warpgroup to the next: the next one syncs, the previous one arrives.
// Memory accesses before either are visible to those who leave the sync.
// PTX ISA: "bar, barrier" (barrier.sync and barrier.arrive).
#pragma once
#include "base.cuh"
#include "deadlock.cuh"
#include "trace.cuh"

__device__ __forceinline__ void named_barrier_sync(u32 barrier, u32 threads) {
    const u32 began = trace_begin();
#ifdef FA_DEBUG
    debug_sync(barrier, threads);
#else
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
    trace_over(TRACE_BARRIER, barrier, began);
}

__device__ __forceinline__ void named_barrier_arrive(u32 barrier, u32 threads) {
#ifdef FA_DEBUG
    debug_arrive(barrier, threads);
#else
    asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}
