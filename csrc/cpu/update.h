// The CPU update of many tensors in one parallel region.
#pragma once

#include "cpu/parallel.h"
#include "rules/rules.h"

namespace fastopt::cpu {

// Applies rules[slab.rule] to each slab. Elements of different slabs may overlap only if threads.count is 1.
void update(const Slab* slabs, int64_t n_slabs, const RuleValue* rules, const Threads& threads);

}  // namespace fastopt::cpu
