// The softmax of the chapters' kernels by itself and beside wgmma of another warpgroup: warpgroup 0 does `mode`, 1 does
// `rounds` softmax steps (softmax, rescale, round, as in pingpong.cu) on registers.
// mode 0: nothing; 1: Q K^T batches; 2: P V batches; 3: softmax steps as well.
// `data`: 128 words that the compiler cannot know.
// out[0]: clocks of warpgroup 0; out[1]: batches or steps it did; out[2]: clocks of warpgroup 1; out[3]: its steps.
#include "pingpong.cu"
#include "micro/common.cuh"


__device__ __forceinline__ void softmax_steps(u32* out, const u32* data, int rounds, float c) {
    Rows rows;
    float s[kBlockK / 2], o[kHeadDim / 2];
    u32 p[kBlockK / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = __uint_as_float(data[i + 1]);
#pragma unroll
    for (int i = 0; i < kBlockK / 2; ++i) s[i] = __uint_as_float(data[i]);
    const u64 start = clock_now();
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        softmax(s, rows, c);
        rescale(o, rows.factor);
        round_p(p, s);
        keep(p);  // a use of every result, as P V would be
        keep(rows.l);
        asm volatile("barrier.sync.aligned %0, 128;" ::"r"(3 + threadIdx.x / 128) : "memory");
    }
    const u64 stop = clock_now();
    keep(o);
    if (threadIdx.x % 128 == 0) {
        out[0] = stop - start;
        out[1] = rounds;
    }
}

extern "C" __global__ void __launch_bounds__(256, 1) beside(u32* out, const u32* data, int mode, int rounds, float c) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    auto fill = [](u16* tile, u32 bytes) {
        for (u32 i = threadIdx.x; i < bytes / 4; i += 256) reinterpret_cast<u32*>(tile)[i] = 0x3c003b80u + i % 61;
    };
    fill(shared.q, sizeof(shared.q));
    fill(shared.k[0], sizeof(shared.k));
    fill(shared.v[0], sizeof(shared.v));
    fence_proxy_async();
    __syncthreads();
    const int warpgroup = warp_uniform(threadIdx.x / 128);
    if (warpgroup == 1) {
        softmax_steps(out + 2, data, rounds, c);
    } else if (mode == 3) {
        softmax_steps(out, data, rounds, c);
    } else if (mode == 1) {
        const u64 q_descriptor = wgmma_descriptor(shared_address(shared.q), 16);
        const u64 k_descriptor = wgmma_descriptor(shared_address(shared.k), 16);
        float s[kBlockK / 2];
        const u64 start = clock_now();
#pragma unroll 1
        for (int round = 0; round < rounds; ++round) {
            issue_qk(s, q_descriptor, k_descriptor);
            wgmma_wait<0>();
            keep(s);  // or the next batch, which overwrites S, would make this one needless
        }
        if (threadIdx.x == 0) out[0] = clock_now() - start, out[1] = rounds;
    keep(s);
    } else if (mode == 2) {
        const u64 v_descriptor = wgmma_descriptor(shared_address(shared.v), kBlockK * 128);
        float o[kHeadDim / 2];
        u32 p[kBlockK / 4];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < kBlockK / 4; ++i) p[i] = data[i];
        const u64 start = clock_now();
#pragma unroll 1
        for (int round = 0; round < rounds; ++round) {
            issue_pv(o, p, v_descriptor);
            wgmma_wait<0>();
        }
        if (threadIdx.x == 0) out[0] = clock_now() - start, out[1] = rounds;
    keep(o);
    }
}
