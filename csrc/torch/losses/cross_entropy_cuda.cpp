#include "torch/losses/cross_entropy_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eq.h>

#include "torch/cuda_library.h"

namespace fastopt {

at::Tensor cross_entropy_cuda(const CrossEntropyArguments& a, const CrossEntropyProblem& problem,
                              at::IntArrayRef loss_sizes) {
  const CudaDevice device(a.input.device());
  cuda::CrossEntropy call{};
  call.problem = problem;
  call.reduction = a.reduction == at::Reduction::None   ? cuda::Reduction::kNone
                   : a.reduction == at::Reduction::Mean ? cuda::Reduction::kMean
                                                        : cuda::Reduction::kSum;
  const auto options = a.input.options().requires_grad(false);
  const bool is_reduced = call.reduction != cuda::Reduction::kNone;
  const at::Tensor loss = at::empty(is_reduced ? at::IntArrayRef() : loss_sizes, options);
  (is_reduced ? call.loss : call.problem.losses) = loss.mutable_data_ptr();
  const LogitLayout& layout = problem.logits_layout;
  const auto what = [&] {
    return c10::str("cross-entropy of ", layout.n_outer * layout.n_inner, " positions and ", layout.n_classes,
                    " classes");
  };
  int64_t bytes = 0;
  int error = cuda_library().workspace_bytes(call, &bytes);
  if (error != 0) check_cuda(error, what(), a.input.device());
  const at::Tensor workspace = bytes > 0 ? at::empty({bytes}, options.dtype(at::kByte)) : at::Tensor();
  if (bytes > 0) call.workspace = workspace.mutable_data_ptr();
  error = cuda_library().cross_entropy(call, device.stream());
  if (error != 0) check_cuda(error, what(), a.input.device());
  // torch's mean over the one target of logits without a batch is 0 on CUDA if that is ignored; on the CPU it is NaN.
  const bool is_unbatched = a.input.dim() == 1 && problem.target && a.label_smoothing == 0;
  if (a.input.is_cuda() && is_unbatched && call.reduction == cuda::Reduction::kMean) {
    loss.masked_fill_(a.target.eq(a.ignore_index), 0);
  }
  ++kernel_calls().cuda;
  return loss;
}

at::Tensor scale_gradient_cuda(const at::Tensor& grad, const at::Tensor& factor, at::ScalarType dtype, bool may_reuse) {
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

}  // namespace fastopt
