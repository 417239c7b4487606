// Large fresh tensors without page faults: a gradient as large as the logits costs more in faults than in arithmetic.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastopt {

// An uninitialised CPU tensor of the given strides. From 4 MiB on its memory asks for huge pages, and the block that
// was freed last is kept for the next such tensor of about its size: in a training loop, for the next step's gradient.
at::Tensor empty_large(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// Frees the block that is kept; bytes that were.
size_t release_kept_block();

}  // namespace fastopt
