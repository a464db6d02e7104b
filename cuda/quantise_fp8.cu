// Queries, keys and values from 16 bits to e4m3, in one pass over Q and K and two over V.
//
//   quantise_fp8        Q and K: rotate each row (random signs, then the fast Hadamard transform), find the largest
//                       magnitude of kBlock rows, divide by the scale, round to e4m3. V: the largest magnitudes alone.
//   quantise_fp8_values V: its scale is one for the whole head, so that it can only be rounded in a second launch;
//                       there V can be transposed on the way, into the layout that fa3_forward_fp8.cu multiplies with.
// It moves 2 bytes in and 1 out for each element (of V twice 2 bytes in), and should take as long as a copy of that
// size.
//
// The results are those of fa_reference/fp8 bit for bit: the transform adds in the same order, and x / scale is rounded
// as a division. A block of zeros gets the scale 1. NaN or infinity in a block makes its scale NaN or infinite, so that
// all that depends on it becomes NaN; nothing finite does.
//
// A block of threads has kBlock rows of one head in registers, 64 elements a thread: kRows rows of 8 / kRows chunks. A
// chunk is 8 neighbouring channels, 16 bytes; a thread's chunks are evenly spread over the row, its neighbours hold the
// chunks beside. So the transform needs other threads only for the spans between 8 channels and the chunks' distance.
#include "hopper/base.cuh"
#include "hopper/fp8.cuh"

constexpr int kHeadDim = FA_HEAD_DIM;
constexpr bool kBf16 = FA_BF16;
constexpr bool kRotate = FA_ROTATE;
constexpr bool kTransposeValues = FA_TRANSPOSE_VALUES;

constexpr int kBlock = 128;  // rows
constexpr int kThreads = kBlock * kHeadDim / 64;
// Rows of a thread. Q, K: few rows mean few shuffles, but short pieces of a row in each load; of V four make a word of
// V^T.
constexpr int kRowsQK = kHeadDim == 64 ? 8 : 2, kRowsV = 4;
constexpr float kLargest = 448.0f;

struct Operand {  // a (batch, heads, len, kHeadDim) tensor, its codes and scales; strides in elements
    const u16* x;
    unsigned char* codes;
    float* scale;  // Q, K: (batch, heads, blocks). V: (batch, heads)
    float* amax;   // V: (batch, heads, blocks)
    int heads, len, blocks;
    long long x_stride_batch, x_stride_head, x_stride_row;
    long long codes_stride_batch, codes_stride_head, codes_stride_row;
};

template <int kRows>
struct Tile {
    static constexpr int kChunks = 8 / kRows, kDistance = kHeadDim / kChunks;  // channels from a chunk to the next
    static constexpr int kLanes = kDistance / 8;                              // threads that share a row
    float x[kRows][kChunks][8];

    __device__ __forceinline__ static int group() { return threadIdx.x / kLanes; }
    __device__ __forceinline__ static int lane() { return threadIdx.x % kLanes; }
    __device__ __forceinline__ static int channel(int chunk) { return chunk * kDistance + lane() * 8; }
    // Row i of the thread. With four, rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of 16: neighbours in V^T's key order, where
    // they make the word `group` of a row.
    __device__ __forceinline__ static int row(int i) {
        return kRows == 4 ? group() / 4 * 16 + group() % 4 * 2 + i % 2 + i / 2 * 8 : group() * kRows + i;
    }

    template <class F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
                for (int j = 0; j < 8; ++j) x[i][chunk][j] = f(x[i][chunk][j], chunk, j);
            }
        }
    }
};

__device__ __forceinline__ float widen(u32 pair, int upper) {
    if constexpr (kBf16) return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
    float y;
    const u16 bits = static_cast<u16>(upper ? pair >> 16 : pair);
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// Global -> registers; rows behind the end are zeros.
template <int kRows>
__device__ __forceinline__ void load(Tile<kRows>& tile, const Operand& operand, int batch, int head, int block) {
    constexpr int kChunks = Tile<kRows>::kChunks;
    const u16* base = operand.x + batch * operand.x_stride_batch + head * operand.x_stride_head;
    uint4 raw[kRows][kChunks];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = block * kBlock + tile.row(i);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            raw[i][chunk] = make_uint4(0, 0, 0, 0);
            if (row < operand.len)
                raw[i][chunk] =
                    *reinterpret_cast<const uint4*>(base + row * operand.x_stride_row + tile.channel(chunk));
        }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const uint4 four = raw[i][chunk];
            const u32 pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) tile.x[i][chunk][j] = widen(pairs[j / 2], j % 2);
        }
    }
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}

// x D H / sqrt(d) for every row, in the order of fa_reference/fp8/hadamard.py: spans 1, 2, 4 within a chunk, 8 and more
// between lanes, the largest between the thread's chunks.
template <int kRows>
__device__ __forceinline__ void rotate(Tile<kRows>& tile, const float* signs) {
    constexpr int kChunks = Tile<kRows>::kChunks;
    float sign[kChunks][8];
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
        const float4 four = reinterpret_cast<const float4*>(signs + tile.channel(i / 2))[i % 2];
        sign[i / 2][i % 2 * 4] = four.x;
        sign[i / 2][i % 2 * 4 + 1] = four.y;
        sign[i / 2][i % 2 * 4 + 2] = four.z;
        sign[i / 2][i % 2 * 4 + 3] = four.w;
    }
    tile.each([&](float x, int chunk, int j) { return x * sign[chunk][j]; });
#pragma unroll
    for (int span = 1; span < 8; span *= 2) {
#pragma unroll
        for (int i = 0; i < kRows * kChunks * 8; ++i) {
            if (i & span) continue;
            float(&x)[8] = tile.x[i / 8 / kChunks][i / 8 % kChunks];
            butterfly(x[i % 8], x[i % 8 + span]);
        }
    }
#pragma unroll
    for (int distance = 1; distance < tile.kLanes; distance *= 2) {
        const float own = tile.lane() & distance ? -1.0f : 1.0f;  // the upper lane of a pair gets a - b
        tile.each([&](float x, int, int) { return fmaf(own, x, __shfl_xor_sync(0xffffffffu, x, distance)); });
    }
#pragma unroll
    for (int span = 1; span < kChunks; span *= 2) {
#pragma unroll
        for (int i = 0; i < kRows * kChunks * 8; ++i) {
            const int chunk = i / 8 % kChunks;
            float(&x)[kChunks][8] = tile.x[i / 8 / kChunks];
            if (!(chunk & span)) butterfly(x[chunk][i % 8], x[chunk + span][i % 8]);
        }
    }
    const float norm = kHeadDim == 64 ? 0.125f : kHeadDim == 256 ? 0.0625f : 0.08838834764831845f;
    tile.each([&](float x, int, int) { return x * norm; });
}

// The largest of all threads' numbers, in every thread.
__device__ __forceinline__ u32 block_max(u32 largest) {
    __shared__ u32 of_warp[kThreads / 32];
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, of_warp[warp]);
    return largest;
}

// The largest magnitude of the block's elements. Compared as integers, which orders numbers of one sign as floats do
// and puts infinity and NaN above them.
template <int kRows>
__device__ __forceinline__ float largest_magnitude(Tile<kRows>& tile) {
    u32 largest = 0;
    tile.each([&](float x, int, int) {
        largest = max(largest, __float_as_uint(x) & 0x7fffffffu);
        return x;
    });
    return __uint_as_float(block_max(largest));
}

// amax / 448; zeros keep the scale 1; a subnormal scale could not be inverted. NaN and infinity pass.
__device__ __forceinline__ float scale_of(float amax) {
    const float smallest = 1.1754943508222875e-38f;  // 2^-126
    const float scale = amax / kLargest;
    return amax == 0.0f ? 1.0f : scale < smallest ? smallest : scale;
}

// x / scale, correctly rounded, from 1 / scale: one step of Markstein's division, which only loses the sign of -0.
__device__ __forceinline__ float divide(float x, float scale, float inverse) {
    const float quotient = x * inverse;
    return copysignf(fmaf(fmaf(-quotient, scale, x), inverse, quotient), x);
}

template <int kRows>
__device__ __forceinline__ void quantise(Tile<kRows>& tile, float scale) {
    const float inverse = 1.0f / scale;
    tile.each([&](float x, int, int) { return divide(x, scale, inverse); });
}

template <int kRows>
__device__ __forceinline__ void store(const Tile<kRows>& tile, const Operand& operand, int batch, int head,
                                      int block) {
    unsigned char* base = operand.codes + batch * operand.codes_stride_batch + head * operand.codes_stride_head;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = block * kBlock + tile.row(i);
#pragma unroll
        for (int chunk = 0; chunk < tile.kChunks; ++chunk) {
            const float(&x)[8] = tile.x[i][chunk];
            const uint2 codes = make_uint2(pack_e4m3(x[0], x[1], x[2], x[3]), pack_e4m3(x[4], x[5], x[6], x[7]));
            if (row < operand.len)
                *reinterpret_cast<uint2*>(base + row * operand.codes_stride_row + tile.channel(chunk)) = codes;
        }
    }
}

// Transposed, through shared memory: rows are channels (the even ones of each 16 first), 128 bytes are the block's
// keys. A thread brings a word, its four keys, for each of its channels. Words are exchanged within a row, so that
// lanes with different channels, whose rows all begin in the same bank, do not meet.
__device__ __forceinline__ void store_transposed(const Tile<kRowsV>& tile, const Operand& operand, int batch, int head,
                                                 int block) {
    constexpr int kWords = kBlock / 4, kLanes = Tile<kRowsV>::kLanes;
    __shared__ alignas(16) u32 turned[kHeadDim][kWords];
    auto place = [](int row, int word) { return word ^ (row / 16 * 2 + row / 4 % 2) % kLanes * (kWords / kLanes); };
#pragma unroll
    for (int chunk = 0; chunk < tile.kChunks; ++chunk) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int channel = tile.channel(chunk) + j, row = channel / 16 * 16 + channel % 16 / 2 + channel % 2 * 8;
            turned[row][place(row, tile.group())] =
                pack_e4m3(tile.x[0][chunk][j], tile.x[1][chunk][j], tile.x[2][chunk][j], tile.x[3][chunk][j]);
        }
    }
    __syncthreads();
    unsigned char* base = operand.codes + batch * operand.codes_stride_batch + head * operand.codes_stride_head +
                          static_cast<long long>(block) * kBlock;
#pragma unroll
    for (int i = 0; i < kHeadDim * kWords / 2 / kThreads; ++i) {
        const int number = i * kThreads + threadIdx.x, row = number / (kWords / 2), word = number % (kWords / 2) * 2;
        *reinterpret_cast<uint2*>(base + row * operand.codes_stride_row + word * 4) =
            *reinterpret_cast<const uint2*>(&turned[row][place(row, word)]);
    }
}

// First launch: blocks 0 .. q_blocks - 1 are Q's, then come K's, then V's.
extern "C" __global__ void __launch_bounds__(kThreads)
    quantise_fp8(const __grid_constant__ Operand q, const __grid_constant__ Operand k,
                 const __grid_constant__ Operand v, const float* signs, int q_blocks, int k_blocks) {
    int number = blockIdx.x;
    const bool is_q = number < q_blocks, is_k = !is_q && number < q_blocks + k_blocks;
    const Operand& operand = is_q ? q : is_k ? k : v;
    number -= is_q ? 0 : is_k ? q_blocks : q_blocks + k_blocks;
    const int flat_head = number / operand.blocks, block = number - flat_head * operand.blocks;
    const int batch = flat_head / operand.heads, head = flat_head - batch * operand.heads;

    if (!is_q && !is_k) {
        Tile<kRowsV> tile;
        load(tile, operand, batch, head, block);
        const float amax = largest_magnitude(tile);
        if (threadIdx.x == 0) operand.amax[number] = amax;
        return;
    }
    Tile<kRowsQK> tile;
    load(tile, operand, batch, head, block);
    if (kRotate) rotate(tile, signs);
    const float scale = scale_of(largest_magnitude(tile));
    if (threadIdx.x == 0) operand.scale[number] = scale;
    quantise(tile, scale);
    store(tile, operand, batch, head, block);
}

// Second launch: V, from the last block to the first, since the end of the first launch has left those in the L2 cache.
extern "C" __global__ void __launch_bounds__(kThreads) quantise_fp8_values(const __grid_constant__ Operand v) {
    const int number = gridDim.x - 1 - blockIdx.x;
    const int flat_head = number / v.blocks, block = number - flat_head * v.blocks;
    const int batch = flat_head / v.heads, head = flat_head - batch * v.heads;

    Tile<kRowsV> tile;
    load(tile, v, batch, head, block);
    u32 largest = 0;
    for (int i = threadIdx.x; i < v.blocks; i += kThreads)
        largest = max(largest, __float_as_uint(v.amax[static_cast<long long>(flat_head) * v.blocks + i]));
    const float scale = scale_of(__uint_as_float(block_max(largest)));
    if (block == 0 && threadIdx.x == 0) v.scale[flat_head] = scale;
    quantise(tile, scale);
    if constexpr (kTransposeValues) store_transposed(tile, v, batch, head, block);
    else store(tile, v, batch, head, block);
}
