// The optimizers that kernels know: hyper-parameters as torch.optim names them, states in the order of their rule.
#pragma once

#include <iterator>  // size
#include <optional>

#include "rules/rules.h"

namespace fastopt {

// A family's read() takes its hyper-parameters from a param group by name. It returns false where a value is of a kind
// that only torch's own step understands.

// The count of a step, and what only a GPU knows of it.
struct StepCount {
  double count;
  bool is_on_device;  // the count, or lr
  const void* lr;     // on the device, or null
  DType lr_dtype;
  StepCount(double count) : count(count), is_on_device(false), lr(nullptr), lr_dtype(DType::kFloat32) {}
};

// Nothing where a constant is too large for the type that the tensors are computed in: torch raises there.
template <class Rule32, class Rule64, class Options>
std::optional<PackedRule> make_rule(DType dtype, const Options& options, const StepCount& step) {
  if (step.is_on_device) return PackedRule::unfinished<Rule32>(options, step.count, step.lr, step.lr_dtype);
  if (dtype == DType::kFloat64) return PackedRule::of(Rule64::at_step(options, step.count));
  const Rule32 rule = Rule32::at_step(options, step.count);
  return is_in_range(rule, options) ? std::optional(PackedRule::of(rule)) : std::nullopt;
}

struct SgdFamily {
  using Options = SgdOptions;
  static constexpr const char* kName = "sgd";
  static constexpr bool kHasStep = false;
  // The momentum buffer is made by the first step, from its gradient.
  static constexpr bool kMakesStates = true;
  static constexpr const char* kStates[] = {"momentum_buffer"};

  template <class Source>
  static bool read(Source& source, Options& o) {
    return source.lr(o.lr) && source.number("momentum", o.momentum) && source.number("dampening", o.dampening) &&
           source.number("weight_decay", o.weight_decay) && source.flag("nesterov", o.nesterov) &&
           source.flag("maximize", o.maximize);
  }
  static bool uses_state(const Options& o, int /*state*/) { return o.momentum != 0; }
  static std::optional<PackedRule> rule(DType dtype, const Options& o, const StepCount& step) {
    if (o.momentum == 0) return make_rule<Sgd<float>, Sgd<double>>(dtype, o, step);
    if (o.nesterov) return make_rule<SgdNesterov<float>, SgdNesterov<double>>(dtype, o, step);
    return make_rule<SgdHeavyBall<float>, SgdHeavyBall<double>>(dtype, o, step);
  }
};

struct RmsPropFamily {
  using Options = RmsPropOptions;
  static constexpr const char* kName = "rmsprop";
  static constexpr bool kHasStep = true;
  static constexpr bool kMakesStates = false;
  static constexpr const char* kStates[] = {"square_avg", "momentum_buffer", "grad_avg"};

  template <class Source>
  static bool read(Source& source, Options& o) {
    return source.lr(o.lr) && source.number("alpha", o.alpha) && source.number("eps", o.eps) &&
           source.number("weight_decay", o.weight_decay) && source.number("momentum", o.momentum) &&
           source.flag("centered", o.centered) && source.flag("maximize", o.maximize);
  }
  static bool uses_state(const Options& o, int state) {
    return state == 0 || (state == 1 && o.momentum > 0) || (state == 2 && o.centered);
  }
  static std::optional<PackedRule> rule(DType dtype, const Options& o, const StepCount& step) {
    if (o.momentum > 0 && o.centered) {
      return make_rule<RmsPropCenteredMomentum<float>, RmsPropCenteredMomentum<double>>(dtype, o, step);
    }
    if (o.momentum > 0) return make_rule<RmsPropMomentum<float>, RmsPropMomentum<double>>(dtype, o, step);
    if (o.centered) return make_rule<RmsPropCentered<float>, RmsPropCentered<double>>(dtype, o, step);
    return make_rule<RmsPropPlain<float>, RmsPropPlain<double>>(dtype, o, step);
  }
};

struct AdamFamily {
  using Options = AdamOptions;
  static constexpr const char* kName = "adam";
  static constexpr bool kHasStep = true;
  static constexpr bool kMakesStates = false;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  template <class Source>
  static bool read(Source& source, Options& o) {
    return source.lr(o.lr) && source.pair("betas", o.beta1, o.beta2) && source.number("eps", o.eps) &&
           source.number("weight_decay", o.weight_decay) && source.flag("amsgrad", o.amsgrad) &&
           source.flag("maximize", o.maximize) && source.flag("decoupled_weight_decay", o.decoupled_weight_decay) &&
           is_decay_rate(o.beta1) && is_decay_rate(o.beta2);
  }
  // Otherwise a bias correction may be 0 or have no root.
  static bool is_decay_rate(double beta) { return 0 <= beta && beta < 1; }
  static bool uses_state(const Options& o, int state) { return state < 2 || o.amsgrad; }
  static std::optional<PackedRule> rule(DType dtype, const Options& o, const StepCount& step) {
    if (o.amsgrad) return make_rule<AdamAmsgrad<float>, AdamAmsgrad<double>>(dtype, o, step);
    return make_rule<AdamPlain<float>, AdamPlain<double>>(dtype, o, step);
  }
};

// How many states a parameter has beside its count of steps.
template <class Family>
int n_states_of(const typename Family::Options& options) {
  int n = 0;
  for (int s = 0; s < static_cast<int>(std::size(Family::kStates)); ++s) n += Family::uses_state(options, s);
  return n;
}

}  // namespace fastopt
