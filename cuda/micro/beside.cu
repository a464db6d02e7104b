// The softmax of the chapters' kernels by itself and beside what other warpgroups do. Three warpgroups, each with a job:
//   0 nothing   1 Q K^T batches   2 P V batches   3 softmax steps (softmax, rescale, round, as in pingpong.cu)
//   4 the end of such a step alone (rescale, round)   5 Q K^T and P V issued together, waited for one after the other
//   6 turning V round, a block at a time (only with FA_FP8, which takes everything from chapter 10's fp8.cu)
// Warpgroup 0 can have any job but 4; warpgroups 1 and 2 have 0, 3 or 4, and 2 starts `delay` clocks after 1. (At d 128
// there are registers for two: 2 has 0. But beside_producer, whose warpgroup 0 has only jobs 0 and 6.) Warpgroup 0 does `batches`, enough to last until the others have done `rounds`.
// `data`: 128 words that the compiler cannot know.
// out[2 w], out[2 w + 1]: clocks of warpgroup w, and how many batches or steps they are for. Of the batches only the
// first `rounds` / 2 count: the others are still at work then.
// out[6 .. 9], for job 5: from the start until Q K^T is issued, P V is issued, Q K^T is done, P V is done, all added up.
#ifdef FA_FP8
#include "fp8.cu"
constexpr int kRegistersP = kBlockK / 8;
#else
#include "pingpong.cu"
constexpr int kRegistersP = kBlockK / 4;
#endif
#include "micro/common.cuh"

__device__ __forceinline__ void softmax_steps(u32* out, const u32* data, bool whole, int rounds, float c) {
    Rows rows;
    rows.factor[0] = rows.factor[1] = c;
    float s[kBlockK / 2], o[kHeadDim / 2];
    u32 p[kRegistersP];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = __uint_as_float(data[i + 1]);
#pragma unroll
    for (int i = 0; i < kBlockK / 2; ++i) s[i] = __uint_as_float(data[i]);
    const u64 start = clock_now();
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        if (whole) softmax(s, rows, c);
        rescale(o, rows.factor);
        round_p(p, s);
        keep(p);  // a use of every result, as P V would be
        keep(rows.l);
        asm volatile("barrier.sync.aligned %0, 128;" ::"r"(5 + threadIdx.x / 128) : "memory");
    }
    const u64 stop = clock_now();
    keep(o);
    if (threadIdx.x % 128 == 0) {
        out[0] = stop - start;
        out[1] = rounds;
    }
}

// Batches of one kind or pairs of them. The clock stops after `counted` batches.
template <bool kQk, bool kPv>
__device__ __forceinline__ void multiply(u32* out, const u32* data, const Shared& shared, int batches, int counted) {
    const u64 q_descriptor = wgmma_descriptor(shared_address(shared.q), 16);
    const u64 k_descriptor = wgmma_descriptor(shared_address(shared.k), 16);
    const u64 v_descriptor = wgmma_descriptor(shared_address(shared.v), kBlockK * 128);
    float s[kBlockK / 2], o[kHeadDim / 2];
    u32 p[kRegistersP];
    if constexpr (kPv) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < kRegistersP; ++i) p[i] = data[i];
    }
    u32 sums[4] = {};
    u64 start = clock_now(), stop = 0;
#pragma unroll 1
    for (int batch = 0; batch < batches; ++batch) {
        const u64 began = clock_now();
        if constexpr (kQk) issue_qk(s, q_descriptor, k_descriptor);
        if constexpr (kQk && kPv) sums[0] += clock_now() - began;
        if constexpr (kPv) issue_pv(o, p, v_descriptor);
        if constexpr (kQk && kPv) {
            sums[1] += clock_now() - began;
            wgmma_wait<1>();
            sums[2] += clock_now() - began;
        }
        wgmma_wait<0>();
        if constexpr (kQk && kPv) sums[3] += clock_now() - began;
        if constexpr (kQk) keep(s);  // or the next batch, which overwrites S, would make this one needless
        if (batch + 1 == counted) {
            stop = clock_now();
            if (threadIdx.x == 0) {
                out[0] = stop - start;
                out[1] = counted;
                for (int i = 0; i < 4; ++i) out[6 + i] = sums[i];
            }
        }
    }
    if constexpr (kPv) keep(o);
}

__device__ __forceinline__ void fill(Shared& shared) {
    for (u32 i = threadIdx.x; i < sizeof(shared) / 4; i += 384)
        reinterpret_cast<u32*>(&shared)[i] = 0x3c003b80u + i % 61;
    fence_proxy_async();
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    beside(u32* out, const u32* data, int job0, int job1, int job2, int batches, int rounds, int delay, float c) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    fill(shared);
    const int warpgroup = warp_uniform(threadIdx.x / 128);
    constexpr bool kLarge = kHeadDim > 64;
    if (kLarge && warpgroup == 2) {
        registers_release_to<24>();
    } else if (warpgroup == 0) {
        if constexpr (kLarge) registers_claim_up_to<240>();
        if (job0 == 1) multiply<true, false>(out, data, shared, batches, rounds / 2);
        else if (job0 == 2) multiply<false, true>(out, data, shared, batches, rounds / 2);
        else if (job0 == 5) multiply<true, true>(out, data, shared, batches, rounds / 2);
        else if (job0 == 3) softmax_steps(out, data, true, rounds, c);
    } else {
        if constexpr (kLarge) registers_claim_up_to<240>();
        const int job = warpgroup == 1 ? job1 : job2;
        const u64 start = clock_now();
        while (warpgroup == 2 && clock_now() - start < delay) {
        }
        if (job >= 3) softmax_steps(out + 2 * warpgroup, data, job == 3, rounds, c);
    }
}

#ifdef FA_FP8
extern "C" __global__ void __launch_bounds__(384, 1)
    beside_producer(u32* out, const u32* data, int job0, int job1, int job2, int batches, int rounds, int delay,
                    float c) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    fill(shared);
    const int warpgroup = warp_uniform(threadIdx.x / 128);
    if (warpgroup == 0) {
        registers_release_to<kProducerRegisters>();
        const u64 start = clock_now();
#pragma unroll 1
        for (int batch = 0; job0 == 6 && batch < batches; ++batch) {
            transpose_v(shared_address(shared.v_rows[batch % 2]), shared_address(shared.v[batch % 2]), threadIdx.x);
            fence_proxy_async();
            named_barrier_sync(kProducerBarrier, 128);
            if (batch + 1 == rounds / 2 && threadIdx.x == 0) {
                out[0] = clock_now() - start;
                out[1] = rounds / 2;
            }
        }
    } else {
        registers_claim_up_to<kConsumerRegisters>();
        const int job = warpgroup == 1 ? job1 : job2;
        const u64 start = clock_now();
        while (warpgroup == 2 && clock_now() - start < delay) {
        }
        if (job >= 3) softmax_steps(out + 2 * warpgroup, data, job == 3, rounds, c);
    }
}
#endif
