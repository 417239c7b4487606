// The list of rules: every update for which the CPU and CUDA loops are compiled, and what one call of a loop is given.
#pragma once

#include <cmath>    // isfinite
#include <cstddef>  // offsetof
#include <cstdint>
#include <cstring>  // memcpy

#include "rules/adam.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

// Rules in one template argument, as the list below needs them.
namespace fastopt {
template <class T>
using SgdHeavyBall = SgdMomentum<T, false>;
template <class T>
using SgdNesterov = SgdMomentum<T, true>;
template <class T>
using RmsPropPlain = RmsProp<T, false, false>;
template <class T>
using RmsPropMomentum = RmsProp<T, true, false>;
template <class T>
using RmsPropCentered = RmsProp<T, false, true>;
template <class T>
using RmsPropCenteredMomentum = RmsProp<T, true, true>;
template <class T>
using AdamPlain = Adam<T, false>;
template <class T>
using AdamAmsgrad = Adam<T, true>;

// Options begin with kNumbers numbers.
static_assert(offsetof(SgdOptions, nesterov) == SgdOptions::kNumbers * sizeof(double));
static_assert(offsetof(RmsPropOptions, centered) == RmsPropOptions::kNumbers * sizeof(double));
static_assert(offsetof(AdamOptions, amsgrad) == AdamOptions::kNumbers * sizeof(double));
}  // namespace fastopt

#define FASTOPT_RULES(X)     \
  X(Sgd)                     \
  X(SgdHeavyBall)            \
  X(SgdNesterov)             \
  X(RmsPropPlain)            \
  X(RmsPropMomentum)         \
  X(RmsPropCentered)         \
  X(RmsPropCenteredMomentum) \
  X(AdamPlain)               \
  X(AdamAmsgrad)

namespace fastopt {

#define FASTOPT_RULE_ID(Rule) k##Rule,
enum class RuleId : int32_t { FASTOPT_RULES(FASTOPT_RULE_ID) kCount };
#undef FASTOPT_RULE_ID

#define FASTOPT_RULE_ID_OF(Rule)                                           \
  constexpr RuleId rule_id(const Rule<float>&) { return RuleId::k##Rule; } \
  constexpr RuleId rule_id(const Rule<double>&) { return RuleId::k##Rule; }
FASTOPT_RULES(FASTOPT_RULE_ID_OF)
#undef FASTOPT_RULE_ID_OF

constexpr int kMaxStates = 3;
constexpr int kMaxRuleBytes = 96;

// A rule of one step, as bytes: float for all stored types but double. Finished; or, where the step's count or lr lies
// on a GPU, the rule's Options, for the kernel to finish.
struct PackedRule {
  RuleId id;
  int32_t n_states;
  alignas(16) char bytes[kMaxRuleBytes];
  bool is_finished;
  DType lr_dtype;
  const void* lr;  // on the GPU, or null: the lr in Options
  double step;     // this step's count, for tensors whose count does not lie on the GPU

  template <class Rule>
  static PackedRule of(const Rule& rule) {
    // A flag among them, of one byte, would keep the loops from becoming vectors.
    static_assert(sizeof(Rule) == Rule::kConstants * sizeof(typename Rule::Real), "a rule is its constants");
    static_assert(sizeof(Rule) <= kMaxRuleBytes, "a rule's constants must fit");
    static_assert(Rule::kStates <= kMaxStates, "a rule's states must fit");
    PackedRule value{rule_id(rule), Rule::kStates, {}, true, DType::kFloat32, nullptr, 0};
    memcpy(value.bytes, &rule, sizeof(Rule));
    return value;
  }

  template <class Rule>
  static PackedRule unfinished(const typename Rule::Options& options, double step, const void* lr, DType lr_dtype) {
    static_assert(sizeof(options) <= kMaxRuleBytes, "a rule's options must fit");
    PackedRule value{rule_id(Rule{}), Rule::kStates, {}, false, lr_dtype, lr, step};
    memcpy(value.bytes, &options, sizeof(options));
    return value;
  }
};

// False if a constant of a float32 rule is infinite or NaN though all options are finite: float32 cannot hold it.
template <class Rule>
bool is_in_range(const Rule& rule, const typename Rule::Options& options) {
  double numbers[Rule::Options::kNumbers];
  typename Rule::Real constants[Rule::kConstants];
  memcpy(numbers, &options, sizeof(numbers));
  memcpy(constants, &rule, sizeof(constants));
  bool are_finite = true, are_constants_finite = true;
  for (const double number : numbers) are_finite &= std::isfinite(number);
  for (const auto constant : constants) are_constants_finite &= std::isfinite(constant);
  return are_constants_finite || !are_finite;
}

// One tensor's update: dense memory, the same order of elements in parameter, gradient and states.
struct TensorUpdate {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  void* step;  // its count of steps, where the kernel counts it up, or null
  int64_t numel;
  int32_t rule;       // index into the step's PackedRules
  DType dtype;        // of parameter and gradient
  DType state_dtype;  // of all states; on the CPU the parameter's
  bool is_step_double;
};

}  // namespace fastopt
