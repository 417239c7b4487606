#include "torch/optim/step_plan.h"

#include <pybind11/stl.h>  // vector

#include <memory>  // unique_ptr
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>  // move
#include <vector>

#include "torch/optim/stepper.h"

namespace fastopt {
namespace {

// The native part of a Python optimizer.
class StepPlan {
 public:
  // `op`: the optimizer's operator.
  StepPlan(const std::string& op, py::object is_ordinary_class)
      : optimizer_(*find_optimizer(op)),
        is_ordinary_class_(std::move(is_ordinary_class)),
        stepper_(new Stepper(optimizer_, is_ordinary_class_)) {}

  bool step(const py::object& optimizer, bool reads_scaling) {
    if (is_underway()) {
      why_not_ = "a step calls the same optimizer's step";
      return false;
    }
    const Lock lock(*this);
    const bool is_done = stepper_->step(optimizer, reads_scaling);
    why_not_ = stepper_->why_not();
    return is_done;
  }

  bool step_without(std::vector<py::object> left_alone, const py::object& optimizer, bool reads_scaling) {
    if (is_underway()) return false;
    const Lock lock(*this);
    return stepper_->step_without(std::move(left_alone), optimizer, reads_scaling);
  }

  std::vector<py::object> unsupported_params(const py::object& optimizer, bool reads_scaling) {
    if (is_underway()) return {};
    const Lock lock(*this);
    return stepper_->unsupported_params(optimizer, reads_scaling);
  }

  const char* why_not() const { return why_not_; }

 private:
  // True if this thread is in a step of the plan.
  bool is_underway() {
    if (n_forks_ != fork_count()) start_in_child();
    return owner_ == std::this_thread::get_id();
  }

  // A second thread waits without the interpreter lock, which the first needs to finish. The owner is read and written
  // with it.
  class Lock {
   public:
    explicit Lock(StepPlan& plan) : plan_(plan), lock_(plan.mutex_, std::try_to_lock) {
      if (!lock_) {
        py::gil_scoped_release no_gil;
        lock_.lock();
      }
      plan.owner_ = std::this_thread::get_id();
    }
    ~Lock() { plan_.owner_ = std::thread::id(); }

   private:
    StepPlan& plan_;
    std::unique_lock<std::mutex> lock_;
  };

  // In a forked child the thread that stepped does not exist: nobody unlocks its mutex, and what it held is in whatever
  // state it was, so that it is left alone.
  void start_in_child() {
    n_forks_ = fork_count();
    new (&mutex_) std::mutex;
    if (owner_ == std::thread::id()) return;
    owner_ = std::thread::id();
    [[maybe_unused]] const auto* left = stepper_.release();
    stepper_.reset(new Stepper(optimizer_, is_ordinary_class_));
  }

  const Optimizer& optimizer_;
  const py::object is_ordinary_class_;
  std::unique_ptr<Stepper> stepper_;
  std::mutex mutex_;
  std::thread::id owner_;
  int64_t n_forks_ = fork_count();
  const char* why_not_ = "";
};

}  // namespace

void bind_step_plan(py::module_& module) {
  prepare_ordinary();
  py::class_<StepPlan>(module, "StepPlan")
      .def(py::init<const std::string&, py::object>(), py::arg("op"), py::arg("is_ordinary_class"))
      .def("step", &StepPlan::step, py::arg("optimizer"), py::arg("reads_scaling") = true)
      .def("step_without", &StepPlan::step_without)
      .def("unsupported_params", &StepPlan::unsupported_params)
      .def("why_not", &StepPlan::why_not);
}

}  // namespace fastopt
