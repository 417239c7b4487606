#include "torch/bindings.h"

#include <ATen/ops/empty.h>

#include "cpu/cross_entropy/shard.h"
#include "losses/cross_entropy.h"
#include "torch/context.h"
#include "torch/large_arrays.h"

namespace fastopt {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The layout of rows that the kernels take, or nothing.
std::optional<LogitLayout> rows_of(const at::Tensor& input, const OptionalTensor& weight) {
  if (backend_of(input) != Backend::kCpu || has_dispatch_modes() || !dtype_of(input)) return std::nullopt;
  if (weight && !is_plain_cpu(*weight)) return std::nullopt;
  if ((input.dim() != 1 && input.dim() != 2) || input.numel() == 0 || input.strides().back() != 1) return std::nullopt;
  const int64_t n_classes = input.sizes().back();
  const bool is_one = input.dim() == 1;
  if (n_classes < cpu::kMinShardClasses) return std::nullopt;
  return LogitLayout{is_one ? 1 : input.size(0), n_classes, 1, is_one ? n_classes : input.stride(0), 1};
}

// Raises RuntimeError unless the tensor is a contiguous CPU array of these sizes and this dtype.
void check_vector(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK(
      is_plain_cpu(tensor) && tensor.sizes() == sizes && tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
      " must be a contiguous CPU tensor of shape ", sizes, " and dtype ", dtype, ", got ", tensor.sizes(), ", ",
      tensor.scalar_type(), ", ", tensor.device());
  check_backed(tensor, name);
}

cpu::LogitShard shard_of(const at::Tensor& input, const LogitLayout& rows, const at::Tensor& is_kept,
                         const OptionalTensor& weight, bool is_smoothed) {
  cpu::LogitShard shard{*dtype_of(input), input.const_data_ptr(), rows.n_outer, rows.n_classes, rows.outer_stride};
  check_backed(input, "input");
  check_vector(is_kept, "is_kept", {shard.n_rows}, at::kBool);
  shard.is_kept = is_kept.const_data_ptr<bool>();
  shard.is_smoothed = is_smoothed;
  if (weight && is_smoothed) {
    check_vector(*weight, "weight", {shard.n_classes}, input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    shard.weight = weight->const_data_ptr();
  }
  return shard;
}

// The maximum, sum exp(x - max) and, if smoothed, sum w (x - max) of each row, as float64 of shape (2 or 3, rows); None
// if the kernels do not take the rows. is_kept: (rows,); weight: in the compute type.
OptionalTensor shard_totals(const at::Tensor& input, const at::Tensor& is_kept, const OptionalTensor& weight,
                            bool is_smoothed) {
  const auto rows = rows_of(input, weight);
  if (!rows) return std::nullopt;
  // Keeps the memory alive: another thread may give a tensor other memory while the kernel runs.
  const c10::Storage held[] = {input.storage(), is_kept.storage(), weight ? weight->storage() : c10::Storage()};
  const cpu::LogitShard shard = shard_of(input, *rows, is_kept, weight, is_smoothed);
  at::Tensor totals = at::empty({2 + is_smoothed, shard.n_rows}, at::kDouble);
  double* first = totals.mutable_data_ptr<double>();
  cpu::shard_totals(shard, torch_threads(), {first, first + shard.n_rows, first + 2 * shard.n_rows});
  count_cross_entropy();
  return totals;
}

// The gradient, or None if the kernels do not take the rows. target: (rows,), as indices into this process's classes;
// numbers: float64 of shape (5, rows), the arrays of cpu::ShardGradient from max to scale.
OptionalTensor shard_gradient(const at::Tensor& input, const at::Tensor& target, const at::Tensor& is_kept,
                              const OptionalTensor& weight, const at::Tensor& numbers, double off, bool is_smoothed) {
  const auto rows = rows_of(input, weight);
  if (!rows) return std::nullopt;
  const c10::Storage held[] = {input.storage(), target.storage(), is_kept.storage(), numbers.storage(),
                               weight ? weight->storage() : c10::Storage()};
  const cpu::LogitShard shard = shard_of(input, *rows, is_kept, weight, is_smoothed);
  check_vector(target, "target", {shard.n_rows}, at::kLong);
  check_vector(numbers, "numbers", {5, shard.n_rows}, at::kDouble);
  const int64_t sizes[] = {shard.n_rows, shard.n_classes}, strides[] = {shard.n_classes, 1};
  at::Tensor grad = empty_large(sizes, strides, input.scalar_type());
  const auto of_rows = [&](int64_t i) { return numbers.const_data_ptr<double>() + i * shard.n_rows; };
  cpu::shard_gradient(shard, torch_threads(),
                      {target.const_data_ptr<int64_t>(), of_rows(0), of_rows(1), of_rows(2), of_rows(3), of_rows(4),
                       off, grad.mutable_data_ptr(), shard.n_classes});
  count_cross_entropy();
  return input.dim() == 1 ? grad.view({-1}) : grad;
}

}  // namespace

void bind_cross_entropy_shard(pybind11::module_& module) {
  const auto without_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  module.def("cross_entropy_shard_totals", &shard_totals, without_gil);
  module.def("cross_entropy_shard_gradient", &shard_gradient, without_gil);
}

}  // namespace fastopt
