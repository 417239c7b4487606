// Tensors of one optimizer step, checked, then updated: in one parallel region on the CPU, in one launch on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <vector>

#include "cpu/parallel.h"
#include "torch/context.h"
#include "torch/optim/memory_overlap.h"
#include "torch/optim/update_cuda.h"
#include "update/tensor_update.h"

namespace fastopt {

// A parameter, its gradient and what its state keeps.
struct ParamTensors {
  const at::Tensor* param;
  const at::Tensor* grad;
  std::array<const at::Tensor*, kMaxKept> kept;  // states like the parameter, then scalars: each one float or double
  int n_states, n_scalars;
  bool has_scalars_on_device;  // on the parameter's; otherwise they are in CPU memory

  int n_kept() const { return n_states + n_scalars; }
  int n_written() const { return 1 + n_kept(); }
};

class UpdateBatch {
 public:
  void clear();

  // Takes a parameter, its gradient and states if a kernel can update them; else returns false; why_not() holds the
  // reason. The rule is given when all tensors are taken: set_rule(index of the tensor, rule). Keeps the gradient,
  // which autograd may replace without the interpreter lock; the others live as long as they are where the caller found
  // them. Raises RuntimeError if the memory of one has been freed.
  bool add(const ParamTensors& tensors);

  // Takes parameters on several threads. `take(i, place)`, for each i in [0, n), on any of them: gives place(tensors,
  // where), with each of [0, n_places) once, and returns what it does; each of the parameters has n_written() tensors
  // that are written, and is an ordinary one in CPU memory. If one is not, returns false; then clear() must follow.
  // After clear().
  template <class F>
  bool add_together(int64_t n, int64_t n_places, int n_written, const cpu::Threads& threads, F&& take) {
    const Places places = make_places(n_places, n_written);
    std::atomic<int64_t> numel{0};
    std::atomic<bool> is_all{true}, is_changed{false};
    cpu::run_tasks(threads, threads.count, [&](int64_t part) {
      int64_t part_numel = 0;
      bool is_taken = true, is_part_changed = false;
      const auto place = [&](const ParamTensors& tensors, int64_t where) __attribute__((always_inline)) {
        if (!fill_at(where, tensors, places, is_part_changed)) return false;
        part_numel += updates_[where].numel;
        return true;
      };
      try {
        const int64_t end = (part + 1) * n / threads.count;
        for (int64_t i = part * n / threads.count; is_taken && i < end; ++i) is_taken = take(i, place);
      } catch (...) {
        is_taken = false;  // taking one after the other will raise it again
      }
      numel += part_numel;
      if (!is_taken) is_all = false;
      if (is_part_changed) is_changed = true;
    });
    numel_ = numel;
    n_threads_ = threads.count;
    overlap_.note_changes(is_changed);
    return is_all;
  }
  int64_t size() const { return static_cast<int64_t>(places_.size()); }
  DType dtype(int64_t i) const { return updates_[i].dtype; }
  bool is_cuda(int64_t i) const { return devices_[places_[i]].backend == Backend::kCuda; }
  bool has_scalars_on_device(int64_t i) const { return updates_[i].has_scalars_on_device; }
  bool has(Backend backend) const;
  // True if a CUDA graph is being captured on the current stream of a tensor's device.
  bool is_capturing() const;
  // True if tensors that would be written share memory with each other or with a gradient.
  bool has_overlap() { return overlap_.is_found(); }

  // True if a tensor is read or written between two addresses.
  bool uses(const char* begin, const char* end) const { return overlap_.touches(begin, end); }

  // Keeps all tensors and their memory alive until clear(): for a run without the interpreter lock, while which other
  // threads may replace or remove them.
  void hold();

  int32_t add_rule(const PackedRule& rule);
  void set_rule(int64_t i, int32_t rule) { replace(updates_[i].rule, rule); }

  // Runs the kernels, advances scalars and bumps the version of each tensor written. With a GradScaler's numbers, which
  // are for tensors on GPUs only, gradients are divided by grad_scale, and nothing changes if found_inf is above 0;
  // either may be null.
  void run(const at::Tensor* grad_scale = nullptr, const at::Tensor* found_inf = nullptr);

  const char* why_not() const { return why_not_; }
  int64_t numel() const { return numel_; }

 private:
  // The devices that the tensors are on; on a GPU with what launches keep from step to step.
  struct Place {
    c10::Device device;
    Backend backend;
    c10::DeleterFnPtr own_deleter;  // of memory that torch's allocator for the device has made
    CudaUpdater updater;
  };

  // Writes what differs only.
  template <class T>
  static void replace(T& last, T value) {
    if (last != value) last = value;
  }

  // How the tensors of a parameter are, if a kernel can update them.
  struct Kind {
    Backend backend;
    DType dtype, state_dtype;
    bool has_grad_same_layout;  // laid out as the parameter
  };

  // Of parameters that are added together.
  struct Places {
    int n_written;  // of each
    MemoryOverlap::Written* written;
    MemoryOverlap::Read* reads;
  };

  static const char* find_fault(const ParamTensors& tensors, Kind& kind);
  void fetch_ahead(const MemoryOverlap::Written* written, int n_written) const;
  bool fill(TensorUpdate& item, const ParamTensors& tensors, const at::Tensor& grad, const Kind& kind,
            MemoryOverlap::Written* written, MemoryOverlap::Read& read) const;
  Places make_places(int64_t n_params, int n_written);
  bool fill_at(int64_t i, const ParamTensors& tensors, const Places& places, bool& is_changed);
  size_t place_of(c10::Device device, Backend backend);
  void note_written();
  void run_cuda(Place& place, int16_t index, const at::Tensor* grad_scale, const at::Tensor* found_inf);

  bool refuse(const char* why) {
    why_not_ = why;
    return false;
  }

  // The last step's, which this one's replace where they differ: what is not written stays in all threads' caches.
  std::vector<TensorUpdate> updates_;
  std::vector<int16_t> places_;  // of this step's updates_, indices into devices_
  std::vector<Place> devices_;   // all that were ever met
  size_t place_ = 0;             // of the last tensor taken
  // Of the memory of counts in CPU memory, wherever their parameters are.
  const c10::DeleterFnPtr cpu_deleter_ = c10::GetAllocator(c10::kCPU)->raw_deleter();
  std::vector<PackedRule> rules_;
  std::vector<at::Tensor> copies_;  // gradients brought into their parameter's layout
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held_tensors_;
  std::vector<c10::Storage> held_storages_;
  // Writes the parameters and states of updates_, and counts of steps; reads the gradients.
  MemoryOverlap overlap_;
  int64_t numel_ = 0;
  int n_threads_ = 1;  // that took the tensors
  const char* why_not_ = "";
};

}  // namespace fastopt
