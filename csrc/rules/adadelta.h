// Adadelta (Zeiler, 2012), with epsilon inside both roots as in torch.optim.Adadelta.
#pragma once

#include <cmath>  // sqrt

#include "rules/description.h"

namespace fastopt {

struct AdadeltaOptions {
  FASTOPT_NUMBERS(lr, rho, eps, weight_decay)
  FASTOPT_FLAGS(maximize)
};

// state: square_avg, acc_delta.
template <class T>
struct Adadelta {
  using Options = AdadeltaOptions;
  using Scalars = StepScalar;
  static constexpr int kStates = 2;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS(T, lr, rho, one_minus_rho, eps, weight_decay, sign)

  FASTOPT_HD static Adadelta at_step(const AdadeltaOptions& o, StepScalar& scalars) {
    ++scalars.step;  // kept for checkpoints; the rule does not depend on it
    return {T(o.lr), T(o.rho), T(1 - o.rho), T(o.eps), T(o.weight_decay), T(o.maximize ? -1 : 1)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    grad *= sign;
    if (weight_decay != 0) grad += weight_decay * param;
    T& square_avg = state[0];
    T& acc_delta = state[1];
    square_avg = rho * square_avg + one_minus_rho * grad * grad;
    const T delta = std::sqrt(acc_delta + eps) / std::sqrt(square_avg + eps) * grad;
    acc_delta = rho * acc_delta + one_minus_rho * delta * delta;
    param -= lr * delta;
  }
};

struct AdadeltaOptimizer : OneRule<Adadelta> {
  static constexpr const char* kOperator = "adadelta_";
  static constexpr const char* kStates = "square_avg, acc_delta";
};

}  // namespace fastopt
