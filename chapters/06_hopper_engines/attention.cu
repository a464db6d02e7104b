// Attention with Hopper's engines: TMA loads tiles, wgmma multiplies them. O = softmax(scale Q K^T) V.
//
// One block of 128 threads, one warpgroup, computes kBlockQ = 64 rows of one head: S = Q K^T, online softmax, O += P V,
// with S, P and O in registers. There is one slot for K and one for V; thread 0 issues the load of the next block as
// soon as all have read the slot, and everybody waits until it has come. Two blocks of threads share an SM.
//
// Shared tiles are [head_dim / 64][rows][64] with the 128-byte swizzle, as one 5-D TMA box delivers them.
// The wrappers are the course's: those of tma_engine.cuh and wgmma_engine.cuh, for every size.
#include "hopper/base.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/sync.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

// ---- configuration: the macros are set by the host -----------------------------------------------------------------
constexpr int kHeadDim = FA_HEAD_DIM;
constexpr int kBlockK = FA_BLOCK_K;  // keys in a block
constexpr bool kCausal = FA_CAUSAL;
constexpr bool kBf16 = FA_BF16;

constexpr int kBlockQ = 64;
constexpr int kThreads = 128;
constexpr u32 kBytesQ = kBlockQ * kHeadDim * 2, kBytesKV = kBlockK * kHeadDim * 2;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

struct Problem {
    int len_q, len_k, queries_per_key_head;
    float scale;
    long long o_stride_batch, o_stride_head, o_stride_row;  // in elements
};

struct Shared {
    alignas(1024) u16 q[kBlockQ * kHeadDim];
    alignas(1024) u16 k[kBlockK * kHeadDim];
    alignas(1024) u16 v[kBlockK * kHeadDim];
    u64 q_full, k_full, v_full;
};

// Names of the barriers in the debug build's deadlock record; the host has the same list.
enum BarrierName { Q_FULL, K_FULL, V_FULL };

// ---- small helpers -------------------------------------------------------------------------------------------------
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {  // two values rounded to nearest even
    u32 packed;
    if constexpr (kBf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// A row is spread over four neighbouring lanes.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---- which rows, which keys ----------------------------------------------------------------------------------------
// Causal: the last rows see most keys and come first, so that no long block of threads is left for the end.
struct Tile {
    int query_start, head, batch, key_head;
    int key_blocks;       // blocks that some row sees: 0 .. key_blocks - 1, visited from the last one down to 0
    int unmasked_blocks;  // blocks of keys 0 .. unmasked_blocks - 1 need no mask: all rows see them whole

    __device__ __forceinline__ explicit Tile(const Problem& problem) {
        query_start = (kCausal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * kBlockQ;
        head = blockIdx.y;
        batch = blockIdx.z;
        key_head = head / problem.queries_per_key_head;
        int first_sees = problem.len_k, last_sees = problem.len_k;  // keys seen by the tile's first and last row
        if (kCausal) {
            const int last_row = min(query_start + kBlockQ, problem.len_q) - 1;
            first_sees = max(0, min(first_sees, query_start + 1 + problem.len_k - problem.len_q));
            last_sees = max(0, min(last_sees, last_row + 1 + problem.len_k - problem.len_q));
        }
        key_blocks = (last_sees + kBlockK - 1) / kBlockK;
        unmasked_blocks = first_sees / kBlockK;
    }
};

// ---- the steps -----------------------------------------------------------------------------------------------------
// Issues S (64, kBlockK) = Q (64, kHeadDim) K^T. 16 columns of the summed dimension are 32 bytes inside a 128-byte row;
// after four such steps comes the next block of 64 columns.
__device__ __forceinline__ void issue_qk(float (&s)[kBlockK / 2], u64 q_descriptor, u64 k_descriptor) {
    // TODO: fence; one wgmma (Wgmma<N, kBf16>::ss) for every 16 columns, the first overwrites S; commit.
    // wgmma_advance(descriptor, bytes) moves a descriptor on
}

// Issues O (64, kHeadDim) += P (64, kBlockK) V. P comes from registers; 16 rows of V are 16 x 128 bytes.
__device__ __forceinline__ void issue_pv(float (&o)[kHeadDim / 2], const u32 (&p)[kBlockK / 4], u64 v_descriptor) {
    // TODO: fence; one wgmma (Wgmma<N, kBf16>::rs) for every 16 keys, which adds to O; commit
}

// Scores of keys that a row must not see become -inf. `limit` = number of visible keys from this thread's first on.
__device__ __forceinline__ void mask(float (&s)[kBlockK / 2], int limit_top, int limit_bottom) {
#pragma unroll
    for (int i = 0; i < kBlockK / 2; ++i) {
        const int column = 8 * (i / 4) + i % 2;  // plus 2 (lane % 4), which the limits already contain
        if (column >= (i / 2 % 2 ? limit_bottom : limit_top)) s[i] = -kInfinity;
    }
}

// What a thread keeps for its two rows (l / 4 and l / 4 + 8 of its warp's 16): register i belongs to row i / 2 % 2.
struct Rows {
    float m[2] = {-kInfinity, -kInfinity};  // maximum so far, times c: where it stays, the factor is exactly 1
    float l[2] = {0.0f, 0.0f};              // this thread's part of the row sum
    float factor[2];                        // exp(m_old - m_new): what O has to be multiplied with
};

// Online softmax: S -> exp(scale (S - m)) in place, with the new maximum m. c = scale log2(e).
__device__ __forceinline__ void softmax(float (&s)[kBlockK / 2], Rows& rows, float c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float m = s[2 * half], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kBlockK / 2; ++i)
            if (i / 2 % 2 == half) m = fmaxf(m, s[i]);
        m = fmaxf(rows.m[half], quad_max(m) * c);
        const float subtract = m == -kInfinity ? 0.0f : m;  // -inf - (-inf) is not a number
        rows.factor[half] = exp2_approx(rows.m[half] - subtract);
        rows.m[half] = m;
#pragma unroll
        for (int i = 0; i < kBlockK / 2; ++i)
            if (i / 2 % 2 == half) sum += s[i] = exp2_approx(fmaf(s[i], c, -subtract));
        rows.l[half] = rows.l[half] * rows.factor[half] + sum;
    }
}

// P in 16 bits. Registers 8 k .. 8 k + 7 of S become the four of step k of P V: the layouts agree.
__device__ __forceinline__ void round_p(u32 (&p)[kBlockK / 4], const float (&s)[kBlockK / 2]) {
#pragma unroll
    for (int i = 0; i < kBlockK / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void rescale(float (&o)[kHeadDim / 2], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= factor[i / 2 % 2];
}

// O / l and the log-sum-exp -> global memory. A row without keys has l = 0: output 0 and lse = -inf.
__device__ __forceinline__ void store(const float (&o)[kHeadDim / 2], const Rows& rows, u16* o_pointer,
                                      float* lse_pointer, const Tile& tile, int row, int lane, const Problem& problem) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float l = quad_sum(rows.l[half]), inverse = l == 0.0f ? 0.0f : 1.0f / l;
        const int r = row + 8 * half;
        if (r >= problem.len_q) continue;
        const long long flat_head = static_cast<long long>(tile.batch) * gridDim.y + tile.head;
        if (lane % 4 == 0)
            lse_pointer[flat_head * problem.len_q + r] =
                l == 0.0f ? -kInfinity : kLn2 * (rows.m[half] + log2f(l));
        u16* o_row = o_pointer + tile.batch * problem.o_stride_batch + tile.head * problem.o_stride_head +
                     r * problem.o_stride_row + 2 * (lane % 4);
#pragma unroll
        for (int i = 2 * half; i < kHeadDim / 2; i += 4)
            *reinterpret_cast<u32*>(o_row + 2 * (i - 2 * half)) = pack(o[i] * inverse, o[i + 1] * inverse);
    }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
              const __grid_constant__ TensorMap v_map, u16* o_pointer, float* lse_pointer,
              const __grid_constant__ Problem problem) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const Tile tile(problem);
    const int thread = threadIdx.x, lane = thread % 32;
    const int row = tile.query_start + 16 * (thread / 32) + lane / 4;  // this thread's upper row
    const float c = problem.scale * kLog2e;
    const u64 q_descriptor = wgmma_descriptor(shared_address(shared.q), 16);
    const u64 k_descriptor = wgmma_descriptor(shared_address(shared.k), 16);
    const u64 v_descriptor = wgmma_descriptor(shared_address(shared.v), kBlockK * 128);
    // Keys that the two rows see, counted from this thread's first column on.
    int visible_top = problem.len_k, visible_bottom = problem.len_k;
    if (kCausal) {
        visible_top = min(visible_top, row + 1 + problem.len_k - problem.len_q);
        visible_bottom = min(visible_bottom, row + 9 + problem.len_k - problem.len_q);
    }
    visible_top -= 2 * (lane % 4);
    visible_bottom -= 2 * (lane % 4);

    // Block n in order of visits: the last keys come first. Called by thread 0.
    auto load_k = [&](int n) {
        // TODO: unless all blocks have been loaded: announce the bytes to the barrier, issue the load
    };
    auto load_v = [&](int n) {
        // TODO: the same for V
    };

    if (thread == 0) {
        mbarrier_init(&shared.q_full, 1);
        mbarrier_init(&shared.k_full, 1);
        mbarrier_init(&shared.v_full, 1);
        mbarrier_init_fence();
    }
    __syncthreads();

    Rows rows;
    float s[kBlockK / 2], o[kHeadDim / 2];
    u32 p[kBlockK / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;

    // TODO: thread 0 loads Q and the first blocks; wait for Q (also where no block follows). Then for every
    // block: wait for K, S = Q K^T, load the next K once all threads are done with this one; mask if needed,
    // softmax, rescale O, round P; wait for V, O += P V, load the next V likewise.
    store(o, rows, o_pointer, lse_pointer, tile, row, lane, problem);
}
