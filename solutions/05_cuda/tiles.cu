// Step (b): the threads of a block share tiles of Q, K and V.
//
// Against scalar.cu: global memory is read by the whole block together, neighbouring threads reading neighbouring
// elements, and every element once per block instead of once per thread; blocks of keys instead of single keys.
// Compiled with HEAD_DIM, BLOCK_Q, BLOCK_K, BF16, CAUSAL defined (fa2_cuda.py); the last two are 0 or 1.

using u16 = unsigned short;

struct Tensor {  // (batch, heads, len, HEAD_DIM) numbers of 16 bits; distances in elements, 1 along HEAD_DIM
    u16* data;
    long long batch, head;
    int row;  // (len - 1) * row + HEAD_DIM fits in 31 bits: the host checks it
};
struct Problem {
    Tensor Q, K, V, O;
    float* lse;  // (batch, heads_q, len_q), contiguous
    int heads_q, group, len_q, len_k;
    float scale;
};

constexpr int Q_PITCH = HEAD_DIM + 1;  // floats from row to row of Q_smem: lanes on neighbouring rows, 32 banks
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define INFINITE __int_as_float(0x7f800000)  // the bits of +infinity

// ---- 16-bit numbers (given) -----------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(u16 bits) {
#if BF16
    return __int_as_float(bits << 16);  // bfloat16 is the upper half of a float
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}
__device__ __forceinline__ u16 to_16_bits(float x) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
    return bits;
}

// ---- global -> shared -----------------------------------------------------------------------------------------------

// Rows first .. first + ROWS of one head, as floats; rows from `len` on become zeros.
template <int ROWS, int PITCH>
__device__ __forceinline__ void load_tile(float* tile_smem, const u16* head, int row_stride, int first, int len) {
    // BEGIN SOLUTION: let the block's BLOCK_Q threads walk over the tile together, neighbouring threads on neighbouring
    //: columns; do not read rows that do not exist
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += BLOCK_Q) {
        const int row = i / HEAD_DIM, column = i % HEAD_DIM;
        tile_smem[row * PITCH + column] = first + row < len ? to_float(head[(first + row) * row_stride + column]) : 0.0f;
    }
    // END SOLUTION
}

// ---- the kernel: one block of threads per BLOCK_Q queries of one head -----------------------------------------------

extern "C" __global__ void __launch_bounds__(BLOCK_Q) attention(const Problem p) {
    extern __shared__ float smem[];
    float* K_smem = smem;                         // (BLOCK_K, HEAD_DIM)
    float* V_smem = K_smem + BLOCK_K * HEAD_DIM;  // (BLOCK_K, HEAD_DIM)
    float* Q_smem = V_smem + BLOCK_K * HEAD_DIM;  // (BLOCK_Q, Q_PITCH)
    float S_rmem[BLOCK_K], O_rmem[HEAD_DIM] = {};
    float m = -INFINITE, l = 0.0f;

    const int head = blockIdx.x, batch = blockIdx.y;
    const int block_row = blockIdx.z * BLOCK_Q, row = block_row + threadIdx.x;
    const u16* Q = p.Q.data + batch * p.Q.batch + head * p.Q.head;
    const u16* K = p.K.data + batch * p.K.batch + head / p.group * p.K.head;
    const u16* V = p.V.data + batch * p.V.batch + head / p.group * p.V.head;

    // BEGIN SOLUTION: load Q; for every block of keys load K and V, wait for all threads, compute this row's scores, mask
    //: them, update m, l and O_rmem online; nobody may overwrite a tile that another thread still reads; write O and lse
    load_tile<BLOCK_Q, Q_PITCH>(Q_smem, Q, p.Q.row, block_row, p.len_q);
    const int last_key = CAUSAL ? min(p.len_k - 1, row + p.len_k - p.len_q) : p.len_k - 1;
    for (int first_key = 0; first_key < p.len_k; first_key += BLOCK_K) {
        __syncthreads();  // everyone has finished with the tiles of the block before
        load_tile<BLOCK_K, HEAD_DIM>(K_smem, K, p.K.row, first_key, p.len_k);
        load_tile<BLOCK_K, HEAD_DIM>(V_smem, V, p.V.row, first_key, p.len_k);
        __syncthreads();  // everyone's part of the tiles is there

        for (int j = 0; j < BLOCK_K; j++) S_rmem[j] = 0.0f;
#pragma unroll 4
        for (int c = 0; c < HEAD_DIM; c++) {
            const float q = Q_smem[threadIdx.x * Q_PITCH + c];
#pragma unroll
            for (int j = 0; j < BLOCK_K; j++) S_rmem[j] += q * K_smem[j * HEAD_DIM + c];
        }
        float m_new = m;
#pragma unroll
        for (int j = 0; j < BLOCK_K; j++) {
            S_rmem[j] = first_key + j <= last_key ? S_rmem[j] * p.scale * LOG2_E : -INFINITE;
            m_new = fmaxf(m_new, S_rmem[j]);
        }
        const float subtract = m_new == -INFINITE ? 0.0f : m_new;  // this row may have seen no key yet
        const float alpha = exp2f(m - subtract);
        l *= alpha;
#pragma unroll
        for (int c = 0; c < HEAD_DIM; c++) O_rmem[c] *= alpha;
#pragma unroll
        for (int j = 0; j < BLOCK_K; j++) {
            const float probability = exp2f(S_rmem[j] - subtract);
            l += probability;
#pragma unroll
            for (int c = 0; c < HEAD_DIM; c++) O_rmem[c] += probability * V_smem[j * HEAD_DIM + c];
        }
        m = m_new;
    }

    if (row >= p.len_q) return;  // only now: every thread was needed for the tiles and the barriers
    u16* O = p.O.data + batch * p.O.batch + head * p.O.head + row * p.O.row;
    const float inverse = l > 0.0f ? 1.0f / l : 0.0f;  // a row without keys gives 0
#pragma unroll
    for (int c = 0; c < HEAD_DIM; c++) O[c] = to_16_bits(O_rmem[c] * inverse);
    p.lse[(static_cast<long long>(batch) * p.heads_q + head) * p.len_q + row] = LN_2 * (m + log2f(l));
    // END SOLUTION
}
