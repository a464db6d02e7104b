// One tile of each product of attention on the matrix engine, without softmax between them, in bf16:
//     S (64, 64) = Q (64, d) K^T    and    O (64, d) = P V,    with P = S rounded to bf16, V (64, d).
//
// One block of 128 threads, one warpgroup, for one head. S and O are written out in fp32, contiguous (B, H, 64, columns).
#include "tma_engine.cuh"
#include "wgmma_engine.cuh"

constexpr int kHeadDim = FA_HEAD_DIM;  // set by the host
constexpr int kRows = 64;              // of every tile: queries and keys
constexpr int kThreads = 128;
constexpr u32 kTileBytes = kRows * kHeadDim * 2;

struct Shared {
    alignas(1024) u16 q[kRows * kHeadDim];
    alignas(1024) u16 k[kRows * kHeadDim];
    alignas(1024) u16 v[kRows * kHeadDim];
    u64 full;
};

enum BarrierName { FULL };

__device__ __forceinline__ u32 pack(float low, float high) {  // two values rounded to bf16, to nearest even
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The descriptors of layouts.py for tiles of kRows rows; `step` counts 16 of the summed dimension.
__device__ constexpr u64 k_major_descriptor(u32 address, int step) {
    u64 descriptor = 0;
    // TODO: columns 16 step .. of all rows: Q and K
    return descriptor;
}

__device__ constexpr u64 mn_major_descriptor(u32 address, int step) {
    u64 descriptor = 0;
    // TODO: rows 16 step .., all columns: V
    return descriptor;
}

// S = Q K^T, waited for. `q` and `k` are shared-memory addresses of tiles.
__device__ __forceinline__ void multiply_qk(float (&s)[kRows / 2], u32 q, u32 k) {
    // TODO: fence; wgmma_64x64 for every 16 columns, of which the first overwrites S; commit; wait for all.
    // Unroll the loop
}

// P in bf16: register r of step k of P V is p[4 k + r].
__device__ __forceinline__ void round_p(u32 (&p)[kRows / 4], const float (&s)[kRows / 2]) {
    // TODO: pack the two registers of S that layouts.py's p_registers(step, register) names
}

// O = P V, waited for. P comes from registers: Wgmma<N, true>::rs(o, p0, p1, p2, p3, descriptor, accumulate) is your
// wgmma_64x64 with N columns and A in four registers, and with V transposed on the way.
__device__ __forceinline__ void multiply_pv(float (&o)[kHeadDim / 2], const u32 (&p)[kRows / 4], u32 v) {
    // TODO: the same for O: one Wgmma<kHeadDim, true>::rs for every 16 keys
}

// Writes an accumulator (64, kColumns) to memory, row by row.
template <int kColumns>
__device__ __forceinline__ void store(float* out, const float (&d)[kColumns / 2]) {
    // TODO: where register i of this thread belongs, layouts.py's accumulator_place says
}

extern "C" __global__ void __launch_bounds__(kThreads)
    wgmma_tile(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
               const __grid_constant__ TensorMap v_map, float* s_out, float* o_out) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int head = blockIdx.x, batch = blockIdx.y;
    const long long flat_head = static_cast<long long>(batch) * gridDim.x + head;
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.full, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {  // three loads may report to one phase
        mbarrier_arrive_expect_tx(&shared.full, 3 * kTileBytes);
        tma_load_5d(shared.q, &q_map, &shared.full, 0, 0, 0, head, batch);
        tma_load_5d(shared.k, &k_map, &shared.full, 0, 0, 0, head, batch);
        tma_load_5d(shared.v, &v_map, &shared.full, 0, 0, 0, head, batch);
    }
    mbarrier_wait(&shared.full, 0, FULL);

    float s[kRows / 2] = {}, o[kHeadDim / 2] = {};
    u32 p[kRows / 4] = {};
    multiply_qk(s, shared_address(shared.q), shared_address(shared.k));
    round_p(p, s);
    multiply_pv(o, p, shared_address(shared.v));
    store<kRows>(s_out + flat_head * kRows * kRows, s);
    store<kHeadDim>(o_out + flat_head * kRows * kHeadDim, o);
}
