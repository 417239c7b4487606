// Shared by all code between torch and the kernels: which tensors a backend takes, the thread pool, kernel call counts.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>  // sort
#include <atomic>
#include <optional>
#include <utility>  // pair

#include "common.h"
#include "cpu/parallel.h"

namespace fastopt {

// Keys of an ordinary strided tensor. A lazy negation, a subclass with its own dispatch, a functional wrapper, a
// batched or a quantised tensor has other keys; kernels that read raw memory must not take it.
constexpr c10::DispatchKeySet kPlainCpu({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                         c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
constexpr c10::DispatchKeySet kPlainCuda({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                          c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA});

inline bool is_plain_cpu(const at::Tensor& tensor) { return (tensor.key_set() | kPlainCpu) == kPlainCpu; }
inline bool is_plain_cuda(const at::Tensor& tensor) { return (tensor.key_set() | kPlainCuda) == kPlainCuda; }

// True if a dispatch mode, functorch transform or the like is active: it must see each call, and tensors that torch
// makes meanwhile may have no memory.
inline bool has_dispatch_modes() {
  constexpr c10::DispatchKeySet kHarmless = c10::default_included_set | kPlainCpu | kPlainCuda;
  return (c10::impl::tls_local_dispatch_key_set().included_ | kHarmless) != kHarmless;
}

// True if forward-mode derivatives are being computed: then tensors may have tangents, which kernels ignore.
inline bool is_forward_mode_on() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }

// The backend whose kernels take a tensor.
enum class Backend : int8_t { kNone, kCpu, kCuda };

// Set by torch/cuda_library.cpp: which tensors the CUDA library takes, if one is loaded.
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

// True if a tensor on this device goes to the CPU kernels; also for a tensor that is only traced.
inline bool is_for_cpu_kernels(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && !cuda_service().takes_cpu.load(std::memory_order_relaxed);
}

inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return std::nullopt;
  }
}
inline std::optional<DType> dtype_of(const at::Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// True if a strided tensor's storage holds all its elements. storage.resize_(0) frees the memory of a live tensor.
inline bool is_backed(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t last = tensor.storage_offset();
  if (tensor.is_contiguous()) {
    last += tensor.numel() - 1;
  } else {
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return static_cast<int64_t>(tensor.storage().nbytes()) >= (last + 1) * static_cast<int64_t>(tensor.itemsize());
}

// Raises RuntimeError if the storage does not hold all elements.
inline void check_backed(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(is_backed(tensor),
              "The tensor has a non-zero number of elements, but its data is not allocated yet: ", name, " of shape ",
              tensor.sizes(), " has a storage of ", tensor.storage().nbytes(), " bytes.");
}

// True if two elements of a strided tensor may be at one address. False if each dimension's stride exceeds the extent
// of all dimensions of smaller stride.
inline bool may_overlap_itself(const at::Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_contiguous()) return false;
  c10::SmallVector<std::pair<int64_t, int64_t>, 6> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.push_back({tensor.stride(d), tensor.size(d)});
  }
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;  // the largest offset of the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (stride <= last) return true;
    last += (size - 1) * stride;
  }
  return false;
}

// Begin and end of the memory that a strided tensor spans.
inline std::pair<char*, char*> memory_range(const at::Tensor& tensor) {
  char* begin = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  int64_t n = tensor.numel() > 0;
  for (int64_t d = 0; n > 0 && d < tensor.dim(); ++d) n += (tensor.size(d) - 1) * tensor.stride(d);
  return {begin, begin + n * tensor.itemsize()};
}

// True if two strided tensors may share memory.
inline bool may_share_memory(const at::Tensor& a, const at::Tensor& b) {
  const auto [begin, end] = memory_range(a);
  const auto [other_begin, other_end] = memory_range(b);
  return begin < other_end && other_begin < end;
}

// The value of a tensor whose elements are all at one address in CPU memory; nothing for other tensors.
inline std::optional<double> repeated_number_in(const at::Tensor& tensor) {
  const auto dtype = dtype_of(tensor);
  if (!dtype || !is_plain_cpu(tensor) || tensor.numel() == 0 || !is_backed(tensor)) return std::nullopt;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != 0) return std::nullopt;
  }
  return with_stored_type(*dtype, [&](auto stored) {
    return std::optional<double>(load(*static_cast<const decltype(stored)*>(tensor.const_data_ptr())));
  });
}

// The value of a one-element tensor in CPU memory; nothing for other tensors.
inline std::optional<double> number_in(const at::Tensor& tensor) {
  return tensor.numel() == 1 ? repeated_number_in(tensor) : std::nullopt;
}

// Number of forks between the process that loaded the library and this one. In a forked child the thread pool has no
// threads, so a parallel region would never end, and a lock that another thread held is never released.
int64_t fork_count();
inline bool is_forked_child() { return fork_count() > 0; }

// torch's own pool and thread count; a single thread inside another parallel region or in a forked child.
inline cpu::Threads torch_threads() {
  const auto on_each = [](int64_t n_threads, void (*run)(void*, int64_t), void* context) {
    at::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(context, i);
    });
  };
  return {at::in_parallel_region() || is_forked_child() ? 1 : at::get_num_threads(), on_each};
}

// Numbers of calls that reached a kernel: fastopt.count_calls() tells which path ran.
struct KernelCalls {
  std::atomic<int64_t> update{0};
  std::atomic<int64_t> threaded_gather{0};  // updates whose tensors were gathered by several threads
  std::atomic<int64_t> cross_entropy{0};
  std::atomic<int64_t> torch_cross_entropy{0};  // calls from Python that reached none
  std::atomic<int64_t> cuda{0};                 // update and cross_entropy calls of the CUDA library
};
inline KernelCalls& kernel_calls() {
  static KernelCalls calls;
  return calls;
}

// Losses that kernels have computed in this thread: a call during which the number stays the same has reached none.
inline thread_local int64_t losses_of_thread = 0;
inline void count_cross_entropy() {
  ++kernel_calls().cross_entropy;
  ++losses_of_thread;
}

}  // namespace fastopt
