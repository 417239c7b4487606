// The CPU update of many tensors in one parallel region.
#pragma once

#include "cpu/parallel.h"
#include "update/tensor_update.h"

namespace fastopt::cpu {

// Applies rules[update.rule] to each tensor. Elements of different updates may overlap only if threads.count is 1.
void update(const TensorUpdate* updates, int64_t n_updates, const PackedRule* rules, int64_t n_rules,
            const Threads& threads);

}  // namespace fastopt::cpu
