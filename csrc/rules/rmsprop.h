// RMSprop (Hinton, 2012, lecture 6.5; centered: Graves, 2013), with epsilon outside the root as in torch.optim.RMSprop.
#pragma once

#include <cmath>  // sqrt

#include "rules/description.h"

namespace fastopt {

struct RmsPropOptions {
  FASTOPT_NUMBERS(lr, alpha, eps, weight_decay, momentum)
  FASTOPT_FLAGS(centered, maximize)
};

// state: square_avg[, momentum_buffer][, grad_avg].
template <class T, bool kMomentum, bool kCentered>
struct RmsProp {
  using Options = RmsPropOptions;
  using Scalars = StepScalar;
  static constexpr int kStates = 1 + kMomentum + kCentered;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS(T, lr, alpha, one_minus_alpha, eps, weight_decay, momentum, sign)

  FASTOPT_HD static RmsProp at_step(const RmsPropOptions& o, StepScalar& scalars) {
    ++scalars.step;  // kept for checkpoints; the rule does not depend on it
    return {T(o.lr), T(o.alpha), T(1 - o.alpha), T(o.eps), T(o.weight_decay), T(o.momentum), T(o.maximize ? -1 : 1)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    grad *= sign;
    if (weight_decay != 0) grad += weight_decay * param;
    T& square_avg = state[0];
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad;
    T variance = square_avg;
    if constexpr (kCentered) {
      T& grad_avg = state[1 + kMomentum];
      grad_avg = moving_average(grad_avg, grad, alpha, one_minus_alpha);
      variance -= grad_avg * grad_avg;
      // E[g^2] - E[g]^2 is not negative but for rounding; a NaN stays a NaN.
      variance = variance < 0 ? T(0) : variance;
    }
    const T update = grad / (std::sqrt(variance) + eps);
    if constexpr (kMomentum) {
      T& momentum_buffer = state[1];
      momentum_buffer = momentum * momentum_buffer + update;
      param -= lr * momentum_buffer;
    } else {
      param -= lr * update;
    }
  }
};

struct RmsPropOptimizer {
  static constexpr const char* kOperator = "rmsprop_";
  static constexpr const char* kStates = "square_avg, momentum_buffer, grad_avg";
  static bool uses_state(const RmsPropOptions& o, int state) {
    return state == 0 || (state == 1 && o.momentum > 0) || (state == 2 && o.centered);
  }

  static constexpr int kVariants = 4;
  template <class T, int kVariant>
  using Rule = RmsProp<T, kVariant % 2 == 1, kVariant / 2 == 1>;
  static int variant(const RmsPropOptions& o) { return (o.momentum > 0 ? 1 : 0) + (o.centered ? 2 : 0); }
};

}  // namespace fastopt
