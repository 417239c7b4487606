// From tensors to a cross-entropy problem, and to the kernel that solves it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>  // pair

namespace fastopt {

// Arguments as torch.nn.functional.cross_entropy's; reduction is torch's number: 0 none, 1 mean, 2 sum.
struct CrossEntropyArguments {
  const at::Tensor& input;
  const at::Tensor& target;
  const at::Tensor* weight;  // or null
  int64_t reduction;
  int64_t ignore_index;
  double label_smoothing;
  bool in_float32 = false;  // the loss is that of 16-bit logits in float32, and is float32; on the CPU, reduced
};

// Whether device, dtypes and shapes are what the kernel works on; also of tensors that are only traced.
bool fits_kernel(const CrossEntropyArguments& arguments);

// Whether the kernel takes these tensors. What it does not take, valid or not, is for torch's own cross-entropy.
bool kernel_takes(const CrossEntropyArguments& arguments);

// Where a gradient goes: nowhere, into memory of its own, or over the logits.
enum class GradientMemory : int8_t { kNone, kFresh, kLogits };

// What the gradient of a loss is multiplied by where it is written: not less than this in size, for it may have to be
// divided by it again.
constexpr double kMinLossFactor = 0x1p-40;
struct LossFactor {
  double number = 1;
  bool is_mean = false;  // of a sum that will be divided by what a mean is divided by: then not the number
  // Whether it is more than a guess, or the logits will be there to compute the gradient anew: a float16 gradient is
  // then multiplied and rounded once, where it is written.
  bool is_known = false;

  double of(double denominator, at::ScalarType loss_dtype) const;  // 1 / denominator as autograd rounds it
};

struct LossGradient {
  at::Tensor grad;         // undefined if it is not wanted
  double factor = 1;       // by which it is multiplied
  double denominator = 1;  // of the mean; on the CPU
  double loss_sum = 0;     // unrounded, on the CPU: the same bits of the same logits
  bool is_final = false;   // float16, already rounded: another factor needs another gradient
};

// Loss, and the gradient of the reduced loss with respect to input if wanted, multiplied by the factor; of each row's
// own loss for reduction none; the factor is the CPU's, and 1 on a GPU. The gradient is float32 for float16 input, so
// that a large factor may follow, unless the factor is known or the gradient goes over the logits, on the CPU. It goes
// there only where they can be walked as they lie. Raises IndexError for a target that is not a class.
//
// Loss first and gradient later, of the same logits: `totals` given without a gradient take what the gradient needs of
// each row, where the kernel finds it; given back with one, they spare it the search, and the loss is undefined.
// `into`: memory for the gradient that has its layout, in place of fresh memory; of another layout, it is freed first.
std::pair<at::Tensor, LossGradient> cross_entropy_kernel(const CrossEntropyArguments& arguments, GradientMemory memory,
                                                         LossFactor factor = {}, at::Tensor* totals = nullptr,
                                                         at::Tensor into = {});

}  // namespace fastopt
