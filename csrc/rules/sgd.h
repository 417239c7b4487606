// SGD, plain and with momentum (Sutskever et al., 2013), with L2 weight decay as in torch.optim.SGD.
#pragma once

#include <type_traits>  // conditional_t

#include "rules/description.h"

namespace fastopt {

struct SgdOptions {
  FASTOPT_NUMBERS(lr, momentum, dampening, weight_decay)
  FASTOPT_FLAGS(nesterov, maximize, is_first_step)
};

template <class T>
struct Sgd {
  using Options = SgdOptions;
  using Scalars = NoScalars;
  static constexpr int kStates = 0;
  static constexpr bool kDivides = false;
  FASTOPT_CONSTANTS(T, lr, weight_decay, sign)

  FASTOPT_HD static Sgd at_step(const SgdOptions& o, NoScalars&) {
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
  using Options = SgdOptions;
  using Scalars = NoScalars;
  static constexpr int kStates = 1;
  static constexpr bool kDivides = false;
  FASTOPT_CONSTANTS(T, lr, weight_decay, sign, momentum, grad_scale, is_first)  // is_first: 1 or 0

  FASTOPT_HD static SgdMomentum at_step(const SgdOptions& o, NoScalars&) {
    return {T(o.lr), T(o.weight_decay), T(o.maximize ? -1 : 1), T(o.momentum), T(1 - o.dampening), T(o.is_first_step)};
  }

  FASTOPT_HD void operator()(T& param, T grad, T* state) const {
    grad *= sign;
    if (weight_decay != 0) grad += weight_decay * param;
    const T buffer = is_first != 0 ? grad : momentum * state[0] + grad_scale * grad;
    state[0] = buffer;
    param -= lr * (kNesterov ? grad + momentum * buffer : buffer);
  }
};

struct SgdOptimizer {
  static constexpr const char* kOperator = "sgd_";
  static constexpr const char* kStates = "momentum_buffer";
  static bool uses_state(const SgdOptions& o, int /*state*/) { return o.momentum != 0; }

  static constexpr int kVariants = 3;
  template <class T, int kVariant>
  using Rule = std::conditional_t<kVariant == 0, Sgd<T>, SgdMomentum<T, kVariant == 2>>;
  static int variant(const SgdOptions& o) { return o.momentum == 0 ? 0 : o.nesterov ? 2 : 1; }
};

}  // namespace fastopt
