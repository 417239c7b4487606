// Cross-entropy on the CPU: loss, and gradient if wanted, in one sweep over the logits.
#pragma once

#include "cpu/parallel.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

// True if the kernel for this layout stores and reuses a problem's `totals`.
bool uses_totals(const LogitLayout& layout, DType dtype);

// Computes the sum of the losses, the same for any number of threads; 0 where totals are used, since the loss is known.
// Returns false if a target has been changed to something that is not a class since the targets were tallied.
bool cross_entropy(const CrossEntropyProblem& problem, const Threads& threads, double* loss_sum);

}  // namespace fastopt::cpu
