// The instruction wgmma.mma_async for every N and type that the kernels use: Wgmma<N, kBf16>::ss and ::rs.
// What they compute, and which thread holds what, is written down in wgmma.cuh, which includes this file.
// PTX ISA: "wgmma.mma_async".
#pragma once
#include "base.cuh"

// wgmma.mma_async is one instruction with N / 2 accumulator operands, so its text is assembled from pieces of eight.
#define WGMMA_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_REGISTERS_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_REGISTERS_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_REGISTERS_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_REGISTERS_56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_REGISTERS_72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_REGISTERS_80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_REGISTERS_88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_REGISTERS_96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_REGISTERS_104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_REGISTERS_112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_REGISTERS_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_REGISTERS_TO_32 \
    WGMMA_REGISTERS_0 ", " WGMMA_REGISTERS_8 ", " WGMMA_REGISTERS_16 ", " WGMMA_REGISTERS_24
#define WGMMA_REGISTERS_TO_64 \
    WGMMA_REGISTERS_TO_32 ", " WGMMA_REGISTERS_32 ", " WGMMA_REGISTERS_40 ", " WGMMA_REGISTERS_48 ", " WGMMA_REGISTERS_56
#define WGMMA_REGISTERS_TO_88 WGMMA_REGISTERS_TO_64 ", " WGMMA_REGISTERS_64 ", " WGMMA_REGISTERS_72 ", " WGMMA_REGISTERS_80
#define WGMMA_REGISTERS_TO_128 \
    WGMMA_REGISTERS_TO_88 ", " WGMMA_REGISTERS_88 ", " WGMMA_REGISTERS_96 ", " WGMMA_REGISTERS_104 ", " \
    WGMMA_REGISTERS_112 ", " WGMMA_REGISTERS_120
#define WGMMA_D8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_D32(d, i) WGMMA_D8(d, i), WGMMA_D8(d, i + 8), WGMMA_D8(d, i + 16), WGMMA_D8(d, i + 24)

// The two forms for one N. o0 .. o5 are the operand numbers that follow the accumulators.
#define WGMMA_TEXT(n, type, registers, sources, last) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" last ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " sources
#define WGMMA_SS(n, type, registers, o0, o1, o2, ...) \
    asm volatile(WGMMA_TEXT(n, type, registers, "%" o0 ", %" o1 ", p, 1, 1, 0, 0;\n}", o2) \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate))
#define WGMMA_RS(n, type, registers, o0, o1, o2, o3, o4, o5, ...) \
    asm volatile(WGMMA_TEXT(n, type, registers, "{%" o0 ", %" o1 ", %" o2 ", %" o3 "}, %" o4 ", p, 1, 1, 1;\n}", o5) \
                 : __VA_ARGS__ : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate))

template <int N, bool kBf16>
struct Wgmma;

// ss: both operands K-major, as in Q K^T.  rs: A in registers, B MN-major (transposed on the way), as in P V.
// accumulate = 0 overwrites D, which saves clearing it.
#define WGMMA_FOR_N(n, registers, o0, o1, o2, o3, o4, o5, ...) \
    template <bool kBf16> \
    struct Wgmma<n, kBf16> { \
        static __device__ __forceinline__ void ss(float (&d)[n / 2], u64 a, u64 b, int accumulate) { \
            if constexpr (kBf16) WGMMA_SS(n, "bf16", registers, o0, o1, o2, __VA_ARGS__); \
            else WGMMA_SS(n, "f16", registers, o0, o1, o2, __VA_ARGS__); \
        } \
        static __device__ __forceinline__ void rs(float (&d)[n / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, \
                                                  int accumulate) { \
            if constexpr (kBf16) WGMMA_RS(n, "bf16", registers, o0, o1, o2, o3, o4, o5, __VA_ARGS__); \
            else WGMMA_RS(n, "f16", registers, o0, o1, o2, o3, o4, o5, __VA_ARGS__); \
        } \
    };

WGMMA_FOR_N(64, WGMMA_REGISTERS_TO_32, "32", "33", "34", "35", "36", "37", WGMMA_D32(d, 0))
WGMMA_FOR_N(96, WGMMA_REGISTERS_TO_32 ", " WGMMA_REGISTERS_32 ", " WGMMA_REGISTERS_40, "48", "49", "50", "51", "52",
            "53", WGMMA_D32(d, 0), WGMMA_D8(d, 32), WGMMA_D8(d, 40))
WGMMA_FOR_N(128, WGMMA_REGISTERS_TO_64, "64", "65", "66", "67", "68", "69", WGMMA_D32(d, 0), WGMMA_D32(d, 32))
WGMMA_FOR_N(176, WGMMA_REGISTERS_TO_88, "88", "89", "90", "91", "92", "93", WGMMA_D32(d, 0), WGMMA_D32(d, 32),
            WGMMA_D8(d, 64), WGMMA_D8(d, 72), WGMMA_D8(d, 80))
WGMMA_FOR_N(256, WGMMA_REGISTERS_TO_128, "128", "129", "130", "131", "132", "133", WGMMA_D32(d, 0), WGMMA_D32(d, 32),
            WGMMA_D32(d, 64), WGMMA_D32(d, 96))
