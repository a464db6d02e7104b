// Queries, keys and values from 16 bits to e4m3, in one pass over Q and K and two over V.
//
//   quantise_fp8        Q and K: rotate each row (random signs, then the fast Hadamard transform), find the largest
//                       magnitude of kBlock rows, divide by the scale, round to e4m3. V: the largest magnitudes alone.
//   quantise_fp8_values V: its scale is one for the whole head, so that it can only be rounded in a second launch; there
//                       V can be transposed on the way, into the layout that fa3_forward_fp8.cu multiplies with.
// It moves 2 bytes in and 1 out for each element (of V twice 2 bytes in), and should take as long as a copy of that size.
//
// The results are those of fa_reference/fp8 bit for bit: the transform adds in the same order, and x / scale is rounded
// as a division. A block of zeros gets the scale 1. NaN or infinity in a block makes its scale NaN or infinite, so that
// all that depends on it becomes NaN; nothing finite does.
//
// A block of threads has kBlock rows of one head in registers: kHeadDim / 8 neighbouring threads share a row, each with 8
// channels (16 bytes) of it, and each thread has 8 rows.
#include "hopper/base.cuh"
#include "hopper/fp8.cuh"

constexpr int kHeadDim = FA_HEAD_DIM;
constexpr bool kBf16 = FA_BF16;
constexpr bool kRotate = FA_ROTATE;
constexpr bool kTransposeValues = FA_TRANSPOSE_VALUES;

constexpr int kBlock = 128;  // rows
constexpr int kRows = 8, kChannels = 8;  // of a thread
constexpr int kLanesPerRow = kHeadDim / kChannels;
constexpr int kThreads = kBlock / kRows * kLanesPerRow;
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

using Tile = float[kRows][kChannels];

// A thread's row i of the block. Four rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of 16 are neighbours in V^T's key order: they
// are i = 0 .. 3 or 4 .. 7, and make the aligned words 2 g and 2 g + 1 of a row of V^T, g being the thread's group.
__device__ __forceinline__ int row_of(int group, int i) {
    const int word = 2 * group + i / 4;
    return word / 4 * 16 + word % 4 * 2 + i % 2 + i % 4 / 2 * 8;
}

__device__ __forceinline__ float widen(u32 pair, int upper) {
    if constexpr (kBf16) return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
    float y;
    const u16 bits = static_cast<u16>(upper ? pair >> 16 : pair);
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// Global -> registers; rows behind the end are zeros.
__device__ __forceinline__ void load(Tile& x, const Operand& operand, int batch, int head, int block) {
    const int group = threadIdx.x / kLanesPerRow, first = threadIdx.x % kLanesPerRow * kChannels;
    const u16* base = operand.x + batch * operand.x_stride_batch + head * operand.x_stride_head + first;
    uint4 raw[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = block * kBlock + row_of(group, i);
        raw[i] = make_uint4(0, 0, 0, 0);
        if (row < operand.len) raw[i] = *reinterpret_cast<const uint4*>(base + row * operand.x_stride_row);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const u32 pairs[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int j = 0; j < kChannels; ++j) x[i][j] = widen(pairs[j / 2], j % 2);
    }
}

// x D H / sqrt(d) for every row: spans 1, 2, 4 within the thread's channels, the larger ones between lanes.
__device__ __forceinline__ void rotate(Tile& x, const float* signs) {
    const int lane = threadIdx.x % kLanesPerRow;
    float sign[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) sign[j] = signs[lane * kChannels + j];
    const float norm = kHeadDim == 64 ? 0.125f : kHeadDim == 256 ? 0.0625f : 0.08838834764831845f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) x[i][j] *= sign[j];
#pragma unroll
        for (int span = 1; span < kChannels; span *= 2) {
#pragma unroll
            for (int j = 0; j < kChannels; ++j) {
                if (j & span) continue;
                const float a = x[i][j], b = x[i][j + span];
                x[i][j] = a + b;
                x[i][j + span] = a - b;
            }
        }
    }
#pragma unroll
    for (int distance = 1; distance < kLanesPerRow; distance *= 2) {
        const float own = lane & distance ? -1.0f : 1.0f;  // the upper lane of a pair gets a - b
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kChannels; ++j)
                x[i][j] = fmaf(own, x[i][j], __shfl_xor_sync(0xffffffffu, x[i][j], distance));
        }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) x[i][j] *= norm;
    }
}

// The largest magnitude of the block's elements, in every thread. Compared as integers, which orders numbers of one sign
// as floats do and puts infinity and NaN above them.
__device__ __forceinline__ float largest_magnitude(const Tile& x) {
    __shared__ u32 of_warp[kThreads / 32];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) largest = max(largest, __float_as_uint(x[i][j]) & 0x7fffffffu);
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, of_warp[warp]);
    return __uint_as_float(largest);
}

// amax / 448; zeros keep the scale 1; a subnormal scale could not be inverted. NaN and infinity pass.
__device__ __forceinline__ float scale_of(float amax) {
    const float smallest = 1.1754943508222875e-38f;  // 2^-126
    const float scale = amax / kLargest;
    return amax == 0.0f ? 1.0f : scale < smallest ? smallest : scale;
}

// x / scale, correctly rounded, from 1 / scale: one step of Markstein's division.
__device__ __forceinline__ float divide(float x, float scale, float inverse) {
    const float quotient = x * inverse;
    return fmaf(fmaf(-quotient, scale, x), inverse, quotient);
}

__device__ __forceinline__ void quantise(Tile& x, float scale) {
    const float inverse = 1.0f / scale;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) x[i][j] = divide(x[i][j], scale, inverse);
    }
}

__device__ __forceinline__ void store(const Tile& x, const Operand& operand, int batch, int head, int block) {
    const int group = threadIdx.x / kLanesPerRow, first = threadIdx.x % kLanesPerRow * kChannels;
    unsigned char* base =
        operand.codes + batch * operand.codes_stride_batch + head * operand.codes_stride_head + first;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = block * kBlock + row_of(group, i);
        const uint2 codes = make_uint2(pack_e4m3(x[i][0], x[i][1], x[i][2], x[i][3]),
                                       pack_e4m3(x[i][4], x[i][5], x[i][6], x[i][7]));
        if (row < operand.len) *reinterpret_cast<uint2*>(base + row * operand.codes_stride_row) = codes;
    }
}

// Transposed, through shared memory: rows are channels (the even ones of each 16 first), 128 bytes are the block's keys.
// A thread brings 8 keys of 8 channels: 8 bytes (`group`) of 8 rows. The exchange of those keeps lanes apart that hold
// different channels, whose rows would otherwise begin in the same bank.
__device__ __forceinline__ void store_transposed(const Tile& x, const Operand& operand, int batch, int head,
                                                 int block) {
    __shared__ uint2 turned[kHeadDim][kBlock / 8];
    const int group = threadIdx.x / kLanesPerRow, lane = threadIdx.x % kLanesPerRow;
    auto place = [](int row, int eight) { return eight ^ (row / 16 * 2 + row / 4 % 2) % 16; };
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
        const int channel = lane * kChannels + j, row = channel / 16 * 16 + channel % 16 / 2 + channel % 2 * 8;
        turned[row][place(row, group)] = make_uint2(pack_e4m3(x[0][j], x[1][j], x[2][j], x[3][j]),
                                                    pack_e4m3(x[4][j], x[5][j], x[6][j], x[7][j]));
    }
    __syncthreads();
    unsigned char* base = operand.codes + batch * operand.codes_stride_batch + head * operand.codes_stride_head +
                          static_cast<long long>(block) * kBlock;
#pragma unroll
    for (int i = 0; i < kHeadDim * kBlock / 8 / kThreads; ++i) {
        const int number = i * kThreads + threadIdx.x, row = number / (kBlock / 8), eight = number % (kBlock / 8);
        *reinterpret_cast<uint2*>(base + row * operand.codes_stride_row + eight * 8) =
            turned[row][place(row, eight)];
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

    Tile x;
    load(x, operand, batch, head, block);
    if (kRotate && (is_q || is_k)) rotate(x, signs);
    const float amax = largest_magnitude(x);
    if (!is_q && !is_k) {
        if (threadIdx.x == 0) operand.amax[number] = amax;
        return;
    }
    const float scale = scale_of(amax);
    if (threadIdx.x == 0) operand.scale[number] = scale;
    quantise(x, scale);
    store(x, operand, batch, head, block);
}

// Second launch: V, from the last block to the first, since the end of the first launch has left those in the L2 cache.
extern "C" __global__ void __launch_bounds__(kThreads) quantise_fp8_values(const __grid_constant__ Operand v) {
    const int number = gridDim.x - 1 - blockIdx.x;
    const int flat_head = number / v.blocks, block = number - flat_head * v.blocks;
    const int batch = flat_head / v.heads, head = flat_head - batch * v.heads;

    Tile x;
    load(x, v, batch, head, block);
    __shared__ u32 of_warp[kThreads / 32];
    u32 largest = 0;
    for (int i = threadIdx.x; i < v.blocks; i += kThreads)
        largest = max(largest, __float_as_uint(v.amax[static_cast<long long>(flat_head) * v.blocks + i]));
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, of_warp[warp]);
    const float scale = scale_of(__uint_as_float(largest));
    if (block == 0 && threadIdx.x == 0) v.scale[flat_head] = scale;
    quantise(x, scale);
    if constexpr (kTransposeValues) store_transposed(x, v, batch, head, block);
    else store(x, v, batch, head, block);
}
