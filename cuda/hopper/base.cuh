// Names that every wrapper in this folder uses. No CUDA header is included anywhere, so NVRTC needs no toolkit.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// The 128-byte TMA descriptor that the host encodes (cuda.h is not available under NVRTC, so it is declared here).
// It must reach the kernel as a `const __grid_constant__` parameter: TMA reads it through its address.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Instructions on shared memory take a 32-bit address inside the shared window, not a generic 64-bit pointer.
// PTX ISA: "cvta".
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
