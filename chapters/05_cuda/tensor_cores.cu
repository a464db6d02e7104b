// Step (c): the two products run on the tensor cores.
//
// Against tiles.cu: tiles keep their 16 bits and are swizzled instead of padded; a warp owns 16 rows instead of a
// thread one; scores and output live in registers in the layout that `mma` prescribes, and so does the softmax.
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
    // TODO: combine x with the lanes that differ in bit 0 and in bit 1 of their number (__shfl_xor_sync), and
    // return the largest of the four
}
__device__ __forceinline__ float quad_sum(float x) {
    // TODO: the same with a sum
}

// ---- layout of a tile in shared memory ------------------------------------------------------------------------------

// Byte offset of a chunk of 16 bytes in a tile of rows of HEAD_DIM.
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    // TODO: the offset of `row` plus 16 bytes times the swizzled chunk (your `swizzle` of layouts.py)
}

// ---- global -> shared -----------------------------------------------------------------------------------------------

// Rows first .. first + ROWS of one head. Rows from `len` on repeat the last one: their scores are masked, their
// outputs not stored, and so they need only be finite and readable.
template <int ROWS>
__device__ __forceinline__ void load_tile(unsigned char* tile_smem, const u16* head, int row_stride, int first,
                                          int len) {
    // TODO: let neighbouring threads copy neighbouring chunks (an int4 each) of the tile to where chunk_offset
    // puts them
}

// ---- shared -> registers -> tensor cores ----------------------------------------------------------------------------

// S = Q K^T. S_rmem[i][n] is the accumulator tile of rows 16 i .. of this warp and keys 8 n .. of the block. Q_smem is the
// tile of the whole block of threads: this warp's rows begin at row threadIdx.x / 32 * WARP_ROWS of it.
__device__ __forceinline__ void scores(float (&S_rmem)[M_TILES][S_TILES][4], u32 Q_smem, u32 K_smem) {
    // TODO: clear S; for every 16 of HEAD_DIM load the A fragments of this warp's rows of Q (ldmatrix_x4), and
    // for every 16 keys the B fragments of two tiles (ldmatrix_x4 on K), and multiply
}

// O += P V, where S_rmem holds P.
__device__ __forceinline__ void accumulate(float (&O_rmem)[M_TILES][O_TILES][4],
                                           const float (&S_rmem)[M_TILES][S_TILES][4], u32 V_smem) {
    // TODO: for every 16 keys pack two accumulator tiles of P into an A fragment, load the B fragments of V
    // with ldmatrix_x4_transposed, two tiles of O at a time, and multiply
}

// ---- registers: mask, softmax ---------------------------------------------------------------------------------------

// Scores of keys that a row does not see become -inf. first_row, first_key: of this warp's rows and of the block.
__device__ __forceinline__ void mask(float (&S_rmem)[M_TILES][S_TILES][4], int first_row, int first_key,
                                     const Problem& p) {
    // TODO: find row and key of every accumulator register (your `c_fragment` of layouts.py); -inf if the key
    // is not below len_k or, if CAUSAL, comes after row + len_k - len_q
}

// S becomes P; m, l and O follow the new maximum. A lane holds two rows of every tile: registers 0, 1 and 2, 3. m is
// kept times scale_log2: kept unscaled, alpha would be exp2 of a fused multiply-add that misses 0 by a rounding.
// m is shared by a quad; l is what this lane has added up: its quad is summed at the very end.
__device__ __forceinline__ void online_softmax(float (&S_rmem)[M_TILES][S_TILES][4],
                                               float (&O_rmem)[M_TILES][O_TILES][4], float (&m)[M_TILES][2],
                                               float (&l)[M_TILES][2], float scale_log2) {
    // TODO: for each of this lane's rows: new maximum over its registers and its quad, alpha, P = exp2 of S, l,
    // and O times alpha; a row that has seen no key has maximum -inf: subtract 0 there
}

// ---- registers -> global --------------------------------------------------------------------------------------------

// O / l and lse of this warp's rows.
__device__ __forceinline__ void store(const float (&O_rmem)[M_TILES][O_TILES][4], const float (&m)[M_TILES][2],
                                      const float (&l)[M_TILES][2], int first_row, int head, int batch,
                                      const Problem& p) {
    // TODO: sum l over the quad, divide O by it (0 for a row without keys), write pairs of neighbouring columns
    // as one u32, and lse = LN_2 (m + log2 l) from one lane of the quad; only rows below len_q
}

// ---- the kernel: one block of threads per BLOCK_Q queries of one head -----------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS) attention(const Problem p) {
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned char* Q_smem = smem;                         // (BLOCK_Q, HEAD_DIM)
    unsigned char* K_smem = Q_smem + BLOCK_Q * ROW_BYTES;  // (BLOCK_K, HEAD_DIM)
    unsigned char* V_smem = K_smem + BLOCK_K * ROW_BYTES;  // (BLOCK_K, HEAD_DIM)
    float S_rmem[M_TILES][S_TILES][4], O_rmem[M_TILES][O_TILES][4] = {};
    float m[M_TILES][2], l[M_TILES][2] = {};
    for (int i = 0; i < M_TILES; i++) m[i][0] = m[i][1] = -INFINITE;

    const int head = blockIdx.x, batch = blockIdx.y;
    const int block_row = blockIdx.z * BLOCK_Q, warp_row = block_row + threadIdx.x / 32 * WARP_ROWS;
    const u16* Q = p.Q.data + batch * p.Q.batch + head * p.Q.head;
    const u16* K = p.K.data + batch * p.K.batch + head / p.group * p.K.head;
    const u16* V = p.V.data + batch * p.V.batch + head / p.group * p.V.head;

    // TODO: load Q; for every block of keys load K and V, wait for all threads, then scores, mask,
    // online_softmax, accumulate; nobody may overwrite a tile that another warp still reads; store at the end
}
