// Fences between the ordinary and the asynchronous view of memory, and the choice of one thread in a warp.
#pragma once
#include "base.cuh"

// Ordinary stores to shared memory before this are seen by TMA and wgmma after it (they read through another "proxy",
// which barriers alone do not order). Every writing thread executes it, then a barrier, then the reader starts.
// Not needed for data that TMA itself wrote. PTX ISA: "fence.proxy.async".
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// True in exactly one lane of a converged warp. PTX ISA: "elect.sync".
__device__ __forceinline__ bool elect_one() {
    u32 elected;
    asm volatile(
        "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected)::"memory");
    return elected != 0;
}

// The value of lane 0, in every lane. All lanes usually hold it already: the shuffle is there to show the compiler that
// the value is the same across the warp, so that it may live in uniform registers (wgmma descriptors have to).
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
