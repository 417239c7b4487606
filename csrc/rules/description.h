// How a rule declares its numbers: each name is written once, as a field, and is known as text too.
#pragma once

#include <type_traits>  // is_same_v

#include "common.h"
#include "names.h"

// Options whose name ends in 1 or 2 are a pair in the param group: beta1 is betas[0].

// The numbers that a parameter's state keeps, each in a tensor of float32 or float64.
#define FASTOPT_SCALARS(...)                                                     \
  FASTOPT_NUMBERS(__VA_ARGS__)                                                   \
  bool are_float; /* a number is rounded to float32 when stored */               \
  FASTOPT_HD double stored(double number) const {                                \
    return are_float ? static_cast<double>(static_cast<float>(number)) : number; \
  }

// Options that are true or false, after the numbers. `is_first_step` is not in a param group: it is true where the step
// makes the parameter's states.
#define FASTOPT_FLAGS(...) \
  bool __VA_ARGS__;        \
  static constexpr const char* kFlags = #__VA_ARGS__;

// The fields of a rule: its constants, all of the type that it computes in. A flag of one byte among them would keep
// the loops from becoming vectors.
#define FASTOPT_CONSTANTS(Type, ...) \
  using Real = Type;                 \
  Type __VA_ARGS__;                  \
  static constexpr int kConstants = ::fastopt::count_names(#__VA_ARGS__);

// The same of a rule that derives from a part with constants of its own.
#define FASTOPT_CONSTANTS_AFTER(Part, Type, ...) \
  using Real = Type;                             \
  Type __VA_ARGS__;                              \
  static constexpr int kConstants = Part::kConstants + ::fastopt::count_names(#__VA_ARGS__);

namespace fastopt {

// The scalars of an optimizer whose parameters keep a count of steps only.
struct StepScalar {
  FASTOPT_SCALARS(step)
};

// Of one whose parameters keep none.
struct NoScalars {
  static constexpr const char* kNumbers = "";
  static constexpr int kNumberCount = 0;
  bool are_float;
};

// An optimizer of one rule, which uses all states.
template <template <class> class TheRule>
struct OneRule {
  static constexpr int kVariants = 1;
  template <class T, int kVariant>
  using Rule = TheRule<T>;
  template <class Options>
  static int variant(const Options&) {
    return 0;
  }
  template <class Options>
  static bool uses_state(const Options&, int /*state*/) {
    return true;
  }
};

// --- What a rule may have besides; one that lacks it pays nothing
// -----------------------------------------------------
//
// Sums over its tensor before the update, such as the norms of LAMB:
//   static constexpr int kSums = 2;
//   void terms(T param, T grad, const T* state, T* terms) const;  one element's, before the update
//   void take_sums(const double* sums);                           changes the constants for this tensor
// A tail, which is one more array that the update reads and writes, of a type of its own: a moving average of the
// parameter, a copy of it in 16 bits, a gradient that becomes zero. Its memory comes after the scalars:
//   using Tail = BFloat16;
//   void tail(T param, T& tail) const;                            after the update

template <class Rule>
constexpr int kSumsOf = 0;
template <class Rule>
  requires(Rule::kSums > 0)
constexpr int kSumsOf<Rule> = Rule::kSums;

struct NoTail {};
template <class Rule>
struct TailOf {
  using Type = NoTail;
};
template <class Rule>
  requires requires { typename Rule::Tail; }
struct TailOf<Rule> {
  using Type = typename Rule::Tail;
};
template <class Rule>
using tail_t = typename TailOf<Rule>::Type;
template <class Rule>
constexpr bool kHasTail = !std::is_same_v<tail_t<Rule>, NoTail>;

// A parameter after decoupled decay. One rounding, where a factor 1 - decay would bring its own each step; an infinite
// parameter stays infinite.
template <class T>
FASTOPT_HD T decayed(T param, T decay) {
  const bool is_finite = param - param == 0;
  return is_finite ? param - decay * param : param;
}

}  // namespace fastopt
