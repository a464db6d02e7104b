// Step (a): one thread computes one row of the output.
//
// A launch starts a grid of blocks of threads, and all of them run the function marked __global__, each with its own
// blockIdx and threadIdx. Here a block has BLOCK_Q threads, and blockIdx.x, .y, .z say which head, batch and rows.
// Compiled with HEAD_DIM, BLOCK_Q, BF16, CAUSAL defined (fa2_cuda.py); the last two are 0 or 1. exp2f, log2f, fmaxf and min
// need no header. Query i sees key j if j <= i + len_k - len_q where CAUSAL, else every key. lse is the natural logarithm;
// a row that sees no key has O = 0 and lse = -INFINITE.

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
    float scale;  // positive: the host checks it
};

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

// ---- the kernel: one block of threads per BLOCK_Q queries of one head -----------------------------------------------

extern "C" __global__ void __launch_bounds__(BLOCK_Q) attention(const Problem p) {
    float O_rmem[HEAD_DIM] = {};  // stays in registers: every index is known when the loops are unrolled
    float m = -INFINITE, l = 0.0f;

    const int head = blockIdx.x, batch = blockIdx.y;
    // BEGIN SOLUTION: find this thread's row and return if there is none; point at its row of Q and at K and V of its
    //: head; for every key it sees compute the score, and update m, l and O_rmem online; write O / l and lse
    const int row = blockIdx.z * BLOCK_Q + threadIdx.x;
    if (row >= p.len_q) return;  // the last block may have more threads than there are rows left
    const u16* Q = p.Q.data + batch * p.Q.batch + head * p.Q.head + row * p.Q.row;
    const u16* K = p.K.data + batch * p.K.batch + head / p.group * p.K.head;
    const u16* V = p.V.data + batch * p.V.batch + head / p.group * p.V.head;

    const int last_key = CAUSAL ? min(p.len_k - 1, row + p.len_k - p.len_q) : p.len_k - 1;
    for (int key = 0; key <= last_key; key++) {
        float score = 0.0f;
#pragma unroll 16
        for (int c = 0; c < HEAD_DIM; c++) score += to_float(Q[c]) * to_float(K[key * p.K.row + c]);
        score *= p.scale * LOG2_E;
        const float m_new = fmaxf(m, score);
        const float alpha = exp2f(m - m_new), probability = exp2f(score - m_new);
        l = l * alpha + probability;
#pragma unroll
        for (int c = 0; c < HEAD_DIM; c++)
            O_rmem[c] = O_rmem[c] * alpha + probability * to_float(V[key * p.V.row + c]);
        m = m_new;
    }

    u16* O = p.O.data + batch * p.O.batch + head * p.O.head + row * p.O.row;
    const float inverse = l > 0.0f ? 1.0f / l : 0.0f;  // a row without keys gives 0
#pragma unroll
    for (int c = 0; c < HEAD_DIM; c++) O[c] = to_16_bits(O_rmem[c] * inverse);
    p.lse[(static_cast<long long>(batch) * p.heads_q + head) * p.len_q + row] = LN_2 * (m + log2f(l));
    // END SOLUTION
}
