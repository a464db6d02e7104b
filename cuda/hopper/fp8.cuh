// FP8 on the tensor cores: wgmma on e4m3 operands, rounding to e4m3, and what it takes to turn V round in shared memory.
//
// wgmma: D (64 x N, fp32) = or += A (64 x 32) B (32 x N). One step sums 32 bytes, as the 16-bit step does. Both operands
// are K-major: there is no transposed form for 8-bit types, so V has to lie with its keys contiguous.
// Layout of D: as in wgmma.cuh. Layout of A in registers (4 registers of four bytes): thread t of the warpgroup,
// w = t / 32, l = t % 32, register r, byte b holds
//     row 16 w + l / 4 + 8 (r % 2),   column 16 (r / 2) + 4 (l % 4) + b.
// PTX ISA: "Register Fragments and Shared Memory Matrix Layouts", wgmma.mma_async.m64nNk32.
#pragma once
#include "base.cuh"
#include "matrices.cuh"
#include "wgmma.cuh"

#define WGMMA_E4M3_TEXT(n, registers, sources, last) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" last ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" registers "}, " sources ", p, 1, 1;\n}"

template <int N>
struct WgmmaE4m3;

// ss: both operands in shared memory, as in Q K^T.  rs: A in registers, as in P V. accumulate = 0 overwrites D.
#define WGMMA_E4M3_FOR_N(n, registers, o0, o1, o2, o3, o4, o5, ...) \
    template <> \
    struct WgmmaE4m3<n> { \
        static __device__ __forceinline__ void ss(float (&d)[n / 2], u64 a, u64 b, int accumulate) { \
            asm volatile(WGMMA_E4M3_TEXT(n, registers, "%" o0 ", %" o1, o2) \
                         : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate)); \
        } \
        static __device__ __forceinline__ void rs(float (&d)[n / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, \
                                                  int accumulate) { \
            asm volatile(WGMMA_E4M3_TEXT(n, registers, "{%" o0 ", %" o1 ", %" o2 ", %" o3 "}, %" o4, o5) \
                         : __VA_ARGS__ : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate)); \
        } \
    };

WGMMA_E4M3_FOR_N(64, WGMMA_REGISTERS_TO_32, "32", "33", "34", "35", "36", "37", WGMMA_D32(d, 0))
WGMMA_E4M3_FOR_N(96, WGMMA_REGISTERS_TO_32 ", " WGMMA_REGISTERS_32 ", " WGMMA_REGISTERS_40, "48", "49", "50", "51", "52",
                 "53", WGMMA_D32(d, 0), WGMMA_D8(d, 32), WGMMA_D8(d, 40))
WGMMA_E4M3_FOR_N(128, WGMMA_REGISTERS_TO_64, "64", "65", "66", "67", "68", "69", WGMMA_D32(d, 0), WGMMA_D32(d, 32))
WGMMA_E4M3_FOR_N(160, WGMMA_REGISTERS_TO_64 ", " WGMMA_REGISTERS_64 ", " WGMMA_REGISTERS_72, "80", "81", "82", "83", "84",
                 "85", WGMMA_D32(d, 0), WGMMA_D32(d, 32), WGMMA_D8(d, 64), WGMMA_D8(d, 72))
WGMMA_E4M3_FOR_N(192, WGMMA_REGISTERS_TO_88 ", " WGMMA_REGISTERS_88, "96", "97", "98", "99", "100", "101",
                 WGMMA_D32(d, 0), WGMMA_D32(d, 32), WGMMA_D32(d, 64))
WGMMA_E4M3_FOR_N(224, WGMMA_REGISTERS_TO_88 ", " WGMMA_REGISTERS_88 ", " WGMMA_REGISTERS_96 ", " WGMMA_REGISTERS_104,
                 "112", "113", "114", "115", "116", "117", WGMMA_D32(d, 0), WGMMA_D32(d, 32), WGMMA_D32(d, 64),
                 WGMMA_D8(d, 96), WGMMA_D8(d, 104))
WGMMA_E4M3_FOR_N(256, WGMMA_REGISTERS_TO_128, "128", "129", "130", "131", "132", "133", WGMMA_D32(d, 0),
                 WGMMA_D32(d, 32), WGMMA_D32(d, 64), WGMMA_D32(d, 96))

// Four floats -> four e4m3 bytes, the first in the lowest; rounds to nearest even, beyond +-448 saturates.
// PTX ISA: "cvt.rn.satfinite.e4m3x2.f32".
__device__ __forceinline__ u32 pack_e4m3(float b0, float b1, float b2, float b3) {
    u32 packed;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(packed)
        : "f"(b0), "f"(b1), "f"(b2), "f"(b3));
    return packed;
}

// Four of the eight bytes of a (numbers 0 to 3) and b (4 to 7): the selector's lowest hexadecimal digit picks the lowest
// byte. PTX ISA: "prmt".
__device__ __forceinline__ u32 byte_permute(u32 a, u32 b, u32 selector) {
    u32 chosen;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(a), "r"(b), "r"(selector));
    return chosen;
}
