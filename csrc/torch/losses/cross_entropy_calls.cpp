#include "torch/losses/cross_entropy_calls.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cross_entropy_loss.h>

namespace fastopt {
namespace {

OptionalTensor optional(const at::Tensor* tensor) { return tensor ? OptionalTensor(*tensor) : std::nullopt; }

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor torch_cross_entropy(const CrossEntropyArguments& a) {
  const CrossEntropyOptions& o = a.options;
  const auto widened = [&](const at::Tensor& tensor) {
    return o.in_float32 && tensor.is_floating_point() ? tensor.to(at::kFloat) : tensor;
  };
  return at::cross_entropy_loss_symint(widened(a.input), widened(a.target),
                                       a.weight ? OptionalTensor(widened(*a.weight)) : std::nullopt, o.reduction,
                                       o.ignore_index, o.label_smoothing);
}

at::Tensor call_cross_entropy(const CrossEntropyArguments& a) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, c10::SymInt, double, bool)>(
          "fastopt::cross_entropy");
  const CrossEntropyOptions& o = a.options;
  return op.call(a.input, a.target, optional(a.weight), o.reduction, o.ignore_index, o.label_smoothing, o.in_float32);
}

std::tuple<at::Tensor, at::Tensor> call_forward(const CrossEntropyArguments& a, bool wants_grad) {
  static const auto op =
      find<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                              c10::SymInt, double, bool, bool)>("fastopt::cross_entropy_forward");
  const CrossEntropyOptions& o = a.options;
  return op.call(a.input, a.target, optional(a.weight), o.reduction, o.ignore_index, o.label_smoothing, wants_grad,
                 o.in_float32);
}

at::Tensor call_backward(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>("fastopt::cross_entropy_backward");
  return op.call(grad_output, grad, input);
}

std::tuple<at::Tensor, at::Tensor> call_keep(const CrossEntropyArguments& a) {
  static const auto op =
      find<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                              c10::SymInt, double, bool)>("fastopt::cross_entropy_keep");
  const CrossEntropyOptions& o = a.options;
  return op.call(a.input, a.target, optional(a.weight), o.reduction, o.ignore_index, o.label_smoothing, o.in_float32);
}

at::Tensor call_take(const at::Tensor& grad_output, const at::Tensor& keeper, const CrossEntropyArguments& a) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                      int64_t, c10::SymInt, double, bool)>("fastopt::cross_entropy_take");
  const CrossEntropyOptions& o = a.options;
  return op.call(grad_output, keeper, a.input, a.target, optional(a.weight), o.reduction, o.ignore_index,
                 o.label_smoothing, o.in_float32);
}

}  // namespace fastopt
