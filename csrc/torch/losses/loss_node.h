// The autograd node of a fused loss: everything about the backward that does not depend on the loss.
//
// It saves the inputs, with their versions, and the gradients that the forward computed; it releases them and raises as
// torch's own nodes do; it serves compiled autograd, and finds second derivatives by differentiating a composite.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>  // shared_ptr
#include <mutex>
#include <type_traits>  // is_same_v

namespace fastopt {

// Inputs are numbered as they are saved: those that have derivatives come first, and output i of the node is the
// gradient of input i. A loss derives from this class and defines composite() and backward().
//
// The mutex is held only while saved tensors are unpacked: computing with them may run hooks that run this backward.
class LossNode : public torch::autograd::Node {
 public:
  using variable_list = torch::autograd::variable_list;

  // Saves an input that has derivatives, and the gradient that the forward computed for it, of the input's shape; or
  // undefined, if the backward computes it.
  void save_differentiable(const at::Tensor& input, const at::Tensor& gradient);
  // Saves an input without derivatives, which may be undefined.
  void save_constant(const at::Tensor& input);
  // True if the forward ran on ordinary tensors, not on traced ones.
  void set_plain(bool is_plain) { is_plain_ = is_plain; }

  variable_list apply(variable_list&& grad_outputs) final;
  void will_release_variables() override { is_last_backward_ = true; }
  void release_variables() override;

  // Compiled autograd: the node's contents, and its backward while a program is traced. A loss adds its options.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  variable_list apply_with_saved(const variable_list& grad_outputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override;

 protected:
  using Inputs = c10::SmallVector<at::Tensor, 4>;

  // How a backward is run.
  struct Mode {
    bool is_traced;    // the tensors may have no memory, or must be seen by the dispatcher
    bool has_tangent;  // grad_output has a forward-mode derivative, which the result needs, too
    bool is_plain() const { return !is_traced && !has_tangent; }
  };

  // The loss in torch's differentiable operators.
  virtual at::Tensor composite(const Inputs& inputs) const = 0;
  // The gradients of the inputs that have derivatives, for a defined grad_output; undefined where
  // task_should_compute_output() is false.
  virtual variable_list backward(const at::Tensor& grad_output, Mode mode) = 0;

  // The saved inputs. Raises torch's error if they have been released or changed in place.
  Inputs unpacked_inputs();
  at::Tensor unpacked_input(size_t i);
  // The saved gradient of input i; undefined if an earlier call has moved it out. may_reuse: true if the caller may
  // overwrite it or return it. It stays true in the last backward, if no other reference exists, as one of a hook for
  // saved tensors may; then the gradient is moved out, so that a backward that is repeated after a later hook has
  // failed does not find it changed.
  at::Tensor saved_gradient(size_t i, bool& may_reuse);
  // The gradient of input i times a factor that broadcasts against it, in the input's dtype.
  at::Tensor scaled(size_t i, const at::Tensor& gradient, const at::Tensor& factor, Mode mode, bool may_reuse) const;
  // The gradients that the composite's own backward gives, in torch's operators. Not while compiled autograd traces.
  variable_list composite_gradients(const at::Tensor& grad_output);
  at::ScalarType dtype(size_t i) const { return gradients_[i].dtype; }

 private:
  struct SavedGradient {
    torch::autograd::SavedVariable gradient;
    at::ScalarType dtype;  // of the input
    bool is_moved_out = false;
  };

  // Locks the mutex while something saved is read. Raises if it has been released.
  std::unique_lock<std::mutex> lock_saved();
  variable_list differentiate_composite(Inputs inputs, const at::Tensor& grad_output, bool create_graph);
  template <class F>
  void for_each_saved(F&& f);

  c10::SmallVector<torch::autograd::SavedVariable, 4> inputs_;
  c10::SmallVector<SavedGradient, 2> gradients_;  // of the first inputs
  bool is_plain_ = true;
  bool is_last_backward_ = false;  // the coming apply is the last that needs saved tensors
  bool is_released_ = false;
};

// Nodes are held by std::shared_ptr or by intrusive_ptr, depending on torch's version.
template <class Loss>
auto make_loss_node() {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Loss>(new Loss(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Loss>();
  }
}

}  // namespace fastopt
