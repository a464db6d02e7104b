// Your wrappers of the matrix engine: what a tile in shared memory looks like to it, one product, and the three
// instructions around products. All 128 threads of the warpgroup execute each of them together.
//
// cuda/hopper/wgmma.cuh offers the same for every size, and attention.cu and the later chapters use that.
#pragma once
#include "hopper/base.cuh"
#include "hopper/wgmma_shapes.cuh"  // the text of register lists, and the product for every other size

// The descriptor of layouts.py: an operand in shared memory under the 128-byte swizzle; arguments in bytes.
// PTX ISA: "Matrix Descriptor". constexpr, so that the checks can ask the compiler for values.
__device__ constexpr u64 wgmma_descriptor(u32 address, u32 leading, u32 stride) {
    u64 descriptor = 0;
    // TODO: layouts.py's descriptor; make each part a u64 before you shift it up
    return descriptor;
}

// Products that follow see what this warpgroup wrote into accumulators and A registers before. Needed before the first
// product, and again whenever such registers were touched. PTX ISA: "wgmma.fence".
__device__ __forceinline__ void wgmma_fence() {
    // TODO: wgmma.fence.sync.aligned;
}

// All products issued since the last commit become one group. PTX ISA: "wgmma.commit_group".
__device__ __forceinline__ void wgmma_commit() {
    // TODO: wgmma.commit_group.sync.aligned;
}

// Returns when at most the kPending newest groups are unfinished. The registers of an unfinished group must not be
// touched, nor the shared memory that it reads be overwritten. PTX ISA: "wgmma.wait_group".
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    // TODO: wgmma.wait_group.sync.aligned N; with kPending as a constant operand ("n")
}

// Starts D (64 x 64, fp32) = A (64 x 16) B (16 x 64), or += if `accumulate` is not 0; A and B are bf16 tiles in shared
// memory, both K-major. PTX ISA: "wgmma.mma_async".
__device__ __forceinline__ void wgmma_64x64(float (&d)[32], u64 a, u64 b, int accumulate) {
    // TODO: wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {32 registers}, a, b, p, 1, 1, 0, 0; where the
    // predicate p says whether to add (setp.ne.b32 p, accumulate, 0;), the ones keep the signs of A and B, and
    // the zeros say that neither is transposed. {" WGMMA_REGISTERS_TO_32 "} writes operands %0 to %31 into the
    // text, and WGMMA_D32(d, 0) lists them as outputs, which are also inputs ("+f"); the next operand is %32
}
