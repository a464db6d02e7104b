// How long a TMA load takes from its instruction until a waiter sees it, and how many bytes a clock arrive.
// One thread of each block loads boxes of kBoxRows x (columns of the map), `count` of them, `ahead` at a time.
// out[block][0 .. 4]: clocks for all; bytes; the shortest and the median clocks of one load (ahead = 0), of which so many
// pass (on average) before the thread can go on: for announcing the bytes and for the load's instruction.
#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"
#include "micro/common.cuh"

constexpr int kSlots = 4;
extern __shared__ __align__(1024) unsigned char shared_bytes[];

// Block b loads rows (b % blocks_apart) * apart + i * rows, for i < count, modulo `length`.
extern "C" __global__ void __launch_bounds__(32, 1)
    loads(const __grid_constant__ TensorMap map, u32* out, int count, int ahead, int rows, int bytes, int apart,
          int length) {
    __shared__ u64 full[kSlots];
    __shared__ u32 took[64];
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kSlots; ++slot) mbarrier_init(&full[slot], 1);
        mbarrier_init_fence();
        tma_prefetch_descriptor(&map);
        int row = blockIdx.x * apart % length;
        auto load = [&](int i) {
            const int slot = i % kSlots;
            mbarrier_arrive_expect_tx(&full[slot], bytes);
            tma_load_5d(shared_bytes + slot * bytes, &map, &full[slot], 0, row, 0, 0, 0);
            row = row + rows < length ? row + rows : row + rows - length;
        };
        u32 issuing = 0;
        const u64 start = clock_now();
        for (int i = 0; i < ahead; ++i) load(i);
        for (int i = 0; i < count; ++i) {
            const u64 began = clock_now();
            if (ahead == 0) {
                load(i);
                issuing += clock_now() - began;
            }
            mbarrier_wait(&full[i % kSlots], i / kSlots & 1);
            took[i % 64] = clock_now() - began;
            if (ahead > 0 && i + ahead < count) load(i + ahead);
        }
        out += blockIdx.x * 5;
        out[0] = clock_now() - start;
        out[1] = count * bytes;
        for (int i = 1; i < 64; ++i)  // sort
            for (int j = i; j > 0 && took[j - 1] > took[j]; --j) {
                const u32 x = took[j];
                took[j] = took[j - 1], took[j - 1] = x;
            }
        out[2] = took[0];
        out[3] = took[32];
        out[4] = issuing / count;
    }
}
