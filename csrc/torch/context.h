// What all glue shares: which tensors kernels take and where, the thread pool, and counts of what ran.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <optional>

#include "common.h"
#include "cpu/parallel.h"

namespace fastopt {

// Keys of an ordinary strided tensor. A lazy negation, a subclass with its own dispatch, a functional wrapper, a
// batched or quantised tensor has others, and is not for a kernel that reads raw memory.
constexpr c10::DispatchKeySet kPlainCpu({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                         c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
constexpr c10::DispatchKeySet kPlainCuda({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                          c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA});

inline bool is_plain_cpu(const at::Tensor& tensor) { return (tensor.key_set() | kPlainCpu) == kPlainCpu; }
inline bool is_plain_cuda(const at::Tensor& tensor) { return (tensor.key_set() | kPlainCuda) == kPlainCuda; }

// Whether no dispatch mode, functorch transform or the like is on: they must see each call, and what torch makes while
// they are on may have no memory.
inline bool is_quiet() {
  constexpr c10::DispatchKeySet kHarmless = c10::default_included_set | kPlainCpu | kPlainCuda;
  return (c10::impl::tls_local_dispatch_key_set().included_ | kHarmless) == kHarmless;
}

// Whose kernels take a tensor.
enum class Backend : int8_t { kNone, kCpu, kCuda };

// Set by torch/cuda_library.cpp: which tensors the CUDA library takes, if there is one.
struct CudaService {
  std::atomic<bool> takes_cuda{false};
  std::atomic<bool> takes_cpu{false};  // in tests: the library runs on the CPU
};
inline CudaService& cuda_service() {
  static CudaService service;
  return service;
}

inline Backend backend_of(const at::Tensor& tensor) {
  if (is_plain_cpu(tensor)) {
    return cuda_service().takes_cpu.load(std::memory_order_relaxed) ? Backend::kCuda : Backend::kCpu;
  }
  if (is_plain_cuda(tensor) && cuda_service().takes_cuda.load(std::memory_order_relaxed)) return Backend::kCuda;
  return Backend::kNone;
}

inline std::optional<DType> dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return std::nullopt;
  }
}

// The value of a tensor of one number in CPU memory, if it is one.
inline std::optional<double> number_in(const at::Tensor& tensor) {
  const auto dtype = dtype_of(tensor);
  if (!dtype || !is_plain_cpu(tensor) || tensor.numel() != 1) return std::nullopt;
  return with_stored_type(*dtype, [&](auto stored) {
    return std::optional<double>(load(*static_cast<const decltype(stored)*>(tensor.const_data_ptr())));
  });
}

// Whether this process was forked after the library was loaded: its copy of the thread pool has no threads, and a
// parallel region would wait for them for ever.
bool is_forked_child();

// torch's own pool and thread count; inside another parallel region, or after a fork, a single thread.
inline cpu::Threads torch_threads() {
  const auto on_each = [](int64_t n_threads, void (*run)(void*, int64_t), void* context) {
    at::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(context, i);
    });
  };
  return {at::in_parallel_region() || is_forked_child() ? 1 : at::get_num_threads(), on_each};
}

// Calls that reached a kernel, so that a test can prove which path ran.
struct KernelCalls {
  std::atomic<int64_t> update{0};
  std::atomic<int64_t> cross_entropy{0};
  std::atomic<int64_t> cuda{0};  // of both, those that the CUDA library took
};
inline KernelCalls& kernel_calls() {
  static KernelCalls calls;
  return calls;
}

}  // namespace fastopt
