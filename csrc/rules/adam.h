// Adam (Kingma & Ba, 2015, algorithm 1), AMSGrad (Reddi et al., 2018), and AdamW's decoupled weight decay
// (Loshchilov & Hutter, 2019), with epsilon outside the root as in torch.optim.Adam.
#pragma once

#include <cmath>  // expm1, log, sqrt

#include "rules/description.h"

namespace fastopt {

struct AdamOptions {
  FASTOPT_NUMBERS(lr, beta1, beta2, eps, weight_decay)
  FASTOPT_FLAGS(amsgrad, maximize, decoupled_weight_decay)
};

// state: exp_avg, exp_avg_sq[, max_exp_avg_sq].
template <class T, bool kAmsgrad>
struct Adam {
  using Options = AdamOptions;
  using Scalars = StepScalar;
  static constexpr int kStates = 2 + kAmsgrad;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS(T, step_size, correction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, l2_decay,
                    decoupled_decay, sign)

  // The bias corrections c1 = 1 - beta1^t and c2 = 1 - beta2^t leave the loop over elements:
  // (lr / c1) m / (sqrt(v / c2) + eps), with sqrt(v / c2) as a product. Neither eps nor lr takes sqrt(c2), about 1/30
  // at first: a small eps would become 0, and a small moment times the smaller lr as well.
  FASTOPT_HD static Adam at_step(const AdamOptions& o, StepScalar& scalars) {
    const double step = ++scalars.step;
    // 1 - beta^t without cancellation; log 0 is -inf, and beta = 0 gives 1.
    const double bias_correction1 = -std::expm1(step * std::log(o.beta1));
    const double bias_correction2_sqrt = std::sqrt(-std::expm1(step * std::log(o.beta2)));
    return {T(o.lr / bias_correction1),
            T(1 / bias_correction2_sqrt),
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
    T variance = exp_avg_sq;
    if constexpr (kAmsgrad) {
      T& max_exp_avg_sq = state[2];
      max_exp_avg_sq = larger_or_nan(exp_avg_sq, max_exp_avg_sq);
      variance = max_exp_avg_sq;
    }
    param -= step_size * exp_avg / (std::sqrt(variance) * correction + eps);
  }
};

struct AdamOptimizer {
  static constexpr const char* kOperator = "adam_";
  static constexpr const char* kStates = "exp_avg, exp_avg_sq, max_exp_avg_sq";
  static bool uses_state(const AdamOptions& o, int state) { return state < 2 || o.amsgrad; }

  static constexpr int kVariants = 2;
  template <class T, int kVariant>
  using Rule = Adam<T, kVariant == 1>;
  static int variant(const AdamOptions& o) { return o.amsgrad; }
};

}  // namespace fastopt
