// What the micro-measurements share: reading the SM's clock, and keeping a result alive without storing it.
#pragma once
#include "hopper/base.cuh"

// 64 bits: the read is then one fast instruction (CS2R), never the slow one into a uniform register.
__device__ __forceinline__ u64 clock_now() {
    u64 now;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
    return now;
}

// A use of the values that the compiler cannot leave out and that never happens: no block has a second row of threads.
template <int kCount, class T>
__device__ __forceinline__ void keep(const T (&values)[kCount]) {
    if (blockDim.y != 1) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(0), "r"(__builtin_bit_cast(u32, values[i])) : "memory");
    }
}
