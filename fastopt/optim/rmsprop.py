"""RMSprop, plain, with momentum, centered."""

import torch

from .. import reference
from .optimizer import FusedOptimizer, without_hooks


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop: :class:`torch.optim.RMSprop` in one native call a step.

        grad       = (-grad if maximize else grad) + weight_decay * param
        square_avg = alpha * square_avg + (1 - alpha) * grad^2
        grad_avg   = alpha * grad_avg + (1 - alpha) * grad                        (if centered)
        update     = grad / (sqrt(square_avg - grad_avg^2) + eps)
        buffer     = momentum * buffer + update;  update = buffer                 (if momentum > 0)
        param     -= lr * update

    float64, float32, bfloat16 and float16; 16-bit types compute in float32.

    Args:
        params: tensors, named tensors or dicts that define groups.
        lr: learning rate, number or tensor of one element. Default: 1e-2
        alpha: smoothing constant. Default: 0.99
        eps: added to the denominator, outside the root. Default: 1e-8
        weight_decay: L2 penalty. Default: 0
        momentum: momentum factor. Default: 0
        centered: divide by an estimate of the standard deviation. Default: False
        capturable: keep ``step`` on the parameter's CUDA device, so that steps can be captured into a CUDA graph; the
            kernels read and count it there. An error on the CPU, as in torch. Default: False
        differentiable: take torch's own step. Default: False
        foreach: accepted with torch's meaning; the step is fused in any case.
        maximize: ascend instead of descend. Default: False

    State of a parameter: ``step``, ``square_avg``, ``momentum_buffer`` if momentum > 0, ``grad_avg`` if centered.

    Raises:
        ValueError: as :class:`torch.optim.RMSprop`, for arguments out of range.

    Source: Hinton, Neural networks for machine learning, lecture 6.5, 2012; centered: Graves, arXiv:1308.0850, 2013.
    """

    _plan_name = "RmsPropPlan"
    _torch_step_function = without_hooks(torch.optim.RMSprop.step)
    _torch_init_group = torch.optim.RMSprop._init_group
    _option_names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")

    def _init_lists(self, group):
        params, grads, square_avgs, momentum_buffers, grad_avgs, steps = [], [], [], [], [], []
        self._init_group(group, params, grads, square_avgs, momentum_buffers, grad_avgs, steps)
        return params, grads, square_avgs, momentum_buffers, grad_avgs, steps

    def _reference_step(self, options, *tensors):
        reference.rmsprop_(*tensors, **options)
