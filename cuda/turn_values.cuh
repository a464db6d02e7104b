// V's rows into V^T's rows within shared memory, by warps that do nothing else, and the layout that both lie in: a
// shared tile is [columns / span][rows][span] bytes, swizzled over the span of 128, 64 or 32 bytes. Before it includes
// this, a file defines what attention_tiles.cuh needs and kHeadDim, kSpan (of V as it comes), kTurnedSpan (of V^T),
// kStages, kTurningThreads, kTurnedAtOnce, and the names V_FULL, TURNED_FULL, TURNED_EMPTY of barriers.
#pragma once
#include "attention_tiles.cuh"
#include "hopper/fp8.cuh"
#include "hopper/sync.cuh"
#include "hopper/wgmma.cuh"

using u8 = unsigned char;

// ---- shared-memory layout ------------------------------------------------------------------------------------------
// Where byte `offset` of an unswizzled tile lies: 16-byte chunks of a span are exchanged by the row's number, which
// stands in the offset's bits from 7 on. PTX ISA: "Swizzling Modes".
template <int kSpanBytes>
__device__ __forceinline__ u32 swizzle(u32 offset) {
    return offset ^ ((offset >> 7) & (kSpanBytes / 16 - 1)) << 4;
}

// Descriptor of a K-major operand whose swizzle spans 128, 64 or 32 bytes (mode 1, 2 or 3): 8 rows are 8 spans.
template <int kSpanBytes>
__device__ __forceinline__ u64 k_major_descriptor(const void* tile) {
    constexpr u64 kMode = kSpanBytes == 128 ? 1 : kSpanBytes == 64 ? 2 : 3;
    return (wgmma_descriptor(shared_address(tile), 16, 8 * kSpanBytes) & ~(3ull << 62)) | kMode << 62;
}

// Bytes from the first 32 columns of a tile of `rows` rows to the 32 columns of `step`.
template <int kSpanBytes>
__device__ __forceinline__ constexpr u32 step_offset(int step, int rows) {
    return step / (kSpanBytes / 32) * rows * kSpanBytes + step % (kSpanBytes / 32) * 32;
}

// ---- turning V -----------------------------------------------------------------------------------------------------
// V (keys, channels) -> V^T (channels, keys), by `kTurningThreads` threads. A warp takes 32 keys x 16 channels at a
// time: ldmatrix transposes 16-bit units, so that a register holds two channels of two keys; prmt parts the channels of
// two such registers, which brings keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9 together: the order that P has. Loads of several
// such pieces come first, then their stores, so that the latencies overlap.
__device__ __forceinline__ void turn_block(const u8* v, u8* turned, int warp, int lane) {
    constexpr int kKeyGroups = kBlockK / 32;
    constexpr int kPieces = kKeyGroups % kTurnedAtOnce == 0 ? kTurnedAtOnce : kKeyGroups % 3 == 0 ? 3 : 2;  // at once
    constexpr int kChannelGroups = kHeadDim / 16, kItems = kChannelGroups * kKeyGroups / kPieces;
    static_assert(kKeyGroups % kPieces == 0, "a block has 32 or 64 keys, or a multiple of 96 or 128");
    const u32 source = shared_address(v), target = shared_address(turned);
#pragma unroll 1
    for (int item = warp; item < kItems; item += kTurningThreads / 32) {
        const int channels = item % kChannelGroups * 16, keys = item / kChannelGroups * kPieces * 32;
        const u32 from = source + channels / kSpan * kBlockK * kSpan + keys * kSpan +
                         swizzle<kSpan>(lane * kSpan + channels % kSpan);
        u32 in[kPieces][4];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) ldmatrix_x4_transposed(in[i], from + i * 32 * kSpan);
        const u32 row = channels + lane / 16 * 8 + lane % 8;
        const u32 to = target + swizzle<kTurnedSpan>(row * kTurnedSpan + lane / 8 % 2 * 16);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const u32 out[4] = {
                byte_permute(in[i][0], in[i][1], 0x6420), byte_permute(in[i][2], in[i][3], 0x6420),   // even channels
                byte_permute(in[i][0], in[i][1], 0x7531), byte_permute(in[i][2], in[i][3], 0x7531)};  // odd ones
            const u32 key = keys + i * 32;  // exclusive or: columns of a span are exchanged, not moved
            stmatrix_x4((to ^ key % kTurnedSpan) + key / kTurnedSpan * kHeadDim * kTurnedSpan, out);
        }
    }
}

// The turning warps' walk over all tiles. They learn a tile's number of blocks where consumers do: with its queries.
template <class Shared>
__device__ __forceinline__ void turn_values(Shared& shared, int warp, int lane) {
    Cursor<kQueryStages> q_cursor;
    Cursor<kStages> cursor;
    while (true) {
        const u32 q_slot = q_cursor.slot();
        mbarrier_wait(&shared.q_full[q_slot], q_cursor.parity(), Q_FULL, q_cursor.count);
        const int key_blocks = shared.tile[q_slot].key_blocks;
        mbarrier_arrive(&shared.q_empty[q_slot]);
        ++q_cursor.count;
        if (key_blocks < 0) break;
        for (int block = key_blocks - 1; block >= 0; --block) {
            const u32 slot = cursor.slot();
            mbarrier_wait(&shared.v_full[slot], cursor.parity(), V_FULL, block);
            mbarrier_wait(&shared.turned_empty[slot], cursor.parity() ^ 1, TURNED_EMPTY, block);
            turn_block(shared.v[slot], shared.turned[slot], warp, lane);
            fence_proxy_async();  // wgmma reads through the asynchronous proxy
            mbarrier_arrive(&shared.turned_full[slot]);
            mbarrier_arrive(&shared.v_empty[slot]);
            ++cursor.count;
        }
    }
}
