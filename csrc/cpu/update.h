// The CPU update of many tensors in one parallel region.
#pragma once

#include "cpu/parallel.h"
#include "rules/rules.h"

namespace fastopt::cpu {

// Applies rules[item.rule] to each item. Elements of different updates may overlap only if threads.count is 1.
void update(const TensorUpdate* updates, int64_t n_updates, const PackedRule* rules, const Threads& threads);

}  // namespace fastopt::cpu
