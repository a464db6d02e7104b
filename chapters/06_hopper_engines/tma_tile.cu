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
    // TODO: tile_offset and swizzle of your layouts.py, for a tile of kRows rows
    return offset;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    tma_tile(const __grid_constant__ TensorMap map, u16* out, int tiles) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const unsigned char* tile_bytes = shared_bytes;  // where `tile` lies; element (r, c) at tile_offset(r, c)
    const int thread = threadIdx.x, head = blockIdx.x, batch = blockIdx.y;
    out += (static_cast<long long>(batch) * gridDim.x + head) * tiles * kRows * kHeadDim;
    // TODO: thread 0 initialises the barrier (one arrival a phase), and everyone waits until it has. Then for
    // every tile: thread 0 announces kTileBytes and asks for rows tile x kRows .. of this head; everyone waits
    // for the phase (parity 0, 1, 0, 1, ...; name FULL), copies its share of the elements to out + tile x kRows
    // x kHeadDim, and says that it has read the slot
}
