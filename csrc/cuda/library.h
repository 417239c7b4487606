// The CUDA library's interface: structures over raw pointers, and one exported function. Torch-free.
//
// The library is compiled by nvcc and opened at run time, so that the glue around it needs no CUDA toolkit, and one
// glue serves any torch. Each function returns a cudaError_t as a number, 0 for success, and launches on a given stream
// of the current device without waiting for it.
#pragma once

#include <cstdint>

#include "losses/cross_entropy.h"
#include "update/tensor_update.h"

namespace fastopt::cuda {

using Stream = void*;  // a cudaStream_t

// Must be increased with any change of a structure in this file; a library with another version is rejected.
constexpr int32_t kInterfaceVersion = 3;

// --- Optimizers ---------------------------------------------------------------------------------------------------

// One tensor of an update. Its elements are divided into chunks; a block of threads takes one chunk.
struct UpdateEntry {
  void* param;
  void* grad;            // written only if there is a grad_scale
  void* kept[kMaxKept];  // as in TensorUpdate; scalars are on the device, where the kernel advances them, or unused
  int64_t numel;
  int32_t first_chunk;
  int8_t rule;
  bool is_aligned;  // every pointer to 16 bytes
  bool has_scalars_on_device;
  uint8_t double_scalars;  // a bit for each scalar: it is a double, otherwise a float
};

// Entries and rules that travel as arguments of a kernel; they must fit 32764 bytes.
constexpr int kMaxRules = 8;
constexpr int kFewEntries = 40;
constexpr int kManyEntries = 490;

// One launch: one rule, one combination of dtypes.
struct Update {
  int32_t rule;  // its id in rules.h
  DType param_dtype, state_dtype;
  const PackedRule* rules;  // at most kMaxRules
  int32_t n_rules;
  const UpdateEntry* entries;  // on the host, at most kManyEntries; or on the device, if is_on_device
  int32_t n_entries;
  bool is_on_device;
  int32_t n_chunks;
  int32_t chunk;            // elements; a multiple of kChunkUnit
  const float* grad_scale;  // on the device, or null: gradients are divided by it, and written back
  const float* found_inf;   // on the device, or null: if it is above 0, nothing changes
  double* sums;             // on the device, n_chunks * n_sums of the rule, or null if it has none; overwritten
  uint32_t* ticket;         // on the device, 0 between launches; needed if an entry has scalars on the device
};

constexpr int32_t kChunkUnit = 2048;

// The mixtures of dtypes that have kernels, besides states of the parameter's own dtype.
constexpr bool has_update_kernel(DType param, DType state) {
  return param == state || (param == DType::kFloat32 && state == DType::kBFloat16) ||
         ((param == DType::kBFloat16 || param == DType::kFloat16) && state == DType::kFloat32);
}

// --- Cross-entropy ------------------------------------------------------------------------------------------------

enum class Reduction : int8_t { kNone, kMean, kSum };

// The problem's weight_sum and, for the mean over class indices, its grad_scale are computed on the device. A target
// that is neither a class nor ignore_index makes its row's loss and gradient NaN; nothing is read for it.
struct CrossEntropy {
  CrossEntropyProblem problem;
  Reduction reduction;
  void* loss;       // the reduced loss, of the problem's dtype, or null for kNone
  void* workspace;  // workspace_bytes(...) of device memory, aligned to 16 bytes
};

// Multiplies n numbers by *factor. If that is 1 and from == to, nothing is read or written.
struct Scale {
  const void* from;
  DType from_dtype;
  void* to;
  DType to_dtype;
  const void* factor;
  DType factor_dtype;
  int64_t n;
};

// --- The library --------------------------------------------------------------------------------------------------

struct Library {
  int32_t interface_version;
  bool is_host_shim;          // its kernels run on the CPU, on memory of the CPU
  const char* architectures;  // "80,86,90"
  const char* (*error_text)(int error);
  int (*probe)();  // 0 if the driver can run this library; any other number is for error_text
  int (*is_capturing)(Stream stream, bool* is_capturing);
  int (*multiprocessors)(int* count);  // of the current device
  int (*update)(const Update& update, Stream stream);
  int (*workspace_bytes)(const CrossEntropy& call, int64_t* bytes);
  int (*cross_entropy)(const CrossEntropy& call, Stream stream);
  int (*scale)(const Scale& scale, Stream stream);
};

}  // namespace fastopt::cuda

extern "C" const fastopt::cuda::Library* fastopt_cuda_library();
