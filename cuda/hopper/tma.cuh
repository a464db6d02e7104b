// TMA: one thread asks the copy engine for a whole box of a tensor; the engine computes the addresses, applies the
// shared-memory swizzle and reports to an mbarrier. Elements outside the tensor arrive as zeros (and count as bytes
// delivered), so ragged lengths need no special case on loads.
// PTX ISA: "cp.async.bulk.tensor", "prefetch.tensormap".
#pragma once
#include "base.cuh"

// Fetches the descriptor into the descriptor cache, so that the first copy does not wait for it.
__device__ __forceinline__ void tma_prefetch_descriptor(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Global -> shared: the box whose first element has coordinates c0 (innermost) .. c4. Completion adds the box's bytes
// to `barrier`, which must already expect them. `destination` must be 1024-byte aligned under the 128-byte swizzle.
__device__ __forceinline__ void tma_load_5d(void* destination, const TensorMap* map, u64* barrier, int c0, int c1,
                                            int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(destination)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Shared -> global: elements of the box outside the tensor are not written. The same thread must then commit and wait.
__device__ __forceinline__ void tma_store_5d(const TensorMap* map, const void* source, int c0, int c1, int c2, int c3,
                                             int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
        "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Closes this thread's group of bulk stores. PTX ISA: "cp.async.bulk.commit_group".
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Returns when the sources of all but the newest kPending groups have been read (shared memory may be reused; the
// global writes may still be on their way). PTX ISA: "cp.async.bulk.wait_group.read".
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
