// FlashAttention-3 forward in FP8 for Hopper (sm_90a): Q, K, V and P in e4m3, sums in fp32, output in bf16.
//
// fa3_forward.cu is the same kernel in 16 bits; read it first. What FP8 changes:
//   scales       a code means code * scale. Q's and K's scales (one a head, or one for every kScaleRows rows) are
//                multiplied into the softmax scale, V's (one a head or a channel) into the output.
//   V            an 8-bit wgmma wants both operands with the summed dimension contiguous, so V is needed as V^T. Either
//                the caller gives it so, or three warps beside the loading one turn each block round in shared memory.
//   P            the accumulator's registers, packed four at a time, are a valid operand if V^T has its keys in the
//                order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15 (`kv_order` in fa_reference/fp8/layouts.py). V^T's rows,
//                the channels, come even ones first in every 16: that keeps the turning stores free of bank conflicts
//                and gives each thread four neighbouring channels of O.
//   softmax      P must fit into [0, 448]. m is kept as in fa3_forward.cu, and exponentials are 2^kOffset exp(s - m); a
//                block is redone when a code reached 448, the code that overflow saturates to.
//   exponentials at head_dim 64 and 128 the exponential unit should be as busy as the tensor cores, or busier: some
//                can be computed by a polynomial on the FMA units instead. It gained nothing sure (LOG_FP8.md).
//   turns        cost more than they bring; the switch is there.
#include "hopper/base.cuh"
#include "hopper/fp8.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/named_barrier.cuh"
#include "hopper/registers.cuh"
#include "hopper/sync.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

// ---- configuration: set by the host (fa3_forward_fp8.py) -----------------------------------------------------------
constexpr int kHeadDim = FA_HEAD_DIM;
constexpr int kConsumers = FA_CONSUMERS;       // warpgroups that compute; each owns 64 rows of the query tile
constexpr int kBlockK = FA_BLOCK_K;            // keys in a block
constexpr int kStages = FA_STAGES;             // slots in the rings of K, V and turned V
constexpr int kQueryStages = FA_QUERY_STAGES;
constexpr int kBlocksPerSM = FA_BLOCKS_PER_SM;  // thread blocks that share a multiprocessor
constexpr bool kCausal = FA_CAUSAL;
constexpr bool kTurnsValues = FA_TURNS_VALUES;  // V comes as (keys, head_dim) and is turned here
constexpr bool kPingpong = FA_PINGPONG;
constexpr bool kTwoLevel = FA_TWO_LEVEL;        // sum each block's P V from zero, and the blocks in true fp32
constexpr int kPolynomial = FA_POLYNOMIAL;      // of eight exponentials this many by polynomial
constexpr int kProducerRegisters = FA_PRODUCER_REGISTERS, kConsumerRegisters = FA_CONSUMER_REGISTERS;

constexpr int kBlockQ = 64 * kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr u32 kBytesQ = kBlockQ * kHeadDim, kBytesKV = kBlockK * kHeadDim;
constexpr int kScaleRows = 128;  // rows of Q or K that share a scale
constexpr int kSpan = kHeadDim < 128 ? kHeadDim : 128;                               // bytes of Q, K and V
constexpr int kTurnedSpan = kBlockK % 128 == 0 ? 128 : kBlockK % 64 == 0 ? 64 : 32;  // of V^T: bytes are keys
constexpr int kColumnBlocks = kTurnsValues ? 0 : kBlockK / kTurnedSpan;
constexpr int kGroup = kTurnedSpan, kGroups = kBlockK / kGroup;  // keys of a block that surely have one scale
constexpr int kOutputColumns = kHeadDim < 128 ? kHeadDim : 128;  // of O that are on their way out at a time
constexpr int kTurningThreads = 96;
constexpr int kTurnedAtOnce = kProducerRegisters >= 40 ? 4 : 2;  // pieces of V in registers
// P is 2^kOffset at its row's maximum: scores may grow by 2^3.75 before a block is redone. From 4 to 8 the error is
// equal.
constexpr float kOffset = 5.0f;
constexpr int kMixed = 4;  // registers of P whose exponentials the compiler may reorder

// Names of the barriers in the debug build's deadlock record; fa3_forward_fp8.py has the same list.
enum BarrierName { Q_FULL, Q_EMPTY, K_FULL, K_EMPTY, V_FULL, V_EMPTY, TURNED_FULL, TURNED_EMPTY };
constexpr u32 kTurnBarrier = 1;  // named barriers 1 .. kConsumers: the turn of consumer 0, 1, ...
constexpr u32 kOutputBarrier = kTurnBarrier + kConsumers;  // as many again: consumer 0, 1, ... with itself

#include "attention_tiles.cuh"
#include "turn_values.cuh"

struct Problem : Schedule {
    int q_scales, k_scales, v_scales;  // of one head: 1, or one for every kScaleRows rows; of V 1 or kHeadDim
    float scale;
    const float *q_scale, *k_scale, *v_scale;  // (batch, heads, scales of one head), contiguous
};

struct Shared {
    alignas(1024) u8 q[kQueryStages][kBlockQ * kHeadDim];
    alignas(1024) u8 k[kStages][kBlockK * kHeadDim];
    alignas(1024) u8 v[kStages][kBlockK * kHeadDim];  // as it came
    alignas(1024) u8 turned[kTurnsValues ? kStages : 1][kTurnsValues ? kBlockK * kHeadDim : 1024];
    alignas(1024) u16 o[kConsumers][64 * kOutputColumns];
    u64 q_full[kQueryStages], q_empty[kQueryStages];
    u64 k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    u64 turned_full[kStages], turned_empty[kStages];
    Tile tile[kQueryStages];  // published together with q_full
};

// ---- softmax -------------------------------------------------------------------------------------------------------
// What a thread keeps for its two rows (l / 4 and l / 4 + 8 of its warp's 16).
struct Rows {
    float shift[2];   // c m - kOffset, m a maximum of scores seen so far: p = exp2(c s - shift); -inf: no key seen yet
    float sum[2];     // this thread's part of the row sum
    float factor[2];  // what O has to be multiplied with after a change of m
};

// A use of P behind the wait for P V. Without one, the compiler takes P's registers for free as soon as P V is issued,
// although it is still being read, and puts the next P there.
__device__ __forceinline__ void keep(const u32 (&p)[kBlockK / 8]) {
#pragma unroll
    for (int i = 0; i < kBlockK / 8; ++i) asm volatile("st.shared.u32 [%0], %1;" ::"r"(0), "r"(p[i]));
}

// exp2(s c - shift) by polynomial. u = (s c - shift + 48) / 64 is clamped to [0, 1] for free: the exponent stays within
// -48 .. 16, and what lies above is as surely out of P's range as 2^16. Adding 1.5 * 2^23 leaves the whole part of 64 u
// in the low bits; 2^fraction (less than 1e-4 off) is computed with the factor 2^-48 in its coefficients, and the whole
// part goes into its exponent.
__device__ __forceinline__ float exp2_polynomial(float s, float c64, float bias64) {
    float u;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(u) : "f"(s), "f"(c64), "f"(bias64));
    const float round = 12582912.0f;
    const float whole = fmaf(u, 64.0f, round);
    const float f = fmaf(u, 64.0f, round - whole);
    constexpr float kTiny = 1.0f / (1ull << 48);
    float y = fmaf(f, 0.05517167f * kTiny, 0.24261111f * kTiny);
    y = fmaf(f, y, 0.69326097f * kTiny);
    y = fmaf(f, y, 0.99992806f * kTiny);
    return __uint_as_float(__float_as_uint(y) + (__float_as_uint(whole) << 23));
}

// One exponential pass over S: P = exp2(c S - shift), rounded and packed for wgmma, the row sums of this block, and
// whether some code reached 448. c: one factor for each kGroup keys.
template <bool kSomeByPolynomial>
__device__ __forceinline__ bool exponentials(const float (&s)[kBlockK / 2], u32 (&p)[kBlockK / 8], float (&sum)[2],
                                             const float (&shift)[2], const float (&c)[kGroups]) {
    float bias64[2] = {(48.0f - shift[0]) * (1.0f / 64), (48.0f - shift[1]) * (1.0f / 64)};
    u32 too_large = 0;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlockK / 8; ++i) {  // register of P: row i % 2, the thread's four keys of every 16
        const int half = i % 2;
        const float factor = c[i / 2 * 16 / kGroup];
        float e[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float score = s[i / 2 * 8 + j / 2 * 4 + half * 2 + j % 2];
            const bool polynomial = kSomeByPolynomial && (i * 4 + j) * 3 % 8 < kPolynomial;
            e[j] = polynomial ? exp2_polynomial(score, factor * (1.0f / 64), bias64[half])
                              : exp2_approx(fmaf(score, factor, -shift[half]));
            sum[half] += e[j];
        }
        p[i] = pack_e4m3(e[0], e[1], e[2], e[3]);
        too_large |= p[i] + 0x02020202u;  // 0x7e is 448, 0x7f not a number: both reach the byte's highest bit
        // The compiler would compute all polynomials first and leave the exponential unit idle meanwhile: so those of
        // the next few registers get an input that depends on an exponential of these. (An infinite one makes
        // not-a-number, but it also makes the block be redone.)
        if (kSomeByPolynomial && kPolynomial > 0 && i % kMixed >= kMixed - 2)
            bias64[half] = fmaf(e[1], 0.0f, bias64[half]);
    }
    return too_large & 0x80808080u;
}

// The textbook update: new maximum, factor for the old sums and O, exponentials with the new maximum.
__device__ __forceinline__ void exact_softmax(const float (&s)[kBlockK / 2], u32 (&p)[kBlockK / 8], float (&sum)[2],
                                              Rows& rows, const float (&c)[kGroups]) {
    float used[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float scaled = -kInfinity;
#pragma unroll
        for (int i = 0; i < kBlockK / 2; i += 4)
            scaled = fmaxf(scaled, fmaxf(s[i + 2 * half], s[i + 2 * half + 1]) * c[2 * i / kGroup]);
        const float shift = fmaxf(rows.shift[half], quad_max(scaled) - kOffset);
        const bool empty = shift == -kInfinity;
        used[half] = empty ? 0.0f : shift;  // -inf - (-inf) is not a number
        rows.factor[half] = empty ? 1.0f : exp2_approx(rows.shift[half] - shift);
        rows.shift[half] = shift;
        rows.sum[half] *= rows.factor[half];
    }
    exponentials<false>(s, p, sum, used, c);
}

// S -> P; returns whether O must be rescaled (the same answer in all lanes of the warp). As in fa3_forward.cu, m is
// kept while P fits, here below 448; a row that has seen no key yet (shift = -inf) always fails the test.
template <bool kMasked>
__device__ __forceinline__ bool softmax(const float (&s)[kBlockK / 2], u32 (&p)[kBlockK / 8], Rows& rows,
                                        const float (&c)[kGroups]) {
    float sum[2];
    const bool too_large = exponentials<!kMasked>(s, p, sum, rows.shift, c);
    const bool again = __any_sync(0xffffffffu, too_large);
    if (again) exact_softmax(s, p, sum, rows, c);
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    return again;
}

// Read-only data, at this point of the program: behind a wait the compiler would not move it forward.
__device__ __forceinline__ float load_early(const float* pointer) {
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(pointer));
    return value;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The output of this thread: of every 16 channels it has four neighbours, in both rows, since V^T's rows 2 q, 2 q + 1
// (even channels) and 8 + 2 q, 8 + 2 q + 1 (odd ones) are channels 4 q .. 4 q + 3. Calls store(half, channel, four bf16
// values) for the channels from `first` on.
template <int kColumns, class Store>
__device__ __forceinline__ void output(const float (&o)[kHeadDim / 2], const float (&inverse)[2], const float* v_scale,
                                       bool per_channel, int first, int lane, Store store) {
    const int q = lane % 4;
    const float one = *v_scale;
#pragma unroll
    for (int g = 0; g < kColumns / 16; ++g) {
        const int column = first + 16 * g;
        float4 scale = make_float4(one, one, one, one);
        if (per_channel) scale = *reinterpret_cast<const float4*>(v_scale + column + 4 * q);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = column / 2 + 2 * half;
            const float a = inverse[half];
            store(half, 16 * g + 4 * q,
                  make_uint2(pack_bf16(o[i] * a * scale.x, o[i + 4] * a * scale.y),
                             pack_bf16(o[i + 1] * a * scale.z, o[i + 5] * a * scale.w)));
        }
    }
}

// ---- consumer ------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void consume(Shared& shared, const int consumer, const TensorMap& o_map,
                                        float* lse_pointer, const Problem& problem) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row_in_tile = 64 * consumer + 16 * (thread / 32) + lane / 4;
    auto& values = [&]() -> auto& {
        if constexpr (kTurnsValues) return shared.turned;
        else return shared.v;
    }();
    u64* values_full = kTurnsValues ? shared.turned_full : shared.v_full;
    u64* values_empty = kTurnsValues ? shared.turned_empty : shared.v_empty;
    constexpr u32 kValuesFull = kTurnsValues ? TURNED_FULL : V_FULL;
    const u64 q_descriptor = k_major_descriptor<kSpan>(shared.q[0] + consumer * 64 * kSpan);
    const u64 k_descriptor = k_major_descriptor<kSpan>(shared.k);
    const u64 v_descriptor = k_major_descriptor<kTurnedSpan>(values);
    const u32 my_turn = kTurnBarrier + consumer, next_turn = kTurnBarrier + (consumer + 1) % kConsumers;
    const bool never = problem.len_k < 0;  // something that the compiler cannot know
    // With turns, consumer 0 alone asks the mbarriers in the main loop: the others come after it, and so after the
    // data.
    const bool asks = kPingpong ? consumer == 0 : !never;
    Cursor<kStages> k_cursor, v_cursor;
    Cursor<kQueryStages> q_cursor;
    if (kPingpong && consumer == kConsumers - 1) named_barrier_arrive(next_turn, 256);  // consumer 0 may begin

    auto issue_qk = [&](float (&s)[kBlockK / 2]) {  // S = Q K^T, overwriting s
        const u64 q = wgmma_advance(q_descriptor, q_cursor.slot() * kBytesQ);
        const u64 k = wgmma_advance(k_descriptor, k_cursor.slot() * kBytesKV);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 32; ++step)
            WgmmaE4m3<kBlockK>::ss(s, wgmma_advance(q, step_offset<kSpan>(step, kBlockQ)),
                                   wgmma_advance(k, step_offset<kSpan>(step, kBlockK)), step != 0);
        wgmma_commit();
    };
    auto issue_pv = [&](float (&o)[kHeadDim / 2], const u32 (&p)[kBlockK / 8], bool fresh) {  // O (+)= P V
        const u64 v = wgmma_advance(v_descriptor, v_cursor.slot() * kBytesKV);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockK / 32; ++step)
            WgmmaE4m3<kHeadDim>::rs(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                    wgmma_advance(v, step_offset<kTurnedSpan>(step, kHeadDim)), !fresh || step != 0);
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

        const long long flat_head = static_cast<long long>(tile.batch) * problem.heads_q + tile.head;
        const int flat_key_head = flat_head / problem.queries_per_key_head;
        const int q_group = min((tile.query_start + 64 * consumer) / kScaleRows, problem.q_scales - 1);
        const float row_factor = problem.scale * kLog2e * problem.q_scale[flat_head * problem.q_scales + q_group];
        const float* k_scale = problem.k_scale + static_cast<long long>(flat_key_head) * problem.k_scales;
        auto load_scales = [&](float (&k_scales)[kGroups], int block) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
                k_scales[g] =
                    load_early(k_scale + min((block * kBlockK + g * kGroup) / kScaleRows, problem.k_scales - 1));
        };

        Rows rows = {{-kInfinity, -kInfinity}, {0, 0}, {1, 1}};
        float o[kHeadDim / 2];
        u32 p[kBlockK / 8];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;

        if (key_blocks > 0) {
            int block = key_blocks - 1;
            {  // first block: S and its softmax, nothing to overlap with yet
                float s[kBlockK / 2], c[kGroups];
                load_scales(c, block);
                mbarrier_wait(&shared.k_full[k_cursor.slot()], k_cursor.parity(), K_FULL, block);
                issue_qk(s);
                wgmma_wait<0>();
                release(shared.k_empty, k_cursor);
#pragma unroll
                for (int g = 0; g < kGroups; ++g) c[g] *= row_factor;
                mask(s, visible_top - block * kBlockK, visible_bottom - block * kBlockK);
                exact_softmax(s, p, rows.sum, rows, c);
            }
            // One step of Algorithm 2: S of `block` and P V of the block before are in flight together. Reads `old`,
            // writes `fresh`; two steps at a time, so that the two change roles without being copied.
            u32 other_p[kBlockK / 8];
            auto step = [&](auto masked, u32 (&old)[kBlockK / 8], u32 (&fresh)[kBlockK / 8]) {
                constexpr bool kMasked = decltype(masked)::value;
                float s[kBlockK / 2], c[kGroups], block_o[kHeadDim / 2];
                load_scales(c, block);
                if (asks) mbarrier_wait(&shared.k_full[k_cursor.slot()], k_cursor.parity(), K_FULL, block);
                if (kPingpong) named_barrier_sync(my_turn, 256);
                issue_qk(s);
                if (asks) mbarrier_wait(&values_full[v_cursor.slot()], v_cursor.parity(), kValuesFull, block + 1);
                if (kTwoLevel) issue_pv(block_o, old, true);
                else issue_pv(o, old, false);
                if (kPingpong) named_barrier_arrive(next_turn, 256);
                wgmma_wait<1>();  // S is there, P V may go on
                release(shared.k_empty, k_cursor);
#pragma unroll
                for (int g = 0; g < kGroups; ++g) c[g] *= row_factor;
                if (kMasked) mask(s, visible_top - block * kBlockK, visible_bottom - block * kBlockK);
                const bool rescale = softmax<kMasked>(s, fresh, rows, c);
                wgmma_wait<0>();  // P V is done: O and the registers of P are free
                release(values_empty, v_cursor);
                if (kTwoLevel) {
#pragma unroll
                    for (int i = 0; i < kHeadDim / 2; ++i) o[i] += block_o[i];
                }
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
                for (int i = 0; i < kBlockK / 8; ++i) p[i] = other_p[i];
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
            mbarrier_wait(&values_full[v_cursor.slot()], v_cursor.parity(), kValuesFull, 0);
            if (kTwoLevel) {
                float block_o[kHeadDim / 2];
                issue_pv(block_o, p, true);
                wgmma_wait<0>();
#pragma unroll
                for (int i = 0; i < kHeadDim / 2; ++i) o[i] += block_o[i];
            } else {
                issue_pv(o, p, false);
                wgmma_wait<0>();
            }
            release(values_empty, v_cursor);
        }

        float inverse[2];
        float* lse_top = lse_pointer + flat_head * problem.len_q + row;
        const int rows_left = problem.len_q - row;  // rows 0 and 8 from here exist if 0 < rows_left, 8 < rows_left
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(rows.sum[half]);
            inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
            if (lane % 4 == 0 && 8 * half < rows_left)
                lse_top[8 * half] = sum == 0.0f ? -kInfinity : rows.shift[half] * kLn2 + logf(sum);
        }
        const float* v_scale = problem.v_scale + static_cast<long long>(flat_key_head) * problem.v_scales;
        const bool per_channel = problem.v_scales > 1;
        // Through shared memory, under the 128-byte swizzle; TMA leaves out rows past the end.
        char* o_smem = reinterpret_cast<char*>(shared.o[consumer]);
        const int row_in_o = 16 * (thread / 32) + lane / 4;
#pragma unroll
        for (int first = 0; first < kHeadDim; first += kOutputColumns) {
            if (thread == 0) tma_store_wait_read<0>();  // the store before has read o_smem
            named_barrier_sync(kOutputBarrier + consumer, 128);
            output<kOutputColumns>(o, inverse, v_scale, per_channel, first, lane,
                                   [&](int half, int channel, uint2 four) {
                                       const u32 in_block = (row_in_o + 8 * half) * 128 + channel % 64 * 2;
                                       char* place = o_smem + channel / 64 * 64 * 128 + swizzle<128>(in_block);
                                       *reinterpret_cast<uint2*>(place) = four;
                                   });
            fence_proxy_async();
            named_barrier_sync(kOutputBarrier + consumer, 128);
            if (thread == 0) {
                tma_store_5d(&o_map, o_smem, 0, tile.query_start + 64 * consumer, first / 64, tile.head,
                             tile.batch);
                tma_store_commit();
            }
        }
    }
    if (thread == 0) tma_store_wait_read<0>();  // shared memory must live until then
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    fa3_forward_fp8(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap o_map, float* lse,
                    u32* tile_counter, const __grid_constant__ Problem problem) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int warpgroup = warp_uniform(threadIdx.x / 128);

    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kQueryStages; ++slot) {
            mbarrier_init(&shared.q_full[slot], 1);
            // Every thread that reads `tile` arrives for itself.
            mbarrier_init(&shared.q_empty[slot], 128 * kConsumers + (kTurnsValues ? kTurningThreads : 0));
        }
        for (int slot = 0; slot < kStages; ++slot) {
            mbarrier_init(&shared.k_full[slot], 1);
            mbarrier_init(&shared.v_full[slot], 1);
            mbarrier_init(&shared.k_empty[slot], kConsumers);  // one thread for its warpgroup
            mbarrier_init(&shared.v_empty[slot], kTurnsValues ? kTurningThreads : kConsumers);
            mbarrier_init(&shared.turned_full[slot], kTurningThreads);
            mbarrier_init(&shared.turned_empty[slot], kConsumers);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == 0) {
        registers_release_to<kProducerRegisters>();
        const int warp = warp_uniform(threadIdx.x / 32);
        if (warp == 0) {
            if (elect_one()) produce(shared, q_map, k_map, v_map, tile_counter, problem);
        } else if (kTurnsValues) {
            turn_values(shared, warp - 1, threadIdx.x % 32);
        }
    } else {
        registers_claim_up_to<kConsumerRegisters>();
        consume(shared, warpgroup - 1, o_map, lse, problem);
    }
}
