// ldmatrix and stmatrix: a warp moves 8 x 8 matrices of 16-bit units between shared memory and registers, in the layout of
// the tensor cores' fragments. Rows are 16 bytes, at any 16-byte aligned address: that is where a swizzle goes in.
#pragma once
#include "base.cuh"

// Four 8 x 8 matrices of 16-bit units, transposed on the way: lanes 8 i .. 8 i + 7 give the addresses of the rows (16
// bytes each) of matrix i; lane l receives in register i the units [2 (l % 4)][l / 4] and [2 (l % 4) + 1][l / 4].
// PTX ISA: "ldmatrix".
__device__ __forceinline__ void ldmatrix_x4_transposed(u32 (&registers)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// The way back, not transposed: lane l's register i is bytes 4 (l % 4) .. + 3 of row l / 4 of matrix i, whose row
// addresses come from lanes 8 i .. 8 i + 7. PTX ISA: "stmatrix".
__device__ __forceinline__ void stmatrix_x4(u32 address, const u32 (&registers)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                 : "memory");
}
