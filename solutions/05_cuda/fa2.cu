// Step (d): FlashAttention-2.
//
// Against tensor_cores.cu: cp.async copies the next block of K and V while this one is used, into a second pair of
// tiles; blocks of keys that no row sees are skipped, and only those that some row does not see whole are masked; and a
// warp owns 32 rows (BLOCK_Q 128), so that a fragment of K or V that it has loaded is used twice.
// Compiled with HEAD_DIM, BLOCK_Q, BLOCK_K, WARPS, BF16, CAUSAL defined (fa2_cuda.py); the last two are 0 or 1.

using u16 = unsigned short;
using u32 = unsigned int;

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

constexpr int THREADS = WARPS * 32;
constexpr int CHUNK = 8, CHUNK_BYTES = 16;                // what one thread copies at once
constexpr int ROW_CHUNKS = HEAD_DIM / CHUNK;
constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int TILE_M = 16, TILE_N = 8, TILE_K = 16;       // mma.m16n8k16: D (16, 8) += A (16, 16) B (16, 8)
constexpr int WARP_ROWS = BLOCK_Q / WARPS;                // rows of Q that one warp owns
constexpr int M_TILES = WARP_ROWS / TILE_M;
constexpr int S_TILES = BLOCK_K / TILE_N;                 // accumulator tiles across S
constexpr int O_TILES = HEAD_DIM / TILE_N;                // accumulator tiles across O
constexpr int STAGES = 2;                                 // pairs of K and V tiles: one in use, one arriving
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define INFINITE __int_as_float(0x7f800000)              // the bits of +infinity

// ---- instructions (given) -------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
// Lane l names one row of 16 bytes: lanes 0-7 those of matrix 0, 8-15 of matrix 1, ...; each matrix is 8 rows. Lane l
// receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of every matrix. PTX ISA: "ldmatrix".
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// The same, but every 8 x 8 matrix arrives transposed: lane l gets rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// Copies 16 bytes from global to shared memory in the background, past the registers. PTX ISA: "cp.async".
__device__ __forceinline__ void cp_async(u32 destination, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}
// Waits for all copies that this thread has started; the other threads' copies need a barrier after that.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#if BF16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif
// D (16, 8) += A (16, 16) B (16, 8). PTX ISA: "mma.m16n8k16"; the fragments are drawn in the lesson.
__device__ __forceinline__ void mma(float (&D)[4], const u32 (&A)[4], u32 B0, u32 B1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3])
                 : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
}
// Two numbers rounded to 16 bits in one register, `low` in the low half (the lower column).
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ float exp2_fast(float x) {  // one MUFU instruction; exp2(-inf) = 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Largest, and sum, over the four lanes of a quad, which share their rows of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    // END SOLUTION
}
__device__ __forceinline__ float quad_sum(float x) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
    // END SOLUTION
}

// ---- layout of a tile in shared memory ------------------------------------------------------------------------------

// Byte offset of a chunk of 16 bytes in a tile of rows of HEAD_DIM.
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
    // = row * ROW_BYTES + (chunk ^ row % 8) * 16, with what differs between lanes in one term that is computed once.
    return (row * ROW_BYTES + row % 8 * CHUNK_BYTES) ^ chunk * CHUNK_BYTES;
    // END SOLUTION
}

// ---- global -> shared -----------------------------------------------------------------------------------------------

// Rows first .. first + ROWS of one head. Rows from `len` on repeat the last one: their scores are masked, their
// outputs not stored, and so they need only be finite and readable.
template <int ROWS>
__device__ __forceinline__ void load_tile(u32 tile_smem, const u16* head, int row_stride, int first, int len) {
    // BEGIN SOLUTION: as in tensor_cores.cu, but with cp_async (if registers run short, unroll this loop less)
    const int chunk = threadIdx.x % ROW_CHUNKS;
#pragma unroll
    for (int row = 0; row < ROWS; row += THREADS / ROW_CHUNKS) {
        const int tile_row = row + threadIdx.x / ROW_CHUNKS;
        const int source_row = min(first + tile_row, len - 1);
        const u32 source = source_row * row_stride + chunk * CHUNK;  // in elements, 32 bits: half the registers
        cp_async(tile_smem + chunk_offset(tile_row, chunk), head + source);
    }
    // END SOLUTION
}

// ---- shared -> registers -> tensor cores ----------------------------------------------------------------------------

// S = Q K^T. S_rmem[i][n] is the accumulator tile of rows 16 i .. of this warp and keys 8 n .. of the block. Q_smem is the
// tile of the whole block of threads: this warp's rows begin at row threadIdx.x / 32 * WARP_ROWS of it.
__device__ __forceinline__ void scores(float (&S_rmem)[M_TILES][S_TILES][4], u32 Q_smem, u32 K_smem) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) S_rmem[i][n][r] = 0.0f;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / TILE_K; k++) {
        u32 Q_rmem[M_TILES][4];
#pragma unroll
        for (int i = 0; i < M_TILES; i++)
            ldmatrix_x4(Q_rmem[i], Q_smem + chunk_offset(warp_row + i * TILE_M + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < S_TILES; n += 2) {
            u32 K_rmem[4];
            ldmatrix_x4(K_rmem, K_smem + chunk_offset(n * TILE_N + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < M_TILES; i++) {
                mma(S_rmem[i][n], Q_rmem[i], K_rmem[0], K_rmem[1]);
                mma(S_rmem[i][n + 1], Q_rmem[i], K_rmem[2], K_rmem[3]);
            }
        }
    }
    // END SOLUTION
}

// O += P V, where S_rmem holds P.
__device__ __forceinline__ void accumulate(float (&O_rmem)[M_TILES][O_TILES][4],
                                           const float (&S_rmem)[M_TILES][S_TILES][4], u32 V_smem) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < BLOCK_K / TILE_K; k++) {
        u32 P_rmem[M_TILES][4];
#pragma unroll
        for (int i = 0; i < M_TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float* P = &S_rmem[i][2 * k + r / 2][r % 2 * 2];
                P_rmem[i][r] = pack(P[0], P[1]);
            }
#pragma unroll
        for (int n = 0; n < O_TILES; n += 2) {
            u32 V_rmem[4];
            ldmatrix_x4_transposed(V_rmem, V_smem + chunk_offset(k * TILE_K + lane % 16, n + lane / 16));
#pragma unroll
            for (int i = 0; i < M_TILES; i++) {
                mma(O_rmem[i][n], P_rmem[i], V_rmem[0], V_rmem[1]);
                mma(O_rmem[i][n + 1], P_rmem[i], V_rmem[2], V_rmem[3]);
            }
        }
    }
    // END SOLUTION
}

// ---- registers: mask, softmax ---------------------------------------------------------------------------------------

// Scores of keys that a row does not see become -inf. first_row, first_key: of this warp's rows and of the block.
__device__ __forceinline__ void mask(float (&S_rmem)[M_TILES][S_TILES][4], int first_row, int first_key,
                                     const Problem& p) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = first_row + i * TILE_M + lane / 4 + r / 2 * 8;
            const int last_key = CAUSAL ? min(p.len_k - 1, row + p.len_k - p.len_q) : p.len_k - 1;
#pragma unroll
            for (int n = 0; n < S_TILES; n++)
                if (first_key + n * TILE_N + lane % 4 * 2 + r % 2 > last_key) S_rmem[i][n][r] = -INFINITE;
        }
    // END SOLUTION
}

// S becomes P; m, l and O follow the new maximum. A lane holds two rows of every tile: registers 0, 1 and 2, 3. m is
// kept times scale_log2: kept unscaled, alpha would be exp2 of a fused multiply-add that misses 0 by a rounding.
// m is shared by a quad; l is what this lane has added up: its quad is summed at the very end.
__device__ __forceinline__ void online_softmax(float (&S_rmem)[M_TILES][S_TILES][4],
                                               float (&O_rmem)[M_TILES][O_TILES][4], float (&m)[M_TILES][2],
                                               float (&l)[M_TILES][2], float scale_log2) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = -INFINITE;
#pragma unroll
            for (int n = 0; n < S_TILES; n++)
                top = fmaxf(top, fmaxf(S_rmem[i][n][2 * h], S_rmem[i][n][2 * h + 1]));
            const float m_new = fmaxf(m[i][h], quad_max(top) * scale_log2);
            const float subtract = m_new == -INFINITE ? 0.0f : m_new;
            const float alpha = exp2_fast(m[i][h] - subtract);  // exactly 1 where the maximum stays
            m[i][h] = m_new;
            l[i][h] *= alpha;
#pragma unroll
            for (int n = 0; n < S_TILES; n++)
#pragma unroll
                for (int r = 2 * h; r < 2 * h + 2; r++) {
                    S_rmem[i][n][r] = exp2_fast(S_rmem[i][n][r] * scale_log2 - subtract);
                    l[i][h] += S_rmem[i][n][r];
                }
#pragma unroll
            for (int n = 0; n < O_TILES; n++) {
                O_rmem[i][n][2 * h] *= alpha;
                O_rmem[i][n][2 * h + 1] *= alpha;
            }
        }
    // END SOLUTION
}

// ---- registers -> global --------------------------------------------------------------------------------------------

// O / l and lse of this warp's rows.
__device__ __forceinline__ void store(const float (&O_rmem)[M_TILES][O_TILES][4], const float (&m)[M_TILES][2],
                                      const float (&l)[M_TILES][2], int first_row, int head, int batch,
                                      const Problem& p) {
    // BEGIN SOLUTION: the same as in tensor_cores.cu: copy yours
    const int lane = threadIdx.x % 32;
    u16* O = p.O.data + batch * p.O.batch + head * p.O.head;
    float* lse = p.lse + (static_cast<long long>(batch) * p.heads_q + head) * p.len_q;
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + i * TILE_M + h * 8 + lane / 4;
            const float sum = quad_sum(l[i][h]);
            if (row >= p.len_q) continue;
            const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
            for (int n = 0; n < O_TILES; n++)
                *reinterpret_cast<u32*>(O + row * p.O.row + n * TILE_N + lane % 4 * 2) =
                    pack(O_rmem[i][n][2 * h] * inverse, O_rmem[i][n][2 * h + 1] * inverse);
            if (lane % 4 == 0) lse[row] = LN_2 * (m[i][h] + log2f(sum));
        }
    // END SOLUTION
}

// ---- the kernel: one block of threads per BLOCK_Q queries of one head -----------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS) attention(const Problem p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const u32 Q_smem = shared_address(smem);               // (BLOCK_Q, HEAD_DIM)
    const u32 K_smem = Q_smem + BLOCK_Q * ROW_BYTES;       // (STAGES, BLOCK_K, HEAD_DIM)
    const u32 V_smem = K_smem + STAGES * BLOCK_K * ROW_BYTES;  // (STAGES, BLOCK_K, HEAD_DIM)
    float S_rmem[M_TILES][S_TILES][4], O_rmem[M_TILES][O_TILES][4] = {};
    float m[M_TILES][2], l[M_TILES][2] = {};
    for (int i = 0; i < M_TILES; i++) m[i][0] = m[i][1] = -INFINITE;

    const int head = blockIdx.x, batch = blockIdx.y;
    // Blocks of threads start in order, blockIdx.z slowest. Under a causal mask the last queries see the most keys:
    // their blocks go first, so that no long one is left for the end.
    const int block_row = (gridDim.z - 1 - blockIdx.z) * BLOCK_Q;
    const int warp_row = block_row + threadIdx.x / 32 * WARP_ROWS;
    const u16* Q = p.Q.data + batch * p.Q.batch + head * p.Q.head;
    const u16* K = p.K.data + batch * p.K.batch + head / p.group * p.K.head;
    const u16* V = p.V.data + batch * p.V.batch + head / p.group * p.V.head;

    int blocks, full_blocks;  // blocks of keys that some row sees (there may be none); those that every row sees whole
    // BEGIN SOLUTION: count both: without a mask from len_k alone, under a causal one from what the first and the last
    //: row of this block see
    const int seen_by_last = CAUSAL ? min(p.len_k, max(0, block_row + BLOCK_Q + p.len_k - p.len_q)) : p.len_k;
    const int seen_by_first = CAUSAL ? min(p.len_k, max(0, block_row + 1 + p.len_k - p.len_q)) : p.len_k;
    blocks = (seen_by_last + BLOCK_K - 1) / BLOCK_K;
    full_blocks = seen_by_first / BLOCK_K;
    // END SOLUTION

    // BEGIN SOLUTION: start the copies of Q and of the first K and V; for every block wait for its copies, let all
    //: threads meet, start the copies of the next block into the other stage, and compute as before, masking where
    //: needed; store
    load_tile<BLOCK_Q>(Q_smem, Q, p.Q.row, block_row, p.len_q);
    if (blocks > 0) {
        load_tile<BLOCK_K>(K_smem, K, p.K.row, 0, p.len_k);
        load_tile<BLOCK_K>(V_smem, V, p.V.row, 0, p.len_k);
    }
    for (int j = 0; j < blocks; j++) {
        cp_async_wait_all();
        __syncthreads();  // everyone's copies of block j are there, and everyone has finished with block j - 1
        const int first_key = j * BLOCK_K;
        const u32 stage = j % STAGES * BLOCK_K * ROW_BYTES, other = (j + 1) % STAGES * BLOCK_K * ROW_BYTES;
        if (j + 1 < blocks) {
            load_tile<BLOCK_K>(K_smem + other, K, p.K.row, first_key + BLOCK_K, p.len_k);
            load_tile<BLOCK_K>(V_smem + other, V, p.V.row, first_key + BLOCK_K, p.len_k);
        }
        scores(S_rmem, Q_smem, K_smem + stage);
        // The same as j >= full_blocks, in the form that takes the compiler one register less: it has none to spare.
        if (first_key + BLOCK_K > full_blocks * BLOCK_K) mask(S_rmem, warp_row, first_key, p);
        online_softmax(S_rmem, O_rmem, m, l, p.scale * LOG2_E);
        accumulate(O_rmem, S_rmem, V_smem + stage);
    }
    cp_async_wait_all();
    store(O_rmem, m, l, warp_row, head, batch, p);
    // END SOLUTION
}
