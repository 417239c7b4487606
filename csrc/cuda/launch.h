// Shared by every kernel file: macros to launch a kernel and to declare dynamic shared memory.
//
// The same sources are compiled by nvcc for a GPU, and by a C++ compiler against tests/cuda_shim/cuda_runtime.h, which
// runs each thread of a block as a fiber on the CPU. That header defines the macros below in its own way, before these.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.h"

// FASTOPT_LAUNCH(kernel, blocks, threads, shared_bytes, stream, arguments...); the kernel in parentheses if its
// template arguments contain commas.
#ifndef FASTOPT_LAUNCH
#define FASTOPT_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  kernel<<<(blocks), (threads), (shared_bytes), (stream)>>>(__VA_ARGS__)
#endif

// FASTOPT_DYNAMIC_SHARED(name): `char* name`, the block's dynamic shared memory, aligned to 16 bytes.
#ifndef FASTOPT_DYNAMIC_SHARED
#define FASTOPT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

// Asserts to the compiler that a pointer loaded from a table points to global memory, so that no generic access is
// needed.
#if defined(__CUDA_ARCH__)
#define FASTOPT_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define FASTOPT_ASSUME_GLOBAL(pointer)
#endif
