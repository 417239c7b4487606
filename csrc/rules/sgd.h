// SGD, plain and with momentum (Sutskever et al., 2013), with L2 weight decay as in torch.optim.SGD.
#pragma once

#include "common.h"

namespace fastopt {

struct SgdOptions {
  static constexpr int kNumbers = 4;
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

template <class T>
struct Sgd {
  using Real = T;
  using Options = SgdOptions;
  static constexpr int kStates = 0;
  static constexpr bool kDivides = false;
  static constexpr int kConstants = 3;
  T lr, weight_decay, sign;

  FASTOPT_HD static Sgd at_step(const SgdOptions& o, double /*step*/) {
    return {T(o.lr), T(o.weight_decay), T(o.maximize ? -1 : 1)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* /*state*/) const {
    grad *= sign;
    // Not `grad + 0 * param`: an infinite parameter without decay must not become NaN.
    if (weight_decay != 0) grad += weight_decay * param;
    param -= lr * grad;
  }
};

// state[0]: momentum_buffer. The first step stores the gradient undamped.
template <class T, bool kNesterov>
struct SgdMomentum {
  using Real = T;
  using Options = SgdOptions;
  static constexpr int kStates = 1;
  static constexpr bool kDivides = false;
  static constexpr int kConstants = 6;
  T lr, weight_decay, sign, momentum, grad_scale, is_first;  // is_first: 1 or 0

  FASTOPT_HD static SgdMomentum at_step(const SgdOptions& o, double step) {
    const bool is_first = step == 1;
    return {T(o.lr),    T(o.weight_decay), T(o.maximize ? -1 : 1), T(o.momentum), T(is_first ? 1 : 1 - o.dampening),
            T(is_first)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    grad *= sign;
    if (weight_decay != 0) grad += weight_decay * param;
    const T buffer = is_first != 0 ? grad : momentum * state[0] + grad_scale * grad;
    state[0] = buffer;
    param -= lr * (kNesterov ? grad + momentum * buffer : buffer);
  }
};

}  // namespace fastopt
