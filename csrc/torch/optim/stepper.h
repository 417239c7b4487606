// A step from Python's objects: what is checked before anything changes, what the kernels get, what is kept.
#pragma once

#include <algorithm>  // min
#include <utility>    // move
#include <vector>

#include "torch/optim/new_states.h"
#include "torch/optim/optimizer_reader.h"
#include "torch/optim/step_groups.h"
#include "torch/optim/unsupported_params.h"

namespace fastopt {

// Elements from which the interpreter is let go while kernels run.
constexpr int64_t kMinElementsToReleaseGil = 1 << 16;

// Parameters below which another thread that gathers costs more than it saves.
constexpr int64_t kMinParamsPerThread = 64;
// Most steps before the next try, where one was not for several threads.
constexpr int kMaxStepsApart = 16;

// One thread at a time steps.
class Stepper {
 public:
  Stepper(const Optimizer& optimizer, py::object is_ordinary_class)
      : optimizer_(std::move(is_ordinary_class)), groups_(optimizer), new_states_(optimizer) {}

  // Updates every parameter that has a gradient, or changes nothing and returns false: then the reason is in why_not().
  // reads_scaling: what a GradScaler has left to the optimizer counts.
  bool step(const py::object& optimizer, bool reads_scaling) {
    why_not_ = "";
    try {
      const bool is_done = gather_all(optimizer.ptr(), reads_scaling) && run();
      clear();
      return is_done;
    } catch (...) {
      clear();
      throw;
    }
  }

  // The same for all parameters but some.
  bool step_without(std::vector<py::object> left_alone, const py::object& optimizer, bool reads_scaling) {
    const auto mode = unsupported_.leave_alone(std::move(left_alone));
    return step(optimizer, reads_scaling);
  }

  // The parameters that no kernel takes, each for a reason of its own, if kernels on the CPU can step all others and
  // those share no memory with these; else none. Changes nothing.
  std::vector<py::object> unsupported_params(const py::object& optimizer, bool reads_scaling) {
    const auto mode = unsupported_.search();
    std::vector<py::object> found;
    try {
      const bool is_split = gather_all(optimizer.ptr(), reads_scaling) && !is_scaled_ && batch_.size() > 0 &&
                            !batch_.has(Backend::kCuda) && unsupported_.are_apart(batch_, state_items_);
      if (is_split) found = unsupported_.params();
    } catch (...) {
      clear();
      throw;
    }
    clear();
    return found;
  }

  const char* why_not() const { return why_not_; }

 private:
  struct Entry {
    size_t group = 0;
    StepInput input;
  };

  // A parameter as the last step saw it.
  struct LastSeen {
    size_t state;  // where it was in the state_items
    bool has_gradient = true;
  };

  // A parameter of a step that several threads read.
  struct Listed {
    PyObject* object;
    size_t group;
    int64_t place;  // among those that have a gradient, if it has one
  };

  bool refuse(const char* why) {
    why_not_ = why;
    return false;
  }

  void clear() {
    batch_.clear();
    entries_.clear();
    groups_.clear();
    new_states_.clear();
    unsupported_.clear();
    optimizer_.clear();
  }

  // Checks everything and changes nothing, but that a parameter may get an empty state.
  bool gather_all(PyObject* optimizer, bool reads_scaling) {
    if (has_dispatch_modes()) return refuse("a dispatch mode or a transform is on");
    if (!is_free_of_function_modes()) return refuse("a torch function mode is on");
    if (is_forward_mode_on()) return refuse("forward-mode differentiation is on");
    for (;;) {
      clear();
      if (!optimizer_.read(optimizer, reads_scaling)) return refuse(optimizer_.why_not());
      must_know_ = false;
      is_scaled_ = optimizer_.grad_scale() || optimizer_.found_inf();
      // Options first, for they may run Python code; then tensors, while no other thread can change them.
      if (const char* fault = groups_.read(optimizer_.groups())) return refuse(fault);
      if (!gather(optimizer_.state())) return false;
      if (is_scaled_ && batch_.has(Backend::kCpu)) return refuse("a GradScaler's numbers are for tensors on the CPU");
      if (batch_.has_overlap()) return refuse("tensors share memory");
      if (groups_.have_scalars() && !groups_.is_capturable() && batch_.is_capturing()) {
        return refuse("a CUDA graph is captured, and capturable is not set");
      }
      is_skipped_ = must_know_ && optimizer_.found_inf() && optimizer_.found_inf()->item().toDouble() > 0;
      if (is_skipped_ || !new_states_.lack_dicts()) return true;
      if (unsupported_.is_search() || !new_states_.add_dicts(optimizer_.state())) {
        return refuse("a parameter has no state");
      }
    }
  }

  bool run() {
    if (is_skipped_) return true;
    const at::Tensor* const found_inf = optimizer_.found_inf();
    if (batch_.numel() >= kMinElementsToReleaseGil) {
      batch_.hold();
      py::gil_scoped_release no_gil;
      batch_.run(optimizer_.grad_scale(), found_inf);
    } else {
      batch_.run(optimizer_.grad_scale(), found_inf);
    }
    new_states_.keep();
    return true;
  }

  bool gather(PyObject* state) {
    state_items_.read(state);
    if (may_gather_together() && gather_together()) return true;
    const bool leaves_some = unsupported_.leaves_some();
    size_t n_params = 0;
    return groups_.for_each_param(why_not_, [&](size_t group, PyObject* param) __attribute__((always_inline)) {
      LastSeen& last_seen = last_seen_of(n_params++);
      if (leaves_some && unsupported_.is_left_alone(param)) return true;
      return gather_param(group, param, last_seen) || unsupported_.take_refused(param);
    });
  }

  LastSeen& last_seen_of(size_t i) {
    if (last_seen_.size() <= i) last_seen_.push_back({i});
    return last_seen_[i];
  }

  [[gnu::always_inline]] bool gather_param(size_t group_index, PyObject* object, LastSeen& last_seen) {
    const StepGroup& group = groups_[group_index];
    FoundParam found;
    const char* fault = find_param<false>(object, group, state_items_, last_seen.state, found);
    if (fault) return refuse(fault);
    last_seen.has_gradient = found.tensors.grad != nullptr;
    if (!last_seen.has_gradient) return true;

    const at::Tensor& param = *found.tensors.param;
    const bool is_cuda = backend_of(param) == Backend::kCuda;
    if (group.is_capturable && !is_cuda) return refuse("capturable is set for a parameter on the CPU");
    if (group.device_lr.defined() && (!is_cuda || group.device_lr.device() != param.device())) {
      return refuse("lr is on another device");
    }
    Entry entry{group_index};
    if (found.lacks_some) {
      if (!group.has_first_step_flag && !are_new_states_ordinary()) return refuse("state is not there yet");
      entry.input.is_first = group.has_first_step_flag;
      // A first step that is skipped makes no momentum buffer: whether this one is cannot be left to the kernel.
      must_know_ |= entry.input.is_first && is_scaled_;
      if (found.own_state) {
        new_states_.make(group, found);
      } else {
        // For now the parameter and its gradient are checked only: it gets a dict, and all is gathered again.
        new_states_.note_without_dict(object);
        found.tensors.n_states = found.tensors.n_scalars = 0;
      }
    }
    if (found.tensors.n_scalars > 0) {
      fault = read_scalars(group, is_cuda, is_scaled_, found.tensors, entry.input);
      if (fault) return refuse(fault);
    }
    if (!batch_.add(found.tensors)) {
      unsupported_.note_refused(object);
      return refuse(batch_.why_not());
    }
    entries_.push_back(entry);
    return give_rule(batch_.size() - 1) || refuse("a hyper-parameter is beyond the range of float32");
  }

  // True if this may be a step of many ordinary parameters in CPU memory; the first step is treated as one of few.
  bool may_gather_together() {
    if (last_seen_.size() < 2 * kMinParamsPerThread || torch_threads().count < 2) return false;
    if (n_steps_apart_ > 0) {
      --n_steps_apart_;
      return false;
    }
    if (is_scaled_ || unsupported_.is_search() || unsupported_.leaves_some() || cuda_service().takes_cpu) return false;
    for (const StepGroup& group : groups_.all()) {
      if (group.is_capturable || group.device_lr.defined()) return false;
    }
    return true;
  }

  // Gathers all parameters if many have gradients, some on each thread; or none, if one of them is for gather_param().
  bool gather_together() {
    listed_.clear();
    int64_t n_places = 0;
    const char* fault = nullptr;
    groups_.for_each_param(fault, [&](size_t group, PyObject* param) {
      const LastSeen& last_seen = last_seen_of(listed_.size());
      listed_.push_back({param, group, n_places});
      n_places += last_seen.has_gradient;
      return true;
    });
    cpu::Threads threads = torch_threads();
    threads.count = static_cast<int>(std::min<int64_t>(threads.count, n_places / kMinParamsPerThread));
    if (fault || threads.count < 2) return false;
    entries_.resize(n_places);
    bool is_done = batch_.add_together(
        static_cast<int64_t>(listed_.size()), n_places, 1 + groups_[0].n_kept(), threads,
        [&](int64_t i, auto&& place) __attribute__((always_inline)) { return take(listed_[i], last_seen_[i], place); });
    for (int64_t i = 0; is_done && i < n_places; ++i) is_done = give_rule(i);
    if (is_done) {
      ++kernel_calls().threaded_gather;
      next_steps_apart_ = 1;
      return true;
    }
    n_steps_apart_ = next_steps_apart_;
    next_steps_apart_ = std::min(2 * next_steps_apart_, kMaxStepsApart);
    batch_.clear();
    entries_.clear();
    groups_.forget_rules();
    return false;
  }

  // On any thread: gives place() the tensors of a parameter that is an ordinary one, and returns whether it is.
  template <class Place>
  [[gnu::always_inline]] bool take(const Listed& listed, LastSeen& last_seen, Place&& place) {
    FoundParam found;
    const StepGroup& group = groups_[listed.group];
    if (find_param<true>(listed.object, group, state_items_, last_seen.state, found)) return false;
    const bool has_gradient = found.tensors.grad != nullptr;
    if (has_gradient != last_seen.has_gradient) return false;
    if (!has_gradient) return true;
    if (found.lacks_some) return false;
    Entry entry{listed.group};
    for (int k = 0; k < found.tensors.n_scalars; ++k) {
      if (read_cpu_scalar(*found.tensors.kept[found.tensors.n_states + k], k, entry.input.scalars)) return false;
    }
    entries_[listed.place] = entry;
    return place(found.tensors, listed.place);
  }

  // Gives a tensor the rule of its group and count; false if there is none for its dtype.
  bool give_rule(int64_t i) {
    const int32_t rule = groups_.rule(entries_[i].group, entries_[i].input, batch_.dtype(i), batch_);
    if (rule < 0) return false;
    batch_.set_rule(i, rule);
    return true;
  }

  OptimizerReader optimizer_;
  UpdateBatch batch_;
  StateItems state_items_;
  UnsupportedParams unsupported_;
  std::vector<Entry> entries_;
  StepGroups groups_;
  NewStates new_states_;
  bool is_scaled_ = false;
  bool must_know_ = false;           // before the launch, whether a scaler skips the step
  bool is_skipped_ = false;          // it does
  std::vector<LastSeen> last_seen_;  // of each parameter
  std::vector<Listed> listed_;
  int n_steps_apart_ = 0;  // from now on
  int next_steps_apart_ = 1;
  const char* why_not_ = "";
};

}  // namespace fastopt
