// In the place of csrc/rules/list.h: LAMB (You et al., 2020, algorithm 2, without bias correction), a rule that needs
// sums before its update, with a copy of the parameter in 16 bits as its tail.
#pragma once

#include <cmath>  // sqrt
#include <tuple>

#include "rules/description.h"

namespace fastopt {

struct LambOptions {
  FASTOPT_NUMBERS(lr, beta1, beta2, eps, weight_decay)
};

// state: exp_avg, exp_avg_sq.
template <class T>
struct Lamb {
  using Options = LambOptions;
  using Scalars = StepScalar;
  using Tail = BFloat16;
  static constexpr int kStates = 2, kSums = 2;
  static constexpr bool kDivides = true;
  FASTOPT_CONSTANTS(T, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, trust_ratio)

  FASTOPT_HD static Lamb at_step(const LambOptions& o, StepScalar& scalars) {
    ++scalars.step;
    return {T(o.lr), T(o.beta1), T(1 - o.beta1), T(o.beta2), T(1 - o.beta2), T(o.eps), T(o.weight_decay), T(1)};
  }

  FASTOPT_HD T direction(T param, T grad, T* state) const {
    state[0] = moving_average(state[0], grad, beta1, one_minus_beta1);
    state[1] = beta2 * state[1] + one_minus_beta2 * grad * grad;
    return state[0] / (std::sqrt(state[1]) + eps) + decay * param;
  }

  FASTOPT_HD void terms(T param, T grad, const T* state, T* terms) const {
    T updated[] = {state[0], state[1]};
    const T step = direction(param, grad, updated);
    terms[0] = param * param;
    terms[1] = step * step;
  }
  FASTOPT_HD void take_sums(const double* sums) {
    trust_ratio = T(sums[0] > 0 && sums[1] > 0 ? std::sqrt(sums[0] / sums[1]) : 1);
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    param -= lr * trust_ratio * direction(param, grad, state);
  }
  FASTOPT_HD void tail(T param, T& tail) const { tail = param; }
};

struct LambOptimizer : OneRule<Lamb> {
  static constexpr const char* kOperator = "lamb_";
  static constexpr const char* kStates = "exp_avg, exp_avg_sq";
};

using Optimizers = std::tuple<LambOptimizer>;

}  // namespace fastopt
