// The list of pointwise losses.
#pragma once

#include <tuple>

#include "losses/mse.h"

namespace fastopt {

using PointwiseLosses = std::tuple<MseLoss>;

constexpr int kPointwiseLosses = std::tuple_size_v<PointwiseLosses>;

template <int kLoss>
using PointwiseLossAt = std::tuple_element_t<kLoss, PointwiseLosses>;

}  // namespace fastopt
