// NAdam (Dozat, 2016): Adam with Nesterov momentum whose factor mu grows with the steps, as in torch.optim.NAdam.
#pragma once

#include <cmath>  // expm1, log, pow, sqrt
#include <string_view>

#include "rules/description.h"

namespace fastopt {

struct NAdamOptions {
  FASTOPT_NUMBERS(lr, beta1, beta2, eps, weight_decay, momentum_decay)
  FASTOPT_FLAGS(decoupled_weight_decay, maximize)
};

struct NAdamScalars {
  FASTOPT_SCALARS(step, mu_product)
};

// state: exp_avg, exp_avg_sq.
template <class T>
struct NAdam {
  using Options = NAdamOptions;
  using Scalars = NAdamScalars;
  static constexpr int kStates = 2;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS(T, grad_factor, avg_factor, correction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
                    l2_decay, decoupled_decay, sign)

  FASTOPT_HD static double mu(const NAdamOptions& o, double step) {
    return o.beta1 * (1 - 0.5 * std::pow(0.96, step * o.momentum_decay));
  }

  FASTOPT_HD static NAdam at_step(const NAdamOptions& o, NAdamScalars& scalars) {
    const double step = ++scalars.step;
    const double mu_now = mu(o, step), mu_next = mu(o, step + 1);
    scalars.mu_product = scalars.stored(scalars.mu_product * scalars.stored(mu_now));  // as torch rounds it
    return {T(o.lr * (1 - mu_now) / (1 - scalars.mu_product)),
            T(o.lr * mu_next / (1 - scalars.mu_product * mu_next)),
            T(1 / std::sqrt(-std::expm1(step * std::log(o.beta2)))),
            T(o.beta1),
            T(1 - o.beta1),
            T(o.beta2),
            T(1 - o.beta2),
            T(o.eps),
            T(o.decoupled_weight_decay ? 0 : o.weight_decay),
            T(o.decoupled_weight_decay ? o.lr * o.weight_decay : 0),
            T(o.maximize ? -1 : 1)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    grad *= sign;
    if (decoupled_decay != 0) param = decayed(param, decoupled_decay);
    if (l2_decay != 0) grad += l2_decay * param;
    T& exp_avg = state[0];
    T& exp_avg_sq = state[1];
    exp_avg = moving_average(exp_avg, grad, beta1, one_minus_beta1);
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad;
    param -= (grad_factor * grad + avg_factor * exp_avg) / (std::sqrt(exp_avg_sq) * correction + eps);
  }
};

struct NAdamOptimizer : OneRule<NAdam> {
  static constexpr const char* kOperator = "nadam_";
  static constexpr const char* kStates = "exp_avg, exp_avg_sq";
  static double initial_value(const NAdamOptions& /*o*/, std::string_view key) { return key == "mu_product" ? 1 : 0; }
};

}  // namespace fastopt
