// Large fresh tensors in huge pages: a gradient as large as the logits costs more in faults of small ones than in
// arithmetic, and a step waits for the memory of its states.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastopt {

// An uninitialised CPU tensor of the given strides. From 4 MiB on its memory asks for huge pages, and the block that
// was freed last is kept for the next such tensor of about its size: in a training loop, for the next step's gradient.
at::Tensor empty_large(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// An uninitialised tensor like a parameter, to be its state: in huge pages if it is on the CPU and fills some of 2 MiB.
at::Tensor empty_state(const at::Tensor& param);

// The same of zeros.
at::Tensor zero_state(const at::Tensor& param);

// Frees the block that is kept; bytes that were.
size_t release_kept_block();

}  // namespace fastopt
