// How fast the arithmetic units are: instructions of one kind, in independent chains (rate) or in one (latency), alone
// and beside wgmmas, exponentials or maxima of another warpgroup.
// Every kernel writes, for each warp, the clocks of kRounds x kChains instructions.
#include "hopper/fp8.cuh"
#include "hopper/sync.cuh"
#include "hopper/wgmma.cuh"
#include "micro/common.cuh"

constexpr int kRounds = 128;

struct Fma {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x) : "f"(y));
    }
};
struct Add {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("add.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    }
};
struct Mul {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("mul.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    }
};
struct Max {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("max.f32 %0, %1, %0;" : "+f"(x) : "f"(y));
    }
};
struct Exp {
    static __device__ __forceinline__ void run(float& x, float&) {
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    }
};
struct ToBf16 {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("{\n.reg .b32 t;\ncvt.rn.bf16x2.f32 t, %0, %1;\nmov.b32 %0, t;\n}" : "+f"(x) : "f"(y));
    }
};
struct ToFp16 {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("{\n.reg .b32 t;\ncvt.rn.f16x2.f32 t, %0, %1;\nmov.b32 %0, t;\n}" : "+f"(x) : "f"(y));
    }
};
struct ToE4m3 {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("{\n.reg .b16 t, z;\nmov.b16 z, 0;\ncvt.rn.satfinite.e4m3x2.f32 t, %0, %1;\nmov.b32 %0, {t, z};\n}"
                     : "+f"(x) : "f"(y));
    }
};
struct Shuffle {
    static __device__ __forceinline__ void run(float& x, float&) {
        asm volatile("{\n.reg .b32 t;\nmov.b32 t, %0;\nshfl.sync.bfly.b32 t, t, 1, 0x1f, 0xffffffff;\nmov.b32 %0, t;\n}"
                     : "+f"(x));
    }
};

// What the softmax does with a score once it has its maximum: one exponential, whose result is added up.
struct ExpSum {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("{\n.reg .f32 t;\nfma.rn.f32 t, %0, %1, %1;\nex2.approx.ftz.f32 %0, t;\nadd.f32 %1, %1, %0;\n}"
                     : "+f"(x), "+f"(y));
    }
};

// The same for two scores, which are then rounded into one register of P.
struct ExpSumRound {
    static __device__ __forceinline__ void run(float& x, float& y) {
        asm volatile("{\n.reg .f32 t, u;\n.reg .b32 p;\n"
                     "fma.rn.f32 t, %0, %1, %1;\nex2.approx.ftz.f32 t, t;\nadd.f32 %1, %1, t;\n"
                     "fma.rn.f32 u, %0, 0f3F000000, %0;\nex2.approx.ftz.f32 u, u;\nadd.f32 %1, %1, u;\n"
                     "cvt.rn.bf16x2.f32 p, t, u;\nmov.b32 %0, p;\n}"
                     : "+f"(x), "+f"(y));
    }
};

// All of the block start together, or with kThreads > 0 so many threads behind the first warpgroup.
template <class Operation, int kChains, int kThreads = 0>
__device__ __forceinline__ void measure(u32* out) {
    float x[kChains], y[kChains];
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
        x[i] = 1.0f + threadIdx.x * 1e-3f + i;
        y[i] = 0.5f + threadIdx.x * 1e-3f * (i + 1);
    }
    u64 start = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {  // the first one fills the instruction cache
        if constexpr (kThreads == 0) __syncthreads();
        else asm volatile("barrier.sync.aligned 1, %0;" ::"n"(kThreads) : "memory");
        start = clock_now();
#pragma unroll 1
        for (int round = 0; round < kRounds; round += 8)
#pragma unroll
            for (int inner = 0; inner < 8; ++inner)
#pragma unroll
                for (int i = 0; i < kChains; ++i) Operation::run(x[i], y[(i + inner) % kChains]);
    }
    // The clock is read when the last results are there.
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChains; ++i) sum += x[i];
    const u64 stop = clock_now() + (sum == 0.12345f);
    const u32 thread = kThreads == 0 ? threadIdx.x : threadIdx.x - 128;
    if (thread % 32 == 0) out[thread / 32] = stop - start;
}

// Keeps the tensor cores busy with batches of eight wgmmas m64n128k16, Q K^T's kind (SS: 0) or P V's (RS: 1), or m64n128k32
// on e4m3 (SS: 2, RS: 3).
template <int kKind>
__device__ __forceinline__ void multiply(int batches) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const u64 a = wgmma_descriptor(shared_address(shared_bytes), 16);
    const u64 b = wgmma_descriptor(shared_address(shared_bytes) + 16384, 16);
    float d[64];
    u32 p[4];
#pragma unroll
    for (int i = 0; i < 64; ++i) d[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = 0x3c003c00u + threadIdx.x;
#pragma unroll 1
    for (int batch = 0; batch < batches; ++batch) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 8; ++step) {
            if constexpr (kKind == 0) Wgmma<128, true>::ss(d, a, b, 1);
            if constexpr (kKind == 1) Wgmma<128, true>::rs(d, p[0], p[1], p[2], p[3], b, 1);
            if constexpr (kKind == 2) WgmmaE4m3<128>::ss(d, a, b, 1);
            if constexpr (kKind == 3) WgmmaE4m3<128>::rs(d, p[0], p[1], p[2], p[3], b, 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
    }
    keep(d);
}

// Keeps a unit busy for as long as so many batches of 64 exponentials need.
template <class Operation>
__device__ __forceinline__ void calculate(int batches) {
    float x[16], y[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = 1.0f + threadIdx.x * 1e-3f + i, y[i] = 0.5f + threadIdx.x * 1e-3f * (i + 1);
#pragma unroll 1
    for (int batch = 0; batch < batches; ++batch)
#pragma unroll
        for (int i = 0; i < 64; ++i) Operation::run(x[i % 16], y[(i + i / 16) % 16]);
    keep(x);
    keep(y);
}

// Warpgroup 0 multiplies or calculates, the other kThreads threads measure.
template <class Operation, int kChains, int kThreads = 128>
__device__ __forceinline__ void beside(u32* out, int kind, int batches) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    for (u32 i = threadIdx.x; i < 65536 / 4; i += 128 + kThreads)
        reinterpret_cast<u32*>(shared_bytes)[i] = 0x3c003b80u + i % 61;
    fence_proxy_async();
    __syncthreads();
    if (warp_uniform(threadIdx.x / 128) == 0) {
        if (kind == 0) multiply<0>(batches);
        else if (kind == 1) multiply<1>(batches);
        else if (kind == 2) multiply<2>(batches);
        else if (kind == 3) multiply<3>(batches);
        else if (kind == 4) calculate<ExpSum>(batches);
        else calculate<Max>(4 * batches);
    } else {
        measure<Operation, kChains, kThreads>(out);
    }
}

#define UNIT(name, operation) \
    extern "C" __global__ void __launch_bounds__(512) rate_##name(u32* out) { measure<operation, 16>(out); } \
    extern "C" __global__ void __launch_bounds__(512) latency_##name(u32* out) { measure<operation, 1>(out); } \
    extern "C" __global__ void __launch_bounds__(256, 1) beside_##name(u32* out, int kind, int batches) { \
        beside<operation, 16>(out, kind, batches); \
    } \
    extern "C" __global__ void __launch_bounds__(384, 1) beside2_##name(u32* out, int kind, int batches) { \
        beside<operation, 16, 256>(out, kind, batches); \
    } \
    extern "C" __global__ void __launch_bounds__(256, 1) \
        latency_beside_##name(u32* out, int kind, int batches) { \
        beside<operation, 1>(out, kind, batches); \
    }

UNIT(fma, Fma)
UNIT(add, Add)
UNIT(mul, Mul)
UNIT(max, Max)
UNIT(exp2, Exp)
UNIT(exp2_sum, ExpSum)
UNIT(exp2_sum_round, ExpSumRound)
UNIT(to_bf16, ToBf16)
UNIT(to_fp16, ToFp16)
UNIT(to_e4m3, ToE4m3)
UNIT(shuffle, Shuffle)

// Maximum over the four threads of a row, as the kernels do it, in a chain.
extern "C" __global__ void quad_max(u32* out) {
    float x = threadIdx.x;
    u64 start = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        start = clock_now();
#pragma unroll 4
        for (int round = 0; round < kRounds; ++round) {
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2)) + 1.0f;
        }
    }
    const u64 stop = clock_now() + (x == 0.5f);
    if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = stop - start;
}
