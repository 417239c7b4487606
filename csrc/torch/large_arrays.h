// Large new tensors in huge pages: with small pages, the page faults of a gradient as large as the logits cost more
// than its arithmetic, and a step waits for the memory of its states.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastopt {

// An uninitialised CPU tensor of the given strides. From 4 MiB on its memory is advised to be huge pages, and the block
// that was freed last is kept for the next such tensor of about its size: in a training loop, the next gradient.
at::Tensor empty_large(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// An uninitialised tensor like a parameter, for its state: in huge pages if it is on the CPU and large enough.
at::Tensor empty_state(const at::Tensor& param);

// The same, filled with zeros.
at::Tensor zero_state(const at::Tensor& param);

// Frees the kept block; returns its size in bytes.
size_t release_kept_block();

}  // namespace fastopt
