// The absolute error. Its derivative is 0 where input and target are equal, and where their difference is not a number,
// as torch's.
#pragma once

#include <cmath>  // fabs

#include "losses/pointwise.h"

namespace fastopt {

struct L1Loss : PointwiseLoss {
  static constexpr const char* kName = "l1_loss";
  static constexpr bool kSavesDerivatives = true;

  template <class T>
  FASTOPT_HD ElementLoss<T> operator()(T input, T target) const {
    const T difference = input - target;
    const T sign = T(difference > 0) - T(difference < 0);
    return {std::fabs(difference), {sign, -sign}};
  }
};

}  // namespace fastopt
