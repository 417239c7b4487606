// How a pointwise loss declares itself, and the problem that its loop solves.
#pragma once

#include "common.h"
#include "names.h"

namespace fastopt {

constexpr int kMaxLossInputs = 3;
constexpr int kMaxLossNumbers = 4;

// One element: its loss, and the loss's derivatives by the inputs that have any.
template <class T, int kDerivatives = 2>
struct ElementLoss {
  T value;
  T derivatives[kDerivatives];
};

// The base of a loss. A loss with options declares them by FASTOPT_NUMBERS, named as in the schema of torch's operator,
// and is those numbers and nothing else. Its call operator takes one element of each input.
struct PointwiseLoss {
  static constexpr int kInputs = 2;       // tensors, in the order of torch's operator
  static constexpr int kDerivatives = 2;  // of the inputs, the first so many have derivatives
  // torch's backward does not read the inputs, which may be changed in place before it, and derivatives are exact in 16
  // bits: then it is they that wait for a factor.
  static constexpr bool kSavesDerivatives = false;
  static constexpr const char* kNumbers = "";
  static constexpr int kNumberCount = 0;
};

// All arrays are dense and have their elements in the same order.
struct PointwiseProblem {
  int loss;  // its place in the list
  double numbers[kMaxLossNumbers];
  DType dtype;  // of all arrays
  int64_t n;
  const void* inputs[kMaxLossInputs];
  bool wants_sum;                   // of the losses
  void* losses;                     // of each element; null: not wanted
  void* gradients[kMaxLossInputs];  // null: not wanted
  // Gradients are multiplied by a number, and by one of each element unless null.
  double grad_scale;
  const void* grad_outputs;
};

}  // namespace fastopt
