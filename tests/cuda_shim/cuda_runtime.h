// Stands in for NVIDIA's header of this name: the sources of csrc/cuda, compiled as C++ with this folder on the include
// path, run on the CPU, each thread of a block as a fiber and one block at a time.
//
// Seed -1, the default, runs threads in order. Others run warps, the lanes of a warp and blocks in random order, which
// FASTOPT_SHIM_SEED in the environment or fastopt_shim_seed() choose. What CUDA forbids ends in a message and abort():
// barriers that some threads never reach, lanes that are not where a mask says, writes past dynamic shared memory.
// Shared memory is garbage when a block begins. Not modelled: real concurrency, weak memory, a block that waits for
// another, inline PTX, speed.
#pragma once

// Sources hold `#pragma unroll`.
#pragma GCC diagnostic ignored "-Wunknown-pragmas"

// clang-format off
#include "vector_types.h"
#include "runtime_types.h"
#include "grid.h"
#include "collectives.h"
#include "device_functions.h"
#include "runtime_calls.h"
// clang-format on
