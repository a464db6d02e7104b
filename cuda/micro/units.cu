// How fast the arithmetic units are: instructions of one kind, in independent chains (rate) or in one (latency).
// Every kernel writes, for each warp, the clocks of kRounds x kChains instructions.
#include "micro/common.cuh"

constexpr int kRounds = 128;

struct Fma { static __device__ __forceinline__ void run(float& x, float& y) { asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x) : "f"(y)); } };
struct Add { static __device__ __forceinline__ void run(float& x, float& y) { asm volatile("add.f32 %0, %0, %1;" : "+f"(x) : "f"(y)); } };
struct Mul { static __device__ __forceinline__ void run(float& x, float& y) { asm volatile("mul.f32 %0, %0, %1;" : "+f"(x) : "f"(y)); } };
struct Max { static __device__ __forceinline__ void run(float& x, float& y) { asm volatile("max.f32 %0, %1, %0;" : "+f"(x) : "f"(y)); } };
struct Exp { static __device__ __forceinline__ void run(float& x, float&) { asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x)); } };
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

template <class Operation, int kChains>
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
        __syncthreads();
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
    if (threadIdx.x % 32 == 0) out[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = stop - start;
}

#define UNIT(name, operation) \
    extern "C" __global__ void __launch_bounds__(512) rate_##name(u32* out) { measure<operation, 16>(out); } \
    extern "C" __global__ void __launch_bounds__(512) latency_##name(u32* out) { measure<operation, 1>(out); }

UNIT(fma, Fma)
UNIT(add, Add)
UNIT(mul, Mul)
UNIT(max, Max)
UNIT(exp2, Exp)
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
