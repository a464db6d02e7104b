// A tensor (B, H, N, d) of 16-bit numbers, copied through shared memory: TMA brings tiles, threads take them apart.
//
// One block of 128 threads copies one head. It has one slot for a tile of kRows rows and visits the tiles one after
// another; out is (B, H, tiles x kRows, d), contiguous, so rows past the end of the tensor are seen too: they are zeros.
#include "tma_engine.cuh"

constexpr int kHeadDim = FA_HEAD_DIM;  // set by the host
constexpr int kRows = 64, kThreads = 128;
constexpr u32 kTileBytes = kRows * kHeadDim * 2;

struct Shared {
    alignas(1024) u16 tile[kRows * kHeadDim];  // [kHeadDim / 64][kRows][64], swizzled
    u64 full;                                  // barrier: the tile has arrived
};

enum BarrierName { FULL };

// Byte offset of an element in a tile as TMA delivers it: layouts.py's tile_offset. constexpr, so that the checks can
// ask the compiler for values.
__device__ constexpr int tile_offset(int row, int column) {
    int offset = 0;
    // BEGIN SOLUTION: tile_offset and swizzle of your layouts.py, for a tile of kRows rows
    offset = column / 64 * kRows * 128 + row * 128 + column % 64 * 2;
    offset ^= offset >> 3 & 0x70;
    // END SOLUTION
    return offset;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    tma_tile(const __grid_constant__ TensorMap map, u16* out, int tiles) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const unsigned char* tile_bytes = shared_bytes;  // where `tile` lies; element (r, c) at tile_offset(r, c)
    const int thread = threadIdx.x, head = blockIdx.x, batch = blockIdx.y;
    out += (static_cast<long long>(batch) * gridDim.x + head) * tiles * kRows * kHeadDim;
    // BEGIN SOLUTION: thread 0 initialises the barrier (one arrival a phase), and everyone waits until it has. Then for
    //: every tile: thread 0 announces kTileBytes and asks for rows tile x kRows .. of this head; everyone waits for the
    //: phase (parity 0, 1, 0, 1, ...; name FULL), copies its share of the elements to out + tile x kRows x kHeadDim,
    //: and says that it has read the slot
    if (thread == 0) {
        mbarrier_init(&shared.full, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    for (int tile = 0; tile < tiles; ++tile) {
        if (thread == 0) {
            mbarrier_arrive_expect_tx(&shared.full, kTileBytes);
            tma_load_5d(shared.tile, &map, &shared.full, 0, tile * kRows, 0, head, batch);
        }
        mbarrier_wait(&shared.full, tile & 1, FULL, tile);
        for (int i = thread; i < kRows * kHeadDim; i += kThreads)
            out[tile * kRows * kHeadDim + i] =
                *reinterpret_cast<const u16*>(tile_bytes + tile_offset(i / kHeadDim, i % kHeadDim));
        __syncthreads();  // all have read the slot: the next tile may overwrite it
    }
    // END SOLUTION
}
