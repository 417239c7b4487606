// NAdam (Dozat, 2016): Adam with Nesterov momentum whose factor mu grows with the steps, as in torch.optim.NAdam.
#pragma once

#include <cmath>  // pow
#include <string_view>

#include "rules/moments.h"

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
struct NAdam : Moments<T> {
  using Options = NAdamOptions;
  using Scalars = NAdamScalars;
  static constexpr int kStates = 2;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS_AFTER(Moments<T>, T, grad_factor, avg_factor)

  FASTOPT_HD static double mu(const NAdamOptions& o, double step) {
    return o.beta1 * (1 - 0.5 * std::pow(0.96, step * o.momentum_decay));
  }

  FASTOPT_HD static NAdam at_step(const NAdamOptions& o, NAdamScalars& scalars) {
    const double step = ++scalars.step;
    const double mu_now = mu(o, step), mu_next = mu(o, step + 1);
    scalars.mu_product = scalars.stored(scalars.mu_product * scalars.stored(mu_now));  // as torch rounds it
    return {Moments<T>::at_step(o, step), T(o.lr * (1 - mu_now) / (1 - scalars.mu_product)),
            T(o.lr * mu_next / (1 - scalars.mu_product * mu_next))};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    this->average(param, grad, state);
    param -= (grad_factor * grad + avg_factor * state[0]) / this->corrected_root(state[1]);
  }
};

struct NAdamOptimizer : OneRule<NAdam> {
  static constexpr const char* kOperator = "nadam_";
  static constexpr const char* kStates = "exp_avg, exp_avg_sq";
  static double initial_value(const NAdamOptions& /*o*/, std::string_view key) { return key == "mu_product" ? 1 : 0; }
};

}  // namespace fastopt
