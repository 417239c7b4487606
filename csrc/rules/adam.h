// Adam (Kingma & Ba, 2015, algorithm 1), AMSGrad (Reddi et al., 2018), and AdamW's decoupled weight decay
// (Loshchilov & Hutter, 2019), with epsilon outside the root as in torch.optim.Adam.
#pragma once

#include "rules/moments.h"

namespace fastopt {

struct AdamOptions {
  FASTOPT_NUMBERS(lr, beta1, beta2, eps, weight_decay)
  FASTOPT_FLAGS(amsgrad, maximize, decoupled_weight_decay)
};

// state: exp_avg, exp_avg_sq[, max_exp_avg_sq].
template <class T, bool kAmsgrad>
struct Adam : Moments<T> {
  using Options = AdamOptions;
  using Scalars = StepScalar;
  static constexpr int kStates = 2 + kAmsgrad;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS_AFTER(Moments<T>, T, step_size)

  // The bias corrections c1 = 1 - beta1^t and c2 = 1 - beta2^t leave the loop over elements:
  // (lr / c1) m / (sqrt(v / c2) + eps). lr does not take sqrt(c2): a small moment times the smaller lr would become 0.
  FASTOPT_HD static Adam at_step(const AdamOptions& o, StepScalar& scalars) {
    const double step = ++scalars.step;
    return {Moments<T>::at_step(o, step), T(o.lr / bias_correction(o.beta1, step))};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    this->average(param, grad, state);
    T variance = state[1];
    if constexpr (kAmsgrad) {
      T& max_exp_avg_sq = state[2];
      max_exp_avg_sq = larger_or_nan(variance, max_exp_avg_sq);
      variance = max_exp_avg_sq;
    }
    param -= step_size * state[0] / this->corrected_root(variance);
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
