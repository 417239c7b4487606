#include "torch/losses/cross_entropy_calls.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cross_entropy_loss.h>

#include <utility>  // move

namespace fastopt {

at::Tensor torch_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing, bool in_float32) {
  if (in_float32) {
    const auto widened = [](const at::Tensor& tensor) {
      return tensor.is_floating_point() ? tensor.to(at::kFloat) : tensor;
    };
    return at::cross_entropy_loss_symint(widened(input), widened(target),
                                         weight ? OptionalTensor(widened(*weight)) : std::nullopt, reduction,
                                         std::move(ignore_index), label_smoothing);
  }
  return at::cross_entropy_loss_symint(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
}

at::Tensor call_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing, bool in_float32) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastopt::cross_entropy", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                               c10::SymInt, double, bool)>();
  return op.call(input, target, weight, reduction, std::move(ignore_index), label_smoothing, in_float32);
}

std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& input, const at::Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction,
                                                c10::SymInt ignore_index, double label_smoothing, bool wants_grad,
                                                bool in_float32) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastopt::cross_entropy_forward", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                    int64_t, c10::SymInt, double, bool, bool)>();
  return op.call(input, target, weight, reduction, std::move(ignore_index), label_smoothing, wants_grad, in_float32);
}

std::tuple<at::Tensor, at::Tensor> call_keep(const CrossEntropyArguments& a, c10::SymInt ignore_index) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastopt::cross_entropy_keep", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                    int64_t, c10::SymInt, double, bool)>();
  return op.call(a.input, a.target, optional(a.weight), a.reduction, std::move(ignore_index), a.label_smoothing,
                 a.in_float32);
}

at::Tensor call_take(const at::Tensor& grad_output, const at::Tensor& keeper, const CrossEntropyArguments& a,
                     c10::SymInt ignore_index) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastopt::cross_entropy_take", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const OptionalTensor&, int64_t, c10::SymInt, double, bool)>();
  return op.call(grad_output, keeper, a.input, a.target, optional(a.weight), a.reduction, std::move(ignore_index),
                 a.label_smoothing, a.in_float32);
}

at::Tensor call_backward(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastopt::cross_entropy_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return op.call(grad_output, grad, input);
}

}  // namespace fastopt
