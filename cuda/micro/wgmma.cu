// How fast the tensor cores are, and how long a warpgroup is held when it issues: batches of wgmma m64nNk16 (16 bit) or
// m64nNk32 (e4m3), with A from shared memory (SS) or registers (RS). Started with one or two warpgroups.
//
// out[warpgroup][0 .. 7]: for batches of 1, 2, 4 and 8 wgmmas alone: clocks until all are issued, until they are done.
// out[warpgroup][8]: clocks of kGroups batches of 8 with at most two in flight.
#include "hopper/fp8.cuh"
#include "hopper/wgmma.cuh"
#include "micro/common.cuh"

constexpr int kGroups = 64, kResults = 16;

extern __shared__ __align__(1024) unsigned char shared_bytes[];

template <int N, bool kRegisters, bool kFp8>
struct Batch {
    u64 a_descriptor, b_descriptor;
    u32 a[4];

    __device__ __forceinline__ explicit Batch(u32 warpgroup) {
        const u32 base = shared_address(shared_bytes);
        a_descriptor = wgmma_descriptor(base + warpgroup * 16384, 16);
        // SS, and 8 bits: rows of B are contiguous along K. RS with 16 bits: [N / 64][128 rows][64 columns].
        b_descriptor = wgmma_descriptor(base + 32768, kRegisters && !kFp8 ? 128 * 128 : 16);
        for (int i = 0; i < 4; ++i) a[i] = 0x3c003c00u + threadIdx.x;
    }

    __device__ __forceinline__ void issue(float (&d)[N / 2], int step) const {
        const u64 b = wgmma_advance(b_descriptor,
                                    kRegisters && !kFp8 ? step * 2048 : step / 4 * N * 128 + step % 4 * 32);
        const u64 from = wgmma_advance(a_descriptor, step / 4 * 8192 + step % 4 * 32);
        if constexpr (kFp8) {
            if constexpr (kRegisters) WgmmaE4m3<N>::rs(d, a[0], a[1], a[2], a[3], b, 1);
            else WgmmaE4m3<N>::ss(d, from, b, 1);
        } else {
            if constexpr (kRegisters) Wgmma<N, true>::rs(d, a[0], a[1], a[2], a[3], b, 1);
            else Wgmma<N, true>::ss(d, from, b, 1);
        }
    }
};

template <int N, bool kRegisters, bool kFp8, int kSteps>
__device__ __forceinline__ void alone(const Batch<N, kRegisters, kFp8>& batch, float (&d)[N / 2], u32* out) {
    u64 start = 0, issued = 0, done = 0;
#pragma unroll 1
    for (int pass = 0; pass < 4; ++pass) {
        asm volatile("barrier.sync.aligned %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
        start = clock_now();
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) batch.issue(d, step);
        wgmma_commit();
        issued = clock_now();
        wgmma_wait<0>();
        done = clock_now();
    }
    if (threadIdx.x % 128 == 0) {
        out[0] = issued - start;
        out[1] = done - start;
    }
}

template <int N, bool kRegisters, bool kFp8>
__device__ __forceinline__ void measure(u32* out) {
    for (u32 i = threadIdx.x; i < 98304 / 4; i += blockDim.x)
        reinterpret_cast<u32*>(shared_bytes)[i] = kFp8 ? 0x38303438u + i * 4 % 7 : 0x3c003b80u + i % 61;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const u32 warpgroup = threadIdx.x / 128;
    out += warpgroup * kResults;
    const Batch<N, kRegisters, kFp8> batch(__shfl_sync(0xffffffffu, warpgroup, 0));
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
    if (blockDim.x == 128) {  // a batch alone on the SM
        alone<N, kRegisters, kFp8, 1>(batch, d, out);
        alone<N, kRegisters, kFp8, 2>(batch, d, out + 2);
        alone<N, kRegisters, kFp8, 4>(batch, d, out + 4);
        alone<N, kRegisters, kFp8, 8>(batch, d, out + 6);
    }
    __syncthreads();
    const u64 start = clock_now();
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 8; ++step) batch.issue(d, step);
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    const u64 stop = clock_now();
    if (threadIdx.x % 128 == 0) out[8] = stop - start;
    keep(d);
}

// Two batches of eight m64n128k16 at once: warpgroup 1 issues its batch `delay` clocks after warpgroup 0.
// out[warpgroup]: clocks from the start of warpgroup 0 until its batch is done.
template <bool kFirstFromRegisters>
__device__ __forceinline__ void contend(u32* out, int delay) {
    for (u32 i = threadIdx.x; i < 98304 / 4; i += blockDim.x)
        reinterpret_cast<u32*>(shared_bytes)[i] = 0x3c003b80u + i % 61;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const Batch<128, kFirstFromRegisters, false> first(warpgroup);
    const Batch<128, false, false> second(warpgroup);
    float d[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) d[i] = 0.0f;
    u64 start = 0, stop = 0;
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
        __syncthreads();
        start = clock_now();
        if (warpgroup == 0) {
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 8; ++step) first.issue(d, step);
            wgmma_commit();
            wgmma_wait<0>();
        } else {
            while (clock_now() - start < delay) {
            }
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 8; ++step) second.issue(d, step);
            wgmma_commit();
            wgmma_wait<0>();
        }
        stop = clock_now();
    }
    if (threadIdx.x % 128 == 0) out[warpgroup] = stop - start;
    keep(d);
}

extern "C" __global__ void __launch_bounds__(256, 1) contend_ss(u32* out, int delay) { contend<false>(out, delay); }
extern "C" __global__ void __launch_bounds__(256, 1) contend_rs(u32* out, int delay) { contend<true>(out, delay); }

#define SHAPE(n) \
    extern "C" __global__ void __launch_bounds__(256, 1) ss_n##n(u32* out) { measure<n, false, false>(out); } \
    extern "C" __global__ void __launch_bounds__(256, 1) rs_n##n(u32* out) { measure<n, true, false>(out); } \
    extern "C" __global__ void __launch_bounds__(256, 1) fp8_ss_n##n(u32* out) { measure<n, false, true>(out); } \
    extern "C" __global__ void __launch_bounds__(256, 1) fp8_rs_n##n(u32* out) { measure<n, true, true>(out); }

SHAPE(64)
SHAPE(128)
SHAPE(256)
