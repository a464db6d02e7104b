// What the attention kernels of this folder share: units of work and their order, the producer, masks, small helpers.
// Before it includes this, a file defines kBlockQ and kBlockK (queries and keys of a tile), kBytesQ and kBytesKV (of
// one slot), kStages and kQueryStages (slots of the rings), kCausal, the names Q_EMPTY, K_EMPTY and V_EMPTY of
// barriers, and kColumnBlocks: 0 where V lies in memory as (keys, head_dim); where it comes transposed, as (head_dim,
// keys), the number of column blocks (dimension 2 of its descriptor) that hold kBlockK keys.
#pragma once
#include "hopper/base.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

struct False {
    static constexpr bool value = false;
};
struct True {
    static constexpr bool value = true;
};

// ---- small helpers -------------------------------------------------------------------------------------------------
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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

// Place in a ring: slot and parity follow from how many items have passed.
template <int kSlots>
struct Cursor {
    u32 count = 0;
    __device__ __forceinline__ u32 slot() const { return count % kSlots; }
    __device__ __forceinline__ u32 parity() const { return (count / kSlots) & 1; }
};

// ---- units of work -------------------------------------------------------------------------------------------------
struct Schedule {
    int len_q, len_k;
    int query_tiles;        // per head
    int heads;              // batch * heads_q: what a tile's flat head index counts
    int heads_q, queries_per_key_head;
    int heads_per_section;  // tiles of this many heads are in flight together, so that their K and V stay in L2
};

// A unit of work. key_blocks: blocks that some row sees (0: the rows are empty; -1: no work left). The first
// unmasked_blocks of them are seen whole by all rows.
struct Tile {
    int query_start, head, batch, key_blocks, unmasked_blocks;
};

// Tile number -> tile. Numbers run through sections of heads; in a section the head varies fastest. Causal: the last
// query tiles see most keys and come first, so that no long tile is left for the end.
__device__ __forceinline__ Tile decode(u32 number, const Schedule& schedule) {
    const u32 section_tiles = schedule.heads_per_section * schedule.query_tiles;
    const u32 section = number / section_tiles, rest = number - section * section_tiles;
    const u32 first_head = section * schedule.heads_per_section;
    const u32 heads = min(static_cast<u32>(schedule.heads_per_section), schedule.heads - first_head);
    u32 query_tile = rest / heads;
    const u32 flat_head = first_head + rest - query_tile * heads;
    if (kCausal) query_tile = schedule.query_tiles - 1 - query_tile;
    const int query_start = query_tile * kBlockQ;
    int first_sees = schedule.len_k, last_sees = schedule.len_k;  // keys seen by the tile's first and last row
    if (kCausal) {
        const int last_row = min(query_start + kBlockQ, schedule.len_q) - 1;
        first_sees = max(0, min(first_sees, query_start + 1 + schedule.len_k - schedule.len_q));
        last_sees = max(0, min(last_sees, last_row + 1 + schedule.len_k - schedule.len_q));
    }
    const int batch = flat_head / schedule.heads_q, head = flat_head - batch * schedule.heads_q;
    return {query_start, head, batch, (last_sees + kBlockK - 1) / kBlockK, first_sees / kBlockK};
}

// ---- producer ------------------------------------------------------------------------------------------------------
// One thread. Blocks go from the last key to the first, so that those with a mask come first. K runs one block ahead of
// V, because consumers need the next block's K before this block's V.
template <class Shared, class Problem>
__device__ __forceinline__ void produce(Shared& shared, const TensorMap& q_map, const TensorMap& k_map,
                                        const TensorMap& v_map, u32* tile_counter, const Problem& problem) {
    const u32 tiles = problem.query_tiles * problem.heads;
    Cursor<kStages> k_cursor, v_cursor;
    Cursor<kQueryStages> q_cursor;
    u32 number = blockIdx.x;
    while (true) {
        Tile tile = {0, 0, 0, -1, 0};
        if (number < tiles) tile = decode(number, problem);
        const int key_head = tile.head / problem.queries_per_key_head;
        auto load = [&](const TensorMap& map, auto* slot, u64* full, u64* empty, u32 parity, u32 name, int block,
                        bool keys_last) {
            mbarrier_wait(empty, parity ^ 1, name, block);
            mbarrier_arrive_expect_tx(full, kBytesKV);
            const int first = keys_last ? 0 : block * kBlockK, column_block = keys_last ? block * kColumnBlocks : 0;
            tma_load_5d(slot, &map, full, 0, first, column_block, key_head, tile.batch);
        };
        auto load_k = [&](int block) {
            const u32 s = k_cursor.slot();
            load(k_map, shared.k[s], &shared.k_full[s], &shared.k_empty[s], k_cursor.parity(), K_EMPTY, block, false);
            ++k_cursor.count;
        };
        auto load_v = [&](int block) {
            const u32 s = v_cursor.slot();
            load(v_map, shared.v[s], &shared.v_full[s], &shared.v_empty[s], v_cursor.parity(), V_EMPTY, block,
                 kColumnBlocks > 0);
            ++v_cursor.count;
        };

        if (tile.key_blocks > 0) load_k(tile.key_blocks - 1);
        const u32 slot = q_cursor.slot();
        mbarrier_wait(&shared.q_empty[slot], q_cursor.parity() ^ 1, Q_EMPTY, number);
        ++q_cursor.count;
        shared.tile[slot] = tile;
        if (tile.key_blocks > 0) {
            mbarrier_arrive_expect_tx(&shared.q_full[slot], kBytesQ);
            tma_load_5d(shared.q[slot], &q_map, &shared.q_full[slot], 0, tile.query_start, 0, tile.head, tile.batch);
        } else {
            mbarrier_arrive(&shared.q_full[slot]);
            if (tile.key_blocks < 0) break;
        }
        for (int block = tile.key_blocks - 2; block >= 0; --block) {
            load_k(block);
            load_v(block + 1);
        }
        // Every block fetches until it is told a number past the end: `tiles` fetches in all, so the counter, which
        // wraps there, is zero again for the next launch.
        number = gridDim.x + atomicInc(tile_counter, tiles - 1);
        if (tile.key_blocks > 0) load_v(0);
    }
}

// ---- masks ---------------------------------------------------------------------------------------------------------
// Scores of keys that a row must not see become -inf. `limit` = number of visible keys from the block's start on.
__device__ __forceinline__ void mask(float (&s)[kBlockK / 2], int limit_top, int limit_bottom) {
#pragma unroll
    for (int i = 0; i < kBlockK / 2; ++i) {
        const int column = 8 * (i / 4) + i % 2;  // plus 2 (lane % 4), which the limits already contain
        if (column >= ((i / 2) % 2 ? limit_bottom : limit_top)) s[i] = -kInfinity;
    }
}
