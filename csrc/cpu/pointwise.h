// Pointwise losses on the CPU.
#pragma once

#include "cpu/parallel.h"
#include "losses/pointwise.h"

namespace fastopt::cpu {

// Computes what the problem wants, in one sweep. Returns the sum of the losses if that is wanted, otherwise 0. It does
// not depend on the number of threads.
double pointwise(const PointwiseProblem& problem, const Threads& threads);

}  // namespace fastopt::cpu
