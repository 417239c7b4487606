// Lion (Chen et al., 2023): steps by the sign of a moving average, with decoupled weight decay.
#pragma once

#include "rules/description.h"

namespace fastopt {

struct LionOptions {
  FASTOPT_NUMBERS(lr, beta1, beta2, weight_decay)
  FASTOPT_FLAGS(maximize)
};

// state: exp_avg.
template <class T>
struct Lion {
  using Options = LionOptions;
  using Scalars = NoScalars;
  static constexpr int kStates = 1;
  static constexpr bool kDivides = false;
  FASTOPT_CONSTANTS(T, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, sign)

  FASTOPT_HD static Lion at_step(const LionOptions& o, NoScalars&) {
    return {T(o.lr),
            T(o.beta1),
            T(1 - o.beta1),
            T(o.beta2),
            T(1 - o.beta2),
            T(o.lr * o.weight_decay),
            T(o.maximize ? -1 : 1)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    grad *= sign;
    if (decay != 0) param = decayed(param, decay);
    T& exp_avg = state[0];
    const T average = beta1 * exp_avg + one_minus_beta1 * grad;
    const T direction = average > 0 ? T(1) : average < 0 ? T(-1) : average;  // 0 and NaN stay
    param -= lr * direction;
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad;
  }
};

struct LionOptimizer : OneRule<Lion> {
  static constexpr const char* kOperator = "lion_";
  static constexpr const char* kStates = "exp_avg";
};

}  // namespace fastopt
