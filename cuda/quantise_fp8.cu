// Queries, keys and values from 16 bits to e4m3, in one launch and with one read of each from HBM.
//
// Q and K: rotate each row (random signs, then the fast Hadamard transform), find the largest magnitude of kBlock rows,
// divide by the scale, round to e4m3. V has one scale for a whole head, so that its tiles are visited twice: for their
// largest magnitudes, and again, while they are still in the L2 cache, to be rounded and, if the attention kernel wants
// it so, transposed. So 2 bytes of each element come from HBM and 1 goes there.
//
// The results are those of fa_reference/fp8 bit for bit: the transform adds in the same order, and x / scale is rounded
// as a division. A block of zeros gets the scale 1. NaN or infinity in a block makes its scale NaN or infinite, so that
// all that depends on it becomes NaN; nothing finite does.
//
// Persistent blocks of threads draw jobs, a tile of kBlock rows and what to do with it, from a counter. TMA brings the
// tiles into a ring of kStages slots, so that memory is busy while the threads compute. A thread has 64 elements in
// registers. The codes go back into the slot that the tile came in, and TMA stores them.
//
// A second visit waits for the first ones of its head, which cannot hang: a block draws jobs in rising order and does
// them in that order, and a job waits only for lower numbers. The lowest unfinished job was drawn by a block that runs
// and has done all its lower ones, so it is being worked on, and what it waits for is done. Nothing has to be known
// about how many blocks run at the same time.
#include "hopper/base.cuh"
#include "hopper/fp8.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/sync.cuh"
#include "hopper/tma.cuh"

constexpr int kHeadDim = FA_HEAD_DIM;
constexpr bool kBf16 = FA_BF16;
constexpr bool kRotate = FA_ROTATE;
constexpr bool kTransposeValues = FA_TRANSPOSE_VALUES;

constexpr int kBlock = 128;  // rows of a tile
constexpr int kThreads = kBlock * kHeadDim / 64, kBlocksPerSM = FA_BLOCKS_PER_SM, kStages = FA_STAGES;
constexpr int kTileBytes = kBlock * kHeadDim * 2;
constexpr int kWarpRows = 2048 / kHeadDim;              // rows of a warp, 64 channels to a thread
constexpr int kSpan = kHeadDim < 128 ? kHeadDim : 128;  // bytes of a row of codes that lie together in shared memory
constexpr float kLargest = 448.0f;
constexpr float kNorm = kHeadDim == 64 ? 0.125f : kHeadDim == 256 ? 0.0625f : 0.08838834764831845f;  // 1 / sqrt(d)

enum Kind { kQ, kK, kV, kLargestOfV, kEnd };  // of a job; the first three number the tensors, too

struct Operand {  // a (batch, heads, len, kHeadDim) tensor
    float* scale;              // Q, K: (batch, heads, blocks). V: (batch, heads)
    int heads, blocks, tiles;  // blocks: tiles of a head; tiles: of all heads and batches
};

struct State {  // all zeros before and after a launch
    int drawn, finished;  // jobs, blocks of threads
    u32 largest[1];       // as many as V has tiles: the bits of the largest magnitude plus 1, once it is known
};

struct Problem {
    Operand operands[3];  // Q, K, V
    const float* signs;   // (kHeadDim)
    State* state;
    int lag;  // a tile of V is visited again when this many more have been visited once; at least those of a head
};

struct Maps {
    TensorMap from[3], to[3];  // Q, K, V and their codes
};

struct Job {
    int kind, tile, batch, head, block;  // tile: counted through all heads
};

struct Shared {
    alignas(1024) unsigned char tile[kStages][kTileBytes];
    uint4 flips[kHeadDim / 8];  // 16 bits a channel: the sign bit where the sign is -1
    Job job[kStages];
    u64 full[kStages];
    u32 of_warp[kThreads / 32];
};
static_assert(sizeof(Shared) <= kStages * kTileBytes + 1024);  // as the host counts

__device__ __forceinline__ int operand_of(int kind) { return kind == kLargestOfV ? kV : kind; }

// V comes first, since between the two visits nothing else should pass through the L2 cache: `lag` first visits, then a
// first and a second one in turn, and the second ones that are left. Then Q and K.
__device__ __forceinline__ Job job_of(int number, const Problem& problem) {
    const int q = problem.operands[kQ].tiles, k = problem.operands[kK].tiles, v = problem.operands[kV].tiles;
    const int lag = problem.lag, in_turn = number - lag;
    Job job;
    if (number >= 2 * v + q + k) return {kEnd};
    if (number >= 2 * v + q) job = {kK, number - 2 * v - q};
    else if (number >= 2 * v) job = {kQ, number - 2 * v};
    else if (number >= 2 * v - lag) job = {kV, number - v};
    else if (number < lag) job = {kLargestOfV, number};
    else if (in_turn % 2 == 0) job = {kLargestOfV, lag + in_turn / 2};
    else job = {kV, in_turn / 2};
    const Operand& operand = problem.operands[operand_of(job.kind)];
    const int flat_head = job.tile / operand.blocks;
    job.block = job.tile - flat_head * operand.blocks;
    job.batch = flat_head / operand.heads;
    job.head = flat_head - job.batch * operand.heads;
    return job;
}

// Thread 0: starts the copy of a job's tile.
__device__ __forceinline__ void fetch(Shared& shared, int slot, int number, const Maps& maps, const Problem& problem) {
    const Job job = shared.job[slot] = job_of(number, problem);
    if (job.kind == kEnd) {
        mbarrier_arrive(&shared.full[slot]);
        return;
    }
    mbarrier_arrive_expect_tx(&shared.full[slot], kTileBytes);
    tma_load_5d(shared.tile[slot], &maps.from[operand_of(job.kind)], &shared.full[slot], 0, job.block * kBlock, 0,
                job.head, job.batch);
}

// Thread 0: starts the copy of its codes.
__device__ __forceinline__ void store(const Shared& shared, int slot, const Job& job, const Maps& maps) {
    const bool turned = kTransposeValues && job.kind == kV;
    tma_store_5d(&maps.to[job.kind], shared.tile[slot], 0, turned ? 0 : job.block * kBlock, turned ? job.block : 0,
                 job.head, job.batch);
}

// Where 16 bytes of a row lie in a tile whose rows are cut into pieces of kBytes, with TMA's swizzle of that width.
template <int kBytes>
__device__ __forceinline__ int place(int row, int sixteen) {
    constexpr int kIn = kBytes / 16;
    return sixteen / kIn * kBlock * kBytes + row * kBytes + (sixteen % kIn ^ row * kBytes / 128 % kIn) * 16;
}

// A thread's 64 elements are eight chunks of 8 channels: side by side in one row, which leaves the transform few spans
// between threads; where V is turned, two chunks of the rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of 16, which are neighbours
// in V^T's key order.
template <bool kTurned>
__device__ __forceinline__ int row_of(int i) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return kTurned ? lane / 4 * 16 + lane % 4 * 2 + i % 2 + i / 2 % 2 * 8 : warp * kWarpRows + lane % kWarpRows;
}

template <bool kTurned>
__device__ __forceinline__ int chunk_of(int i) {
    return kTurned ? threadIdx.x / 32 * 2 + i / 4 : threadIdx.x % 32 / kWarpRows * 8 + i;
}

template <bool kTurned>
__device__ __forceinline__ uint4 chunk_at(const unsigned char* tile, int i) {
    return *reinterpret_cast<const uint4*>(tile + place<128>(row_of<kTurned>(i), chunk_of<kTurned>(i)));
}

__device__ __forceinline__ float widen(u32 pair, int upper) {
    if constexpr (kBf16) return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
    float y;
    const u16 bits = static_cast<u16>(upper ? pair >> 16 : pair);
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// Slot -> registers. kFlip: times the signs.
template <bool kTurned, bool kFlip>
__device__ __forceinline__ void load(float (&x)[64], const Shared& shared, int slot) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint4 four = chunk_at<kTurned>(shared.tile[slot], i);
        const uint4 flips = kFlip ? shared.flips[chunk_of<kTurned>(i)] : make_uint4(0, 0, 0, 0);
        const u32 pairs[4] = {four.x ^ flips.x, four.y ^ flips.y, four.z ^ flips.z, four.w ^ flips.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) x[i * 8 + j] = widen(pairs[j / 2], j % 2);
    }
}

// x H for every row, in the order of fa_reference/fp8/hadamard.py: spans below 64 in the thread, then between lanes.
__device__ __forceinline__ void transform(float (&x)[64]) {
#pragma unroll
    for (int span = 1; span < 64; span *= 2) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            if (i & span) continue;
            const float sum = x[i] + x[i + span];
            x[i + span] = x[i] - x[i + span];
            x[i] = sum;
        }
    }
#pragma unroll
    for (int distance = kWarpRows; distance < 32; distance *= 2) {
        const float own = threadIdx.x & distance ? -1.0f : 1.0f;  // the upper lane of a pair gets a - b
#pragma unroll
        for (int i = 0; i < 64; ++i) x[i] = fmaf(own, x[i], __shfl_xor_sync(0xffffffffu, x[i], distance));
    }
}

// The largest of all threads' numbers, in every thread.
__device__ __forceinline__ u32 block_max(u32 largest, Shared& shared) {
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, shared.of_warp[warp]);
    return largest;
}

// The largest magnitude of the block's elements; NaN if there is one: as an integer it is above infinity.
__device__ __forceinline__ float largest_magnitude(const float (&x)[64], Shared& shared) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 64; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(x[i])));
    return __uint_as_float(block_max(__float_as_uint(largest), shared));
}

// The same of a tile of V, from the 16-bit numbers: without their signs they are ordered as integers are.
__device__ __forceinline__ float largest_of_values(Shared& shared, int slot) {
    u32 largest = 0;  // two
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint4 four = chunk_at<false>(shared.tile[slot], i);
        const u32 pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) asm("max.u16x2 %0, %0, %1;" : "+r"(largest) : "r"(pairs[j] & 0x7fff7fffu));
    }
    return widen(block_max(max(largest & 0xffff, largest >> 16), shared), 0);
}

// amax / 448; zeros keep the scale 1; a subnormal scale could not be inverted. NaN and infinity pass.
__device__ __forceinline__ float scale_of(float amax) {
    const float smallest = 1.1754943508222875e-38f;  // 2^-126
    const float scale = amax / kLargest;
    return amax == 0.0f ? 1.0f : scale < smallest ? smallest : scale;
}

// The scale of a head of V. Waits for its tiles' largest magnitudes; each is its own flag, so that no fence is needed.
__device__ __forceinline__ float scale_of_values(const Job& job, Shared& shared, const Problem& problem) {
    const int blocks = problem.operands[kV].blocks, first = job.tile - job.block;
    const volatile u32* of_tile = problem.state->largest;
    u32 largest = 0, found;
    for (int i = threadIdx.x; i < blocks; i += kThreads) {
        do found = of_tile[first + i];
        while (found == 0);
        largest = max(largest, found);
    }
    return scale_of(__uint_as_float(block_max(largest, shared) - 1));
}

// -minus_x / scale, correctly rounded, from 1 / scale: one step of Markstein's division. With these signs, which cost
// nothing, -0 stays -0.
__device__ __forceinline__ float divide(float minus_x, float scale, float inverse) {
    const float minus_quotient = minus_x * inverse;
    return fmaf(fmaf(-minus_quotient, scale, minus_x), -inverse, -minus_quotient);
}

template <bool kRotated>
__device__ __forceinline__ void quantise(float (&x)[64], float scale) {
    const float inverse = 1.0f / scale;
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = divide(kRotated ? x[i] * -kNorm : -x[i], scale, inverse);
}

// The codes go into the slot that the tile came in, once all threads have their elements.
__device__ __forceinline__ void write_rows(const float (&x)[64], unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        auto word = [&](int j) {
            const float* y = x + i * 16 + j * 4;
            return pack_e4m3(y[0], y[1], y[2], y[3]);
        };
        const int offset = place<kSpan>(row_of<false>(0), chunk_of<false>(0) / 2 + i);
        *reinterpret_cast<uint4*>(tile + offset) = make_uint4(word(0), word(1), word(2), word(3));
    }
}

// A word, the thread's four keys, for each of its channels, which are rows here: of each 16 the even ones first.
__device__ __forceinline__ void write_turned(const float (&x)[64], unsigned char* tile) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int channel = 0; channel < 16; ++channel) {
        const float* y = x + channel / 8 * 32 + channel % 8;  // from a key to the next: a chunk
        const int row = warp * 16 + channel / 2 + channel % 2 * 8;
        const int offset = place<128>(row, lane / 4) + lane % 4 * 4;
        *reinterpret_cast<u32*>(tile + offset) = pack_e4m3(y[0], y[8], y[16], y[24]);
    }
}

__device__ __forceinline__ void work_on(const Job& job, Shared& shared, int slot, const Problem& problem) {
    const bool leader = threadIdx.x == 0;
    const Operand& v = problem.operands[kV];
    float x[64];
    if (job.kind == kLargestOfV) {
        const u32 bits = __float_as_uint(largest_of_values(shared, slot));
        volatile u32* of_tile = problem.state->largest;
        if (leader) of_tile[job.tile] = bits + 1;
    } else if (job.kind == kV) {
        load<kTransposeValues, false>(x, shared, slot);
        const float scale = scale_of_values(job, shared, problem);
        if (leader && job.block == 0) v.scale[job.tile / v.blocks] = scale;
        quantise<false>(x, scale);
        if (kTransposeValues) write_turned(x, shared.tile[slot]);
        else write_rows(x, shared.tile[slot]);
    } else {
        load<false, kRotate>(x, shared, slot);
        if (kRotate) transform(x);
        const float largest = largest_magnitude(x, shared);
        const float scale = scale_of(kRotate ? largest * kNorm : largest);
        if (leader) problem.operands[job.kind].scale[job.tile] = scale;
        quantise<kRotate>(x, scale);
        write_rows(x, shared.tile[slot]);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    quantise_fp8(const __grid_constant__ Maps maps, const __grid_constant__ Problem problem) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const bool leader = threadIdx.x == 0;
    int* drawn = &problem.state->drawn;
    if (leader) {
        for (u64& barrier : shared.full) mbarrier_init(&barrier, 1);
        mbarrier_init_fence();
        int number[kStages];
#pragma unroll
        for (int& next : number) next = atomicAdd(drawn, 1);
#pragma unroll
        for (int slot = 0; slot < kStages; ++slot) fetch(shared, slot, number[slot], maps, problem);
    }
    if (kRotate && threadIdx.x < kHeadDim)
        reinterpret_cast<u16*>(shared.flips)[threadIdx.x] = problem.signs[threadIdx.x] < 0 ? 0x8000 : 0;
    __syncthreads();

    int slot = 0, previous = 0;
    for (u32 parity = 0, started = 0;; started = 1) {
        mbarrier_wait(&shared.full[slot], parity);
        const Job job = shared.job[slot];
        if (job.kind == kEnd) break;
        int next = 0;
        if (leader && started) next = atomicAdd(drawn, 1);  // early, so that nobody waits for the answer
        work_on(job, shared, slot, problem);
        fence_proxy_async();
        __syncthreads();
        if (leader) {
            if (job.kind != kLargestOfV) store(shared, slot, job, maps);
            tma_store_commit();
            tma_store_wait_read<1>();  // the codes of the tile before have left its slot
            if (started) fetch(shared, previous, next, maps, problem);
        }
        previous = slot;
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
    // The last block leaves the state as it was before the launch.
    bool last = false;
    if (leader) {
        tma_store_wait_read<0>();
        __threadfence();
        last = atomicAdd(&problem.state->finished, 1) == gridDim.x - 1;
    }
    if (__syncthreads_or(last)) {
        for (int i = threadIdx.x; i < problem.operands[kV].tiles; i += kThreads) problem.state->largest[i] = 0;
        if (leader) problem.state->drawn = problem.state->finished = 0;
    }
}
