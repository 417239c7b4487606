// Large fresh tensors on huge pages: a gradient as large as the logits costs more in page faults than in arithmetic.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastopt {

// An uninitialised CPU tensor of the given strides; from 4 MiB on, its memory asks for huge pages.
at::Tensor empty_on_huge_pages(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

}  // namespace fastopt
