#include "torch/losses/scale_gradient.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>  // min
#include <optional>

#include "torch/context.h"
#include "torch/cuda_library.h"

namespace fastopt {
namespace {

// Results of up to this many elements have memory of their own: then one pass rounds them.
constexpr int64_t kMaxApart = 1 << 20;
// Larger ones are multiplied and then rounded in windows of this many elements, which stay in the second-level cache.
constexpr int64_t kWindow = 1 << 17;

// A tensor of 16-bit numbers in the memory of a tensor of 32-bit numbers that is not needed any more.
at::Tensor in_place_of(const at::Tensor& wide, at::ScalarType dtype) {
  return at::empty({0}, wide.options().dtype(dtype)).set_(wide.storage(), 0, wide.sizes(), wide.strides());
}

// grad times factor, if given, rounded once. A large one is processed in windows, so that no other array of its size is
// needed; in the gradient's own memory, if may_reuse, each window is written where all elements have been read.
at::Tensor rounded(at::Tensor grad, std::optional<at::Tensor> factor, at::ScalarType dtype, bool may_reuse) {
  const int64_t n = grad.numel();
  const bool is_whole = !is_plain_cpu(grad) || n <= kMaxApart || !grad.is_non_overlapping_and_dense();
  if (factor && (is_whole || factor->numel() != 1)) {  // a factor for each position is not windowed
    grad = may_reuse ? grad.mul_(*factor) : at::mul(grad, *factor);
    factor.reset();
    may_reuse = true;
  }
  if (is_whole) return grad.to(dtype);
  may_reuse &= grad.storage_offset() == 0 && grad.itemsize() == 2 * c10::elementSize(dtype);
  if (factor) factor = factor->reshape({});
  const at::Tensor from = grad.as_strided({n}, {1});
  at::Tensor result = may_reuse ? in_place_of(grad, dtype) : at::empty_like(grad, dtype);
  const at::Tensor to = result.as_strided({n}, {1});
  for (int64_t begin = 0, size = 0; begin < n; begin += size) {
    const bool is_copied = begin == 0 || !may_reuse;  // the first window overlaps its result
    size = std::min(kWindow, n - begin);
    at::Tensor window = from.narrow(0, begin, size);
    if (is_copied) {
      window = factor ? at::mul(window, *factor) : window.clone();
    } else if (factor) {
      window.mul_(*factor);
    }
    to.narrow(0, begin, size).copy_(window);
  }
  // Saving the result saves its whole storage, so that is given the result's size.
  if (may_reuse) result.storage().unsafeGetStorageImpl()->set_nbytes(result.nbytes());
  return result;
}

// A gradient times a number on its device; in its own memory if may_reuse, where a factor of 1 changes nothing.
at::Tensor scale_on_cuda(const at::Tensor& grad, const at::Tensor& factor, at::ScalarType dtype, bool may_reuse) {
  const CudaDevice device(grad.device());
  const bool stays = may_reuse && grad.scalar_type() == dtype;
  const at::Tensor scaled = stays ? grad : at::empty_like(grad, grad.options().dtype(dtype));
  const cuda::Scale scale{grad.const_data_ptr(), *dtype_of(grad),         scaled.mutable_data_ptr(),
                          *dtype_of(scaled),     factor.const_data_ptr(), *dtype_of(factor),
                          grad.numel()};
  const int error = cuda_library().scale(scale, device.stream());
  if (error != 0) check_cuda(error, c10::str("scaling a gradient of ", grad.numel(), " elements"), grad.device());
  return scaled;
}

}  // namespace

at::Tensor scale_gradient(const at::Tensor& grad, const at::Tensor& factor, at::ScalarType dtype, bool may_reuse) {
  check_backed(grad, "grad");  // a hook for saved tensors may have replaced it
  check_backed(factor, "grad_output");
  const bool is_cuda = backend_of(grad) == Backend::kCuda && backend_of(factor) == Backend::kCuda;
  if (is_cuda && factor.numel() == 1 && factor.device() == grad.device() && dtype_of(factor)) {
    return scale_on_cuda(grad, factor, dtype, may_reuse);
  }
  if (const auto number = repeated_number_in(factor)) return scale_gradient(grad, *number, dtype, may_reuse);
  const at::Tensor same_type = factor.to(grad.scalar_type());
  if (grad.scalar_type() != dtype) return rounded(grad, same_type, dtype, may_reuse);
  return may_reuse ? grad.mul_(same_type) : at::mul(grad, same_type);
}

at::Tensor scale_gradient(const at::Tensor& grad, double factor, at::ScalarType dtype, bool may_reuse) {
  check_backed(grad, "grad");
  const bool is_one = factor == 1;
  if (grad.scalar_type() != dtype) {
    return rounded(grad, is_one ? std::nullopt : std::optional(at::scalar_tensor(factor, grad.options())), dtype,
                   may_reuse);
  }
  if (!may_reuse) return is_one ? grad.clone() : at::mul(grad, factor);  // grad is kept for another backward
  return is_one ? grad : grad.mul_(factor);
}

}  // namespace fastopt
