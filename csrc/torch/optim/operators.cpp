// The optimizers as operators over lists of tensors: for torch.compile, TorchScript and callers in C++.
#include "torch/operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <vector>

#include "torch/optim/update_batch.h"
#include "update/optimizer.h"

namespace fastopt {
namespace {

// One call of an optimizer's operator: its arguments by the names that the schema gives them.
class UpdateCall {
 public:
  UpdateCall(const Optimizer& optimizer, const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments)
      : optimizer_(optimizer), schema_(schema), arguments_(arguments) {
    for (int i = 0; i < static_cast<int>(optimizer.numbers.size()); ++i) {
      optimizer.number(options_, i) = argument(optimizer.numbers[i].name).toScalar().toDouble();
    }
    for (int i = 0; i < static_cast<int>(optimizer.flags.size()); ++i) {
      optimizer.flag(options_, i) = argument(optimizer.flags[i]).toBool();
    }
    params_ = list("params");
    grads_ = list_of_each_param("grads");
    for (int s = 0; s < static_cast<int>(optimizer.states.size()); ++s) {
      if (optimizer.uses_state(options_, s)) states_.push_back(list_of_key(optimizer.states[s]));
    }
    for (const std::string& name : optimizer.scalars) scalars_.push_back(list_of_key(name));
  }

  void run() {
    UpdateBatch batch;
    for (size_t i = 0; i < params_.size(); ++i) add(batch, i);
    TORCH_CHECK(!batch.has_overlap(), name(), ": tensors share memory");
    for (size_t i = 0; i < params_.size(); ++i) {
      const bool is_on_device = batch.has_scalars_on_device(i);
      ScalarValues values;
      for (size_t k = 0; !is_on_device && k < scalars_.size(); ++k) {
        values.numbers[k] = scalars_[k][i].item().toDouble();
        values.are_float &= scalars_[k][i].scalar_type() == at::kFloat;
      }
      const auto rule = is_on_device ? optimizer_.unfinished_rule(options_, values, {})
                                     : optimizer_.rule(batch.dtype(i), options_, values);
      TORCH_CHECK(rule, "value cannot be converted to type float without overflow");  // as torch says it
      batch.set_rule(i, batch.add_rule(*rule));
    }
    batch.run();
  }

 private:
  std::string name() const { return "fastopt::" + optimizer_.op; }

  const c10::IValue& argument(const std::string& name) const {
    const auto index = schema_.argumentIndexWithName(name);
    TORCH_INTERNAL_ASSERT(index, schema_, " has no argument ", name);
    return arguments_[*index];
  }
  std::vector<at::Tensor> list(const std::string& name) const { return argument(name).toTensorVector(); }
  std::vector<at::Tensor> list_of_each_param(const std::string& argument_name) const {
    auto tensors = list(argument_name);
    TORCH_CHECK_VALUE(tensors.size() == params_.size(), name(), ": ", argument_name,
                      " must have one tensor for each of the ", params_.size(), " params, got ", tensors.size());
    return tensors;
  }
  // The argument of what is under a key of the parameters' states: "exp_avgs" of exp_avg, "state_steps" of step.
  std::string argument_of_key(const std::string& key) const {
    const std::string plural = key + "s";
    return schema_.argumentIndexWithName(plural) ? plural : "state_" + plural;
  }
  std::vector<at::Tensor> list_of_key(const std::string& key) const { return list_of_each_param(argument_of_key(key)); }

  void add(UpdateBatch& batch, size_t i) const {
    const at::Tensor& param = params_[i];
    TORCH_CHECK(!(at::GradMode::is_enabled() && param.requires_grad()), name(),
                ": a param that requires grad is updated in place; call it under torch.no_grad()");
    ParamTensors tensors{&param, &grads_[i], {}, static_cast<int>(states_.size()), static_cast<int>(scalars_.size()),
                         false};
    for (size_t s = 0; s < states_.size(); ++s) tensors.kept[s] = &states_[s][i];
    for (size_t k = 0; k < scalars_.size(); ++k) {
      const at::Tensor& scalar = scalars_[k][i];
      const bool is_number =
          scalar.numel() == 1 && (scalar.scalar_type() == at::kFloat || scalar.scalar_type() == at::kDouble);
      const bool is_on_device = backend_of(param) == Backend::kCuda && scalar.device() == param.device();
      TORCH_CHECK(is_number && (is_plain_cpu(scalar) || is_on_device), name(), ": each of ",
                  argument_of_key(optimizer_.scalars[k]), " must be one float32 or float64 number, on the CPU or on ",
                  "its parameter's device (index ", i, ")");
      TORCH_CHECK(k == 0 || is_on_device == tensors.has_scalars_on_device, name(),
                  ": the scalars of a state are on different devices (index ", i, ")");
      tensors.has_scalars_on_device = is_on_device;
      tensors.kept[states_.size() + k] = &scalar;
    }
    TORCH_CHECK(batch.add(tensors), name(), ": ", batch.why_not(), " (index ", i, ")");
  }

  const Optimizer& optimizer_;
  const c10::FunctionSchema& schema_;
  const at::ArrayRef<c10::IValue> arguments_;
  OptionValues options_{};
  std::vector<at::Tensor> params_, grads_;
  std::vector<std::vector<at::Tensor>> states_, scalars_;
};

// The kernel of every optimizer's operator.
void update(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string_view qualified = schema.name();  // "fastopt::adam_"
  const Optimizer& optimizer = *find_optimizer(qualified.substr(qualified.rfind(':') + 1));
  const size_t n = schema.arguments().size();
  UpdateCall(optimizer, schema, torch::jit::last(*stack, n)).run();
  torch::jit::drop(*stack, n);
}

TORCH_LIBRARY_IMPL(fastopt, CPU, library) { implement_updates(library); }

}  // namespace

void implement_updates(torch::Library& library) {
  for (const Optimizer& optimizer : all_optimizers()) {
    library.impl(optimizer.op.c_str(), torch::CppFunction::makeFromBoxedFunction<&update>());
  }
}

}  // namespace fastopt
