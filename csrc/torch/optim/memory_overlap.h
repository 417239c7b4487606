// The memory of a step's tensors, and a check that written ranges overlap neither each other nor the gradients read.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>  // any_of
#include <span>
#include <vector>

#include "torch/context.h"

namespace fastopt {

// Memory of a tensor whose elements lie side by side.
struct Memory {
  char* begin;
  char* end;
  const void* storage;
  bool is_own;  // made by torch's allocator, so that no other storage holds it
};

// `own_deleter`: that of torch's allocator for the tensor's device. Memory that is shared until one of several tensors
// is written (lazy clones) becomes the tensor's own if it is to be written. Raises RuntimeError if the storage does not
// hold all elements.
inline Memory memory_of(const at::Tensor& tensor, int64_t n_bytes, int64_t item_bytes, c10::DeleterFnPtr own_deleter,
                        bool is_written, const char* name) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const int64_t offset = impl->storage_offset() * item_bytes;
  if (offset + n_bytes > static_cast<int64_t>(storage->nbytes()) && n_bytes > 0) check_backed(tensor, name);
  const bool is_own = storage->data_ptr().get_deleter() == own_deleter;
  char* data = nullptr;
  if (is_own) {
    data = static_cast<char*>(storage->data_ptr().get()) + offset;
  } else {
    data = static_cast<char*>(is_written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()));
  }
  return {data, data + n_bytes, storage, is_own};
}

// Compares addresses, for two storages may be views of the same memory (torch.from_numpy twice, DLPack). Most steps
// write the same memory as the step before, so what was found is kept until an address, a size or a storage differs.
class MemoryOverlap {
 public:
  struct Written {
    Memory memory;
    c10::TensorImpl* tensor;

    // True if they differ from the last step's.
    bool replace(const Memory& now, c10::TensorImpl* its_tensor) {
      tensor = its_tensor;
      [[maybe_unused]] const auto version = tensor->version_counter().current_version();  // fetched: it will be written
      if (memory.begin == now.begin && memory.end == now.end && memory.storage == now.storage &&
          memory.is_own == now.is_own) {
        return false;
      }
      memory = now;
      return true;
    }
  };
  struct Read {
    Memory memory;
    c10::TensorImpl* tensor;
    c10::Storage held;  // the memory
  };

  void clear() {
    next_ = written_.data();
    reads_.clear();
  }
  void add_read(const Memory& memory, c10::TensorImpl* tensor) {
    reads_.push_back({memory, tensor, tensor->unsafe_storage()});
  }

  // Room for more, to be filled; then note_changes() must be called with whether any of them differs from the last
  // step's.
  Written* written_room(size_t n) {
    while (static_cast<size_t>(end_ - next_) < n) grow();
    next_ += n;
    return next_ - n;
  }
  Read* read_room(size_t n) {
    reads_.resize(reads_.size() + n);
    return reads_.data() + reads_.size() - n;
  }
  void note_changes(bool is_any) {
    if (is_any) is_checked_ = false;
  }

  std::span<const Written> written() const { return {written_.data(), static_cast<size_t>(next_ - written_.data())}; }
  const std::vector<Read>& reads() const { return reads_; }
  const Written* end_of_room() const { return end_; }
  bool is_found();
  bool touches(const char* begin, const char* end) const {
    const auto is_in = [&](const auto& use) { return use.memory.begin < end && begin < use.memory.end; };
    return std::any_of(written().begin(), written().end(), is_in) || std::any_of(reads_.begin(), reads_.end(), is_in);
  }

 private:
  void grow();
  void check_written();
  bool is_written(const Memory& read) const;

  std::vector<Written> written_;  // those of the last step, which this step's replace up to next_
  Written* next_ = nullptr;
  Written* end_ = nullptr;
  std::vector<Read> reads_;

  // The last check of the written ranges, and its result.
  bool is_checked_ = false;
  size_t n_checked_ = 0;
  bool has_overlap_ = false;
  bool is_all_own_ = true;
  std::vector<Memory> sorted_;         // by address
  std::vector<const void*> storages_;  // open addressing, less than half full
};

}  // namespace fastopt
