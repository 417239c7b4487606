// The optimizers of rules.h as values: names, options and rules that are known while the program runs.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "update/tensor_update.h"

namespace fastopt {

// The bytes of a rule's Options: its numbers, then its flags.
struct OptionValues {
  alignas(double) char bytes[kMaxRuleBytes];
};

// A learning rate in a GPU's memory.
struct DeviceLr {
  const void* memory = nullptr;  // null: lr is among the options
  DType dtype = DType::kFloat32;
};

// A number among the options, and where a param group has it.
struct NumberOption {
  std::string name;       // as in the operator's schema: "beta1"
  std::string group_key;  // "betas"
  int place;              // in the pair under that key; -1: the number itself is under it
  bool is_decay_rate;     // a beta, in [0, 1): otherwise a bias correction may be 0 or have no root
};

struct Optimizer {
  std::string op;  // its operator in torch.ops.fastopt
  std::vector<NumberOption> numbers;
  std::vector<std::string> flags;
  std::vector<std::string> states, scalars;  // the keys of a parameter's state
  int first_step_flag;                       // the place of is_first_step among the flags; -1: it has none
  bool makes_states;                         // the first step makes them; otherwise the constructor has

  bool (*uses_state)(const OptionValues& options, int state);
  // The value with which a state is filled, or a scalar begins, when it is made.
  double (*initial_value)(const OptionValues& options, std::string_view name);
  // The rule of one step, after the scalars before it; nothing where a constant is too large for float32, in which the
  // tensors are computed: torch raises there.
  std::optional<PackedRule> (*rule)(DType dtype, const OptionValues& options, const ScalarValues& scalars);
  // The same where scalars or lr are in a GPU's memory.
  PackedRule (*unfinished_rule)(const OptionValues& options, const ScalarValues& scalars, const DeviceLr& lr);

  double& number(OptionValues& options, int i) const { return reinterpret_cast<double*>(options.bytes)[i]; }
  bool& flag(OptionValues& options, int i) const {
    return reinterpret_cast<bool*>(options.bytes + numbers.size() * sizeof(double))[i];
  }
  bool is_in_domain(const OptionValues& options) const;
};

const std::vector<Optimizer>& all_optimizers();

// Null if there is none.
const Optimizer* find_optimizer(std::string_view op);

}  // namespace fastopt
