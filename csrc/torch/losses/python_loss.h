// A loss as Python's functions return it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>  // move

namespace fastopt {

// The loss that run() computes, as a new object. Of a large input it is computed without the GIL.
template <class F>
PyObject* loss_object(const at::Tensor& input, F&& run) {
  constexpr int64_t kLarge = 1 << 15;  // elements
  if (input.numel() < kLarge) return THPVariable_Wrap(run());
  at::Tensor loss;
  {
    pybind11::gil_scoped_release no_gil;
    loss = run();
  }
  return THPVariable_Wrap(std::move(loss));
}

}  // namespace fastopt
