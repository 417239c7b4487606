// Brings what a step will read of its tensors into the caches, where a program's passes have left other things. Each
// element is at the end of a chain of pointers; the chains of several parameters are followed side by side, a link at a
// time, so that their cache misses overlap. Only reads; the interpreter lock is held, and no Python code runs.
#pragma once

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>  // min
#include <array>
#include <cstring>  // memcpy
#include <vector>

#include "torch/ordinary.h"
#include "torch/state_reader.h"

namespace fastopt {

class LookAhead {
 public:
  // Follows the chains of a group's first parameters; then go_on() with each parameter that the step takes, in order,
  // follows those of the next ones. `params`: a list; `guesses`: where their states are in the walk, from `first` on.
  void start(PyObject* params, size_t first, const StateWalk& walk, const std::vector<size_t>& guesses) {
    list_ = params;
    first_ = first;
    walk_ = &walk;
    guesses_ = &guesses;
    taken_ = 0;
    begin(0);
    for (int link = 0; link < kLinks; ++link) follow(link);
  }
  void go_on() {
    const int i = static_cast<int>(taken_++ % kParams);
    if (i % kParamsPerLink != 0) return;
    const int link = i / kParamsPerLink - 1;
    if (link < 0) begin(taken_ - 1 + kParams);
    if (link >= 0 && link < kLinks) follow(link);
  }

 private:
  static constexpr int kParams = 16;  // whose chains are followed together
  static constexpr int kParamsPerLink = 2;
  static constexpr int kLinks = 5;
  static constexpr size_t kLine = 64;
  static constexpr int kMaxStates = 4;              // with the step
  static constexpr size_t kAutogradMetaBytes = 48;  // up to the gradient
  static constexpr size_t kDictKeysBytes = 2 * kLine;
  static constexpr size_t kDataBytes = 4 * kLine;  // of an array; then the processor sees where it leads

  static void fetch(const void* begin, size_t n_bytes) {
    const char* bytes = static_cast<const char*>(begin);
    for (size_t i = 0; i < n_bytes; i += kLine) __builtin_prefetch(bytes + i);
    __builtin_prefetch(bytes + n_bytes - 1);
  }

  void begin(Py_ssize_t begin) {
    n_params_ = n_tensors_ = n_dicts_ = n_states_ = 0;
    const Py_ssize_t end = std::min<Py_ssize_t>(begin + kParams, PyList_GET_SIZE(list_));
    for (Py_ssize_t i = begin; i < end; ++i) {
      fetch(params_[n_params_++] = PyList_GET_ITEM(list_, i), sizeof(THPVariable));
      PyObject* const own_state = first_ + i < guesses_->size() ? walk_->at((*guesses_)[first_ + i]) : nullptr;
      if (own_state) fetch(dicts_[n_dicts_++] = own_state, sizeof(PyDictObject));
    }
  }

  void follow(int link) {
    switch (link) {
      case 0: return fetch_params();
      case 1: return fetch_states();
      case 2: return fetch_gradients();
      case 3: return fetch_storages();
      default: return fetch_data();
    }
  }

  void fetch_impl(c10::TensorImpl* tensor) {
    fetch(tensor, sizeof(c10::TensorImpl));
    tensors_[n_tensors_++] = tensor;
  }

  void fetch_params() {
    for (int i = 0; i < n_params_; ++i) {
      if (THPVariable_CheckExact(params_[i])) fetch_impl(THPVariable_Unpack(params_[i]).unsafeGetTensorImpl());
    }
    n_params_ = n_tensors_;
    for (int i = 0; i < n_dicts_; ++i) {
      if (is_ordinary_dict(dicts_[i])) fetch(reinterpret_cast<PyDictObject*>(dicts_[i])->ma_keys, kDictKeysBytes);
    }
  }

  void fetch_states() {
    for (int i = 0; i < n_params_; ++i) {
      const c10::AutogradMetaInterface* const autograd = tensors_[i]->autograd_meta();
      if (autograd) fetch(autograd, kAutogradMetaBytes);
    }
    for (int i = 0; i < n_dicts_; ++i) {
      if (!is_ordinary_dict(dicts_[i])) continue;
      Py_ssize_t position = 0;
      PyObject *key, *value;
      for (int s = 0; s < kMaxStates && PyDict_Next(dicts_[i], &position, &key, &value); ++s) {
        states_[n_states_++] = value;
        fetch(value, sizeof(THPVariable));
      }
    }
  }

  void fetch_gradients() {
    for (int i = 0; i < n_params_; ++i) {
      if (const c10::TensorImpl* const grad = grad_of(i)) fetch(grad, sizeof(*grad));
    }
    for (int i = 0; i < n_states_; ++i) {
      if (THPVariable_CheckExact(states_[i])) fetch_impl(THPVariable_Unpack(states_[i]).unsafeGetTensorImpl());
    }
  }

  // Read anew for each link: autograd may replace it.
  const c10::TensorImpl* grad_of(int param) const {
    const at::Tensor& grad = tensors_[param]->grad();
    return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
  }

  void fetch_storages() {
    for (int i = 0; i < n_params_; ++i) {
      if (const c10::TensorImpl* const grad = grad_of(i)) fetch_storage(*grad);
    }
    for (int i = 0; i < n_tensors_; ++i) {
      fetch_storage(*tensors_[i]);
      fetch_version(*tensors_[i]);
    }
  }

  static void fetch_storage(const c10::TensorImpl& tensor) {
    const c10::StorageImpl* const storage = tensor.unsafe_storage().unsafeGetStorageImpl();
    if (storage) fetch(storage, sizeof(*storage));
  }

  // A VariableVersion is nothing but a pointer to the count.
  static void fetch_version(const c10::TensorImpl& tensor) {
    const c10::VariableVersion& version = tensor.version_counter();
    const void* count;
    static_assert(sizeof(version) == sizeof(count));
    memcpy(&count, &version, sizeof(count));
    __builtin_prefetch(count, /*is_written=*/1);
  }

  void fetch_data() {
    for (int i = 0; i < n_params_; ++i) {
      if (const c10::TensorImpl* const grad = grad_of(i)) fetch_data_of(*grad);
    }
    for (int i = 0; i < n_tensors_; ++i) fetch_data_of(*tensors_[i]);
  }

  static void fetch_data_of(const c10::TensorImpl& tensor) {
    const c10::StorageImpl* const storage = tensor.unsafe_storage().unsafeGetStorageImpl();
    if (!storage || !storage->device().is_cpu()) return;
    const size_t offset = tensor.storage_offset() * tensor.itemsize();
    const size_t n_bytes = tensor.numel() * tensor.itemsize();
    fetch(static_cast<const char*>(storage->data_ptr().get()) + offset, std::min(n_bytes, kDataBytes));
  }

  PyObject* list_ = nullptr;
  size_t first_ = 0;
  const StateWalk* walk_ = nullptr;
  const std::vector<size_t>* guesses_ = nullptr;
  Py_ssize_t taken_ = 0;
  // Of the parameters whose chains are followed; first the parameters among the tensors.
  std::array<PyObject*, kParams> params_, dicts_;
  std::array<PyObject*, kParams * kMaxStates> states_;
  std::array<c10::TensorImpl*, kParams * (1 + kMaxStates)> tensors_;
  int n_params_ = 0, n_dicts_ = 0, n_states_ = 0, n_tensors_ = 0;
};

}  // namespace fastopt
