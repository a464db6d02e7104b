// Debug build (-DFA_DEBUG): every mbarrier wait is bounded. The first waiter whose time is up writes down who it is and
// what it waits for; from then on all waits give up at once, so the kernel runs to its end with a useless result
// instead of hanging, and the host can read the record. Release builds contain none of this. Not bounded: named barriers
// (the hardware has no wait with a limit for them); a hang in one needs a time limit outside.
#pragma once
#include "base.cuh"

#ifdef FA_DEBUG
#ifndef FA_DEBUG_WAIT_NS
#define FA_DEBUG_WAIT_NS 1000000000ull
#endif

// One word a field; the host reads it by name: (set, block, thread, barrier name, parity, iteration).
struct DeadlockRecord {
    u32 set, block, thread, name, parity, iteration;
};
extern "C" __device__ DeadlockRecord fa_deadlock_record = {};

__device__ __forceinline__ u64 global_nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

template <class Done>
__device__ __forceinline__ void bounded_wait(Done done, u32 name, u32 parity, u32 iteration) {
    const u64 deadline = global_nanoseconds() + FA_DEBUG_WAIT_NS;
    while (!done()) {
        if (*reinterpret_cast<volatile u32*>(&fa_deadlock_record.set) != 0) return;  // somebody else gave up
        if (global_nanoseconds() < deadline) continue;
        if (atomicCAS(&fa_deadlock_record.set, 0u, 1u) == 0u) {
            fa_deadlock_record.block = blockIdx.x;
            fa_deadlock_record.thread = threadIdx.x;
            fa_deadlock_record.name = name;
            fa_deadlock_record.parity = parity;
            fa_deadlock_record.iteration = iteration;
            __threadfence();
        }
        return;
    }
}
#endif
