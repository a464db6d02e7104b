// The other way to divide the work, for comparison (given): warps split K and V, as FlashAttention-1 did.
//
// Against fa2.cu: every warp works on all BLOCK_Q rows of Q and on its share of the keys of each block, so that the warps'
// outputs must be added up through shared memory: after every block (MERGE_EVERY_BLOCK=1, as FlashAttention-1), or once
// at the end (0), each warp with a maximum and a sum of its own until then.
// Compiled with HEAD_DIM, BLOCK_Q, BLOCK_K, WARPS, BF16, CAUSAL, MERGE_EVERY_BLOCK defined (fa2_cuda.py).

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
constexpr int WARP_KEYS = BLOCK_K / WARPS;                // keys of each block that one warp owns
constexpr int M_TILES = BLOCK_Q / TILE_M;
constexpr int S_TILES = WARP_KEYS / TILE_N;               // accumulator tiles across this warp's part of S
constexpr int O_TILES = HEAD_DIM / TILE_N;                // accumulator tiles across O
constexpr int OWN_TILES = O_TILES / WARPS;                // those that this warp adds up and stores
constexpr int SUM_PITCH = HEAD_DIM + 8;                   // floats from row to row of O_smem: no bank conflicts
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
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---- layout of a tile in shared memory ------------------------------------------------------------------------------

// Byte offset of a chunk of 16 bytes in a tile of rows of HEAD_DIM.
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    // = row * ROW_BYTES + (chunk ^ row % 8) * 16, with what differs between lanes in one term that is computed once.
    return (row * ROW_BYTES + row % 8 * CHUNK_BYTES) ^ chunk * CHUNK_BYTES;
}

// ---- global -> shared -----------------------------------------------------------------------------------------------

// Rows first .. first + ROWS of one head. Rows from `len` on repeat the last one: their scores are masked, their
// outputs not stored, and so they need only be finite and readable.
template <int ROWS>
__device__ __forceinline__ void load_tile(u32 tile_smem, const u16* head, int row_stride, int first, int len) {
    const int chunk = threadIdx.x % ROW_CHUNKS;
#pragma unroll
    for (int row = 0; row < ROWS; row += THREADS / ROW_CHUNKS) {
        const int tile_row = row + threadIdx.x / ROW_CHUNKS;
        const int source_row = min(first + tile_row, len - 1);
        const u32 source = source_row * row_stride + chunk * CHUNK;  // in elements, 32 bits: half the registers
        cp_async(tile_smem + chunk_offset(tile_row, chunk), head + source);
    }
}

// ---- shared -> registers -> tensor cores ----------------------------------------------------------------------------

// S = Q K^T. S_rmem[i][n] is the accumulator tile of rows 16 i .. and of this warp's keys 8 n ...
__device__ __forceinline__ void scores(float (&S_rmem)[M_TILES][S_TILES][4], u32 Q_smem, u32 K_smem) {
    const int lane = threadIdx.x % 32;
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
            ldmatrix_x4(Q_rmem[i], Q_smem + chunk_offset(i * TILE_M + lane % 16, 2 * k + lane / 16));
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
}

// O += P V, where S_rmem holds P.
__device__ __forceinline__ void accumulate(float (&O_rmem)[M_TILES][O_TILES][4],
                                           const float (&S_rmem)[M_TILES][S_TILES][4], u32 V_smem) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < WARP_KEYS / TILE_K; k++) {
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
}

// ---- registers: mask, softmax ---------------------------------------------------------------------------------------

// Scores of keys that a row does not see become -inf. first_row, first_key: of the block's rows and of
// this warp's keys.
__device__ __forceinline__ void mask(float (&S_rmem)[M_TILES][S_TILES][4], int first_row, int first_key,
                                     const Problem& p) {
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
}

// S becomes P; m, l and O follow the new maximum. A lane holds two rows of every tile: registers 0, 1 and 2, 3. m is
// kept times scale_log2: kept unscaled, alpha would be exp2 of a fused multiply-add that misses 0 by a rounding.
// m is shared by a quad; l is what this lane has added up: its quad is summed at the very end.
__device__ __forceinline__ void online_softmax(float (&S_rmem)[M_TILES][S_TILES][4],
                                               float (&O_rmem)[M_TILES][O_TILES][4], float (&m)[M_TILES][2],
                                               float (&l)[M_TILES][2], float scale_log2) {
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
}

// ---- registers -> shared -> registers: add up the warps' outputs ----------------------------------------------------

// Merges the partial (O, m, l) of all warps into O_sum (this warp's OWN_TILES of columns), m_sum and l_sum.
__device__ __forceinline__ void merge(float (&O_sum)[M_TILES][OWN_TILES][4], float (&m_sum)[M_TILES][2],
                                      float (&l_sum)[M_TILES][2], const float (&O_rmem)[M_TILES][O_TILES][4],
                                      const float (&m)[M_TILES][2], const float (&l)[M_TILES][2], float* O_smem,
                                      float2* ml_smem) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // everyone has finished with what lies in this memory
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = warp * BLOCK_Q + i * TILE_M + h * 8 + lane / 4;
            const float sum = quad_sum(l[i][h]);
            if (lane % 4 == 0) ml_smem[row] = {m[i][h], sum};
#pragma unroll
            for (int n = 0; n < O_TILES; n++)
                *reinterpret_cast<float2*>(O_smem + row * SUM_PITCH + n * TILE_N + lane % 4 * 2) = {
                    O_rmem[i][n][2 * h], O_rmem[i][n][2 * h + 1]};
        }
    __syncthreads();  // everyone's part is there
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = i * TILE_M + h * 8 + lane / 4;
            float m_new = m_sum[i][h];
#pragma unroll
            for (int w = 0; w < WARPS; w++) m_new = fmaxf(m_new, ml_smem[w * BLOCK_Q + row].x);
            const float subtract = m_new == -INFINITE ? 0.0f : m_new;
            const float alpha = exp2_fast(m_sum[i][h] - subtract);
            m_sum[i][h] = m_new;
            l_sum[i][h] *= alpha;
#pragma unroll
            for (int n = 0; n < OWN_TILES; n++) O_sum[i][n][2 * h] *= alpha, O_sum[i][n][2 * h + 1] *= alpha;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float2 ml = ml_smem[w * BLOCK_Q + row];
                const float weight = exp2_fast(ml.x - subtract);
                l_sum[i][h] += ml.y * weight;
#pragma unroll
                for (int n = 0; n < OWN_TILES; n++) {
                    const int column = (warp * OWN_TILES + n) * TILE_N + lane % 4 * 2;
                    const float2 o = *reinterpret_cast<float2*>(O_smem + (w * BLOCK_Q + row) * SUM_PITCH + column);
                    O_sum[i][n][2 * h] += o.x * weight, O_sum[i][n][2 * h + 1] += o.y * weight;
                }
            }
        }
}

__device__ __forceinline__ void clear(float (&O_rmem)[M_TILES][O_TILES][4], float (&m)[M_TILES][2],
                                      float (&l)[M_TILES][2]) {
#pragma unroll
    for (int i = 0; i < M_TILES; i++) {
        m[i][0] = m[i][1] = -INFINITE;
        l[i][0] = l[i][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) O_rmem[i][n][r] = 0.0f;
    }
}

// ---- registers -> global --------------------------------------------------------------------------------------------

// O / l of this warp's columns, and lse.
__device__ __forceinline__ void store(const float (&O_rmem)[M_TILES][OWN_TILES][4], const float (&m)[M_TILES][2],
                                      const float (&l)[M_TILES][2], int first_row, int head, int batch,
                                      const Problem& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u16* O = p.O.data + batch * p.O.batch + head * p.O.head;
    float* lse = p.lse + (static_cast<long long>(batch) * p.heads_q + head) * p.len_q;
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + i * TILE_M + h * 8 + lane / 4;
            const float sum = l[i][h];
            if (row >= p.len_q) continue;
            const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
            for (int n = 0; n < OWN_TILES; n++)
                *reinterpret_cast<u32*>(O + row * p.O.row + (warp * OWN_TILES + n) * TILE_N + lane % 4 * 2) =
                    pack(O_rmem[i][n][2 * h] * inverse, O_rmem[i][n][2 * h + 1] * inverse);
            if (warp == 0 && lane % 4 == 0) lse[row] = LN_2 * (m[i][h] + log2f(sum));
        }
}

// ---- the kernel: one block of threads per BLOCK_Q queries of one head -----------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS) attention(const Problem p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const u32 Q_smem = shared_address(smem);               // (BLOCK_Q, HEAD_DIM)
    const u32 K_smem = Q_smem + BLOCK_Q * ROW_BYTES;       // (STAGES, BLOCK_K, HEAD_DIM)
    const u32 V_smem = K_smem + STAGES * BLOCK_K * ROW_BYTES;  // (STAGES, BLOCK_K, HEAD_DIM)
    // The exchange has memory of its own if it happens while copies arrive, else it takes the tiles' place.
    unsigned char* exchange = smem + (MERGE_EVERY_BLOCK ? (BLOCK_Q + 2 * STAGES * BLOCK_K) * ROW_BYTES : 0);
    float* O_smem = reinterpret_cast<float*>(exchange);    // (WARPS, BLOCK_Q, SUM_PITCH)
    float2* ml_smem = reinterpret_cast<float2*>(O_smem + WARPS * BLOCK_Q * SUM_PITCH);  // (WARPS, BLOCK_Q)
    float S_rmem[M_TILES][S_TILES][4], O_rmem[M_TILES][O_TILES][4], O_sum[M_TILES][OWN_TILES][4] = {};
    float m[M_TILES][2], l[M_TILES][2], m_sum[M_TILES][2], l_sum[M_TILES][2] = {};
    clear(O_rmem, m, l);
    for (int i = 0; i < M_TILES; i++) m_sum[i][0] = m_sum[i][1] = -INFINITE;

    const int head = blockIdx.x, batch = blockIdx.y;
    // Blocks of threads start in order, blockIdx.z slowest. Under a causal mask the last queries see the most keys:
    // their blocks go first, so that no long one is left for the end.
    const int block_row = (gridDim.z - 1 - blockIdx.z) * BLOCK_Q;
    const int warp_key = threadIdx.x / 32 * WARP_KEYS;
    const float scale_log2 = p.scale * LOG2_E;
    const u16* Q = p.Q.data + batch * p.Q.batch + head * p.Q.head;
    const u16* K = p.K.data + batch * p.K.batch + head / p.group * p.K.head;
    const u16* V = p.V.data + batch * p.V.batch + head / p.group * p.V.head;

    int blocks, full_blocks;  // blocks of keys that some row sees; those that every row sees whole
    const int seen_by_last = CAUSAL ? min(p.len_k, max(0, block_row + BLOCK_Q + p.len_k - p.len_q)) : p.len_k;
    const int seen_by_first = CAUSAL ? min(p.len_k, max(0, block_row + 1 + p.len_k - p.len_q)) : p.len_k;
    blocks = (seen_by_last + BLOCK_K - 1) / BLOCK_K;
    full_blocks = seen_by_first / BLOCK_K;

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
        scores(S_rmem, Q_smem, K_smem + stage + warp_key * ROW_BYTES);
        if (j >= full_blocks) mask(S_rmem, block_row, first_key + warp_key, p);
        online_softmax(S_rmem, O_rmem, m, l, scale_log2);
        accumulate(O_rmem, S_rmem, V_smem + stage + warp_key * ROW_BYTES);
        if (MERGE_EVERY_BLOCK) {
            merge(O_sum, m_sum, l_sum, O_rmem, m, l, O_smem, ml_smem);
            clear(O_rmem, m, l);
        }
    }
    cp_async_wait_all();
    if (!MERGE_EVERY_BLOCK) merge(O_sum, m_sum, l_sum, O_rmem, m, l, O_smem, ml_smem);
    store(O_sum, m_sum, l_sum, block_row, head, batch, p);
}
