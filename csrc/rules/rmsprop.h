// RMSprop (Hinton, 2012, lecture 6.5; centered: Graves, 2013), with epsilon outside the root as in torch.optim.RMSprop.
#pragma once

#include <cmath>  // sqrt
#include "common.h"

namespace fastopt {

struct RmsPropOptions {
  static constexpr int kNumbers = 5;
  double lr, alpha, eps, weight_decay, momentum;
  bool centered, maximize;
};

// state: square_avg[, momentum_buffer][, grad_avg].
template <class T, bool kMomentum, bool kCentered>
struct RmsProp {
  using Real = T;
  using Options = RmsPropOptions;
  static constexpr int kStates = 1 + kMomentum + kCentered;
  static constexpr bool kDivides = true;
  static constexpr int kConstants = 7;
  T lr, alpha, one_minus_alpha, eps, weight_decay, momentum, sign;

  FASTOPT_HD static RmsProp at_step(const RmsPropOptions& o, double /*step*/) {
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

}  // namespace fastopt
