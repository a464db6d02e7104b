// The way out of O: registers -> shared memory (stmatrix) -> global memory (TMA), while the next tile begins.
// Before it includes this, a file defines kHeadDim, kOutputColumns (columns that go at a time, a multiple of 64),
// kOutputBarrier (a named barrier for each consumer) and `pack`, which rounds two values to the output's format.
#pragma once
#include "attention_tiles.cuh"
#include "hopper/matrices.cuh"
#include "hopper/named_barrier.cuh"
#include "hopper/sync.cuh"

// Stores O / l of one consumer's 64 rows; TMA leaves out rows past the end. o_smem: (kOutputColumns / 64, 64, 64) under
// the 128-byte swizzle. Thread 0 must wait for its last store to have read o_smem before the block ends.
__device__ __forceinline__ void store_output(const float (&o)[kHeadDim / 2], const float (&inverse)[2], u16* o_smem,
                                             const TensorMap& o_map, const Tile& tile, int consumer) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    u16* row = o_smem + (16 * (thread / 32) + lane % 16) * 64;  // to which this lane's address points
#pragma unroll
    for (int first = 0; first < kHeadDim; first += kOutputColumns) {
        if (thread == 0) tma_store_wait_read<0>();  // the store before has read o_smem
        named_barrier_sync(kOutputBarrier + consumer, 128);
#pragma unroll
        for (int column = 0; column < kOutputColumns; column += 16) {  // 16 rows x 2 chunks of 8 columns, 16 bytes each
            u32 x[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = (first + column) / 2 + 2 * j;
                x[j] = pack(o[i] * inverse[j % 2], o[i + 1] * inverse[j % 2]);
            }
            const int chunk = (column % 64 / 8 + lane / 16) ^ lane % 8;  // swizzled
            stmatrix_x4(shared_address(row + column / 64 * 64 * 64 + chunk * 8), x);
        }
        fence_proxy_async();
        named_barrier_sync(kOutputBarrier + consumer, 128);
        if (thread == 0) {
            tma_store_5d(&o_map, o_smem, 0, tile.query_start + 64 * consumer, first / 64, tile.head, tile.batch);
            tma_store_commit();
        }
    }
}
