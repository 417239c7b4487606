// The list of pointwise losses.
#pragma once

#include <tuple>

#include "losses/l1.h"
#include "losses/mse.h"

namespace fastopt {

using PointwiseLosses = std::tuple<MseLoss, L1Loss>;

constexpr int kPointwiseLosses = std::tuple_size_v<PointwiseLosses>;

template <int kLoss>
using PointwiseLossAt = std::tuple_element_t<kLoss, PointwiseLosses>;

}  // namespace fastopt
