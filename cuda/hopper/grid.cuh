// Two kernels in one stream whose end and start overlap (programmatic dependent launch).
#pragma once
#include "base.cuh"

// Waits until the kernel before this one has ended and all it wrote is visible. To be called before anything that it may
// have written, or may still read, is touched; what comes earlier overlaps with its end. Without such a kernel, and in a
// launch that did not ask for the overlap, it does not wait. PTX ISA: "griddepcontrol".
__device__ __forceinline__ void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The kernel behind this one may be brought onto the SMs, as soon as every block of this one has said so or ended and
// there is room. It promises nothing about memory: that is what grid_wait is for. PTX ISA: "griddepcontrol".
__device__ __forceinline__ void grid_next_may_start() { asm volatile("griddepcontrol.launch_dependents;"); }
