// The optimizers as operators over lists of tensors: for torch.compile, TorchScript and callers in C++.
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "torch/families.h"
#include "torch/operators.h"
#include "torch/update_batch.h"

namespace fastopt {
namespace {

template <class Family>
void update(at::TensorList params, at::TensorList grads, std::initializer_list<at::TensorList> states,
            at::TensorList steps, const typename Family::Options& options, bool is_first_step) {
  const auto check_length = [&](at::TensorList list, const char* what) {
    TORCH_CHECK_VALUE(list.size() == params.size(), "fastopt::", Family::kName, "_: ", what,
                      " must have one tensor for ", "each of the ", params.size(), " params, got ", list.size());
  };
  check_length(grads, "grads");
  if (Family::kHasStep) check_length(steps, "state_steps");
  int s = 0;
  for (const at::TensorList& list : states) {
    if (Family::uses_state(options, s)) check_length(list, Family::kStates[s]);
    ++s;
  }

  UpdateBatch batch;
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && params[i].requires_grad()), "fastopt::", Family::kName,
                "_: a param that requires grad is updated in place; call it under torch.no_grad()");
    ParamTensors tensors{&params[i], &grads[i], {}, 0};
    s = 0;
    for (const at::TensorList& list : states) {
      if (Family::uses_state(options, s++)) tensors.states[tensors.n_states++] = &list[i];
    }
    TORCH_CHECK(batch.add(tensors), "fastopt::", Family::kName, "_: ", batch.why_not(), " (index ", i, ")");
    if (Family::kHasStep) {
      const bool is_number = steps[i].numel() == 1 && steps[i].is_floating_point();
      const bool is_on_device = batch.is_cuda(i) && steps[i].device() == params[i].device() &&
                                (steps[i].scalar_type() == at::kFloat || steps[i].scalar_type() == at::kDouble);
      TORCH_CHECK(is_number && (is_plain_cpu(steps[i]) || is_on_device), "fastopt::", Family::kName,
                  "_: each of state_steps must be one floating-point number, on the CPU or on its parameter's device ",
                  "(index ", i, ")");
      if (is_on_device) batch.count_on_device(i, steps[i]);
    }
  }
  TORCH_CHECK(!batch.has_overlap(), "fastopt::", Family::kName, "_: tensors share memory");
  for (size_t i = 0; i < params.size(); ++i) {
    StepCount step(is_first_step ? 1 : 2);
    if (Family::kHasStep && batch.counts_on_device(i)) {
      step.is_on_device = true;
    } else if (Family::kHasStep) {
      step.count = steps[i].add_(1).item().toDouble();
    }
    const auto rule = Family::rule(batch.dtype(i), options, step);
    TORCH_CHECK(rule, "value cannot be converted to type float without overflow");  // as torch says it
    batch.set_rule(i, batch.add_rule(*rule));
  }
  batch.run();
}

void sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, double lr, double momentum,
          double dampening, double weight_decay, bool nesterov, bool maximize, bool is_first_step) {
  update<SgdFamily>(params, grads, {momentum_buffers}, {}, {lr, momentum, dampening, weight_decay, nesterov, maximize},
                    is_first_step);
}

void rmsprop_(at::TensorList params, at::TensorList grads, at::TensorList square_avgs, at::TensorList momentum_buffers,
              at::TensorList grad_avgs, at::TensorList state_steps, double lr, double alpha, double eps,
              double weight_decay, double momentum, bool centered, bool maximize) {
  update<RmsPropFamily>(params, grads, {square_avgs, momentum_buffers, grad_avgs}, state_steps,
                        {lr, alpha, eps, weight_decay, momentum, centered, maximize}, false);
}

void adam_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
           at::TensorList max_exp_avg_sqs, at::TensorList state_steps, double lr, double beta1, double beta2,
           double eps, double weight_decay, bool amsgrad, bool maximize, bool decoupled_weight_decay) {
  update<AdamFamily>(params, grads, {exp_avgs, exp_avg_sqs, max_exp_avg_sqs}, state_steps,
                     {lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay}, false);
}

TORCH_LIBRARY_IMPL(fastopt, CPU, library) { implement_updates(library); }

}  // namespace

void implement_updates(torch::Library& library) {
  library.impl("sgd_", sgd_);
  library.impl("rmsprop_", rmsprop_);
  library.impl("adam_", adam_);
}

}  // namespace fastopt
