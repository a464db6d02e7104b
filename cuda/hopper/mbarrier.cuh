// mbarrier: a barrier object in shared memory that counts arrivals and, for TMA, bytes still to come.
//
// A phase is complete when its pending arrivals and its pending bytes are both zero; the barrier then starts the next
// phase by itself. A waiter names the phase by its parity (0, 1, 0, 1, ...), so it must never fall two phases behind.
// A fresh barrier is in phase 0: waiting on parity 1 ("the phase before the first") returns at once, which is how a
// producer finds every slot of an empty ring free. Discipline here: consumers start with parity 0, producers with 1.
// PTX ISA: "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once
#include "base.cuh"
#include "deadlock.cuh"
#include "trace.cuh"

// Sets the number of arrivals that complete a phase. One thread, once; then mbarrier_init_fence and __syncthreads.
__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the asynchronous proxy (TMA), which __syncthreads alone does not.
// PTX ISA: "fence.mbarrier_init".
__device__ __forceinline__ void mbarrier_init_fence() {
#ifdef FA_DEBUG
    debug_clear_named_barriers();
#endif
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival. Release semantics: what this thread did before is visible to whoever sees the phase complete.
__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Announces `bytes` that TMA delivers in this phase, then arrives once. Bytes may come before their announcement, as the
// phase cannot end while this arrival is missing; the kernels here announce first, which is easier to get right.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Has the phase of this parity completed? May put the thread to sleep for a while, and may say no too early.
__device__ __forceinline__ bool mbarrier_try_wait(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Blocks until the phase of this parity has completed. Acquire semantics: bytes that TMA counted on this barrier, and
// what the arriving threads wrote before, are visible afterwards; no proxy fence is needed.
// `name` and `iteration` are only used by the debug and the tracing build (deadlock.cuh, trace.cuh).
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity, u32 name = 0, u32 iteration = 0) {
    const u32 began = trace_begin();
#ifdef FA_DEBUG
    bounded_wait([&] { return mbarrier_try_wait(barrier, parity); }, name, parity, iteration);
#else
    while (!mbarrier_try_wait(barrier, parity)) {
    }
#endif
    trace_over(TRACE_MBARRIER, name, began);
}
