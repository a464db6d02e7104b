// wgmma: D (64 x N, fp32, in the registers of one warpgroup) = or += A (64 x 16) B (16 x N), asynchronously.
// A comes from shared memory (SS) or registers (RS), B always from shared memory. All 128 threads of the warpgroup
// execute every instruction here together. PTX ISA: "Asynchronous Warpgroup Level Matrix Instructions".
//
// Layout of D: thread t of the warpgroup, w = t / 32, l = t % 32, register i holds
//     row 16 w + l / 4 + 8 ((i / 2) % 2),   column 8 (i / 4) + 2 (l % 4) + i % 2.
// Layout of A in registers (4 registers of two 16-bit values): register r holds
//     row 16 w + l / 4 + 8 (r % 2),         columns 2 (l % 4) + 8 (r / 2) + {0, 1}.
// So registers 8 k .. 8 k + 7 of D, rounded and packed in pairs, are A for step k of the next product: no data moves.
#pragma once
#include "base.cuh"
#include "wgmma_shapes.cuh"
#include "trace.cuh"

// Shared-memory matrix descriptor for the 128-byte swizzle. Bits 0-13: address / 16; 16-29: leading byte offset / 16;
// 32-45: stride byte offset / 16; 62-63: swizzle mode (1 = 128 bytes). The swizzle's unit is 8 rows of 128 bytes.
// K-major operand (Q, K: contiguous along the summed dimension): `stride` = 1024, from 8 rows to the next 8; `leading`
// is not used. MN-major operand (V: contiguous along N): `leading` = from 64 columns to the next 64, `stride` = 1024.
// PTX ISA: "Shared Memory Matrix Layout", "Matrix Descriptor".
__device__ __forceinline__ u64 wgmma_descriptor(u32 address, u32 leading, u32 stride = 1024) {
    return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(leading >> 4) << 16 |
           static_cast<u64>(stride >> 4) << 32 | 1ull << 62;
}

// The same descriptor, `bytes` further on (a multiple of 16).
__device__ __forceinline__ u64 wgmma_advance(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

// Orders register accesses of this warpgroup before the wgmmas that follow: needed before the first one, and whenever
// other instructions have touched accumulators or A registers since. PTX ISA: "wgmma.fence".
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a batch of wgmmas. PTX ISA: "wgmma.commit_group".
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    trace_moment(TRACE_COMMIT);
}

// Returns when at most the newest kPending batches are unfinished. Until then neither the accumulators nor the A
// registers of an unfinished batch may be touched, nor its shared memory overwritten. PTX ISA: "wgmma.wait_group".
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    const u32 began = trace_begin();
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    trace_over(TRACE_WGMMA, kPending, began);
}
