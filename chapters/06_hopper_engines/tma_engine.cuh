// Your wrappers of the copy engine: an mbarrier that counts bytes, and a TMA load that reports to it.
//
// cuda/hopper/mbarrier.cuh and tma.cuh offer the same functions, and attention.cu and the later chapters use those.
// Every wrapper is one PTX instruction. `asm volatile` keeps it in its place among the others; "memory" tells the
// compiler not to move loads and stores of memory across it. Operands: "r" a 32-bit register, "l" a 64-bit one, "n" a
// constant, "=r" a result. Shared memory is named by a 32-bit address: shared_address(pointer).
#pragma once
#include "hopper/base.cuh"
#include "hopper/deadlock.cuh"

// Prepares `barrier` for phases that `arrivals` arrivals complete, and that wait for as many bytes as were announced.
// Guarantees nothing about who sees it: that is the next function's job. PTX ISA: "mbarrier.init".
__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
    // TODO: mbarrier.init.shared::cta.b64 [address of the barrier], arrivals;
}

// TMA reaches memory through the "async proxy", a path that ordinary writes and __syncthreads know nothing about. After
// this fence it finds initialised barriers; after __syncthreads other threads do. PTX ISA: "fence.mbarrier_init".
__device__ __forceinline__ void mbarrier_init_fence() {
    // TODO: fence.mbarrier_init.release.cluster;
}

// Adds `bytes` to what this phase still waits for, then arrives once. The phase completes when no arrival and no byte
// is missing, and the next one begins by itself. PTX ISA: "mbarrier.arrive", qualifier .expect_tx.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    // TODO: mbarrier.arrive.expect_tx.shared::cta.b64 _, [address of the barrier], bytes; the _ throws away the
    // state that the instruction returns
}

// Has the phase with this parity completed? If yes, what TMA wrote for it is visible to this thread (acquire). It may
// answer no although the answer is about to be yes, so it belongs into a loop. PTX ISA: "mbarrier.try_wait".
__device__ __forceinline__ bool mbarrier_try_wait(u64* barrier, u32 parity) {
    u32 done = 1;
    // TODO: mbarrier.try_wait.parity.shared::cta.b64 p, [address of the barrier], parity; gives a predicate:
    // declare it (.reg .pred p;) and turn it into a number (selp.u32 %0, 1, 0, p;), all inside one { }
    return done != 0;
}

// Given. In the debug build the wait has a limit, and says who waited for what (deadlock.cuh).
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity, u32 name = 0, u32 iteration = 0) {
#ifdef FA_DEBUG
    bounded_wait([&] { return mbarrier_try_wait(barrier, parity); }, name, parity, iteration);
#else
    while (!mbarrier_try_wait(barrier, parity)) {
    }
#endif
}

// Asks TMA for the box of `map`'s tensor that starts at (c0, ..., c4), c0 innermost, and returns at once. The box is
// written to `destination`, a multiple of 1024; elements outside the tensor come as zeros. When a piece has arrived its
// bytes are taken off what `barrier` waits for. One thread calls it. PTX ISA: "cp.async.bulk.tensor".
__device__ __forceinline__ void tma_load_5d(void* destination, const TensorMap* map, u64* barrier, int c0, int c1,
                                            int c2, int c3, int c4) {
    // TODO: cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [address of the
    // destination], [map, {c0, c1, c2, c3, c4}], [address of the barrier]; the map's pointer is 64-bit
}
