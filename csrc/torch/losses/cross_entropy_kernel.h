// Turns tensors into a cross-entropy problem and calls the kernel that solves it.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <utility>  // pair

namespace fastopt {

// Options as torch.nn.functional.cross_entropy's.
struct CrossEntropyOptions {
  int64_t reduction = at::Reduction::Mean;  // torch's number: 0 none, 1 mean, 2 sum
  c10::SymInt ignore_index = -100;          // may be a symbol in a traced program
  double label_smoothing = 0;
  bool in_float32 = false;  // the loss of 16-bit logits is computed in float32, and is float32; on the CPU, reduced
};

// Tensors and options of a call; they must outlive this.
struct CrossEntropyArguments {
  const at::Tensor& input;
  const at::Tensor& target;
  const at::Tensor* weight;  // or null
  const CrossEntropyOptions& options;
};

// True if a kernel supports the device, dtypes and shapes; also for tensors that are only traced.
bool fits_kernel(const CrossEntropyArguments& arguments);

// True if a kernel takes these tensors. Other arguments, valid or not, go to torch's own cross-entropy.
bool kernel_takes(const CrossEntropyArguments& arguments);

// grad_output, a number or one for each position, in a shape that broadcasts against the gradient of the logits.
at::Tensor along_classes(const at::Tensor& grad_output, const at::Tensor& grad);

// The memory of a gradient: no gradient is wanted, new memory, or that of the logits.
enum class GradientMemory : int8_t { kNone, kFresh, kLogits };

// The factor by which the gradient of a loss is multiplied when it is written. Its absolute value is at least this,
// since the gradient may have to be divided by it later.
constexpr double kMinLossFactor = 0x1p-40;
struct LossFactor {
  double number = 1;
  bool is_mean = false;  // the factor is 1 / the mean's denominator instead of the number
  // True if the factor is certain, or if the logits will be there to compute the gradient again: a float16 gradient is
  // then multiplied and rounded once, when it is written.
  bool is_known = false;

  double of(double denominator, at::ScalarType loss_dtype) const;  // 1 / denominator as autograd rounds it
};

struct LossGradient {
  at::Tensor grad;         // undefined if it is not wanted
  double factor = 1;       // by which grad is multiplied
  double denominator = 1;  // of the mean; on the CPU
  double loss_sum = 0;     // unrounded, on the CPU; bitwise the same for the same logits
  bool is_final = false;   // float16, already rounded: another factor needs another gradient
};

// Computes the loss and, if wanted, the gradient of the reduced loss (for reduction none: of each row's own loss) with
// respect to input, times the factor; the factor is applied on the CPU only, and 1 on a GPU. For float16 input the
// gradient is float32, so that a large factor may follow, unless, on the CPU, the factor is known or the gradient
// overwrites the logits. It overwrites them only if a kernel supports their strides. Raises IndexError for a target
// that is not a class.
//
// To compute the loss first and the gradient later: a call without a gradient stores each row's totals in `totals`, if
// the kernel computes them; a call with a gradient reuses them, and its loss is undefined. `into`: memory for the
// gradient, used instead of new memory if it has the right layout, else freed first.
std::pair<at::Tensor, LossGradient> cross_entropy_kernel(const CrossEntropyArguments& arguments, GradientMemory memory,
                                                         LossFactor factor = {}, at::Tensor* totals = nullptr,
                                                         at::Tensor into = {});

}  // namespace fastopt
