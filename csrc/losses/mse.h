// The squared error.
#pragma once

#include "losses/pointwise.h"

namespace fastopt {

struct MseLoss : PointwiseLoss {
  static constexpr const char* kName = "mse_loss";

  template <class T>
  FASTOPT_HD ElementLoss<T> operator()(T input, T target) const {
    const T difference = input - target;
    return {difference * difference, {2 * difference, 2 * (target - input)}};
  }
};

}  // namespace fastopt
