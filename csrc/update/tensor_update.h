// What the update loops of both devices are given: a rule of one step, and one tensor's memory.
#pragma once

#include <cstdint>
#include <cstring>  // memcpy

#include "rules/description.h"

namespace fastopt {

constexpr int kMaxStates = 3;   // arrays like the parameter
constexpr int kMaxScalars = 2;  // numbers that a parameter's state keeps: its count of steps and others
constexpr int kMaxKept = 4;     // of both, and a rule's tail
constexpr int kMaxSums = 2;     // numbers that a rule needs to know of a tensor before its update
constexpr int kMaxRuleBytes = 96;

// The numbers that a parameter's state keeps, in memory of float32 or of float64.
struct ScalarValues {
  double numbers[kMaxScalars] = {};
  bool are_float = true;
  friend bool operator==(const ScalarValues&, const ScalarValues&) = default;
};

// A rule of one step, as bytes: float for all stored types but double. Finished; or, where scalars or lr lie on a GPU,
// the rule's Options, for the kernel to finish.
struct PackedRule {
  int32_t id;
  int8_t n_states, n_scalars, n_sums, tail_bytes;  // tail_bytes: of one element, 0 without a tail
  bool is_finished;
  DType lr_dtype;
  alignas(16) char bytes[kMaxRuleBytes];
  const void* lr;  // on the GPU, or null: the lr in Options
  // Of tensors whose scalars are in CPU memory: before the step, for the kernel that finishes the rule, and after it.
  double scalars_before[kMaxScalars], scalars_after[kMaxScalars];

  template <class Rule>
  static PackedRule finished(int32_t id, const Rule& rule) {
    static_assert(sizeof(Rule) == Rule::kConstants * sizeof(typename Rule::Real), "a rule is its constants");
    static_assert(sizeof(Rule) <= kMaxRuleBytes, "a rule's constants must fit");
    PackedRule packed = empty<Rule>(id);
    memcpy(packed.bytes, &rule, sizeof(Rule));
    packed.is_finished = true;
    return packed;
  }

  template <class Rule>
  static PackedRule unfinished(int32_t id, const typename Rule::Options& options, const void* lr, DType lr_dtype) {
    static_assert(sizeof(options) <= kMaxRuleBytes, "a rule's options must fit");
    PackedRule packed = empty<Rule>(id);
    memcpy(packed.bytes, &options, sizeof(options));
    packed.lr = lr;
    packed.lr_dtype = lr_dtype;
    return packed;
  }

 private:
  template <class Rule>
  static PackedRule empty(int32_t id) {
    constexpr int kScalars = Rule::Scalars::kNumberCount;
    constexpr int kSums = kSumsOf<Rule>;
    constexpr bool kHasATail = kHasTail<Rule>;
    static_assert(Rule::kStates <= kMaxStates && kScalars <= kMaxScalars && kSums <= kMaxSums &&
                      Rule::kStates + kScalars + kHasATail <= kMaxKept,
                  "a rule's states, scalars and sums must fit");
    PackedRule packed{};
    packed.id = id;
    packed.n_states = Rule::kStates;
    packed.n_scalars = kScalars;
    packed.n_sums = kSums;
    packed.tail_bytes = kHasATail ? sizeof(tail_t<Rule>) : 0;
    return packed;
  }
};

// One tensor's update: dense memory, the same order of elements in parameter, gradient and states.
struct TensorUpdate {
  void* param;
  const void* grad;
  void* kept[kMaxKept];  // the states, then the scalars, then the rule's tail
  int64_t numel;
  int32_t rule;                // index into the step's PackedRules
  DType dtype;                 // of parameter and gradient
  DType state_dtype;           // of all states; on the CPU the parameter's
  bool has_scalars_on_device;  // the kernel advances them there
  uint8_t double_scalars;      // a bit for each scalar: it is a double, otherwise a float
};

FASTOPT_HD double read_scalar(const void* memory, bool is_double) {
  return is_double ? *static_cast<const double*>(memory) : static_cast<double>(*static_cast<const float*>(memory));
}
FASTOPT_HD void write_scalar(void* memory, bool is_double, double value) {
  if (is_double) {
    *static_cast<double*>(memory) = value;
  } else {
    *static_cast<float*>(memory) = static_cast<float>(value);
  }
}

}  // namespace fastopt
