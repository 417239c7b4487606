// Tensors of one optimizer step, checked, then updated: in one parallel region on the CPU, in one launch on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "rules/rules.h"
#include "torch/context.h"
#include "torch/memory_overlap.h"
#include "torch/update_cuda.h"

namespace fastopt {

class UpdateBatch {
 public:
  void clear();

  // Takes a parameter, its gradient and states if a kernel can update them; else returns false, and why_not() tells.
  // The rule is given when all tensors are taken: set_rule(index of the tensor, rule). Keeps the gradient, which
  // autograd may replace without the interpreter lock; the others live as long as they are where the caller found them.
  // Raises RuntimeError if the memory of one has been freed.
  bool add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* const* states, int n_states);
  int64_t size() const { return static_cast<int64_t>(places_.size()); }
  DType dtype(int64_t i) const { return slabs_[i].dtype; }
  bool is_cuda(int64_t i) const { return devices_[places_[i]].backend == Backend::kCuda; }
  bool has(Backend backend) const;
  // Whether a CUDA graph is being captured on the current stream of a tensor's device.
  bool is_capturing() const;
  // Has the kernel count this tensor's steps; it must lie on the tensor's device.
  void count_on_device(int64_t i, const at::Tensor& step);
  bool counts_on_device(int64_t i) const { return slabs_[i].step != nullptr; }

  // Whether tensors that would be written share memory with each other or with a gradient.
  bool has_overlap() { return overlap_.is_found(); }

  // Whether a tensor is read or written between two addresses.
  bool uses(const char* begin, const char* end) const { return overlap_.touches(begin, end); }

  // Keeps all tensors and their memory alive until clear(): for a run without the interpreter lock, while which other
  // threads may replace or remove them.
  void hold();

  int32_t add_rule(const RuleValue& rule);
  void set_rule(int64_t i, int32_t rule) { replace(slabs_[i].rule, rule); }

  // Runs the kernels and bumps the version of each tensor written. With a GradScaler's numbers, which are for tensors
  // on GPUs only, gradients are divided by grad_scale, and nothing changes if found_inf is above 0; either may be null.
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

  size_t place_of(c10::Device device, Backend backend);
  void run_cuda(Place& place, int16_t index, const at::Tensor* grad_scale, const at::Tensor* found_inf);

  bool refuse(const char* why) {
    why_not_ = why;
    return false;
  }

  // The last step's, which this one's replace where they differ: what is not written stays in all threads' caches.
  std::vector<Slab> slabs_;
  std::vector<int16_t> places_;  // of this step's slabs_, indices into devices_
  std::vector<Place> devices_;   // all that were ever met
  size_t place_ = 0;             // of the last tensor taken
  std::vector<RuleValue> rules_;
  std::vector<at::Tensor> copies_;  // gradients brought into their parameter's layout
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held_tensors_;
  std::vector<c10::Storage> held_storages_;
  // Writes the parameters and states of slabs_, and step counts on a GPU; reads the gradients.
  MemoryOverlap overlap_;
  int64_t numel_ = 0;
  const char* why_not_ = "";
};

}  // namespace fastopt
