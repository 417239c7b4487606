#include "update/optimizer.h"

#include <algorithm>  // find, find_if
#include <cmath>      // isfinite

#include "rules/rules.h"

namespace fastopt {
namespace {

NumberOption number_option(const std::string& name) {
  const bool is_of_pair = name.back() == '1' || name.back() == '2';
  if (!is_of_pair) return {name, name, -1, false};
  const std::string stem = name.substr(0, name.size() - 1);
  return {name, stem + "s", name.back() - '1', stem == "beta"};
}

template <class Options>
Options unpacked(const OptionValues& values) {
  Options options;
  memcpy(&options, values.bytes, sizeof(options));
  return options;
}

// False if a constant of a float32 rule is infinite or NaN though all numbers are finite: float32 cannot hold it.
template <class Rule>
bool is_in_range(const Rule& rule, const typename Rule::Options& options) {
  double numbers[Rule::Options::kNumberCount];
  typename Rule::Real constants[Rule::kConstants];
  memcpy(numbers, &options, sizeof(numbers));
  memcpy(constants, &rule, sizeof(constants));
  bool are_finite = true, are_constants_finite = true;
  for (const double number : numbers) are_finite &= std::isfinite(number);
  for (const auto constant : constants) are_constants_finite &= std::isfinite(constant);
  return are_constants_finite || !are_finite;
}

// A rule's scalars from their values, and back.
template <class Scalars>
Scalars unpacked(const ScalarValues& values) {
  Scalars scalars{};
  if constexpr (Scalars::kNumberCount > 0) memcpy(&scalars, values.numbers, Scalars::kNumberCount * sizeof(double));
  scalars.are_float = values.are_float;
  return scalars;
}
template <class Scalars>
void write_numbers(const Scalars& scalars, double* numbers) {
  if constexpr (Scalars::kNumberCount > 0) memcpy(numbers, &scalars, Scalars::kNumberCount * sizeof(double));
}

template <class Rule>
std::optional<PackedRule> finished_rule(int32_t id, const typename Rule::Options& options, const ScalarValues& before) {
  auto scalars = unpacked<typename Rule::Scalars>(before);
  const Rule rule = Rule::at_step(options, scalars);
  if (sizeof(typename Rule::Real) < sizeof(double) && !is_in_range(rule, options)) return std::nullopt;
  PackedRule packed = PackedRule::finished(id, rule);
  write_numbers(scalars, packed.scalars_after);
  return packed;
}

template <int kOptimizer>
struct Entry {
  using Type = OptimizerAt<kOptimizer>;
  using Options = typename Type::template Rule<float, 0>::Options;
  using Scalars = typename Type::template Rule<float, 0>::Scalars;

  // Calls f.operator()<kVariant>() for the variant that the options choose.
  template <class F>
  static auto with_variant(const Options& options, F&& f) {
    const int variant = Type::variant(options);
    if constexpr (Type::kVariants > 3) {
      if (variant == 3) return f.template operator()<3>();
    }
    if constexpr (Type::kVariants > 2) {
      if (variant == 2) return f.template operator()<2>();
    }
    if constexpr (Type::kVariants > 1) {
      if (variant == 1) return f.template operator()<1>();
    }
    return f.template operator()<0>();
  }

  static std::optional<PackedRule> rule(DType dtype, const OptionValues& values, const ScalarValues& scalars) {
    const Options options = unpacked<Options>(values);
    return with_variant(options, [&]<int kVariant>() {
      constexpr int32_t id = rule_id(kOptimizer, kVariant);
      return dtype == DType::kFloat64
                 ? finished_rule<typename Type::template Rule<double, kVariant>>(id, options, scalars)
                 : finished_rule<typename Type::template Rule<float, kVariant>>(id, options, scalars);
    });
  }

  static PackedRule unfinished_rule(const OptionValues& values, const ScalarValues& scalars, const DeviceLr& lr) {
    const Options options = unpacked<Options>(values);
    return with_variant(options, [&]<int kVariant>() {
      using Rule = typename Type::template Rule<float, kVariant>;
      PackedRule packed = PackedRule::unfinished<Rule>(rule_id(kOptimizer, kVariant), options, lr.memory, lr.dtype);
      auto after = unpacked<typename Rule::Scalars>(scalars);
      write_numbers(after, packed.scalars_before);
      Rule::at_step(options, after);
      write_numbers(after, packed.scalars_after);
      return packed;
    });
  }

  static bool uses_state(const OptionValues& values, int state) {
    return Type::uses_state(unpacked<Options>(values), state);
  }

  static double initial_value(const OptionValues& values, std::string_view name) {
    if constexpr (requires(const Options& options) { Type::initial_value(options, name); }) {
      return Type::initial_value(unpacked<Options>(values), name);
    } else {
      return 0;
    }
  }

  static Optimizer describe() {
    Optimizer optimizer{};
    optimizer.op = Type::kOperator;
    for (const std::string& name : split_names(Options::kNumbers)) optimizer.numbers.push_back(number_option(name));
    optimizer.flags = split_names(Options::kFlags);
    optimizer.states = split_names(Type::kStates);
    optimizer.scalars = split_names(Scalars::kNumbers);
    const auto first_step = std::find(optimizer.flags.begin(), optimizer.flags.end(), "is_first_step");
    optimizer.first_step_flag =
        first_step == optimizer.flags.end() ? -1 : static_cast<int>(first_step - optimizer.flags.begin());
    if constexpr (requires { Type::kMakesStates; }) {
      optimizer.makes_states = Type::kMakesStates;
    } else {
      optimizer.makes_states = true;
    }
    optimizer.uses_state = &uses_state;
    optimizer.initial_value = &initial_value;
    optimizer.rule = &rule;
    optimizer.unfinished_rule = &unfinished_rule;
    constexpr size_t kNumberBytes = Options::kNumberCount * sizeof(double);
    static_assert(sizeof(Options) - kNumberBytes - count_names(Options::kFlags) < sizeof(double),
                  "options are their numbers and flags");
    return optimizer;
  }
};

}  // namespace

bool Optimizer::is_in_domain(const OptionValues& options) const {
  const auto* values = reinterpret_cast<const double*>(options.bytes);
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (numbers[i].is_decay_rate && !(0 <= values[i] && values[i] < 1)) return false;
  }
  return true;
}

const std::vector<Optimizer>& all_optimizers() {
  static const auto* optimizers = []<int... kOptimizers>(std::integer_sequence<int, kOptimizers...>) {
    return new std::vector<Optimizer>{Entry<kOptimizers>::describe()...};
  }(std::make_integer_sequence<int, std::tuple_size_v<Optimizers>>{});
  return *optimizers;
}

const Optimizer* find_optimizer(std::string_view op) {
  for (const Optimizer& optimizer : all_optimizers()) {
    if (optimizer.op == op) return &optimizer;
  }
  return nullptr;
}

}  // namespace fastopt
