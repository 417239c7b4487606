"""RMSprop, plain, with momentum, centered."""

import torch

from .operator import decayed, operator
from .optimizer import FusedOptimizer


@operator(
    "rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] momentum_buffers, "
    "Tensor(d!)[] grad_avgs, Tensor(e!)[] state_steps, *, float lr, float alpha=0.99, float eps=1e-08, "
    "float weight_decay=0, float momentum=0, bool centered=False, bool maximize=False) -> ()"
)
def rmsprop_(param, grad, square_avg, buffer, grad_avg, step, o):
    step.add_(1)
    grad = decayed(param, grad, o.weight_decay, o.maximize)
    square_avg.mul_(o.alpha).addcmul_(grad, grad, value=1 - o.alpha)
    variance = square_avg
    if o.centered:
        grad_avg.lerp_(grad, 1 - o.alpha)
        variance = square_avg.addcmul(grad_avg, grad_avg, value=-1)
        variance = torch.where(variance < 0, 0.0, variance)  # not negative but for rounding; NaN stays
    denominator = variance.sqrt().add_(o.eps)
    if o.momentum > 0:
        buffer.mul_(o.momentum).addcdiv_(grad, denominator)
        param.add_(buffer, alpha=-o.lr)
    else:
        param.addcdiv_(grad, denominator, value=-o.lr)


class RMSprop(FusedOptimizer, torch.optim.RMSprop, operator=rmsprop_):
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
