// What synchronisation costs: handing over at an mbarrier and at a named barrier, and asking one that is complete.
// out[0]: clocks of kRounds there-and-backs between two warpgroups at two mbarriers; out[1]: the same at two named
// barriers; out[2]: kRounds waits at an mbarrier whose phase is complete; out[3]: kRounds arrivals by one thread;
// out[4]: kRounds bar.sync of a warpgroup with itself; out[5]: kRounds of one thread arriving at an mbarrier, then
// bar.sync of its warpgroup; out[6], out[7]: how long the arrivals of out[0] and out[1], once more, kept the arriving
// warp, all added up; out[8]: the same for nothing.
#include "hopper/mbarrier.cuh"
#include "hopper/named_barrier.cuh"
#include "micro/common.cuh"

constexpr int kRounds = 256;

extern "C" __global__ void __launch_bounds__(256, 1) barriers(u32* out) {
    __shared__ u64 there, back, full, idle;
    const int thread = threadIdx.x % 128;
    const bool first = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 0;
    if (threadIdx.x == 0) {
        mbarrier_init(&there, 1);
        mbarrier_init(&back, 1);
        mbarrier_init(&full, 1);
        mbarrier_init(&idle, 1 << 19);
        mbarrier_init_fence();
    }
    __syncthreads();
    u64 start = clock_now();
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        if (first) {
            if (thread == 0) mbarrier_arrive(&there);
            mbarrier_wait(&back, round & 1);
        } else {
            mbarrier_wait(&there, round & 1);
            if (thread == 0) mbarrier_arrive(&back);
        }
    }
    if (threadIdx.x == 0) out[0] = clock_now() - start;
    __syncthreads();
    start = clock_now();
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        if (first) {
            named_barrier_arrive(1, 256);
            named_barrier_sync(2, 256);
        } else {
            named_barrier_sync(1, 256);
            named_barrier_arrive(2, 256);
        }
    }
    if (threadIdx.x == 0) out[1] = clock_now() - start;
    __syncthreads();
    u32 by_mbarrier = 0, by_named = 0, by_nothing = 0;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        if (first) {
            const u64 began = clock_now();
            if (thread == 0) mbarrier_arrive(&there);
            const u64 arrived = clock_now();
            mbarrier_wait(&back, round & 1);
            const u64 again = clock_now();
            named_barrier_arrive(1, 256);
            const u64 after = clock_now();
            by_mbarrier += arrived - began;
            by_named += after - again;
            by_nothing += clock_now() - after;
            named_barrier_sync(2, 256);
        } else {
            mbarrier_wait(&there, round & 1);
            if (thread == 0) mbarrier_arrive(&back);
            named_barrier_sync(1, 256);
            named_barrier_arrive(2, 256);
        }
    }
    if (threadIdx.x == 0) out[6] = by_mbarrier, out[7] = by_named, out[8] = by_nothing;
    __syncthreads();
    if (!first) return;
    start = clock_now();
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) mbarrier_wait(&full, 1);
    if (thread == 0) out[2] = clock_now() - start;
    start = clock_now();
    if (thread == 0)
#pragma unroll 1
        for (int round = 0; round < kRounds; ++round) mbarrier_arrive(&idle);
    if (thread == 0) out[3] = clock_now() - start;
    named_barrier_sync(3, 128);
    start = clock_now();
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) named_barrier_sync(3, 128);
    if (thread == 0) out[4] = clock_now() - start;
    start = clock_now();
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        if (thread == 0) mbarrier_arrive(&idle);
        named_barrier_sync(3, 128);
    }
    if (thread == 0) out[5] = clock_now() - start;
}
