// Numbers the rules of the optimizers in the list: each rule is one variant of one optimizer.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>  // integer_sequence

#include "rules/list.h"

namespace fastopt {

constexpr int kMaxVariants = 4;  // of an optimizer
constexpr int kRuleIds = std::tuple_size_v<Optimizers> * kMaxVariants;

template <int kOptimizer>
using OptimizerAt = std::tuple_element_t<kOptimizer, Optimizers>;

// Some ids have no rule: an optimizer may have fewer variants.
constexpr int32_t rule_id(int optimizer, int variant) { return optimizer * kMaxVariants + variant; }

// A table by rule id: make.operator()<Rule>() of each rule, and a value-initialised entry where an id has none.
template <class T, class Make>
auto table_of_rules(Make make) {
  using Entry = decltype(make.template operator()<typename OptimizerAt<0>::template Rule<T, 0>>());
  std::array<Entry, kRuleIds> table{};
  const auto fill = [&]<int kOptimizer, int... kVariants>(std::integer_sequence<int, kVariants...>) {
    using Optimizer = OptimizerAt<kOptimizer>;
    static_assert(Optimizer::kVariants <= kMaxVariants, "an optimizer's variants must fit");
    ((table[rule_id(kOptimizer, kVariants)] =
          make.template operator()<typename Optimizer::template Rule<T, kVariants>>()),
     ...);
  };
  [&]<int... kOptimizers>(std::integer_sequence<int, kOptimizers...>) {
    (fill.template operator()<kOptimizers>(std::make_integer_sequence<int, OptimizerAt<kOptimizers>::kVariants>{}),
     ...);
  }(std::make_integer_sequence<int, std::tuple_size_v<Optimizers>>{});
  return table;
}

}  // namespace fastopt
