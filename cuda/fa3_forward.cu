// FlashAttention-3 forward for Hopper (sm_90a), fp16 or bf16: O = softmax(scale Q K^T) V and the log-sum-exp of each row.
//
// One block works on one tile of kBlockQ queries at a time and stays for many tiles (persistent). Its warpgroups:
//   producer  one thread issues TMA loads of Q, and of K and V blocks into two rings of kStages slots each;
//   consumers each owns 64 query rows: S = Q K^T, online softmax, O += P V, everything in registers.
// What makes it fast, in the order of the paper (arXiv 2407.08608, section 3):
//   warp specialisation  loads never wait for arithmetic; registers move from producer to consumers;
//   pingpong             the consumers issue their matrix products in turn, so one's softmax runs under the other's;
//   two-stage pipeline   a consumer issues S of the next block before it needs P V of this one (Algorithm 2).
// Beyond the paper: the maximum of a block is only computed if its exponentials grow too large (see `softmax`).
//
// Layouts: every shared tile is [head_dim / 64][rows][64] with the 128-byte swizzle, as one 5-D TMA box delivers it.
#include "hopper/base.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/named_barrier.cuh"
#include "hopper/registers.cuh"
#include "hopper/sync.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

// ---- configuration: set by the host (fa3_forward.py) ---------------------------------------------------------------
constexpr int kHeadDim = FA_HEAD_DIM;
constexpr int kConsumers = FA_CONSUMERS;       // warpgroups that compute; each owns 64 rows of the query tile
constexpr int kBlockK = FA_BLOCK_K;            // keys in a block
constexpr int kStages = FA_STAGES;             // slots in the rings of K and V
constexpr int kQueryStages = FA_QUERY_STAGES;  // with 2, the next tile's queries are there before this tile ends
constexpr int kBlocksPerSM = FA_BLOCKS_PER_SM;  // thread blocks that share a multiprocessor
constexpr bool kCausal = FA_CAUSAL;
constexpr bool kBf16 = FA_BF16;
constexpr int kProducerRegisters = FA_PRODUCER_REGISTERS, kConsumerRegisters = FA_CONSUMER_REGISTERS;

constexpr int kBlockQ = 64 * kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr bool kTurns = kConsumers > 1;  // a consumer alone has nobody to take turns with
constexpr int kOutputColumns = kHeadDim < 128 ? kHeadDim : 128;  // of O that are on their way out at a time
constexpr u32 kBytesQ = kBlockQ * kHeadDim * 2, kBytesKV = kBlockK * kHeadDim * 2;
constexpr int kColumnBlocks = 0;         // V lies as (keys, head_dim)
constexpr float kLargestSum = 16384.0f;  // of a thread's exponentials in one block, before a new maximum is taken

// Names of the barriers in the debug build's deadlock record; fa3_forward.py has the same list.
enum BarrierName { Q_FULL, Q_EMPTY, K_FULL, K_EMPTY, V_FULL, V_EMPTY };
constexpr u32 kTurnBarrier = 1;  // named barriers 1 .. kConsumers: the turn of consumer 0, 1, ...
constexpr u32 kOutputBarrier = kTurnBarrier + kConsumers;  // as many again: consumer 0, 1, ... with itself

#include "attention_tiles.cuh"

struct Problem : Schedule {
    float scale;
};

struct Shared {
    alignas(1024) u16 q[kQueryStages][kBlockQ * kHeadDim];
    alignas(1024) u16 k[kStages][kBlockK * kHeadDim];
    alignas(1024) u16 v[kStages][kBlockK * kHeadDim];
    alignas(1024) u16 o[kConsumers][64 * kOutputColumns];
    u64 q_full[kQueryStages], q_empty[kQueryStages];
    u64 k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    Tile tile[kQueryStages];  // published together with q_full
};

// ---- small helpers -------------------------------------------------------------------------------------------------
__device__ __forceinline__ u32 pack(float low, float high) {  // two values rounded to nearest even
    u32 packed;
    if constexpr (kBf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

#include "attention_output.cuh"

// ---- consumer ------------------------------------------------------------------------------------------------------
// What a thread keeps for its two rows (l / 4 and l / 4 + 8 of its warp's 16).
struct Rows {
    float scaled[2];  // c m: m is a maximum of scores seen so far, p = exp2(c s - c m); -inf while no key was seen
    float sum[2];     // this thread's part of the row sum
    float factor[2];  // what O has to be multiplied with after a change of m
};

// One exponential pass over S: P = exp2(c S - c m), rounded and packed for wgmma, and the row sums of this block.
__device__ __forceinline__ void exponentials(const float (&s)[kBlockK / 2], u32 (&p)[kBlockK / 4], float (&sum)[2],
                                             const float (&scaled)[2], float c) {
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlockK / 4; ++i) {
        const int half = i % 2;
        const float low = exp2_approx(fmaf(s[2 * i], c, -scaled[half]));
        const float high = exp2_approx(fmaf(s[2 * i + 1], c, -scaled[half]));
        sum[half] += low;
        sum[half] += high;
        p[i] = pack(low, high);
    }
}

// The textbook update: new maximum, factor for the old sums and O, exponentials with the new maximum.
__device__ __forceinline__ void exact_softmax(const float (&s)[kBlockK / 2], u32 (&p)[kBlockK / 4], float (&sum)[2],
                                              Rows& rows, float c) {
    float used[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float m = fmaxf(s[2 * half], s[2 * half + 1]);
#pragma unroll
        for (int i = 4; i < kBlockK / 2; i += 4) m = fmaxf(m, fmaxf(s[i + 2 * half], s[i + 2 * half + 1]));
        const float scaled = fmaxf(rows.scaled[half], quad_max(m) * c);
        const bool empty = scaled == -kInfinity;
        used[half] = empty ? 0.0f : scaled;  // -inf - (-inf) is not a number
        rows.factor[half] = empty ? 1.0f : exp2_approx(rows.scaled[half] - scaled);
        rows.scaled[half] = scaled;
        rows.sum[half] *= rows.factor[half];
    }
    exponentials(s, p, sum, used, c);
}

// S -> P; returns whether O must be rescaled (the same answer in all lanes of the warp).
//
// Softmax does not change when another number than the true maximum is subtracted; the number must only keep exp2 in
// range. So m, the maximum at some earlier block, is kept for as long as it does, and a block's maximum is not even
// computed: its exponentials are taken with the old m, and if they turn out too large, once more with a new one (S is
// still in registers). Safe for every input: p <= sum <= 2^14 fits both formats; the sum over the row is at least 1,
// because m was attained; overflow, NaN, and rows without a key so far (m = -inf) all fail the test `sum <= 2^14`.
__device__ __forceinline__ bool softmax(const float (&s)[kBlockK / 2], u32 (&p)[kBlockK / 4], Rows& rows, float c) {
    float sum[2];
    exponentials(s, p, sum, rows.scaled, c);
    const bool again = __any_sync(0xffffffffu, !(sum[0] <= kLargestSum && sum[1] <= kLargestSum));
    if (again) exact_softmax(s, p, sum, rows, c);
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    return again;
}

// A use of P behind the wait for P V. Without one, the compiler takes P's registers for free as soon as P V is issued,
// although it is still being read, and puts the next P there.
__device__ __forceinline__ void keep(const u32 (&p)[kBlockK / 4]) {
#pragma unroll
    for (int i = 0; i < kBlockK / 4; ++i) asm volatile("st.shared.u32 [%0], %1;" ::"r"(0), "r"(p[i]));
}

__device__ __forceinline__ void consume(Shared& shared, const int consumer, const TensorMap& o_map, float* lse_pointer,
                                        const Problem& problem) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row_in_tile = 64 * consumer + 16 * (thread / 32) + lane / 4;
    const float c = problem.scale * kLog2e;
    const u64 q_descriptor = wgmma_descriptor(shared_address(shared.q) + consumer * 64 * 128, 16);
    const u64 k_descriptor = wgmma_descriptor(shared_address(shared.k), 16);
    const u64 v_descriptor = wgmma_descriptor(shared_address(shared.v), kBlockK * 128);
    const u32 my_turn = kTurnBarrier + consumer, next_turn = kTurnBarrier + (consumer + 1) % kConsumers;
    // In the main loop consumer 0 alone asks the mbarriers: the others get their turn after it, and so after the data.
    const bool asks = consumer == 0;
    const bool never = problem.len_k < 0;  // something that the compiler cannot know
    Cursor<kStages> k_cursor, v_cursor;
    Cursor<kQueryStages> q_cursor;
    if (kTurns && consumer == kConsumers - 1) named_barrier_arrive(next_turn, 256);  // consumer 0 may begin

    auto issue_qk = [&](float (&s)[kBlockK / 2]) {  // S = Q K^T, overwriting s
        const u64 q = wgmma_advance(q_descriptor, q_cursor.slot() * kBytesQ);
        const u64 k = wgmma_advance(k_descriptor, k_cursor.slot() * kBytesKV);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step)
            Wgmma<kBlockK, kBf16>::ss(s, wgmma_advance(q, step / 4 * kBlockQ * 128 + step % 4 * 32),
                                      wgmma_advance(k, step / 4 * kBlockK * 128 + step % 4 * 32), step != 0);
        wgmma_commit();
    };
    auto issue_pv = [&](float (&o)[kHeadDim / 2], const u32 (&p)[kBlockK / 4]) {  // O += P V
        const u64 v = wgmma_advance(v_descriptor, v_cursor.slot() * kBytesKV);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockK / 16; ++step)
            Wgmma<kHeadDim, kBf16>::rs(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                       wgmma_advance(v, step * 16 * 128), 1);
        wgmma_commit();
    };
    auto release = [&](u64* empty, Cursor<kStages>& cursor) {
        if (thread == 0) mbarrier_arrive(&empty[cursor.slot()]);
        ++cursor.count;
    };

    while (true) {
        const u32 q_slot = q_cursor.slot();
        mbarrier_wait(&shared.q_full[q_slot], q_cursor.parity(), Q_FULL, q_cursor.count);
        const Tile tile = shared.tile[q_slot];
        const int key_blocks = warp_uniform(tile.key_blocks), unmasked_blocks = tile.unmasked_blocks;
        if (key_blocks < 0) break;
        const int row = tile.query_start + row_in_tile;  // this thread's upper row
        // Keys that the two rows see, counted from this thread's first column on.
        int visible_top = problem.len_k, visible_bottom = problem.len_k;
        if (kCausal) {
            visible_top = min(visible_top, row + 1 + problem.len_k - problem.len_q);
            visible_bottom = min(visible_bottom, row + 9 + problem.len_k - problem.len_q);
        }
        visible_top -= 2 * (lane % 4);
        visible_bottom -= 2 * (lane % 4);

        Rows rows = {{-kInfinity, -kInfinity}, {0, 0}, {1, 1}};
        float o[kHeadDim / 2];
        u32 p[kBlockK / 4];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;

        if (key_blocks > 0) {
            int block = key_blocks - 1;
            {  // first block: S and its softmax, nothing to overlap with yet
                float s[kBlockK / 2];
                mbarrier_wait(&shared.k_full[k_cursor.slot()], k_cursor.parity(), K_FULL, block);
                issue_qk(s);
                wgmma_wait<0>();
                release(shared.k_empty, k_cursor);
                mask(s, visible_top - block * kBlockK, visible_bottom - block * kBlockK);
                exact_softmax(s, p, rows.sum, rows, c);
            }
            // One step of Algorithm 2: S of `block` and P V of the block before are in flight together. Reads `old`,
            // writes `fresh`; two steps at a time, so that the two change roles without being copied.
            u32 other_p[kBlockK / 4];
            auto step = [&](auto masked, u32 (&old)[kBlockK / 4], u32 (&fresh)[kBlockK / 4]) {
                float s[kBlockK / 2];
                if (asks) mbarrier_wait(&shared.k_full[k_cursor.slot()], k_cursor.parity(), K_FULL, block);
                if (kTurns) named_barrier_sync(my_turn, 256);
                issue_qk(s);
                if (asks) mbarrier_wait(&shared.v_full[v_cursor.slot()], v_cursor.parity(), V_FULL, block + 1);
                issue_pv(o, old);
                if (kTurns) named_barrier_arrive(next_turn, 256);
                wgmma_wait<1>();  // S is there, P V may go on
                release(shared.k_empty, k_cursor);
                if (decltype(masked)::value) mask(s, visible_top - block * kBlockK, visible_bottom - block * kBlockK);
                const bool rescale = softmax(s, fresh, rows, c);
                wgmma_wait<0>();  // P V is done: O and the registers of P are free
                release(shared.v_empty, v_cursor);
                if (rescale) {
#pragma unroll
                    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= rows.factor[(i / 2) % 2];
                }
                if (never) keep(old);
                --block;
            };
            --block;
            // One at a time while blocks need a mask or their number is odd, then in pairs.
#pragma unroll 1
            while (block >= unmasked_blocks || block % 2 == 0) {
                step(True{}, p, other_p);
#pragma unroll
                for (int i = 0; i < kBlockK / 4; ++i) p[i] = other_p[i];
            }
#pragma unroll 1
            while (block > 0) {
                step(False{}, p, other_p);
                step(False{}, other_p, p);
            }
        }
        mbarrier_arrive(&shared.q_empty[q_slot]);  // the last S is done and this thread has read the tile
        ++q_cursor.count;
        if (key_blocks > 0) {
            mbarrier_wait(&shared.v_full[v_cursor.slot()], v_cursor.parity(), V_FULL, 0);
            issue_pv(o, p);
            wgmma_wait<0>();
            release(shared.v_empty, v_cursor);
        }

        float inverse[2];
        const long long flat_head = static_cast<long long>(tile.batch) * problem.heads_q + tile.head;
        float* lse_top = lse_pointer + flat_head * problem.len_q + row;
        const int rows_left = problem.len_q - row;  // rows 0 and 8 from here exist if 0 < rows_left, 8 < rows_left
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(rows.sum[half]);
            inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
            if (lane % 4 == 0 && 8 * half < rows_left)
                lse_top[8 * half] = sum == 0.0f ? -kInfinity : rows.scaled[half] * kLn2 + logf(sum);
        }
        store_output(o, inverse, shared.o[consumer], o_map, tile, consumer);
    }
    if (thread == 0) tma_store_wait_read<0>();  // shared memory must not go before TMA has read it
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    fa3_forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap o_map, float* lse,
                u32* tile_counter, const __grid_constant__ Problem problem) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int warpgroup = warp_uniform(threadIdx.x / 128);

    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kQueryStages; ++slot) {
            mbarrier_init(&shared.q_full[slot], 1);
            mbarrier_init(&shared.q_empty[slot], 128 * kConsumers);  // every consumer thread: each reads `tile`
        }
        for (int slot = 0; slot < kStages; ++slot) {
            mbarrier_init(&shared.k_full[slot], 1);
            mbarrier_init(&shared.v_full[slot], 1);
            mbarrier_init(&shared.k_empty[slot], kConsumers);  // one thread for its warpgroup
            mbarrier_init(&shared.v_empty[slot], kConsumers);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == 0) {
        registers_release_to<kProducerRegisters>();
        if (warp_uniform(threadIdx.x / 32) == 0 && elect_one())
            produce(shared, q_map, k_map, v_map, tile_counter, problem);
    } else {
        registers_claim_up_to<kConsumerRegisters>();
        consume(shared, warpgroup - 1, o_map, lse, problem);
    }
}
