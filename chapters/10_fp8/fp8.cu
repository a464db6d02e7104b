// FP8: the kernel of chapter 9 on e4m3 numbers (FlashAttention-3 paper, arXiv 2407.08608, section 3.3).
// O = softmax(scale Q K^T) V, where Q, K and V are codes times scales: Q and K have one scale a block of rows, V one a
// head. P is rounded to e4m3 too; sums, softmax and O are fp32, the output is bf16.
//
// One block of 384 threads computes kBlockQ = 128 rows of one head. Its warpgroups have different jobs:
//   producer   (0)     one thread issues TMA loads of Q, and of K and V blocks into rings of kStages slots;
//                      all four warps then turn each block of V round, as FP8 products want its keys contiguous;
//   consumers  (1, 2)  each owns 64 rows: S = Q K^T, online softmax, O += P V, with S, P and O in registers.
// Producer and consumers meet at mbarriers: `full` (the bytes are there), `empty` (both consumers have read the slot).
// The consumers take turns at issuing to the tensor cores. In a turn each issues S of the next block and P V of this
// one; its softmax of the next block then runs beside its own P V and beside the other's turn.
//
// Shared tiles are [rows][128] bytes with the 128-byte swizzle, as one 5-D TMA box delivers them; V turned round is
// [head_dim][128 keys], its keys in the order that P's registers have.
#include "hopper/base.cuh"
#include "hopper/fp8.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/named_barrier.cuh"
#include "hopper/registers.cuh"
#include "hopper/sync.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

// ---- configuration: the macros are set by the host -----------------------------------------------------------------
constexpr int kHeadDim = FA_HEAD_DIM;
constexpr int kBlockK = FA_BLOCK_K;  // keys in a block
constexpr int kStages = FA_STAGES;   // slots in the rings of K and V
constexpr bool kCausal = FA_CAUSAL;
static_assert(kHeadDim == 128 && kBlockK == 128, "a row of Q, K and of V turned round is what the swizzle spans");

constexpr int kConsumers = 2;
constexpr int kBlockQ = 64 * kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 3 x 168 at launch
constexpr u32 kBytesQ = kBlockQ * kHeadDim, kBytesKV = kBlockK * kHeadDim;
constexpr float kOffset = 8.0f;  // P is computed as 2^8 exp(s - m): e4m3 holds [2^-9, 448]
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

struct Problem {
    int len_q, len_k, queries_per_key_head;
    float scale;
    long long o_stride_batch, o_stride_head, o_stride_row;  // in elements
};

// What the codes have to be multiplied with. Q and K have `..._blocks` scales a head, one or as many as blocks of rows;
// V has one a head. Heads are counted through all batches.
struct Scales {
    const float *q, *k, *v;
    int q_blocks, k_blocks;
};

struct Shared {
    alignas(1024) unsigned char q[kBlockQ * kHeadDim];
    alignas(1024) unsigned char k[kStages][kBlockK * kHeadDim];
    alignas(1024) unsigned char v_rows[kStages][kBlockK * kHeadDim];  // V as it lies in memory
    alignas(1024) unsigned char v[kStages][kHeadDim * kBlockK];       // V turned round
    u64 q_full, k_full[kStages], k_empty[kStages], v_rows_full[kStages], v_full[kStages], v_empty[kStages];
};

// Names of the barriers in the debug build's deadlock record; the host has the same list.
enum BarrierName { Q_FULL, K_FULL, K_EMPTY, V_ROWS_FULL, V_FULL, V_EMPTY };
constexpr u32 kTurnBarrier = 1;      // named barriers 1 and 2: the turn of consumer 0 and of consumer 1
constexpr u32 kProducerBarrier = 3;  // the four warps of the producer have read a block of V

// ---- small helpers -------------------------------------------------------------------------------------------------
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {  // two values rounded to nearest even
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
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
    int batch_head, batch_key_head;  // heads counted through all batches
    int key_blocks;       // blocks that some row sees; visited from the last key on
    int unmasked_blocks;  // the first ones of them: all rows see them whole

    __device__ __forceinline__ explicit Tile(const Problem& problem) {
        query_start = (kCausal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * kBlockQ;
        head = blockIdx.y;
        batch = blockIdx.z;
        key_head = head / problem.queries_per_key_head;
        batch_head = batch * gridDim.y + head;
        batch_key_head = batch * (gridDim.y / problem.queries_per_key_head) + key_head;
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

// ---- scales --------------------------------------------------------------------------------------------------------
// The scale of a block of rows: number `block` of its head, or the head's only one.
__device__ __forceinline__ float block_scale(const float* scale, int blocks, int batch_head, int block) {
    return scale[batch_head * blocks + min(block, blocks - 1)];
}

// Codes of Q times codes of K, times this, times the scale of the block of keys = score in units of log2.
__device__ __forceinline__ float query_factor(const Tile& tile, const Problem& problem, const Scales& scales) {
    float factor = 0.0f;
    // TODO: the softmax scale, kLog2e, and block_scale of this tile's queries, in one number
    return factor;
}

// ---- producer ------------------------------------------------------------------------------------------------------
// Where 16-byte chunk `chunk` of row `row` of a tile lies: the 128-byte swizzle.
__device__ __forceinline__ u32 swizzled(int row, int chunk) { return row * 128 + ((chunk ^ row % 8) * 16); }

// V (kBlockK, kHeadDim) -> (kHeadDim, kBlockK), bytes, keys in the order of layouts.py's key_at. Each of the four warps takes
// 16 keys x 32 channels at a time: four matrices of 8 keys x 16 channels, which are 8 x 8 units of two bytes.
__device__ __forceinline__ void transpose_v(u32 v_rows, u32 v, int thread) {
    const int warp = thread / 32, lane = thread % 32;
    // TODO: ldmatrix_x4_transposed, byte_permute, stmatrix_x4, with addresses and selectors of layouts.py. The
    // producer has 40 registers: addresses kept for many unrolled steps do not fit
}

// The whole warpgroup; its thread 0 issues the copies. Item n of a ring lies in slot n % kStages; it is that slot's
// (n / kStages)-th, whose lowest bit is the parity that its `full` barrier completes.
__device__ __forceinline__ void produce(Shared& shared, const Tile& tile, const TensorMap& q_map,
                                        const TensorMap& k_map, const TensorMap& v_map) {
    const int thread = threadIdx.x;
    // TODO: thread 0 loads Q as in chapter 9. Then for block n, thread 0 loads V into v_rows (all have read the
    // slot's last block: the barrier at the end says so) and K as in chapter 9; then all turn round V of block
    // n - 1: wait until its bytes are there and until its slot in v is empty, __syncwarp (ldmatrix needs all
    // lanes together), transpose, fence_proxy_async (the tensor cores read it), arrive at v_full (128
    // arrivals), and named_barrier_sync(kProducerBarrier, 128). One iteration more than there are blocks.
}

// ---- the steps of a consumer ---------------------------------------------------------------------------------------
// Issues S (64, kBlockK) = Q (64, kHeadDim) K^T. 32 columns of the summed dimension are 32 bytes of a 128-byte row.
__device__ __forceinline__ void issue_qk(float (&s)[kBlockK / 2], u64 q_descriptor, u64 k_descriptor) {
    wgmma_fence();
    // TODO: WgmmaE4m3<kBlockK>::ss for every 32 columns
    wgmma_commit();
}

// Issues O (64, kHeadDim) += P (64, kBlockK) V. P comes from registers; V was turned round: 32 keys are 32 bytes.
__device__ __forceinline__ void issue_pv(float (&o)[kHeadDim / 2], const u32 (&p)[kBlockK / 8], u64 v_descriptor) {
    wgmma_fence();
    // TODO: WgmmaE4m3<kHeadDim>::rs for every 32 keys
    wgmma_commit();
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
    float l[2] = {0.0f, 0.0f};              // this thread's part of the row sum, times 2^kOffset
    float factor[2];                        // exp(m_old - m_new): what O has to be multiplied with
};

// Online softmax: S -> 2^kOffset exp(scale (S - m)) in place, with the new maximum m. c = q_factor times the
// scale of this block of keys: m is kept in units of log2, so that blocks with different scales share it.
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
        // TODO: as in chapter 9, but with exponents that are kOffset larger (the factor's is not)
        rows.l[half] = rows.l[half] * rows.factor[half] + sum;
    }
}

// A use of S before the wait that follows. Without one, the compiler moves the whole softmax behind the wait for P V,
// and nothing overlaps. It moves nothing across a branch, though, even one that is never taken.
__device__ __forceinline__ void pin(const float (&s)[kBlockK / 2]) {
#pragma unroll
    for (int i = 0; i < kBlockK / 2; ++i) asm volatile("st.shared.f32 [%0], %1;" ::"r"(0), "f"(s[i]));
}

// P in e4m3. Registers 8 j .. 8 j + 7 of S are 16 keys of two rows. They become registers 2 j (upper row) and 2 j + 1
// of P: four bytes of one row, the keys in the order of key_at (layouts.py).
__device__ __forceinline__ void round_p(u32 (&p)[kBlockK / 8], const float (&s)[kBlockK / 2]) {
    // TODO: pack_e4m3 with the four registers of S that p_registers in layouts.py names
}

__device__ __forceinline__ void rescale(float (&o)[kHeadDim / 2], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= factor[i / 2 % 2];
}

// O v_scale / l and the log-sum-exp -> global memory. A row without keys has l = 0: output 0 and lse = -inf.
__device__ __forceinline__ void store(const float (&o)[kHeadDim / 2], const Rows& rows, float v_scale, u16* o_pointer,
                                      float* lse_pointer, const Tile& tile, int row, int lane, const Problem& problem) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float l = quad_sum(rows.l[half]);
        float inverse = 0.0f, lse = -kInfinity;
        // TODO: for a row that has keys: what O is multiplied with, and lse = ln2 (m + log2(l)) without the
        // factor 2^kOffset that l contains (and O too, so it cancels there)
        const int r = row + 8 * half;
        if (r >= problem.len_q) continue;
        if (lane % 4 == 0) lse_pointer[static_cast<long long>(tile.batch_head) * problem.len_q + r] = lse;
        u16* o_row = o_pointer + tile.batch * problem.o_stride_batch + tile.head * problem.o_stride_head +
                     r * problem.o_stride_row + 2 * (lane % 4);
#pragma unroll
        for (int i = 2 * half; i < kHeadDim / 2; i += 4)
            *reinterpret_cast<u32*>(o_row + 2 * (i - 2 * half)) = pack_bf16(o[i] * inverse, o[i + 1] * inverse);
    }
}

// ---- consumer ------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void consume(Shared& shared, const Tile& tile, const int consumer, u16* o_pointer,
                                        float* lse_pointer, const Problem& problem, const Scales& scales) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row = tile.query_start + 64 * consumer + 16 * (thread / 32) + lane / 4;  // this thread's upper row
    const float q_factor = query_factor(tile, problem, scales);
    const u64 q_descriptor = wgmma_descriptor(shared_address(shared.q) + consumer * 64 * 128, 16);
    const u64 k_descriptor = wgmma_descriptor(shared_address(shared.k), 16);
    const u64 v_descriptor = wgmma_descriptor(shared_address(shared.v), 16);
    // Keys that the two rows see, counted from this thread's first column on.
    int visible_top = problem.len_k, visible_bottom = problem.len_k;
    if (kCausal) {
        visible_top = min(visible_top, row + 1 + problem.len_k - problem.len_q);
        visible_bottom = min(visible_bottom, row + 9 + problem.len_k - problem.len_q);
    }
    visible_top -= 2 * (lane % 4);
    visible_bottom -= 2 * (lane % 4);
    const bool never = problem.len_k < 0;  // something that the compiler cannot know
    const u32 my_turn = kTurnBarrier + consumer, other_turn = kTurnBarrier + 1 - consumer;

    Rows rows;
    float s[kBlockK / 2], o[kHeadDim / 2];
    u32 p[kBlockK / 8];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;

    mbarrier_wait(&shared.q_full, 0, Q_FULL);
    if (consumer == 1) named_barrier_arrive(other_turn, 256);  // consumer 0 may begin
    if (tile.key_blocks > 0) {
        mbarrier_wait(&shared.k_full[0], 0, K_FULL, 0);
        issue_qk(s, q_descriptor, k_descriptor);
        wgmma_wait<0>();
        if (thread == 0) mbarrier_arrive(&shared.k_empty[0]);
        const int last = tile.key_blocks - 1;
        const float c = q_factor * block_scale(scales.k, scales.k_blocks, tile.batch_key_head, last);
        if (last >= tile.unmasked_blocks) mask(s, visible_top - last * kBlockK, visible_bottom - last * kBlockK);
        softmax(s, rows, c);
        round_p(p, s);
    }
#pragma unroll 1
    for (int n = 1; n < tile.key_blocks; ++n) {
        const int slot = n % kStages, parity = n / kStages & 1, block = tile.key_blocks - 1 - n;
        const int slot_v = (n - 1) % kStages, parity_v = (n - 1) / kStages & 1;
        const float c = q_factor * block_scale(scales.k, scales.k_blocks, tile.batch_key_head, block);
        mbarrier_wait(&shared.k_full[slot], parity, K_FULL, n);
        named_barrier_sync(my_turn, 256);
        issue_qk(s, q_descriptor, wgmma_advance(k_descriptor, slot * kBytesKV));
        mbarrier_wait(&shared.v_full[slot_v], parity_v, V_FULL, n);
        issue_pv(o, p, wgmma_advance(v_descriptor, slot_v * kBytesKV));
        named_barrier_arrive(other_turn, 256);
        wgmma_wait<1>();  // S is there, P V may go on
        if (thread == 0) mbarrier_arrive(&shared.k_empty[slot]);

        if (block >= tile.unmasked_blocks) mask(s, visible_top - block * kBlockK, visible_bottom - block * kBlockK);
        softmax(s, rows, c);
        if (never) pin(s);

        wgmma_wait<0>();  // P V is done: O and the registers of P are free
        if (thread == 0) mbarrier_arrive(&shared.v_empty[slot_v]);
        rescale(o, rows.factor);
        round_p(p, s);
    }
    if (tile.key_blocks > 0) {
        const int slot_v = (tile.key_blocks - 1) % kStages, parity_v = (tile.key_blocks - 1) / kStages & 1;
        mbarrier_wait(&shared.v_full[slot_v], parity_v, V_FULL, tile.key_blocks);
        issue_pv(o, p, wgmma_advance(v_descriptor, slot_v * kBytesKV));
        wgmma_wait<0>();
    }
    store(o, rows, scales.v[tile.batch_key_head], o_pointer, lse_pointer, tile, row, lane, problem);
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
              const __grid_constant__ TensorMap v_map, u16* o, float* lse, const __grid_constant__ Problem problem,
              const __grid_constant__ Scales scales) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const Tile tile(problem);
    const int warpgroup = warp_uniform(threadIdx.x / 128);

    if (threadIdx.x == 0) {
        mbarrier_init(&shared.q_full, 1);
        for (int slot = 0; slot < kStages; ++slot) {
            mbarrier_init(&shared.k_full[slot], 1);
            mbarrier_init(&shared.v_rows_full[slot], 1);
            mbarrier_init(&shared.v_full[slot], 128);  // every thread of the producer has written its part
            mbarrier_init(&shared.k_empty[slot], kConsumers);
            mbarrier_init(&shared.v_empty[slot], kConsumers);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == 0) {
        registers_release_to<kProducerRegisters>();
        produce(shared, tile, q_map, k_map, v_map);
    } else {
        registers_claim_up_to<kConsumerRegisters>();
        consume(shared, tile, warpgroup - 1, o, lse, problem, scales);
    }
}
