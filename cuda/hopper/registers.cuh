// setmaxnreg: moves registers between warpgroups while the kernel runs. A block gets (registers at entry) x (threads)
// when it is launched; a warpgroup that only issues copies hands most of its share to a pool, and those that hold the
// accumulators take more out of it (and wait until it is there). All warps of the warpgroup must execute the same
// instruction; the count is a multiple of 8 in 24..256; newly gained registers hold garbage.
// It is ignored unless the entry count is known: give the kernel __launch_bounds__(threads, 1), with the 1.
// PTX ISA: "setmaxnreg".
#pragma once
#include "base.cuh"

template <int kRegisters>
__device__ __forceinline__ void registers_release_to() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "a multiple of 8 in 24..256");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_claim_up_to() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "a multiple of 8 in 24..256");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
