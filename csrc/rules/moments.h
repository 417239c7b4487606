// What Adam and its kin share: weight decay, and the moving averages of the gradient and of its square.
#pragma once

#include <cmath>  // expm1, log, sqrt

#include "rules/description.h"

namespace fastopt {

// 1 - beta^step without cancellation: the bias of a moving average that began at 0. log 0 is -inf, and beta = 0
// gives 1.
FASTOPT_HD double bias_correction(double beta, double step) { return -std::expm1(step * std::log(beta)); }

template <class T>
struct Moments {
  FASTOPT_CONSTANTS(T, correction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, l2_decay, decoupled_decay, sign)

  template <class Options>
  FASTOPT_HD static Moments at_step(const Options& o, double step) {
    return {T(1 / std::sqrt(bias_correction(o.beta2, step))),
            T(o.beta1),
            T(1 - o.beta1),
            T(o.beta2),
            T(1 - o.beta2),
            T(o.eps),
            T(o.decoupled_weight_decay ? 0 : o.weight_decay),
            T(o.decoupled_weight_decay ? o.lr * o.weight_decay : 0),
            T(o.maximize ? -1 : 1)};
  }

  // Decays the parameter, or adds the decay to the gradient, and averages. state: exp_avg, exp_avg_sq.
  FASTOPT_HD void average(T& param, T& grad, T* state) const {
    grad *= sign;
    if (decoupled_decay != 0) param = decayed(param, decoupled_decay);
    if (l2_decay != 0) grad += l2_decay * param;
    state[0] = moving_average(state[0], grad, beta1, one_minus_beta1);
    state[1] = beta2 * state[1] + one_minus_beta2 * grad * grad;
  }

  // sqrt(variance / bias correction) + eps, with the correction as a factor. eps does not take it, about 1/30 at first:
  // a small eps would become 0.
  FASTOPT_HD T corrected_root(T variance) const { return std::sqrt(variance) * correction + eps; }
};

}  // namespace fastopt
