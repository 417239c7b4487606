// Adagrad (Duchi, Hazan & Singer, 2011), with epsilon outside the root as in torch.optim.Adagrad.
#pragma once

#include <cmath>  // sqrt

#include "rules/description.h"

namespace fastopt {

struct AdagradOptions {
  FASTOPT_NUMBERS(lr, lr_decay, weight_decay, eps)
  FASTOPT_FLAGS(maximize)
};

// state: sum.
template <class T>
struct Adagrad {
  using Options = AdagradOptions;
  using Scalars = StepScalar;
  static constexpr int kStates = 1;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS(T, lr, weight_decay, eps, sign)

  FASTOPT_HD static Adagrad at_step(const AdagradOptions& o, StepScalar& scalars) {
    const double n_steps_before = scalars.step++;
    return {T(o.lr / (1 + n_steps_before * o.lr_decay)), T(o.weight_decay), T(o.eps), T(o.maximize ? -1 : 1)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    grad *= sign;
    if (weight_decay != 0) grad += weight_decay * param;
    T& sum = state[0];
    sum += grad * grad;
    param -= lr * grad / (std::sqrt(sum) + eps);
  }
};

struct AdagradOptimizer : OneRule<Adagrad> {
  static constexpr const char* kOperator = "adagrad_";
  static constexpr const char* kStates = "sum";
  // The constructor makes them, with an initial value of its own.
  static constexpr bool kMakesStates = false;
};

}  // namespace fastopt
