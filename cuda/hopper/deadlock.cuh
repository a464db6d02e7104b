// Debug build (-DFA_DEBUG): every wait at a barrier is bounded. The first waiter whose time is up writes down who it is
// and what it waits for; from then on all waits give up at once, so the kernel runs to its end with a useless result
// instead of hanging, and the host can read the record. Every other warp of that block writes down where it stands then.
// Release builds contain none of this.
// The hardware has no wait with a limit for named barriers, so here they are counters in shared memory that open by the
// same rule. Not bounded: setmaxnreg and __syncthreads; a hang in those needs a time limit outside.
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
extern "C" __device__ DeadlockRecord fa_deadlock_record = {};     // `set` becomes 1 when it is claimed, 2 when complete
extern "C" __device__ DeadlockRecord fa_deadlock_others[16] = {};  // one a warp

__device__ __forceinline__ u64 global_nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// The first one to come writes down who it is and what it met with.
__device__ __forceinline__ void record_deadlock(DeadlockRecord& record, u32 name, u32 parity, u32 iteration) {
    if (atomicCAS(&record.set, 0u, 1u) != 0u) return;
    record.block = blockIdx.x;
    record.thread = threadIdx.x;
    record.name = name;
    record.parity = parity;
    record.iteration = iteration;
    __threadfence();
    atomicExch(&record.set, 2u);
}

template <class Done>
__device__ __forceinline__ void bounded_wait(Done done, u32 name, u32 parity, u32 iteration) {
    const u64 deadline = global_nanoseconds() + FA_DEBUG_WAIT_NS;
    while (!done()) {
        if (*reinterpret_cast<volatile u32*>(&fa_deadlock_record.set) == 2u) {  // somebody else gave up
            if (fa_deadlock_record.block == blockIdx.x)
                record_deadlock(fa_deadlock_others[threadIdx.x / 32], name, parity, iteration);
            return;
        }
        if (global_nanoseconds() >= deadline) record_deadlock(fa_deadlock_record, name, parity, iteration);
    }
}

// Of each named barrier: arrivals so far, and the number of threads that it was first used with. mbarrier_init_fence
// clears them.
__shared__ u32 fa_debug_arrivals[16], fa_debug_threads[16];
constexpr u32 kDebugNamedBarrier = 256;  // in the record: 256 + number of a named barrier
constexpr u32 kDebugCounts = 512;        // in the record: 512 + number of one that is used with two different counts

__device__ __forceinline__ void debug_clear_named_barriers() {
    for (int i = 0; i < 16; ++i) fa_debug_arrivals[i] = fa_debug_threads[i] = 0;
}

__device__ __forceinline__ u32 debug_arrive(u32 barrier, u32 threads) {
    const u32 first = atomicCAS(&fa_debug_threads[barrier], 0u, threads);
    if (first != 0 && first != threads) record_deadlock(fa_deadlock_record, kDebugCounts + barrier, first, threads);
    __threadfence_block();
    return atomicAdd(&fa_debug_arrivals[barrier], 1u);
}

// Opens when a multiple of `threads` is reached that includes this thread's own arrival.
__device__ __forceinline__ void debug_sync(u32 barrier, u32 threads) {
    const u32 opening = debug_arrive(barrier, threads) / threads;
    const volatile u32* arrivals = &fa_debug_arrivals[barrier];
    const u32 enough = (opening + 1) * threads;
    bounded_wait([&] { return *arrivals >= enough; }, kDebugNamedBarrier + barrier, opening & 1, opening);
    __threadfence_block();
    __syncwarp();
}
#endif
