// A step from Python's objects: what is checked before anything changes, what the kernels get, what is kept.
#pragma once

#include <algorithm>  // min
#include <utility>    // move
#include <vector>

#include "torch/families.h"
#include "torch/found_param.h"
#include "torch/made_states.h"
#include "torch/odd_params.h"
#include "torch/optimizer_reader.h"
#include "torch/step_groups.h"

namespace fastopt {

// Elements from which the interpreter is let go while kernels run.
constexpr int64_t kMinElementsToReleaseGil = 1 << 16;

// Parameters below which another thread that gathers costs more than it saves.
constexpr int64_t kMinParamsPerThread = 64;
// Most steps before the next try, where one was not for several threads.
constexpr int kMaxStepsApart = 16;

// One thread at a time steps.
template <class Family>
class Stepper {
 public:
  using Options = typename Family::Options;

  explicit Stepper(py::object is_ordinary_class) : optimizer_(std::move(is_ordinary_class)) {}

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
    const auto mode = odd_.leave_alone(std::move(left_alone));
    return step(optimizer, reads_scaling);
  }

  // The parameters that no kernel takes, each for a reason of its own, if kernels on the CPU can step all others and
  // those share no memory with these; else none. Changes nothing.
  std::vector<py::object> odd_params(const py::object& optimizer, bool reads_scaling) {
    const auto mode = odd_.search();
    std::vector<py::object> found;
    try {
      const bool is_split = gather_all(optimizer.ptr(), reads_scaling) && !is_scaled_ && batch_.size() > 0 &&
                            !batch_.has(Backend::kCuda) && odd_.are_apart(batch_, walk_);
      if (is_split) found = odd_.params();
    } catch (...) {
      clear();
      throw;
    }
    clear();
    return found;
  }

  const char* why_not() const { return why_not_; }

 private:
  using Group = typename StepGroups<Family>::Group;

  struct Entry {
    size_t group = 0;
    double count = 0;  // of steps, this one included; 0 if the kernel counts
  };

  // What the last step knew of a parameter.
  struct Guess {
    size_t state;  // where it was in the walk
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
    made_states_.clear();
    odd_.clear();
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
      is_skipped_ = must_know_ && optimizer_.found_inf() && optimizer_.found_inf()->item().toDouble() > 0;
      if (is_skipped_ || !made_states_.lack_dicts()) break;
      if (odd_.is_search() || !made_states_.add_dicts(optimizer_.state())) return refuse("a parameter has no state");
    }
    if (is_scaled_ && batch_.has(Backend::kCpu)) return refuse("a GradScaler's numbers are for tensors on the CPU");
    if (batch_.has_overlap()) return refuse("tensors share memory");
    if (Family::kHasStep && !groups_.is_capturable() && batch_.is_capturing()) {
      return refuse("a CUDA graph is captured, and capturable is not set");
    }
    return true;
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
    if constexpr (Family::kMakesStates) made_states_.keep(Family::kStates[0]);
    return true;
  }

  bool gather(PyObject* state) {
    walk_.read(state);
    if (may_gather_together() && gather_together()) return true;
    const bool leaves_some = odd_.leaves_some();
    size_t n_params = 0;
    return groups_.for_each_param(why_not_, [&](size_t group, PyObject* param) __attribute__((always_inline)) {
      Guess& guess = guess_of(n_params++);
      if (leaves_some && odd_.is_left_alone(param)) return true;
      return gather_param(group, param, guess) || odd_.take_refused(param);
    });
  }

  Guess& guess_of(size_t i) {
    if (guesses_.size() <= i) guesses_.push_back({i});
    return guesses_[i];
  }

  [[gnu::always_inline]] bool gather_param(size_t group_index, PyObject* object, Guess& guess) {
    const Group& group = groups_[group_index];
    FoundParam found;
    const char* fault = find_param<Family, false>(object, group.options, keys_, walk_, guess.state, found);
    if (fault) return refuse(fault);
    guess.has_gradient = found.tensors.grad != nullptr;
    if (!guess.has_gradient) return true;

    const at::Tensor& param = *found.tensors.param;
    const bool is_cuda = backend_of(param) == Backend::kCuda;
    if (group.is_capturable && !is_cuda) return refuse("capturable is set for a parameter on the CPU");
    if (group.device_lr.defined() && (!is_cuda || group.device_lr.device() != param.device())) {
      return refuse("lr is on another device");
    }
    Entry entry{group_index};
    const at::Tensor* step_on_device = nullptr;
    if constexpr (Family::kHasStep) {
      const at::Tensor& step = *found.step;
      // A default device places steps too, whatever the options.
      const bool is_on_device = group.wants_device_steps || !is_plain_cpu(step);
      if (is_cuda && is_on_device && backend_of(step) == Backend::kCuda) {
        if ((fault = fault_of_step(step))) return refuse(fault);
        if (step.device() != param.device()) return refuse("a step is on another device");
        step_on_device = &step;
      } else {
        if (group.is_capturable || is_scaled_) return refuse("a step is not on its parameter's device");
        if ((fault = read_step(step, entry.count))) return refuse(fault);
        found.tensors.step = &step;
      }
    } else {
      const bool is_first = made_states_.make(object, found);
      // A first step that is skipped makes no state: whether this one is cannot be left to the kernel.
      must_know_ |= is_first && is_scaled_;
      entry.count = is_first ? 1 : 2;
    }
    if (!batch_.add(found.tensors)) {
      odd_.note_refused(object);
      return refuse(batch_.why_not());
    }
    if (step_on_device) batch_.count_on_device(batch_.size() - 1, *step_on_device);
    entries_.push_back(entry);
    return give_rule(batch_.size() - 1) || refuse("a hyper-parameter is beyond the range of float32");
  }

  // Whether this may be a step of many ordinary parameters in CPU memory; the first step is taken for one of few.
  bool may_gather_together() {
    if (guesses_.size() < 2 * kMinParamsPerThread || torch_threads().count < 2) return false;
    if (n_steps_apart_ > 0) {
      --n_steps_apart_;
      return false;
    }
    if (is_scaled_ || odd_.is_search() || odd_.leaves_some() || cuda_service().takes_cpu) return false;
    for (const Group& group : groups_.all()) {
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
      const Guess& guess = guess_of(listed_.size());
      listed_.push_back({param, group, n_places});
      n_places += guess.has_gradient;
      return true;
    });
    cpu::Threads threads = torch_threads();
    threads.count = static_cast<int>(std::min<int64_t>(threads.count, n_places / kMinParamsPerThread));
    if (fault || threads.count < 2) return false;
    entries_.resize(n_places);
    bool is_done = batch_.add_together(
        static_cast<int64_t>(listed_.size()), n_places, 1 + n_states_of<Family>(groups_[0].options) + Family::kHasStep,
        threads,
        [&](int64_t i, auto&& place) __attribute__((always_inline)) { return take(listed_[i], guesses_[i], place); });
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
  [[gnu::always_inline]] bool take(const Listed& listed, Guess& guess, Place&& place) {
    FoundParam found;
    const auto& options = groups_[listed.group].options;
    if (find_param<Family, true>(listed.object, options, keys_, walk_, guess.state, found)) return false;
    const bool has_gradient = found.tensors.grad != nullptr;
    if (has_gradient != guess.has_gradient) return false;
    if (!has_gradient) return true;
    for (int s = 0; s < found.tensors.n_states; ++s) {
      if (!found.tensors.states[s]) return false;
    }
    Entry entry{listed.group, 2};
    if constexpr (Family::kHasStep) {
      if (read_step(*found.step, entry.count)) return false;
      found.tensors.step = found.step;
    }
    entries_[listed.place] = entry;
    return place(found.tensors, listed.place);
  }

  // Gives a tensor the rule of its group and count; false if there is none for its dtype.
  bool give_rule(int64_t i) {
    const int32_t rule = groups_.rule(entries_[i].group, entries_[i].count, batch_.dtype(i), batch_);
    if (rule < 0) return false;
    batch_.set_rule(i, rule);
    return true;
  }

  OptimizerReader optimizer_;
  UpdateBatch batch_;
  StateWalk walk_;
  OddParams odd_;
  std::vector<Entry> entries_;
  StepGroups<Family> groups_;
  MadeStates made_states_;
  bool is_scaled_ = false;
  bool must_know_ = false;      // before the launch, whether a scaler skips the step
  bool is_skipped_ = false;     // it does
  std::vector<Guess> guesses_;  // of each parameter
  std::vector<Listed> listed_;
  const StateKeys<Family> keys_;
  int n_steps_apart_ = 0;  // from now on
  int next_steps_apart_ = 1;
  const char* why_not_ = "";
};

}  // namespace fastopt
