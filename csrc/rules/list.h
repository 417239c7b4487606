// The list of optimizers.
#pragma once

#include <tuple>

#include "rules/adadelta.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/lion.h"
#include "rules/nadam.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace fastopt {

using Optimizers = std::tuple<SgdOptimizer, RmsPropOptimizer, AdamOptimizer, AdagradOptimizer, AdadeltaOptimizer,
                              NAdamOptimizer, LionOptimizer>;

}  // namespace fastopt
